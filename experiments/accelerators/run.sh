#!/usr/bin/env bash
# Measures what one accelerator does, in at most ten minutes, and prints tables. A JSON line a row goes into the folder $OUT:
#
#   OUT=runs/accelerators experiments/accelerators/run.sh           # one GPU
#   OUT=runs/rehearsal experiments/accelerators/run.sh --tiny       # a rehearsal on CPU: everything is small
#
# PYTHON names the interpreter. AVIT_DATA_DIR takes ImageNet's images in place of digits. Each section is a process of its own
# with a time limit, the most valuable one first; if one fails, the next ones run all the same.
set -u
cd "$(dirname "$0")/../.." || exit 1
[ -n "${OUT:-}" ] || { echo "error: name the folder for the rows, for example OUT=runs/accelerators $0" >&2; exit 2; }
mkdir -p "$OUT" || exit 2
python=${PYTHON:-python3}
export XLA_PYTHON_CLIENT_MEM_FRACTION=.5 PYTHONUNBUFFERED=1 # PyTorch has the other half
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/runs/compiled} # a second run starts at once
slower=1
if [ "${1:-}" = --tiny ]; then
  export JAX_PLATFORMS=cpu
  slower=10 # there the cores compile, and others may use them
fi

usable() { # whether the packages are there, and JAX sees the GPU if the machine has one
  "$1" -c 'import shutil, absl, etils.epath, flax, jax, optax, PIL, sklearn
assert jax.default_backend() != "cpu" or jax.config.jax_platforms == "cpu" or not shutil.which("nvidia-smi")' 2>>"$OUT/install.log"
}

if ! usable "$python"; then
  "$python" -m venv --system-site-packages runs/venv >>"$OUT/install.log" 2>&1 &&
    timeout 240 runs/venv/bin/python -m pip install -q '.[cuda]' >>"$OUT/install.log" 2>&1 && usable runs/venv/bin/python ||
    { echo "error: packages are missing, and pip cannot install '.[cuda]': see $OUT/install.log" >&2; exit 1; }
  python=runs/venv/bin/python
fi

failed=0
section() { # name, seconds
  local limit=$(($2 * slower)) status
  timeout -k 5 "$limit" "$python" -m experiments.accelerators.section --section="$1" --out="$OUT" "${@:3}"
  status=$?
  if [ $status -ne 0 ]; then
    failed=1
    local error="status $status"
    [ $status -ne 124 ] || error="stopped after $limit seconds"
    echo "{\"section\": \"$1\", \"error\": \"$error\"}" | tee -a "$OUT/$1.jsonl"
  fi
}
section machine 25 "$@"
section static 140 "$@"
section removal 170 "$@"
section removal_old_flags 90 "$@"
section equality 70 "$@"
section switch 25 "$@"
section kernels 60 "$@"
"$python" -m experiments.accelerators.report "$OUT" | tee "$OUT/table.txt"
exit $failed
