#!/usr/bin/env python3
"""Time the engine and PyTorch on both stages of SAE-Tuning, in turns, and print a Markdown table.

Model SmolLM2-135M-Instruct, hookpoint model.layers.12, SAE of 8192 (or 18432)
latents with k = 32, the same data and template.  The engine runs in bf16 and in
f32; PyTorch is baseline.py in bf16, its fastest type on CPUs that multiply it,
with glibc's allocator as it is and with settings that keep freed memory
("kept"), which is its best.  Every program is a process of its own; the
programs take turns within each repetition, so that a slow minute of the machine
hits all of them.  Tokens/s are those of single steps, the first (warm-up) step
of each run left out; peak memory is the process's, as the kernel counted it.
Below each case stands how far the engine's losses in bf16 are from those in f32.

    python run.py --repeat 3              # or run.sh, which builds first

Nothing else heavy may run meanwhile.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
LAYER, K = 12, 32
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30), "MALLOC_TOP_PAD_": str(256 << 20)}
CASES = {  # name: (stage, rows a step, tokens a row, latents)
    "sae-4x512": ("sae", 4, 512, 8192),
    "sae-4x512-18432": ("sae", 4, 512, 18432),
    "sft-1x512": ("sft", 1, 512, 8192),
    "sft-1x2048": ("sft", 1, 2048, 8192),
}
DTYPES = {"bf16": "bfloat16", "f32": "float32"}  # the engine's names and PyTorch's


class Bench:
    def __init__(self, a, work):
        self.a, self.work = a, Path(work)
        self.model, problems = a.assets / "smollm2", a.assets / "problems.jsonl"
        self.lines = problems.read_text().splitlines(keepends=True)
        self.template = HERE / "template.jinja"
        self.n = 0

    def data(self, rows, seq_len):
        """A file with just enough problems for `rows` rows, so that an epoch has that many."""
        out = self.work / f"{rows}x{seq_len}.jsonl"
        if not out.exists():
            sys.path.insert(0, str(HERE))
            import baseline
            from transformers import PreTrainedTokenizerFast

            tok = PreTrainedTokenizerFast.from_pretrained(self.model)
            all_lines = self.work / "all.jsonl"
            all_lines.write_text("".join(self.lines))
            texts = baseline.load_texts(all_lines, self.template)[:2048]
            n, found = 1, 0
            while found < rows:  # a row of length exactly seq_len each, the last short one dropped
                n += 1
                found = (len(tok(tok.eos_token.join(["", *texts[:n]]), verbose=False)["input_ids"]) - 1) // seq_len
            out.write_text("".join(self.lines[:n]))
        return out

    def measured(self, call, env=()):
        """Run to the end; peak resident memory of the process in MiB."""
        self.n += 1
        log = self.work / f"{self.n}.log"
        with log.open("w") as f:
            p = subprocess.Popen([str(c) for c in call], stdout=f, stderr=subprocess.STDOUT,
                                 env={**os.environ, "HF_HUB_OFFLINE": "1", **dict(env)})
            _, status, usage = os.wait4(p.pid, 0)
        if status != 0:
            raise SystemExit(f"{' '.join(map(str, call))}\nfailed with status {status}:\n{log.read_text()[-3000:]}")
        return usage.ru_maxrss / 1024

    def engine(self, case, steps, dtype, epochs=1, sae=None, layer=LAYER):
        """Tokens/s and loss of each step, and the peak memory."""
        stage, rows, seq_len, latents = case
        out = self.work / f"run{self.n}"
        per = ["--sae-batch", rows, "--sae-epochs", epochs] if stage == "sae" else ["--sft-batch", rows, "--epochs", epochs]
        rss = self.measured([
            self.a.bin, "train", "--stage", stage, "--source", self.model, "--target", self.model,
            "--data", self.data(rows * steps, seq_len), "--template", self.template, "--layer", layer,
            *(["--latents", latents, "--k", K] if sae is None else ["--sae", sae]),
            "--seq-len", seq_len, *per, "--lora-dropout", 0, "--lr", "1e-6", "--dtype", dtype, "--device", "cpu",
            "--threads", self.a.threads, "--out", out,
        ])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        lines = [m for m in lines if m["stage"] == stage]
        assert len(lines) == steps * epochs, f"{len(lines)} steps, expected {steps * epochs}"
        return [m["tokens_per_s"] for m in lines], [m["fvu" if stage == "sae" else "kl"] for m in lines], rss

    def torch(self, case, steps, dtype, kept, truncated=False, sae=None, save=None):
        """Tokens/s of each step, and the peak memory."""
        stage, rows, seq_len, latents = case
        out = self.work / f"torch{self.n}.json"
        if stage == "sae":
            more = ["--steps1", steps, "--steps2", 0, "--seq-len", seq_len, "--batch", rows]
        else:
            more = ["--steps1", 0, "--steps2", steps, "--seq-len2", seq_len, "--batch2", rows, "--sae", sae]
        rss = self.measured([
            sys.executable, HERE / "baseline.py", "--model", self.model, "--data", self.data(rows * steps, seq_len),
            "--layer", LAYER, "--num-latents", latents, "--k", K, "--dtype", DTYPES[dtype], "--threads", self.a.threads,
            "--stage1-forward", "truncated" if truncated else "full", "--out", out, *more,
            *(["--save-sae", save] if save else []),
        ], KEPT if kept else {})
        r = json.loads(out.read_text())["stage1" if stage == "sae" else "stage2"]
        return [r["tokens_per_step"] / s for s in r["seconds_per_step"]], rss


def opponents(stage, dtypes):
    whole = "PyTorch, whole LM" if stage == "sae" else "PyTorch"
    for dtype in dtypes:
        yield f"{whole}, {dtype}, default malloc", dict(dtype=dtype, kept=False)
        yield f"{whole}, {dtype}, kept malloc", dict(dtype=dtype, kept=True)
        if stage == "sae":
            cut = f"PyTorch, LM cut after the layer, {dtype}, kept malloc"
            yield cut, dict(dtype=dtype, kept=True, truncated=True)


def compare(bench, name, sae):
    """{program: ([tokens/s of each step], [peak MiB of each run])} over all repetitions, and the
    engine's losses by dtype."""
    case, a = CASES[name], bench.a
    found, losses = {}, {}

    def add(program, speeds, rss):
        s, m = found.setdefault(program, ([], []))
        s += speeds
        m.append(rss)

    for _ in range(a.repeat):
        for dtype in DTYPES:
            if case[0] == "sae":
                speeds, losses[dtype], rss = bench.engine(case, a.steps, dtype)
                add(f"engine, {dtype}", speeds[1:], rss)
            else:
                speeds, losses[dtype], rss = bench.engine(case, a.steps, dtype, epochs=2, sae=sae)
                add(f"engine, {dtype}, first epoch", speeds[1 : a.steps], rss)
                add(f"engine, {dtype}, from cache", speeds[a.steps :], rss)
        for program, how in opponents(case[0], a.torch_dtypes.split(",")):
            speeds, rss = bench.torch(case, a.steps, sae=sae, **how)
            add(program, speeds[1:], rss)
        print(f"{name}: {found}", file=sys.stderr, flush=True)
    return found, losses


