#!/usr/bin/env python3
"""Tables of what run.sh found: summary.json and summary.md.

    python summarise.py --out FOLDER-OF-run.sh --results FOLDER
"""
import argparse
import json
from math import comb
from pathlib import Path

LAYERS = (6, 12, 20)
NAMES = {
    "base": "model as it is",
    **{f"inserted-{layer}": f"SAE inserted at layer {layer}" for layer in LAYERS},
    **{f"tuned-{layer}": f"SAE-Tuning at layer {layer}, SAE taken out" for layer in LAYERS},
    "sft": "plain SFT",
}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sign_test(gained, lost):
    """Two-sided exact probability that as uneven a split of the changed problems comes by chance (McNemar's test)."""
    n, few = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(comb(n, i) for i in range(few + 1)) / 2**n)


def evaluation(out, name, tasks, base):
    found = json.loads((out / f"eval/{name}.json").read_text())
    graded = {r["index"]: r for r in lines(out / f"eval/{name}.jsonl") if "completion" in r}
    right = {i for i, r in graded.items() if r["correct"]}
    by_task = {t: [sum(i in right for i in members), len(members)] for t, members in tasks.items()}
    estimate = found["pass_at_k"][0]
    return right, {
        "name": name,
        "pass_at_1": estimate["value"],
        "low": estimate["low"],
        "high": estimate["high"],
        "correct": found["correct"],
        "problems": found["problems"],
        "correct_by_task": by_task,
        "truncated": found["truncated"],
        "mean_new_tokens": sum(r["tokens"] for r in graded.values()) / len(graded),
        **({} if base is None else {"gained": len(right - base), "lost": len(base - right),
                                    "p": sign_test(len(right - base), len(base - right))}),
    }


def course(path, key, stage, hookpoint=None):
    """Mean of a measurement over the first and the last eighth of the steps."""
    steps = [r for r in lines(path) if r["stage"] == stage and r.get("hookpoint", hookpoint) == hookpoint]
    values = [r[key] for r in steps if r.get(key) is not None]
    n = max(1, len(values) // 8)
    return [sum(values[:n]) / n, sum(values[-n:]) / n] if values else None


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--results", type=Path, required=True)
    a = ap.parse_args()
    tasks = {}
    for i, record in enumerate(lines(a.out / "data/test.jsonl")):
        tasks.setdefault(record["task"], []).append(i)
    rows, base = [], None
    for name in NAMES:
        if (a.out / f"eval/{name}.json").exists():
            right, row = evaluation(a.out, name, tasks, base)
            base = right if name == "base" else base
            rows.append(row)
    saes = [{"layer": layer, "fvu": course(a.out / "saes/metrics.jsonl", "fvu", "sae", f"model.layers.{layer}"),
             "fvu_no_sinks": course(a.out / "saes/metrics.jsonl", "fvu_no_sinks", "sae", f"model.layers.{layer}")}
            for layer in LAYERS]
    runs = [name for name in NAMES if (a.out / name / "metrics.jsonl").exists()]
    kl = {name: course(a.out / name / "metrics.jsonl", "kl_per_token", "sft") for name in runs if name != "sft"}
    seconds = {}
    for line in (a.out / "times.tsv").read_text().splitlines():
        name, user, _ = line.split("\t")
        seconds[name] = float(user)
    summary = {"evaluations": rows, "saes": saes, "kl_per_token": kl, "user_cpu_seconds": seconds,
               "user_cpu_seconds_in_all": sum(seconds.values())}
    a.results.mkdir(parents=True, exist_ok=True)
    (a.results / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    text = ["| | Pass@1 | 95 % interval | " + " | ".join(tasks) + " | gained, lost | p |",
            "|---|---|---|" + "---|" * len(tasks) + "---|---|"]
    for r in rows:
        by_task = " | ".join(f"{c}/{n}" for c, n in r["correct_by_task"].values())
        change = f"{r['gained']}, {r['lost']} | {r['p']:.2g}" if "p" in r else " | "
        text.append(f"| {NAMES[r['name']]} | {100 * r['pass_at_1']:.1f} % | {100 * r['low']:.1f} to {100 * r['high']:.1f} | "
                    f"{by_task} | {change} |")
    text += ["", "| layer | FVU, start and end | without sink tokens | KL a token, start and end |", "|---|---|---|---|"]
    def pair(values):
        return f"{values[0]:.3f}, {values[1]:.3f}" if values else ""

    for sae in saes:
        text.append(f"| {sae['layer']} | {pair(sae['fvu'])} | {pair(sae['fvu_no_sinks'])} | "
                    f"{pair(kl.get('tuned-%d' % sae['layer']))} |")
    text += ["", "| part | user CPU seconds |", "|---|---|"]
    text += [f"| {name} | {user:.0f} |" for name, user in seconds.items()]
    text += [f"| all | {summary['user_cpu_seconds_in_all']:.0f} |", ""]
    (a.results / "summary.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
