#!/usr/bin/env bash
# Collects what tests/gpu/run.sh needs into one archive, for a machine that has an NVIDIA GPU and its driver but neither
# Rust nor a network: the program, the device tests, a generator of random models, fixtures, and the emulator.
#
#   tests/gpu/build.sh [ARCHIVE]        default target/resa-gpu.tar.gz; RESA_PROFILE=dev for a quick build
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
archive=$(realpath -m "${1:-target/resa-gpu.tar.gz}")
profile=${RESA_PROFILE:-release}

NVCC=${NVCC:-$(tests/emulator/setup_nvcc.sh)}
export NVCC
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bundle=$work/resa-gpu
mkdir -p "$bundle/bin" "$bundle/tests"

# The library's own tests are of no use here, but with them Cargo chooses the features of the whole test suite, whose
# dependencies are then not built a second time.
cargo test --profile "$profile" --no-run --message-format=json --workspace --lib --test ops --test cli >"$work/messages"
# Under `cargo test` an example that is named would become a test.
cargo build --profile "$profile" --message-format=json --workspace --example random_model >>"$work/messages"
# Path of what Cargo made of a target: NAME KIND.
made() {
    local line
    line=$(grep '"reason":"compiler-artifact"' "$work/messages" | grep "\"kind\":\[\"$2\"\]" | grep "\"name\":\"$1\"" |
        grep -o '"executable":"[^"]*"' | tail -n 1)
    [[ -n $line ]] || { echo "Cargo made no $2 named $1" >&2; exit 1; }
    line=${line#*:\"}
    echo "${line%\"}"
}
cp "$(made ops test)" "$bundle/bin/ops"
cp "$(made cli test)" "$bundle/bin/cli"
cp "$(made resa-engine bin)" "$bundle/bin/resa-engine"
cp "$(made random_model example)" "$bundle/bin/random_model"
emulator=$(grep -o '"[^"]*libcuda_emulator\.so"' "$work/messages" | tail -n 1 | tr -d '"')
cp "$emulator" "$bundle/bin/"
strip --strip-debug "$bundle"/bin/*
cp -r tests/fixtures "$bundle/tests/"
cp tests/gpu/run.sh "$bundle/"
{
    git rev-parse HEAD
    git diff --quiet HEAD || echo "with uncommitted changes"
} >"$bundle/commit"
tar -C "$work" -czf "$archive" resa-gpu
echo "$archive ($(du -h "$archive" | cut -f1)); unpack it there and run resa-gpu/run.sh"