def table(name, found, losses):
    """One case's rows. A ratio is that of the medians; its spread goes from the engine's slowest
    step beside PyTorch's fastest to the reverse."""
    others = {p: v for p, v in found.items() if not p.startswith("engine")}
    print(f"\n### {name}\n\n| program | tokens/s, median (min–max) | peak memory, MiB |", end="")
    print("".join(f" ÷ {p} |" for p in others) + " memory ÷ " + ", ÷ ".join(others) + " |")
    print("|---" * (4 + len(others)) + "|")
    for program, (s, m) in found.items():
        row = f"| {program} | {statistics.median(s):.0f} ({min(s):.0f}–{max(s):.0f}) | {max(m):.0f} |"
        if program in others:
            print(row + " |" * (len(others) + 1))
            continue
        for t, _ in others.values():
            ratio = statistics.median(s) / statistics.median(t)
            row += f" **{ratio:.2f}** ({min(s) / max(t):.2f}–{max(s) / min(t):.2f}) |"
        print(row + " " + ", ".join(f"{max(m) / max(n):.2f}" for _, n in others.values()) + " |")
    worst = max(abs(n - w) / w for n, w in zip(losses["bf16"], losses["f32"]))
    print(f"\nLosses of the engine in bf16 within {100 * worst:.2f} % of those in f32 over {len(losses['f32'])} steps.")
    sys.stdout.flush()


