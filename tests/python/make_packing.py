#!/usr/bin/env python3
"""Expected token rows for the engine's packing, made by the Python tools.

The JSON holds `texts`, `seq_len` and `rows`: the ids that PreTrainedTokenizerFast
and the packing of benches/vs_pytorch/baseline.py give for the texts.

    python make_packing.py --tokenizer DIR --seq-len 64 --out packing.json
    python make_packing.py --tokenizer DIR --data FILE.jsonl --template FILE --limit 200 --seq-len 128 --out packing.json
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benches" / "vs_pytorch"))
import baseline
from transformers import PreTrainedTokenizerFast

ODD = [
    "What is 1234567 + 89?", "  two  spaces\t and a tab ", "Café naïve — “quotes” … 𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "日本語 と 한국어 и русский",
    "emoji 👩‍👩‍👧 🇪🇺 e\u0301 \u00a0 \u200b", "line\nbreaks\r\n\n\nhere\n", "<think> inside </think>\n<answer>7</answer>",
    "{{ not a template }} {% raw %}", "don't can't we'll I'M", "a" * 80, "x_1 = \\frac{1}{2}", "", "<|endoftext|>", "x",
]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--tokenizer", type=Path, required=True)
    ap.add_argument("--data", type=Path, help="JSON Lines, after the list of unusual texts")
    ap.add_argument("--template", type=Path)
    ap.add_argument("--limit", type=int, help="only the first so many records")
    ap.add_argument("--seq-len", type=int, default=64)
    ap.add_argument("--out", type=Path, required=True)
    a = ap.parse_args()
    texts = ODD + (baseline.load_texts(a.data, a.template)[: a.limit] if a.data else [])
    rows = baseline.pack(texts, PreTrainedTokenizerFast.from_pretrained(a.tokenizer), a.seq_len)
    a.out.write_text(json.dumps({"seq_len": a.seq_len, "texts": texts, "rows": rows.tolist()}) + "\n")
    print(f"{len(texts)} texts, {len(rows)} rows of {a.seq_len} -> {a.out}")


if __name__ == "__main__":
    main()
