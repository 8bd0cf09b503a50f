"""Settings of every test: eight CPU devices, exact matmuls, no silent rank promotion, quick compilation."""

import os
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling is nearly all that the tests do: optimise less, and compile equal programs once a session.
jax.config.update("jax_disable_most_optimizations", True)
_cache = tempfile.TemporaryDirectory()
jax.config.update("jax_compilation_cache_dir", _cache.name)
