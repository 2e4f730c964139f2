#!/usr/bin/env python3
"""Time the engine and PyTorch on both stages of SAE-Tuning, in turns, and print a Markdown table.

Model SmolLM2-135M-Instruct, hookpoint model.layers.12, SAE of 8192 (or 18432)
latents with k = 32, the same data and template.  The engine runs as it does by
default; PyTorch is baseline.py in the faster of bf16 and f32 on this machine,
with glibc's allocator as it is and with settings that keep freed memory
("kept"), which is its best.  Every program is a process of its own; the
programs take turns within each repetition, so that a slow minute of the machine
hits all of them.  Tokens/s are those of single steps, the first (warm-up) step
of each run left out; peak memory is the process's, as the kernel counted it.
The default settings take about a quarter of an hour on two cores.

    python run.py --repeat 2              # or run.sh, which builds first

Nothing else heavy may run meanwhile.
"""
import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
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
FIRST = {"sae": "sae-4x512", "sft": "sft-1x512"}  # by which PyTorch's type is chosen
LIMIT = 120  # seconds; CPUs that do not multiply bf16 take far longer for it
DTYPES = {"bf16": "bfloat16", "f32": "float32"}  # the engine's names and PyTorch's


def problems_for(rows, seq_len, model, lines, template):
    """The least number of problems, of at most 2048, that fill `rows` rows of exactly `seq_len` tokens."""
    sys.path.insert(0, str(HERE))
    import baseline
    from transformers import PreTrainedTokenizerFast

    tok = PreTrainedTokenizerFast.from_pretrained(model)
    texts = baseline.load_texts(lines, template)[:2048]
    n, found = 1, 0
    while found < rows:  # the last row, a short one, is dropped
        n += 1
        found = (len(tok(tok.eos_token.join(["", *texts[:n]]), verbose=False)["input_ids"]) - 1) // seq_len
    return n


class Bench:
    def __init__(self, a, work):
        self.a, self.work = a, Path(work)
        self.model, problems = a.assets / "smollm2", a.assets / "problems.jsonl"
        self.lines = problems.read_text().splitlines(keepends=True)
        self.template = HERE / "template.jinja"
        self.n = 0
        self.chosen = {}  # stage: (PyTorch's fastest type, what that rests on)

    def data(self, rows, seq_len):
        """A file with just enough problems for `rows` rows, so that an epoch has that many."""
        out = self.work / f"{rows}x{seq_len}.jsonl"
        if not out.exists():
            all_lines = self.work / "all.jsonl"
            all_lines.write_text("".join(self.lines))
            # In a process of its own, which takes the memory of what it imports with it: see `measured`.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                n = process.submit(problems_for, rows, seq_len, self.model, all_lines, self.template).result()
            out.write_text("".join(self.lines[:n]))
        return out

    def measured(self, call, env=(), limit=None):
        """Run to the end; peak resident memory of the process in MiB, None where it took longer than `limit` seconds.

        Linux takes what this process holds when it starts another for the first peak of that one, so it must hold less.
        """
        self.n += 1
        log = self.work / f"{self.n}.log"
        with log.open("w") as f:
            p = subprocess.Popen([str(c) for c in call], stdout=f, stderr=subprocess.STDOUT,
                                 env={**os.environ, "HF_HUB_OFFLINE": "1", **dict(env)})
            timer = threading.Timer(limit or threading.TIMEOUT_MAX, p.kill)
            timer.daemon = True
            timer.start()
            began = time.monotonic()
            _, status, usage = os.wait4(p.pid, 0)
            timer.cancel()
        if status != 0 and limit and time.monotonic() - began >= limit:
            return None
        if status != 0:
            raise SystemExit(f"{' '.join(map(str, call))}\nfailed with status {status}:\n{log.read_text()[-3000:]}")
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert usage.ru_maxrss > own, f"a peak of {usage.ru_maxrss} KiB could be this process's own, {own} KiB"
        return usage.ru_maxrss / 1024

    def engine(self, case, steps, dtype, epochs=1, sae=None, layer=LAYER):
        """Tokens/s of each step, and the peak memory."""
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
        return [m["tokens_per_s"] for m in lines], rss

    def fastest_dtype(self, stage, sae):
        """PyTorch's fastest type for a stage, by two steps of the stage's smallest case in each (of Stage I the
        model cut after the layer), the second of which counts."""
        if stage not in self.chosen:
            case, speeds = CASES[FIRST[stage]], {}
            for dtype in sorted(self.a.torch_dtypes, reverse=True):  # f32 first, which needs no limit
                limit = LIMIT if speeds else None
                found = self.torch(case, 2, dtype, kept=True, truncated=stage == "sae", sae=sae, limit=limit)
                speeds[dtype] = found[0][1] if found else 0.0
            best = max(speeds, key=speeds.get)
            text = ", ".join(f"{d} {s:.0f} tokens/s" if s else f"{d} not done in {LIMIT} s" for d, s in speeds.items())
            self.chosen[stage] = best, f"{best}, of {text} (two steps{', cut after the layer' if stage == 'sae' else ''})"
        return self.chosen[stage][0]

    def torch(self, case, steps, dtype, kept, truncated=False, sae=None, save=None, limit=None):
        """Tokens/s of each step, and the peak memory; None where it took longer than `limit` seconds."""
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
        ], KEPT if kept else {}, limit)
        if rss is None:
            return None
        r = json.loads(out.read_text())["stage1" if stage == "sae" else "stage2"]
        return [r["tokens_per_step"] / s for s in r["seconds_per_step"]], rss


