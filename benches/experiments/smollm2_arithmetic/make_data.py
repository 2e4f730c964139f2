#!/usr/bin/env python3
"""Problems with verified answers from the reasoning-gym package, in two files that share none.

Easy sums and word problems: SmolLM2-135M solves some of them and not all. Every split is drawn with a seed of its own,
and a problem that an earlier split has is left out.

    python make_data.py --out FOLDER      # test.jsonl and train.jsonl
"""
import argparse
import json
import random
from pathlib import Path

import reasoning_gym

# task: (share of a split, settings of the task)
TASKS = {
    "chain_sum": (0.4, {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}),
    "products": (0.2, {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    "leg_counting": (0.2, {"min_animals": 1, "max_animals": 2, "max_instances": 5}),
    "gsm_symbolic": (0.2, {}),
}
# split: (problems, seed)
SPLITS = {"test": (150, 1), "train": (800, 2)}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, required=True)
    a = ap.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    seen = set()
    for split, (size, seed) in SPLITS.items():
        rows = []
        for task, (share, settings) in TASKS.items():
            wanted, taken = round(size * share), 0
            # There are only a hundred products of two digits: a split may end with fewer than it asked for.
            for item in reasoning_gym.create_dataset(task, size=4 * wanted, seed=seed, **settings):
                problem = item["question"].strip()
                if problem not in seen and taken < wanted:
                    taken += 1
                    seen.add(problem)
                    rows.append({"problem": problem, "answer": str(item["answer"]).strip(), "task": task})
        random.Random(seed).shuffle(rows)
        (a.out / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        counts = {task: sum(r["task"] == task for r in rows) for task in TASKS}
        print(f"{split}: {len(rows)} problems, {counts}")


if __name__ == "__main__":
    main()
