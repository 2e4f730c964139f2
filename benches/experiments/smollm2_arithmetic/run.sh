#!/usr/bin/env bash
# Pass@1 of SmolLM2-135M-Instruct on sums and word problems: as it is, with an SAE inserted, after SAE-Tuning at three
# hookpoints, after plain SFT. Everything on the CPU. A part that is done is left out when the script is run again.
#
#   tests/setup_python.sh && cargo build --release && benches/experiments/smollm2_arithmetic/run.sh
#
# THREADS (1), RESA_BIN, RESA_VENV, RESA_ASSETS and OUT (target/experiments/smollm2_arithmetic) can be set.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../../.." && pwd)
bin=${RESA_BIN:-$repo/target/release/resa-engine}
python=${RESA_VENV:-$repo/target/venv}/bin/python
model=${RESA_ASSETS:-$repo/target/assets}/smollm2
out=${OUT:-$repo/target/experiments/smollm2_arithmetic}
threads=${THREADS:-1}
mkdir -p "$out/eval"
cd "$out"

# Settings: the same for all hookpoints and for SFT. The learning rate is above the paper's 1e-6, and twice the default
# of its authors' code, since there are 40 steps and not thousands.
data=(--template "$here/template.jinja" --seq-len 256)
stage_one=(--latents 4096 --k 32 --sae-batch 4 --max-sae-steps 48)
stage_two=(--sft-batch 2 --max-sft-steps 40 --epochs 2 --lr 1e-4)
sampling=(--temperature 0 --max-new-tokens 32)

# part NAME FILE OUTPUT COMMAND...: runs the command unless FILE is there; its standard output goes to OUTPUT, its user
# CPU seconds and seconds to times.tsv.
part() {
    local name=$1 file=$2 output=$3
    shift 3
    [[ -e $file ]] && return
    echo "== $name" >&2
    local TIMEFORMAT=$name$'\t%U\t%R'
    { time "$@" >"$output" 2>>log.txt; } 2>>times.tsv
}

evaluate() { # NAME OPTIONS...
    local name=$1
    shift
    part "eval $name" "eval/$name.json" "eval/$name.json.part" "$bin" eval --model "$model" --data data/test.jsonl \
        --template "$here/template.jinja" "${sampling[@]}" --threads "$threads" "$@" --out "eval/$name.jsonl" --json
    [[ -e eval/$name.json ]] || mv "eval/$name.json.part" "eval/$name.json"
}

train() { # NAME DONE OPTIONS...
    local name=$1 file=$2
    shift 2
    [[ -e $name/$file ]] || rm -rf "$name"
    part "train $name" "$name/$file" "$name.txt" "$bin" train --target "$model" --data data/train.jsonl "${data[@]}" \
        --threads "$threads" --out "$name" --log-every 10 "$@"
}

part data data/train.jsonl data.txt "$python" "$here/make_data.py" --out data
evaluate base
train saes sae/model.layers.20 --stage sae --layer 6 --layer 12 --layer 20 "${stage_one[@]}"
for layer in 12 20 6; do
    sae=saes/sae/model.layers.$layer
    train "tuned-$layer" adapter/adapter_config.json --stage sft --sae "$sae" --sae-init pretrained --layer "$layer" \
        "${stage_two[@]}"
    evaluate "tuned-$layer" --adapter "tuned-$layer/adapter"
    if [[ $layer == 12 ]]; then
        train sft adapter/adapter_config.json --stage sft --method sft "${stage_two[@]}"
        evaluate sft --adapter sft/adapter
    fi
    evaluate "inserted-$layer" --sae "$sae" --layer "$layer"
done
part features features/features.json features.txt "$bin" features --model "$model" --sae saes/sae \
    --compare tuned-12/adapter --data data/test.jsonl --template "$here/template.jinja" --limit 64 \
    --threads "$threads" --out features
for name in tuned-12 tuned-20 tuned-6 sft; do cp "eval/$name.jsonl" "$name/"; done
"$bin" report saes tuned-12 tuned-20 tuned-6 sft --out report.html
"$python" "$here/summarise.py" --out "$out" --results "$here/results"
