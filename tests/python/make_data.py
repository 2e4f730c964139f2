#!/usr/bin/env python3
"""Build a JSONL of {"problem", "answer"} arithmetic items with reasoning-gym.

No reasoning traces: each line holds only the question and the final answer,
as the data of SAE-Tuning do.

    python make_data.py --out problems.jsonl --items 4000 --seed 42
"""
import argparse
import hashlib
import json
import random
from pathlib import Path

import reasoning_gym

# task -> share of the items
MIX = {
    "gsm_symbolic": 6,
    "chain_sum": 3,
    "simple_equations": 3,
    "basic_arithmetic": 2,
    "leg_counting": 2,
    "time_intervals": 1,
    "calendar_arithmetic": 1,
    "gcd": 1,
    "lcm": 1,
    "fraction_simplification": 1,
    "products": 1,
    "prime_factorization": 1,
    "decimal_arithmetic": 1,
    "polynomial_equations": 1,
    "simple_geometry": 1,
    "complex_arithmetic": 1,
}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--items", type=int, default=4000)
    ap.add_argument("--seed", type=int, default=42)
    a = ap.parse_args()

    total = sum(MIX.values())
    sizes = {t: a.items * w // total for t, w in MIX.items()}
    sizes["gsm_symbolic"] += a.items - sum(sizes.values())
    rows = []
    for i, (task, size) in enumerate(sizes.items()):
        data = reasoning_gym.create_dataset(task, size=size, seed=a.seed + 1000 * i)
        for item in data:
            rows.append({"problem": item["question"].strip(), "answer": str(item["answer"]).strip()})
    random.Random(a.seed).shuffle(rows)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    a.out.write_text(text, encoding="utf-8")
    print(f"{len(rows)} items, {len(set(r['problem'] for r in rows))} distinct problems, {len(text)} characters -> {a.out}")
    print("sha256", hashlib.sha256(text.encode()).hexdigest())
    print(sizes)


if __name__ == "__main__":
    main()
