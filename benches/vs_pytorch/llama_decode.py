#!/usr/bin/env python3
"""One greedy generation by llama.cpp: tokens/s after the first token, and the text, as JSON.

Run by decode.py with the Python that has xllamacpp, llama.cpp as a wheel with the kernels for every level of SIMD.
"""
import argparse
import json

import xllamacpp as xlc


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", required=True)
    ap.add_argument("--prompt", type=json.loads, required=True, help="token ids")
    ap.add_argument("--tokens", type=int, required=True)
    ap.add_argument("--threads", type=int, required=True)
    a = ap.parse_args()
    params = xlc.CommonParams()
    params.model.path = a.model
    params.n_ctx = len(a.prompt) + a.tokens + 8
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.warmup = True
    params.cpuparams.n_threads = a.threads
    params.cpuparams_batch.n_threads = a.threads
    found = xlc.Server(params).handle_completions({
        "prompt": a.prompt, "n_predict": a.tokens, "temperature": 0.0, "ignore_eos": True,
        "cache_prompt": False, "stream": False,
    })
    found = json.loads(found) if isinstance(found, str) else found
    timings = found["timings"]
    assert timings["predicted_n"] == a.tokens, timings
    print(json.dumps({"tokens_per_s": timings["predicted_per_second"], "text": found["choices"][0]["text"]}))


if __name__ == "__main__":
    main()
