"""What the study trains: the parent, and each row of its table as what differs from the shared
recipe.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from avit_jax import config as config_lib
from avit_jax.models import vit
from avit_jax.training import build
from configs import cifar10
from experiments.rivals import (
    dropping,
    dynamic_vit,
    early_exit,
    ends,
    evit,
    layer_act,
    tome,
    unrolled,
)

_WITH_PARENT = ("init", "distill.teacher")
HELD_OUT = "train[48000:]"  # neither trained on nor reported: what gates are calibrated on
_SHARED = {
    "data.train_split": "train[:48000]",
    "augment.magnitude": 0.0,
    "train.eval_every": 0,
    "train.save_every": 100,
}
_PARENT = {
    "halting.enabled": False,
    "optimizer.learning_rate": 2e-3,
    "train.steps": 5000,
    "train.save_every": 200,
}
_CHILD = {
    "optimizer.learning_rate": 5e-4,
    "optimizer.ema_decay": 0.99,
    "train.steps": 1000,
    "distill.targets": "soft",
    "distill.temperature": 2.0,
}
# Prior and weight that configs/deit_*.py may have, see recipes.py; "hybrid" is what they had.
RECIPES = {
    "paper": {"loss.prior_mode": "paper", "loss.prior_weight": 0.1},
    "hybrid": {"loss.prior_mode": "paper", "loss.prior_weight": 1e-3},
    "released": {"loss.prior_mode": "official", "loss.prior_weight": 1e-3},
}
# Four times as wide: its layers have 14 times the work beside the same fixed costs. It learns at
# half the rates.
_WIDE = {"model.width": 384, "model.num_heads": 12}
# Static networks with slightly more MACs than the methods have at these budgets, in two shapes.
_SMALL = {
    "narrow_0.4": {"model.width": 60},
    "narrow_0.6": {"model.width": 75},
    "narrow_0.8": {"model.width": 87},
    "shallow_0.6": {"model.width": 93, "model.depth": 4},
}
PARENTS = ("parent", *(f"{name}_parent" for name in _SMALL))


@dataclasses.dataclass(frozen=True)
class Arm:
    """One row of the table.

    Attributes:
      overrides: of the shared recipe.
      rival: makes the network from the attributes of the configuration's; None: that one itself.
      seeds: how many runs it has.
      starts: "parent", its weights; "own", those of a network of its shape, trained as the parent
        was; or "scratch".
      taught: whether the parent's logits are its teacher.
    """

    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    rival: Callable[..., vit.AViT] | None = None
    seeds: int = 3
    starts: str = "parent"
    taught: bool = True


_BUDGET_ALONE = {"loss.ponder_weight": 0.0, "loss.prior_weight": 0.0}
# What we add to the paper's recipe: redundant tokens halt first and are merged, and the budget
# alone says how many.
_MERGING = {
    "halting.merge": True,
    "halting.redundancy": 50.0,
    "halting.gamma": 1.0,
    "halting.beta": -42.0,
} | _BUDGET_ALONE
_PRIOR_AND_PONDER = {"loss.ponder_weight": 5e-4, "loss.prior_weight": 0.1}  # as in the recipe


_STATIC = {"halting.enabled": False}


def _static(**options: Any) -> Arm:
    return Arm(_STATIC, **options)


def _halting(budget: float, **overrides: Any) -> dict[str, Any]:
    return {"budget": budget, "train.adaptive": True} | {
        name.replace("__", "."): value for name, value in overrides.items()
    }


def _arms() -> dict[str, Arm]:
    of = functools.partial
    arms = {"static": _static()}
    arms |= {f"avit_{budget}": Arm(_halting(budget)) for budget in (0.4, 0.5, 0.6, 0.8)}
    arms |= {
        f"avit_merging_{budget}": Arm(_halting(budget) | _MERGING)
        for budget in (0.4, 0.5, 0.6, 0.8)
    }
    arms |= {
        f"layer_act_{budget}": Arm(
            _halting(budget, eval__adaptive=False, train__adaptive=False), of(layer_act.LayerACT)
        )
        for budget in (0.4, 0.6, 0.8)
    }
    # Shares that bring the network to about 0.4, 0.6 and 0.8 of the static MACs.
    for name, rival, rates in (
        ("dynamic_vit", dynamic_vit.DynamicViT, (0.4, 0.65, 0.82)),
        ("evit", evit.EViT, (0.29, 0.61, 0.815)),
        ("random", of(dropping.Dropping, choice="random"), (0.47, 0.705, 0.86)),
        ("uniform", of(dropping.Dropping, choice="uniform"), (0.47, 0.705, 0.86)),
    ):
        arms |= {
            f"{name}_{budget}": _static(rival=of(rival, keep_rate=rate))
            for budget, rate in zip((0.4, 0.6, 0.8), rates, strict=True)
        }
    arms |= {
        f"tome_{budget}": _static(rival=of(tome.ToMe, merges=merges))
        for budget, merges in ((0.4, 15), (0.6, 8), (0.8, 4))
    }
    arms["tome_after_mlp"] = _static(
        rival=of(tome.ToMe, merges=19, after_mlp=True)
    )  # 0.41, as avit_merging_0.4
    # Without ends, it has a MACs ratio of 0.443.
    arms["ends"] = _static(rival=of(ends.Ends, merges=13))
    arms["early_exit"] = _static(rival=of(early_exit.EarlyExit))
    arms |= {name: Arm(_STATIC | shape, starts="own") for name, shape in _SMALL.items()}
    return arms | _ablations()


def _ablations() -> dict[str, Arm]:
    """Each with one seed, beside avit_0.6, but two without a teacher; those without a budget cost
    what they cost.
    """
    one = {"seeds": 1}
    free = {"budget": 0.0}
    arms = {
        "static_not_distilled": _static(taught=False),
        "paper_recipe": Arm(free, taught=False, **one),
        "official_prior": Arm(
            free | {"loss.prior_mode": "official", "loss.prior_weight": 1e-3}, **one
        ),
        "no_budget": Arm(free, **one),
        "target_depth_2.5": Arm(free | {"loss.target_depth": 2.5}, **one),
        "target_depth_5": Arm(free | {"loss.target_depth": 5.0}, **one),
        "from_scratch": Arm(_halting(0.6), starts="scratch", **one),
        "not_distilled": Arm(_halting(0.6), taught=False, **one),
        "no_prior": Arm(_halting(0.6, loss__prior_weight=0.0), **one),
        "no_ponder": Arm(_halting(0.6, loss__ponder_weight=0.0), **one),
        "no_prior_no_ponder": Arm(_halting(0.6) | _BUDGET_ALONE, **one),
        "gamma_learnt": Arm(_halting(0.6, halting__learnable=True), **one),
        "gamma_2": Arm(_halting(0.6, halting__gamma=2.0, halting__beta=-4.0), **one),
        "gamma_10": Arm(_halting(0.6, halting__gamma=10.0, halting__beta=-30.0), **one),
        "last_channel": Arm(_halting(0.6, halting__channel=-1), **one),
        "middle_channel": Arm(_halting(0.6, halting__channel=48), **one),
        "merging_from_scratch": Arm(_halting(0.6) | _MERGING, starts="scratch", **one),
        "merging_not_distilled": Arm(_halting(0.6) | _MERGING, taught=False),
        "merging_with_prior_and_ponder": Arm(_halting(0.6) | _MERGING | _PRIOR_AND_PONDER, **one),
        "merging_by_the_papers_gate": Arm(_halting(0.6, halting__merge=True), **one),
        "merging_by_the_papers_gate_alone": Arm(
            _halting(0.6, halting__merge=True) | _BUDGET_ALONE, **one
        ),
        "merging_redundancy_20": Arm(
            _halting(0.6) | _MERGING | {"halting.redundancy": 20.0, "halting.beta": -17.0}, **one
        ),
        "merging_redundancy_100": Arm(
            _halting(0.6) | _MERGING | {"halting.redundancy": 100.0, "halting.beta": -84.0}, **one
        ),
        "merging_gamma_0": Arm(
            _halting(0.6) | _MERGING | {"halting.gamma": 0.0}, **one
        ),  # by redundancy alone
        "merging_gamma_5": Arm(_halting(0.6) | _MERGING | {"halting.gamma": 5.0}, **one),
        "mixup": Arm(_halting(0.6, augment__mixup=0.8, augment__cutmix=1.0), **one),
    }
    return arms


ARMS = _arms()


def config(name: str, seed: int, *, data_dir: str, parent: str, wide: bool = False) -> ConfigDict:
    """The configuration of one run.

    Args:
      name: of the arm, or one of PARENTS.
      seed: of the run.
      data_dir: folder of the prepared data set.
      parent: weight file of the parent; those of the smaller ones are beside it.
      wide: the network of 384 channels, in place of 96.
    """
    config = cifar10.get_config()
    overrides: dict[str, Any] = _SHARED | {"data.dir": data_dir, "seed": seed}
    if name in PARENTS:
        overrides |= _PARENT | _SMALL.get(name.removesuffix("_parent"), {})
    else:
        arm = ARMS[name]
        overrides |= _CHILD | arm.overrides
        overrides |= {"init": parent} if arm.starts == "parent" else {}
        if arm.starts == "own":
            overrides["init"] = str(pathlib.Path(parent).with_name(f"{name}_parent.safetensors"))
        overrides |= {"distill.teacher": parent} if arm.taught else {}
    if wide:
        overrides |= _WIDE | {"optimizer.learning_rate": overrides["optimizer.learning_rate"] / 2}
    config.update_from_flattened_dict(overrides)
    return config


def changes(name: str) -> tuple[str, str]:
    """Which row an ablation belongs to, and what it changes of that one, as options."""
    arm = ARMS[name]
    twin = "avit_0.6" if arm.overrides.get("halting.enabled", True) else "static"
    twin = "avit_merging_0.6" if "halting.redundancy" in arm.overrides else twin
    here, there = (
        config_lib.flat(config(row, 0, data_dir="", parent="parent")) for row in (name, twin)
    )
    options = [
        f"{key}={value}"
        for key, value in here.items()
        if value != there[key] and key not in _WITH_PARENT
    ]
    options += ["random weights"] * (arm.starts != "parent") + ["no teacher"] * (not arm.taught)
    if arm.rival is not None:
        made = functools.partial(arm.rival)
        options += [made.func.__name__, *(f"{key}={value}" for key, value in made.keywords.items())]
    return twin, ", ".join(options)


def network(name: str, config: ConfigDict) -> vit.AViT:
    """The model of one run."""
    model = build.model(config)
    if name in PARENTS or ARMS[name].rival is None:
        return model
    return ARMS[name].rival(**unrolled.attributes(model))
