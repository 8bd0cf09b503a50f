"""Settings of every test: eight CPU devices, exact matmuls, no silent promotion of ranks or dtypes,
types that are checked, quick compilation.

AVIT_TEST_PLATFORM=cuda (or tpu) runs the tests that need one device on an accelerator. Set `-n 0`
too, because each process reserves the memory of the device.
"""

import logging
import os
from collections.abc import Iterator

import jax
import jaxtyping
import pytest

# Read when the devices are first asked for.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
if jax.__version_info__ < (
    0,
    11,
):  # the default emitters take three times as long to compile; newer versions have no others
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

_PLATFORM = os.environ.get("AVIT_TEST_PLATFORM", "cpu")
jax.config.update("jax_platforms", _PLATFORM)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Checks the annotated shapes and dtypes of arguments and results. It has no effect on modules that
# are already imported. An int may stand for a float.
jaxtyping.install_import_hook(
    ["avit_jax.core", "avit_jax.kernels", "avit_jax.models"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)
# Most of the time of the tests is compilation. All processes share compiled programs, also with
# later runs.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "cache"):  # not with -p no:cacheprovider
        jax.config.update(
            "jax_compilation_cache_dir", str(config.cache.mkdir(f"xla-{jax.__version__}"))
        )


@pytest.fixture(autouse=True)
def _compile_quickly(request: pytest.FixtureRequest) -> None:
    """Compiles with few optimizations, except in comparisons with the released implementation."""
    quickly = _PLATFORM == "cpu" and "golden" not in request.module.__name__
    jax.config.update("jax_disable_most_optimizations", quickly)


@pytest.fixture(autouse=True)
def _restore_log() -> Iterator[None]:
    """What a command line sets on the package's logger must not reach the next test."""
    logger = logging.getLogger("avit_jax")
    logger.propagate = True
    handlers, level = [*logger.handlers], logger.level
    yield
    logger.handlers, logger.propagate = handlers, True
    logger.setLevel(level)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Frees the compiled programs after each file: a process may have at most 65,530 memory maps."""
    yield
    jax.clear_caches()
