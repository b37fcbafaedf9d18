#!/usr/bin/env bash
# All that is to be known of a GPU, in 8 minutes: benchmarks/gpu.sh [FOLDER]
# The machine needs NVIDIA's driver, jax[cuda12], flax, optax, orbax-checkpoint and pytest;
# no TensorFlow, no network. Writes tests.txt, gpu.json and gpu.md into FOLDER (runs/gpu).
# TINY=1 JAX_PLATFORMS=cpu benchmarks/gpu.sh tries it on a CPU, with tiny sizes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
end=$((SECONDS + ${LIMIT:-470}))
out="${1:-runs/gpu}"
mkdir -p "$out"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}" PYTHONPATH="$PWD"
export TF_CPP_MIN_LOG_LEVEL=3 XLA_CLIENT_MEM_FRACTION="${XLA_CLIENT_MEM_FRACTION:-0.9}"

# The tests take less than half of the memory, and of the time.
XLA_CLIENT_MEM_FRACTION=0.3 timeout 150 python -m pytest -m gpu tests/test_gpu.py -v \
    -p no:cacheprovider -o addopts=--import-mode=importlib 2>&1 | tee "$out/tests.txt"
tested=${PIPESTATUS[0]}

timeout $((end - SECONDS)) python -m benchmarks.gpu --out="$out" \
    --seconds=$((end - SECONDS - 15)) ${TINY:+--tiny}
measured=$?
cat "$out/gpu.md"
exit $((tested || measured))
