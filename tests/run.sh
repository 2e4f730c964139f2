#!/usr/bin/env bash
# Runs every test: brings what they need (Python packages, a real small model and nvcc, under target/), builds in release
# mode, runs the Rust tests, then the tests that use PyTorch, transformers, PEFT and sparsify on what the engine writes.
# Arguments go to cargo test, for instance `tests/run.sh --test ops` (then the Python tests are left out).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ $# -gt 0 ]]; then
    exec cargo test --release --workspace "$@"
fi

# Its downloads take minutes in which the compiler can have the cores.
tests/setup_python.sh &
python=$!
trap 'kill $python 2>/dev/null || true' EXIT
NVCC=$(tests/emulator/setup_nvcc.sh)
export NVCC
# The program too. Not by cargo build: without what the tests depend on, some crates have other features, and the library
# would be built twice.
cargo test --release --workspace --no-run
wait $python
# With the emulator's warps in random order: results must not depend on it. What is moved does: a load that some threads
# of a warp reach later is two. So what counts it, `traffic`, has the warps in order. That runs with the library's tests
# since for --test ops alone Cargo would choose other features and build the dependencies again.
CUDA_EMU_SCHEDULE=1 cargo test --release --workspace -- --skip traffic::
cargo test --release --workspace --lib --test ops traffic::
export RESA_VENV=${RESA_VENV:-$PWD/target/venv} RESA_ASSETS=${RESA_ASSETS:-$PWD/target/assets}
"$RESA_VENV/bin/python" -m pytest -q -p no:cacheprovider tests/python