def opponents(bench, name, sae):
    """Programs to compare with: PyTorch in its fastest type for the stage, with both allocator settings."""
    stage = CASES[name][0]
    dtype = bench.fastest_dtype(stage, sae)
    for kept in (False, True):
        if kept or name in FIRST.values():
            yield f"PyTorch, {dtype}, {'kept' if kept else 'default'} malloc", dict(dtype=dtype, kept=kept)
    if stage == "sae":
        yield f"PyTorch cut after the layer, {dtype}, kept malloc", dict(dtype=dtype, kept=True, truncated=True)


def compare(bench, name, sae):
    """{program: ([tokens/s of each step], [peak MiB of each run])} over all repetitions."""
    case, a = CASES[name], bench.a
    found = {}

    def add(program, speeds, rss):
        s, m = found.setdefault(program, ([], []))
        s += speeds
        m.append(rss)

    programs = list(opponents(bench, name, sae))
    for _ in range(a.repeat):
        for dtype in a.dtypes:
            if case[0] == "sae":
                speeds, rss = bench.engine(case, a.steps, dtype)
                add(f"engine, {dtype}", speeds[1:], rss)
            else:
                speeds, rss = bench.engine(case, a.steps, dtype, epochs=2, sae=sae)
                add(f"engine, {dtype}, first epoch", speeds[1 : a.steps], rss)
                add(f"engine, {dtype}, from the cache", speeds[a.steps :], rss)
        for program, how in programs:
            speeds, rss = bench.torch(case, a.steps, sae=sae, **how)
            add(program, speeds[1:], rss)
        print(f"{name}: {found}", file=sys.stderr, flush=True)
    return found


def spread(speeds):
    return f"{statistics.median(speeds):.0f} ({min(speeds):.0f}–{max(speeds):.0f})"


def rows_of(name, found):
    """One case's rows of the table: the engine beside PyTorch at its best. Of PyTorch's settings
    the fastest counts for the speed and the smallest for the memory."""
    stage, rows, seq_len, latents = CASES[name]
    others = {p: v for p, v in found.items() if not p.startswith("engine")}
    cut = {p: v for p, v in others.items() if "cut" in p}
    whole = {p: v for p, v in others.items() if p not in cut}
    label = f"Stage {'I' if stage == 'sae' else 'II'}, {rows} x {seq_len}" + (f", {latents} latents" if latents != 8192 else "")
    for program, (speeds, memory) in found.items():
        if program in others:
            continue
        for group, note in ((whole, ""), (cut, ", PyTorch cut after the layer")):
            if not group:
                continue
            best, (other, _) = max(group.items(), key=lambda item: statistics.median(item[1][0]))
            least = min(max(m) for _, m in group.values())
            ratio = statistics.median(speeds) / statistics.median(other)
            yield (f"| {label}{program.removeprefix('engine')}{note} | {spread(speeds)} | {spread(other)} "
                   f"({best.split(', ', 1)[1]}) | **{ratio:.1f}** ({min(speeds) / max(other):.1f}–{max(speeds) / min(other):.1f}) "
                   f"| {max(memory):.0f} | {least:.0f} | {max(memory) / least:.2f} |")