def scaling(bench, sae):
    print("\n| tokens a step | Stage I, ms a token | Stage II first epoch, ms a token | Stage II from cache, ms a token |")
    print("|---|---|---|---|")
    for seq_len in (256, 512, 1024, 2048):
        one, _, _ = bench.engine(("sae", 1, seq_len, 8192), bench.a.steps, "auto")
        two, _, _ = bench.engine(("sft", 1, seq_len, 8192), bench.a.steps, "auto", epochs=2, sae=sae)
        parts = [one[1:], two[1 : bench.a.steps], two[bench.a.steps :]]
        print(f"| {seq_len} | " + " | ".join(f"{1e3 / statistics.median(p):.2f}" for p in parts) + " |", flush=True)
    print("\n| layers of the model | Stage I, ms a token |\n|---|---|")
    for layers in (4, 8, 16, 24):
        speeds, _, _ = bench.engine(("sae", 1, 1024, 8192), bench.a.steps, "auto", layer=layers - 1)
        print(f"| {layers} | {1e3 / statistics.median(speeds[1:]):.3f} |", flush=True)


def machine():
    name = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")), platform.machine())
    import torch
    import transformers

    return (f"{name}, {len(os.sched_getaffinity(0))} cores; torch {torch.__version__}, transformers "
            f"{transformers.__version__}; {time.strftime('%Y-%m-%d')}; load before {os.getloadavg()[0]:.2f}")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    env = os.environ.get
    ap.add_argument("--repeat", type=int, default=3)
    ap.add_argument("--steps", type=int, default=6, help="steps of a run, the first of them warm-up")
    ap.add_argument("--cases", default=",".join(CASES), help=f"default: {','.join(CASES)}")
    ap.add_argument("--torch-dtypes", default="bf16", help="PyTorch's types: bf16, f32 or both, with a comma (default: bf16)")
    ap.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    ap.add_argument("--scaling", action="store_true", help="also time the engine for 256 to 2048 tokens a step and 4 to 24 layers")
    ap.add_argument("--bin", type=Path, default=Path(env("RESA_BIN", REPO / "target/release/resa-engine")))
    ap.add_argument("--assets", type=Path, default=Path(env("RESA_ASSETS", REPO / "target/assets")))
    a = ap.parse_args()
    unknown = set(a.cases.split(",")) - set(CASES)
    if unknown:
        ap.error(f"unknown case {', '.join(sorted(unknown))}; known: {', '.join(CASES)}")
    if set(a.torch_dtypes.split(",")) - set(DTYPES):
        ap.error(f"--torch-dtypes: expected {' or '.join(DTYPES)}, found {a.torch_dtypes}")
    if a.steps < 2 or a.repeat < 1:
        ap.error("--steps must be at least 2 and --repeat at least 1")
    print(f"{machine()}; {a.threads} threads; {a.repeat} x {a.steps - 1} timed steps\n", flush=True)
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(a, work)
        sae = Path(work) / "sae"
        bench.torch(CASES["sae-4x512"], 2, "f32", kept=True, truncated=True, save=sae)
        for name in a.cases.split(","):
            table(name, *compare(bench, name, sae))
        if a.scaling:
            scaling(bench, sae)


if __name__ == "__main__":
    main()
