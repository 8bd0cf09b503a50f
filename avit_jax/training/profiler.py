"""Records a trace of some steps with JAX's profiler."""

import logging

import jax
from etils import epath

_logger = logging.getLogger(__name__)


class Profiler:
    """Records a trace of some steps.

    Args:
      steps: first and last step; (0, 0): none.
      start_step: number of steps done before. If it is `steps[0]` or more, the profiler records
        nothing.
      folder: folder to write the trace to.
    """

    def __init__(self, steps: tuple[int, int], start_step: int, folder: epath.Path) -> None:
        self._steps = steps if start_step < steps[0] else (0, 0)
        self._folder, self._is_recording = folder, False

    def start(self, step: int) -> None:
        """Starts recording if the step is the first one."""
        if step == self._steps[0]:
            jax.profiler.start_trace(str(self._folder))
            self._is_recording = True

    def stop(self, step: int, values: dict[str, jax.Array]) -> None:
        """Stops recording if the step is the last one; waits until its metrics are ready."""
        if step == self._steps[1]:
            jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        """Stops recording and writes the trace, also if the run ends before the last step."""
        if self._is_recording:
            self._is_recording = False
            jax.profiler.stop_trace()
            _logger.info("wrote the trace from step %d on into %s", self._steps[0], self._folder)
