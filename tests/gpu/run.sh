#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with NVIDIA's driver (no Rust, no network, no Python): the device tests, the
# same under compute-sanitizer where it is installed, bench-kernels, and both stages at the shape of a 1.5B model with
# random weights. Run it from what tests/gpu/build.sh packed. All results go to one folder, the summary to results.md.
#
#   ./run.sh [--emulator] [--shape qwen2-1.5b|smollm2|example] [--limit SECONDS] [--out DIR]
#
# --emulator runs the kernels on the CPU emulator instead, at the smallest shape: a rehearsal of this script.
# --limit is the longest that one step may take, for a machine that is lent by the minute (default 5400).
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
backend=gpu shape=qwen2-1.5b limit=5400 out=$PWD/resa-gpu-results
while [[ $# -gt 0 ]]; do
    case $1 in
    --emulator) backend=emulator shape=example ;;
    --shape) shape=${2:?--shape needs a name}; shift ;;
    --limit) limit=${2:?--limit needs seconds}; shift ;;
    --out) out=${2:?--out needs a folder}; shift ;;
    *) echo "unknown argument $1" >&2; exit 2 ;;
    esac
    shift
done
mkdir -p "$out/logs"
out=$(cd "$out" && pwd)
results=$out/results.md
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bin=$here/bin
export RESA_CUDA=$backend RESA_ROOT=$here CUDA_EMU_LIBRARY=$bin/libcuda_emulator.so
if [[ $backend == emulator ]]; then
    # The program takes whatever is called libcuda for the driver.
    mkdir "$work/driver"
    ln -s "$bin/libcuda_emulator.so" "$work/driver/libcuda.so"
    export LD_LIBRARY_PATH=$work/driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi

head_of_steps() {
    echo "| step | result | seconds | host memory, peak MiB | GPU memory, peak MiB |"
    echo "|---|---|---|---|---|"
}
smi() { nvidia-smi --query-gpu="$1" --format=csv,noheader,nounits 2>/dev/null | head -n 1; }
device=$(smi name) driver=$(smi driver_version)
{
    echo "# resa-engine on ${backend}: ${device:-no GPU}"
    echo
    echo "- date: $(date -u +%Y-%m-%dT%H:%M:%SZ)"
    echo "- commit: $(tr '\n' ' ' <"$here/commit")"
    echo "- device: ${device:-none}, memory $(smi memory.total) MiB, driver ${driver:-none}"
    echo "- host: $(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2-), $(nproc) cores"
    [[ $backend == gpu ]] || echo "- **the kernels ran on the emulator: times mean nothing**"
    echo
    head_of_steps
} >"$results"