def table(bench, sae):
    print("| | tokens/s | PyTorch's, at its best | times as fast | peak memory, MiB | PyTorch's, least | share |\n" + "|---" * 7 + "|", flush=True)
    measured = {}
    for name in bench.a.cases.split(","):
        measured[name] = compare(bench, name, sae)
        print("\n".join(rows_of(name, measured[name])), flush=True)
    print("\nMedian (least to most) of the steps; the ratio's range is from the engine's slowest step beside PyTorch's "
          "fastest to the reverse.\nPyTorch:")
    for stage, text in sorted(bench.chosen.items()):
        print(f"- Stage {'I' if stage == 'sae' else 'II'}: {text[1]}")
    for name, found in measured.items():
        for program, (speeds, memory) in found.items():
            if not program.startswith("engine"):
                print(f"- {name}, {program}: {spread(speeds)} tokens/s, {max(memory):.0f} MiB")
    sys.stdout.flush()


def scaling(bench, sae):
    print("\n| tokens a step | Stage I, ms a token | Stage II first epoch, ms a token | Stage II from cache, ms a token |")
    print("|---|---|---|---|")
    for seq_len in (256, 512, 1024, 2048):
        one, _ = bench.engine(("sae", 1, seq_len, 8192), bench.a.steps, "auto")
        two, _ = bench.engine(("sft", 1, seq_len, 8192), bench.a.steps, "auto", epochs=2, sae=sae)
        parts = [one[1:], two[1 : bench.a.steps], two[bench.a.steps :]]
        print(f"| {seq_len} | " + " | ".join(f"{1e3 / statistics.median(p):.2f}" for p in parts) + " |", flush=True)
    print("\n| layers of the model | Stage I, ms a token |\n|---|---|")
    for layers in (4, 8, 16, 24):
        speeds, _ = bench.engine(("sae", 1, 1024, 8192), bench.a.steps, "auto", layer=layers - 1)
        print(f"| {layers} | {1e3 / statistics.median(speeds[1:]):.3f} |", flush=True)


def machine():
    name = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")), platform.machine())
    torch, transformers = map(metadata.version, ("torch", "transformers"))
    return (f"{name}, {len(os.sched_getaffinity(0))} cores; torch {torch}, transformers {transformers}; "
            f"{time.strftime('%Y-%m-%d')}; load before {os.getloadavg()[0]:.2f}")


def types(known):
    def parse(text):
        found = text.split(",")
        if set(found) - known:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(sorted(known))}, found {text}")
        return found

    return parse


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    env = os.environ.get
    ap.add_argument("--repeat", type=int, default=2)
    ap.add_argument("--steps", type=int, default=4, help="steps of a run, the first of them warm-up")
    ap.add_argument("--cases", default="sae-4x512,sft-1x512,sft-1x2048", help=f"of {','.join(CASES)} (default: all but 18432 latents)")
    ap.add_argument("--dtypes", type=types({"auto", *DTYPES}), default=["auto"], help="the engine's types: auto, bf16, f32, with commas")
    ap.add_argument("--torch-dtypes", type=types(set(DTYPES)), default=["bf16", "f32"], help="PyTorch's types that the fastest is taken from")
    ap.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    ap.add_argument("--scaling", action="store_true", help="also time the engine for 256 to 2048 tokens a step and 4 to 24 layers")
    ap.add_argument("--bin", type=Path, default=Path(env("RESA_BIN", REPO / "target/release/resa-engine")))
    ap.add_argument("--assets", type=Path, default=Path(env("RESA_ASSETS", REPO / "target/assets")))
    a = ap.parse_args()
    unknown = set(a.cases.split(",")) - set(CASES)
    if unknown:
        ap.error(f"unknown case {', '.join(sorted(unknown))}; known: {', '.join(CASES)}")
    if a.steps < 2 or a.repeat < 1:
        ap.error("--steps must be at least 2 and --repeat at least 1")
    print(f"{machine()}; {a.threads} threads; {a.repeat} x {a.steps - 1} timed steps\n", flush=True)
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(a, work)
        sae = Path(work) / "sae"
        bench.torch(CASES["sae-4x512"], 2, "f32", kept=True, truncated=True, save=sae)
        table(bench, sae)
        if a.scaling:
            scaling(bench, sae)


if __name__ == "__main__":
    main()
