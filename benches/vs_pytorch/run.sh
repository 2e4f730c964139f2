#!/usr/bin/env bash
# Builds the engine, brings PyTorch and the model, times both beside each other and prints a table.
# Options go to run.py (--repeat, --steps, --cases, --dtypes, --threads, --scaling). Timings need a quiet machine;
# once all is built and there, the default takes about a quarter of an hour.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
(cd "$repo" && cargo build --release)
"$repo/tests/setup_python.sh"
exec "${RESA_VENV:-$repo/target/venv}/bin/python" "$repo/benches/vs_pytorch/run.py" "$@"