failures=0
# Runs a command, what it prints into logs, and adds a row to the table: step NAME COMMAND...
step() {
    local name=$1 log
    shift
    log=$out/logs/${name//[^a-z0-9.]/-}.log
    echo "== $name" >&2
    local began=$SECONDS host=0 gpu=0 now status
    timeout "$limit" "$@" >"$log" 2>"${log%.log}.err" &
    local pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        # timeout's child is the command itself.
        for child in $(cat "/proc/$pid/task/$pid/children" 2>/dev/null); do
            now=$(awk '/^VmHWM/ { print int($2 / 1024) }' "/proc/$child/status" 2>/dev/null)
            [[ ${now:-0} -gt $host ]] && host=$now
        done
        now=$(smi memory.used)
        [[ ${now:-0} =~ ^[0-9]+$ && ${now:-0} -gt $gpu ]] && gpu=$now
        sleep 0.2
    done
    wait "$pid"
    status=$?
    local result=passed
    [[ $status -eq 0 ]] || { result="**failed ($status)**, see logs"; failures=$((failures + 1)); }
    echo "| $name | $result | $((SECONDS - began)) | $host | $gpu |" >>"$results"
    return "$status"
}

step "operators" "$bin/ops"
step "runs" "$bin/cli" cuda::

bench=("$bin/resa-engine" bench-kernels --device cuda)
step "bench" "${bench[@]}" --json && cp "$out/logs/bench.log" "$out/bench.json"
# Once more, against the first: what differs is noise.
step "bench again" "${bench[@]}" --compare "$out/bench.json"

case $shape in
example) settings=(--layer 3 --latents 1024 --k 16 --seq-len 64 --sae-batch 2 --max-sae-steps 3 --max-sft-steps 6) rows=4 ;;
smollm2) settings=(--layer 12 --latents 8192 --seq-len 512 --sae-batch 4 --max-sae-steps 20 --max-sft-steps 160) rows=80 ;;
*) settings=(--layer 12 --latents 65536 --seq-len 2048 --sae-batch 16 --max-sae-steps 5 --max-sft-steps 160) rows=80 ;;
esac
step "random model" "$bin/random_model" "$shape" "$work/model"
# A problem takes some 40 tokens: enough problems for so many rows, few enough for a second epoch.
[[ ${settings[*]} =~ --seq-len\ ([0-9]+) ]]
lines=$((rows * BASH_REMATCH[1] / 40))
problems=$here/tests/fixtures/example/problems.jsonl
for ((have = 0; have < lines; have += 2000)); do cat "$problems"; done | head -n "$lines" >"$work/problems.jsonl"
step "both stages, $shape" "$bin/resa-engine" train --device cuda --target "$work/model" \
    --data "$work/problems.jsonl" --template "$here/tests/fixtures/example/template.jinja" \
    "${settings[@]}" --epochs 2 --checkpoint-every 1000000 --out "$work/run"

metrics=$work/run/metrics.jsonl
if [[ -s $metrics ]]; then
    cp "$metrics" "$out/"
    {
        echo
        echo "## Both stages at the shape of $shape, random weights"
        echo
        echo "\`${settings[*]}\`. The first step of each stage is left out."
        echo
        echo "| stage | steps | tokens/s |"
        echo "|---|---|---|"
        awk '
            function number(key) { match($0, "\"" key "\":[-+.0-9e]+"); return substr($0, RSTART + length(key) + 3, RLENGTH - length(key) - 3) + 0 }
            { stage = /"stage":"sae"/ ? "I" : (number("epoch") > 1 ? "II, later epochs" : "II, first epoch") }
            number("step") > 1 { steps[stage]++; seconds[stage] += number("seconds"); tokens[stage] += number("seconds") * number("tokens_per_s") }
            END { for (stage in steps) printf "| %s | %d | %.0f |\n", stage, steps[stage], tokens[stage] / seconds[stage] }
        ' "$metrics" | sort
    } >>"$results"
fi
{
    echo
    echo "## bench-kernels"
    echo
    echo "As JSON in bench.json; this is the second run, with verdicts against the first (what differs is noise)."
    echo
    echo '```'
    cat "$out/logs/bench-again.log"
    echo '```'
} >>"$results"
# Last, since it takes longest.
{
    echo
    echo "## Under compute-sanitizer"
    echo
    head_of_steps
} >>"$results"
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
# Every test of a binary in a process of its own, as many at a time as there are cores: BINARY FILTER SANITIZER TOOL.
each_test='"$1" "$2" --list | sed -n "s/: test\$//p" |
    xargs -P "$(nproc)" -I {} "$3" --tool $4 --error-exitcode 9 --require-cuda-init no "$1" --exact {}'
# A call that fails is an error of the engine's anyway, and one test asks for more memory than there is.
memcheck="memcheck --report-api-errors no"
if [[ $backend == gpu && -n $sanitizer ]]; then
    for tool in "$memcheck" racecheck synccheck initcheck; do
        step "operators under ${tool%% *}" bash -c "$each_test" _ "$bin/ops" "" "$sanitizer" "$tool"
    done
    step "runs under memcheck" bash -c "$each_test" _ "$bin/cli" cuda:: "$sanitizer" "$memcheck"
else
    echo "| compute-sanitizer | not found | | | |" >>"$results"
fi
echo "$results: $failures steps failed" >&2
[[ $failures -eq 0 ]]
