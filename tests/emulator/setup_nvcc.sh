#!/usr/bin/env bash
# Installs nvcc 13.0 from PyPI into target/nvcc and prints its path, with cuobjdump and nvdisasm, which read what it
# makes, beside it (their first packages are of 13.2); does nothing the second time.
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
venv="${CARGO_TARGET_DIR:-$root/target}/nvcc"
find_nvcc() { ls "$venv"/lib/python3*/site-packages/nvidia/cu13/bin/nvcc 2>/dev/null | head -n 1; }
if [ -z "$(find_nvcc)" ] || [ ! -e "$(dirname "$(find_nvcc)")/cuobjdump" ]; then
  python3 -m venv "$venv" >&2
  "$venv/bin/pip" install --quiet --disable-pip-version-check \
    'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-crt==13.0.*' \
    'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cccl==13.0.*' \
    'nvidia-cuda-cuobjdump==13.2.51' 'nvidia-cuda-nvdisasm==13.2.51' >&2
fi
nvcc="$(find_nvcc)"
[ -n "$nvcc" ] || { echo "nvcc was not installed into $venv" >&2; exit 1; }
command -v g++ >/dev/null || { echo "nvcc needs a host compiler: install g++" >&2; exit 1; }
echo "$nvcc"
