"""Which prior and weight the ImageNet recipes should have: the paper's, the released code's, or the
paper's prior, weakly.

python -m experiments.pareto.recipes --data_dir=...

A short fine-tuning of the study's parent without budget and teacher, for each candidate in --runs;
a run that was stopped goes on. Images that are held back from training choose. Writes recipes.json.
"""

import json
import logging

from absl import app, flags
from absl import logging as absl_logging

from avit_jax.training import loop, progress
from avit_jax.utils import errors
from experiments import results, timing
from experiments.pareto import arms

_DATA_DIR = flags.DEFINE_string("data_dir", None, "folder of the prepared data set", required=True)
_RUNS = flags.DEFINE_string("runs", "runs/recipes", "folder of the runs")
_OUT = flags.DEFINE_string("out", "experiments/pareto/recipes.json", "file to write")
_PARENT = "experiments/pareto/parent.safetensors"
_SHORT = {"train.steps": 250, "train.batch_size": 32, "train.save_every": 50, "eval.pictures": 1}
_SHARED = _SHORT | {
    "data.eval_split": arms.HELD_OUT,
    "halting.gamma": 10.0,  # the gate of the released A-ViT-T, as in configs/deit_tiny.py
    "halting.beta": -30.0,
    "loss.target_depth": 4.0,  # of 6 layers, as 8 of the 12 there
}


def main(_: list[str]) -> None:
    """Trains each candidate, and adds its row."""
    absl_logging.set_verbosity(absl_logging.FATAL)  # what Orbax has to tell
    progress.to_console(logging.INFO)
    for name, loss in arms.RECIPES.items():
        config = arms.config("paper_recipe", 0, data_dir=_DATA_DIR.value, parent=_PARENT)
        config.update_from_flattened_dict(_SHARED | loss)
        workdir = f"{_RUNS.value}/{name}"
        loop.train(config, workdir)
        row = results.load(f"{workdir}/summary.json")
        if not row:  # a signal has stopped it
            return
        results.add(_OUT.value, name, timing.environment() | _SHARED | loss | row)
        print(name, json.dumps(row), flush=True)


if __name__ == "__main__":
    app.run(errors.exit_on_user_error(main))
