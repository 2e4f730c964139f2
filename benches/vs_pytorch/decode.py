#!/usr/bin/env python3
"""Time one-token decoding of the engine, of transformers and of llama.cpp, in turns, and print a Markdown table.

Model SmolLM2-135M-Instruct, one prompt, greedy, the same number of new tokens, key/value cache on both sides, the
first token (the prompt) not counted. Every turn is one generation of each program; transformers stays loaded, the
engine is a process of its own each time and counts without its start. Beside tokens/s stands the share of the memory
bandwidth's floor: bytes of the weights that a token needs (each once), over the bandwidth at which this machine
sums up an array of that size with as many threads. llama.cpp runs the same weights, where the Python of a virtual
environment that has it as a wheel is named (at batch 1 alone; it counts as the engine does, without its start):

    python decode.py --repeat 5 --batch 1      # run.sh first, which builds
    python3 -m venv target/llama && target/llama/bin/pip install --only-binary :all: xllamacpp==2026.10.11549
    python decode.py --llama target/llama/bin/python
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
PROMPT = "Write a long story about a lighthouse keeper and the sea."
SIZES = {"f32": 4, "bf16": 2}


class Torch:
    def __init__(self, folder, dtype, a):
        kind = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
        self.lm = AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()
        tok = PreTrainedTokenizerFast.from_pretrained(folder)
        text = tok.apply_chat_template([{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True)
        self.prompt = tok(text, add_special_tokens=False)["input_ids"]
        self.ids = torch.tensor([self.prompt] * a.batch)
        self.a = a

    @torch.inference_mode()
    def rate(self):
        """Tokens/s between a generation of one token and one of all."""
        seconds = []
        for n in (1, self.a.tokens):
            start = time.perf_counter()
            out = self.lm.generate(self.ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, use_cache=True,
                                   pad_token_id=0)
            seconds.append(time.perf_counter() - start)
            assert out.shape[1] == self.ids.shape[1] + n
        return self.a.batch * (self.a.tokens - 1) / (seconds[1] - seconds[0])


def engine(dtype, a):
    out = subprocess.run([str(part) for part in (
        a.bin, "generate", "--model", a.assets / "smollm2", "--prompt", PROMPT, "--temperature", 0, "--ignore-eos",
        "--max-new-tokens", a.tokens, "--samples", a.batch, "--batch", a.batch, "--dtype", dtype,
        "--threads", a.threads, "--json")], capture_output=True, text=True, check=True).stdout
    first = json.loads(out.splitlines()[0])
    assert len(first["tokens"]) == a.tokens
    return first["decode_tokens_per_s"]


def llama(model, prompt, a):
    out = subprocess.run([str(part) for part in (
        a.llama, HERE / "llama_decode.py", "--model", model, "--prompt", prompt, "--tokens", a.tokens,
        "--threads", a.threads)], capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])["tokens_per_s"]


def bandwidth(size, threads):
    """Bytes/s of the fastest of several sums over an array of `size` bytes."""
    data = torch.ones(size // 4)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return size / best


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--repeat", type=int, default=5)
    ap.add_argument("--tokens", type=int, default=128, help="new tokens of a generation")
    ap.add_argument("--batch", type=int, default=1, help="sequences at a time")
    ap.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    ap.add_argument("--llama", type=Path, help="Python that has xllamacpp")
    ap.add_argument("--bin", type=Path, default=Path(os.environ.get("RESA_BIN", REPO / "target/release/resa-engine")))
    ap.add_argument("--assets", type=Path, default=Path(os.environ.get("RESA_ASSETS", REPO / "target/assets")))
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    print(f"{a.threads} threads, batch {a.batch}, {a.tokens} tokens, {a.repeat} turns; "
          f"load before {os.getloadavg()[0]:.2f}\n")
    print("| weights | program | tokens/s, median (min–max) | engine ÷ this, of the turns | share of the bandwidth floor |")
    print("|---|---|---|---|---|")
    for dtype, size in SIZES.items():
        peer = Torch(a.assets / "smollm2", dtype, a)
        # The embedding is tied to the head, so every weight is read once a step, whatever the batch.
        weights = size * sum(p.numel() for p in peer.lm.parameters())
        speed = bandwidth(weights, a.threads)
        programs = {"engine": lambda: engine(dtype, a), "transformers": peer.rate}
        with tempfile.TemporaryDirectory() as folder:
            if a.llama and a.batch == 1:
                model = Path(folder) / "model.gguf"
                subprocess.run([sys.executable, HERE / "to_gguf.py", "--model", a.assets / "smollm2", "--out", model,
                                "--dtype", dtype], check=True)
                programs["llama.cpp"] = lambda: llama(model, peer.prompt, a)
            turns = [{name: rate() for name, rate in programs.items()} for _ in range(a.repeat)]
        for program in programs:
            rates = [turn[program] for turn in turns]
            ratios = sorted(turn["engine"] / turn[program] for turn in turns)
            share = statistics.median(rates) / a.batch * weights / speed
            ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})" if program != "engine" else ""
            print(f"| {dtype} | {program} | {statistics.median(rates):.1f} ({min(rates):.1f}–{max(rates):.1f}) | {ratio} | "
                  f"{share:.2f} of {speed / 1e9:.1f} GB/s |", flush=True)


if __name__ == "__main__":
    main()
