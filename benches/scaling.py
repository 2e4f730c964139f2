#!/usr/bin/env python3
"""How the cost of a step grows with tokens and with layers: the engine on SmolLM2, one step at a time.

    tests/setup_python.sh; cargo build --release; python3 benches/scaling.py

Prints Markdown tables: seconds a step (median and range over the steps after the first), tokens per second, and the
time relative to the row before it; with twice the tokens or layers a linear cost gives 2. Needs a quiet machine.
"""
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
BIN = Path(os.environ.get("RESA_BIN", REPO / "target/release/resa-engine"))
ASSETS = Path(os.environ.get("RESA_ASSETS", REPO / "target/assets"))
STEPS = 6


def run(stage: str, *args) -> list[dict]:
    """The metrics of the steps of a stage, the first left out."""
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp) / "run"
        call = [BIN, "train", "--target", ASSETS / "smollm2", "--data", ASSETS / "problems.jsonl", "--dtype", "f32",
                "--lora-dropout", 0, "--out", out, *args]
        subprocess.run([str(a) for a in call], check=True, capture_output=True)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if r["stage"] == stage][1:]


def table(title: str, unit: str, cases: list[tuple[int, list[dict]]]):
    print(f"\n| {title}: {unit} | s/step median (min-max) | tokens/s | time by the row before | size by the row before |")
    print("|---|---|---|---|---|")
    before = None
    for size, steps in cases:
        seconds = [s["seconds"] for s in steps]
        median = statistics.median(seconds)
        tokens = statistics.median(s["tokens_per_s"] for s in steps)
        growth = f"{median / before[1]:.2f} | {size / before[0]:.2f}" if before else "|"
        print(f"| {size} | {median:.3f} ({min(seconds):.3f}-{max(seconds):.3f}) | {tokens:.0f} | {growth} |", flush=True)
        before = (size, median)


def main():
    lengths = [256, 512, 1024, 2048]
    common = ["--latents", 8192, "--layer", 12]
    stage_one = ["--stage", "sae", "--sae-batch", 1, "--max-sae-steps", STEPS]
    table("Stage I, layer 12", "tokens", [(n, run("sae", *common, *stage_one, "--seq-len", n)) for n in lengths])
    stage_two = ["--max-sae-steps", 1, "--sae-batch", 1, "--sft-batch", 1, "--max-sft-steps", STEPS]
    table("Stage II, layer 12", "tokens", [(n, run("sft", *common, *stage_two, "--seq-len", n)) for n in lengths])
    layers = [4, 8, 16, 24]
    deep = [(n, run("sae", "--latents", 8192, "--layer", n - 1, *stage_one, "--seq-len", 1024)) for n in layers]
    table("Stage I, 1024 tokens", "layers", deep)


if __name__ == "__main__":
    main()
