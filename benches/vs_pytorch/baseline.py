#!/usr/bin/env python3
"""The two stages of SAE-Tuning in plain PyTorch on a CPU or a GPU, step by step, timed.

Stage I   a TopK SAE is trained on the residual output of model.layers[L].
Stage II  the SAE is frozen and put in place of that layer's output; LoRA
          weights are trained so that the student's logits follow the
          teacher's (the same model, adapter off, SAE off).

This is a reference to measure against and to check losses with.  It follows
the published procedure ("Resa: Transparent Reasoning Models via SAEs",
arXiv 2506.09967), with the whole language model and dense gradients of the
top-k, as the authors' code has them.

    python baseline.py --model DIR --data FILE.jsonl --layer 12 \
        --num-latents 8192 --seq-len 512 --batch 4 --steps1 6 --steps2 0 \
        --dtype float32 --save-sae SAEDIR --out stage1.json
    python baseline.py --model DIR --data FILE.jsonl --layer 12 \
        --sae SAEDIR --seq-len2 2048 --batch2 1 --steps1 0 --steps2 6 \
        --dtype float32 --out stage2.json
"""
import argparse
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

import jinja2
import torch
import torch.nn.functional as F
from torch import nn

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# ----------------------------------------------------------------- data

def load_texts(path, template):
    """One text a problem: the final answer alone, in the thinking format."""
    template = jinja2.Template(Path(template).read_text(encoding="utf-8"))
    with open(path, encoding="utf-8") as f:
        return [template.render(json.loads(line)) for line in f]


def pack(texts, tok, seq_len, docs_per_block=2048):
    """GPT-style packing: EOS before every text, rows of exactly seq_len tokens.

    Each block of 2048 texts is one string; its last row is dropped.
    Where the tokenizer adds a BOS, every row starts with one.
    """
    rows = []
    bos = tok("")["input_ids"]
    size = seq_len - len(bos)
    for i in range(0, len(texts), docs_per_block):
        joined = tok.eos_token.join([""] + texts[i : i + docs_per_block])
        ids = tok(joined, verbose=False)["input_ids"][len(bos) :]
        rows += [bos + ids[j : j + size] for j in range(0, len(ids) - size, size)]
    assert rows, "not enough text"
    return torch.tensor(rows, dtype=torch.long)


# ------------------------------------------------------------------ SAE

class TopKSae(nn.Module):
    """TopK SAE with the plain autograd path, as the authors' code has it.

    The gradient of the top-k is a dense [tokens, latents] matrix, so both
    encoder gradients are dense matrix products.
    """

    def __init__(self, d_in, num_latents, k):
        super().__init__()
        self.d_in, self.num_latents, self.k = d_in, num_latents, k
        self.encoder = nn.Linear(d_in, num_latents, dtype=torch.float32)
        self.encoder.bias.data.zero_()
        self.W_dec = nn.Parameter(self.encoder.weight.data.clone())
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.unit_norm_decoder()

    @torch.no_grad()
    def unit_norm_decoder(self):
        eps = torch.finfo(torch.float32).eps  # the SAE is trained in float32
        self.W_dec.data /= self.W_dec.data.norm(dim=1, keepdim=True) + eps

    @torch.no_grad()
    def drop_parallel_grad(self):
        g, w = self.W_dec.grad, self.W_dec.data
        g -= (g * w).sum(1, keepdim=True) * w

    def encode(self, x):
        # out of place, so that the model's own tensor stays as it is
        pre = torch.relu(self.encoder(x.to(self.W_dec.dtype) - self.b_dec))
        return pre.topk(self.k, dim=-1, sorted=False)

    def decode(self, acts, idx):
        return F.embedding_bag(
            idx, self.W_dec, per_sample_weights=acts.to(self.W_dec.dtype), mode="sum"
        ) + self.b_dec

    def forward(self, x, want_loss=True):
        acts, idx = self.encode(x)
        out = self.decode(acts, idx)
        fvu = (up(x - out).pow(2).sum() / total_variance(x)) if want_loss else None
        return out, idx, fvu


def up(t):
    """Sums of squares are not taken in 16 bits."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def total_variance(x):
    return up(x - x.mean(0)).pow(2).sum()


def sae_state(sae):
    return {
        "encoder.weight": sae.encoder.weight.data,
        "encoder.bias": sae.encoder.bias.data,
        "W_dec": sae.W_dec.data,
        "b_dec": sae.b_dec.data,
    }


def save_sae(sae, path):
    from safetensors.torch import save_file

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous().clone() for n, t in sae_state(sae).items()}, str(path / "sae.safetensors"))
    cfg = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True,
        "num_latents": sae.num_latents, "k": sae.k, "multi_topk": False,
        "skip_connection": False, "transcode": False, "d_in": sae.d_in,
    }
    (path / "cfg.json").write_text(json.dumps(cfg))


def load_sae(path):
    from safetensors.torch import load_file

    cfg = json.loads((Path(path) / "cfg.json").read_text())
    n = cfg["num_latents"] or cfg["d_in"] * cfg["expansion_factor"]
    sae = TopKSae(cfg["d_in"], n, cfg["k"])
    state = load_file(str(Path(path) / "sae.safetensors"))
    with torch.no_grad():
        for name, t in sae_state(sae).items():
            t.copy_(state[name])
    return sae


class SignSGD(torch.optim.Optimizer):
    """Base of signum; ScheduleFreeWrapper supplies the momentum."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for g in self.param_groups:
            for p in g["params"]:
                if p.grad is not None:
                    p.add_(p.grad.sign(), alpha=-g["lr"])


def signum_schedule_free(params, lr, momentum=0.95):
    from schedulefree import ScheduleFreeWrapper

    opt = ScheduleFreeWrapper(SignSGD([{"params": list(params), "lr": lr}]), momentum=momentum)
    opt.train()
    return opt


def default_sae_lr(num_latents):
    return 5e-3 / math.sqrt(num_latents / 2**14)


# ------------------------------------------------------------- plumbing

def cpu_jiffies():
    """(busy, stolen) clock ticks of the whole machine; None where unknown."""
    try:
        v = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        return v[0] + v[1] + v[2] + v[5] + v[6], v[7]
    except (OSError, ValueError, IndexError):
        return None


class Clock:
    """Wall seconds of every step and of its parts; notes what else the CPUs did."""

    def __init__(self, device):
        self.device = device
        self.steps, self.parts = [], []
        self.cpu0, self.own0, self.wall0 = cpu_jiffies(), time.process_time(), time.perf_counter()

    def start(self):
        self.t0 = time.perf_counter()
        self.cur = {}

    @contextmanager
    def part(self, name):
        t = time.perf_counter()
        yield
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.cur[name] = self.cur.get(name, 0.0) + time.perf_counter() - t

    def stop(self):
        self.steps.append(time.perf_counter() - self.t0)
        self.parts.append(self.cur)

    def summary(self, warmup, tokens):
        s = self.steps[warmup:] or self.steps
        p = self.parts[warmup:] or self.parts
        mean = sum(s) / len(s)
        noise, cpu = {}, cpu_jiffies()
        if cpu and self.cpu0:
            hz, wall = os.sysconf("SC_CLK_TCK"), time.perf_counter() - self.wall0
            own = time.process_time() - self.own0
            noise = {
                "cores_stolen": (cpu[1] - self.cpu0[1]) / hz / wall,
                "cores_used_by_others": ((cpu[0] - self.cpu0[0]) / hz - own) / wall,
                "cores_used": own / wall,
            }
        return {
            "seconds_per_step": self.steps,
            "warmup_steps": warmup,
            "mean_seconds": mean,
            "median_seconds": statistics.median(s),
            "min_seconds": min(s),
            "max_seconds": max(s),
            "tokens_per_step": tokens,
            "tokens_per_second": tokens / statistics.median(s),
            "cpu": noise,
            "median_parts": {k: statistics.median(q[k] for q in p) for k in p[0]},
        }


def peak_memory(device):
    gpu = {"peak_gpu_mib": torch.cuda.max_memory_reserved() / 2**20} if device == "cuda" else {}
    return {"peak_rss_mib": peak_rss_mib(), **gpu}


def peak_rss_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class StopForward(Exception):
    pass


def first_tensor(output):
    """Decoder layers give a tensor in transformers 5, a tuple before."""
    return output[0] if isinstance(output, tuple) else output


def layer_output(model, layer, ids, truncated):
    got = []

    def hook(_, __, output):
        got.append(first_tensor(output))
        if truncated:
            raise StopForward

    h = model.model.layers[layer].register_forward_hook(hook)
    try:
        with torch.no_grad():
            model(ids)
    except StopForward:
        pass
    finally:
        h.remove()
    return got[0].flatten(0, 1)


def load_model(path, dtype, device):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").to(device)
    model.requires_grad_(False)
    return model.eval()


# -------------------------------------------------------------- Stage I

def stage1(a, model, rows, dtype):
    d = model.config.hidden_size
    torch.manual_seed(a.seed)
    sae = TopKSae(d, a.num_latents, a.k).to(a.device)
    if a.init_sae:
        start = sae_state(load_sae(a.init_sae))
        for name, t in sae_state(sae).items():
            t.copy_(start[name])
    if a.save_init_sae:
        save_sae(sae, a.save_init_sae)
    lr = a.lr1 or default_sae_lr(a.num_latents)
    opt = signum_schedule_free(sae.parameters(), lr)
    low = dtype == torch.bfloat16
    last_fired = torch.zeros(a.num_latents, dtype=torch.long, device=a.device)
    clock, losses, x = Clock(a.device), [], None
    for step in range(a.steps1):
        i = step * a.batch
        ids = rows[i : i + a.batch]
        assert len(ids) == a.batch, "data too short for the steps"
        clock.start()
        ids = ids.to(a.device)
        with clock.part("lm_forward"):
            x = layer_output(model, a.layer, ids, a.stage1_forward == "truncated")
        with clock.part("sae_forward"):
            if step == 0:
                sae.b_dec.data = x.mean(0).to(torch.float32)
            sae.unit_norm_decoder()
            # the reference wraps this in bf16 autocast
            with torch.autocast(a.device, dtype=torch.bfloat16) if low else nullcontext():
                _, idx, fvu = sae(x)
            losses.append(float(fvu.detach()))
        with clock.part("sae_backward"):
            fvu.backward()
        with clock.part("sae_optimizer"):
            sae.drop_parallel_grad()
            opt.step()
            opt.zero_grad()
            last_fired += ids.numel()
            last_fired[idx.flatten()] = 0
        clock.stop()
        print(f"stage1 {step} fvu {losses[-1]:.6f} {clock.steps[-1]:.3f} s", flush=True)
    res = {
        "fvu": losses, "lr": lr,
        "lm_forward": a.stage1_forward, "num_latents": a.num_latents, "k": a.k,
        "latents_fired_in_last_step": int((last_fired == 0).sum()),
        **clock.summary(a.warmup, a.batch * a.seq_len), **peak_memory(a.device),
    }
    opt.eval()  # the averaged weights are what is kept
    return sae, res


# ------------------------------------------------------------- Stage II

def stage2(a, model, sae, rows, dtype):
    from peft import LoraConfig, PeftModel, TaskType, get_peft_model

    torch.manual_seed(a.seed)
    cfg = LoraConfig(r=a.lora_r, lora_alpha=a.lora_alpha, lora_dropout=a.lora_dropout,
                     target_modules=LORA_TARGETS, bias="none", task_type=TaskType.CAUSAL_LM)
    if a.init_lora:
        peft_model = PeftModel.from_pretrained(model, a.init_lora, is_trainable=True)
    else:
        peft_model = get_peft_model(model, cfg)  # adapter weights are float32 by default
    if a.save_init_lora:
        peft_model.save_pretrained(a.save_init_lora)
    params = [p for p in peft_model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=a.lr2)
    frozen = TopKSae(sae.d_in, sae.num_latents, sae.k)
    with torch.no_grad():
        for name, t in sae_state(frozen).items():
            t.copy_(sae_state(sae)[name])
    frozen = frozen.to(a.device, dtype).eval().requires_grad_(False)

    state = {"on": False, "keep": None}

    def hook(_, __, output):
        h = first_tensor(output)
        if not state["on"]:
            state["keep"] = h.detach().clone() if a.recon_log else None
            return None
        with torch.no_grad():
            rec = frozen(h.reshape(-1, h.shape[-1]))[0].reshape(h.shape)
        return (rec,) + output[1:] if isinstance(output, tuple) else rec

    handle = model.model.layers[a.layer].register_forward_hook(hook)
    peft_model.train()
    clock, losses, norms, recon = Clock(a.device), [], [], []
    for step in range(a.steps2):
        i = step * a.batch2
        ids = rows[i : i + a.batch2]
        assert len(ids) == a.batch2, "data too short for the steps"
        clock.start()
        ids = ids.to(a.device)
        opt.zero_grad()
        with clock.part("teacher_forward"), torch.no_grad(), peft_model.disable_adapter():
            state["on"] = False
            logits = peft_model(ids).logits
            probs = logits.softmax(-1).to(logits.dtype)
        if a.recon_log:
            with clock.part("recon_log"), torch.no_grad():
                h = state["keep"].flatten(0, 1)
                recon.append(float(F.mse_loss(frozen(h)[0], h)))
        with clock.part("student_forward"):
            state["on"] = True
            logp = F.log_softmax(peft_model(ids).logits, dim=-1)
        with clock.part("loss"):
            loss = F.kl_div(logp, probs, reduction="batchmean", log_target=False)
            losses.append(float(loss.detach()))
        with clock.part("backward"):
            loss.backward()
        with clock.part("clip_and_adamw"):
            norms.append(float(nn.utils.clip_grad_norm_(params, 1.0)))
            opt.step()
        del logits, logp, probs, loss
        clock.stop()
        print(f"stage2 {step} kl {losses[-1]:.5f} grad {norms[-1]:.4f} {clock.steps[-1]:.3f} s", flush=True)
    handle.remove()
    tokens = a.batch2 * a.seq_len2
    with_grad = [n for n, p in peft_model.named_parameters() if p.requires_grad]
    res = {
        "kl_batchmean": losses, "kl_per_token": [v / a.seq_len2 for v in losses],
        "grad_norm": norms, "recon_mse": recon, "lr": a.lr2,
        "lora": {"r": a.lora_r, "alpha": a.lora_alpha, "dropout": a.lora_dropout,
                 "tensors": len(with_grad), "parameters": sum(p.numel() for p in params)},
        "num_latents": sae.num_latents, "k": sae.k,
        **clock.summary(a.warmup, tokens), **peak_memory(a.device),
    }
    if a.save_lora:
        peft_model.save_pretrained(a.save_lora)
    return res


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", required=True, help="Hugging Face folder")
    ap.add_argument("--data", required=True, help="JSON Lines of problem and answer")
    ap.add_argument("--template", default=Path(__file__).resolve().parent / "template.jinja",
                    help="Jinja; default: template.jinja beside this file")
    ap.add_argument("--layer", type=int, default=12)
    ap.add_argument("--num-latents", type=int, default=8192)
    ap.add_argument("--k", type=int, default=32)
    ap.add_argument("--seq-len", type=int, default=512)
    ap.add_argument("--batch", type=int, default=4)
    ap.add_argument("--seq-len2", type=int, help="Stage II (default: --seq-len)")
    ap.add_argument("--batch2", type=int, default=1)
    ap.add_argument("--steps1", type=int, default=6)
    ap.add_argument("--steps2", type=int, default=6)
    ap.add_argument("--warmup", type=int, default=1, help="steps left out of the means")
    ap.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    ap.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    ap.add_argument("--stage1-forward", choices=["full", "truncated"], default="full",
                    help="full: the whole LM with its logits, as the reference does; truncated: stop after --layer")
    ap.add_argument("--lr1", type=float, help="default 5e-3/sqrt(num_latents/2^14)")
    ap.add_argument("--lr2", type=float, default=1e-6)
    ap.add_argument("--lora-r", type=int, default=32)
    ap.add_argument("--lora-alpha", type=int, default=128)
    ap.add_argument("--lora-dropout", type=float, default=0.0)
    ap.add_argument("--no-recon-log", dest="recon_log", action="store_false",
                    help="leave out the extra SAE pass that only logs a reconstruction error")
    ap.add_argument("--sae", help="SAE directory for Stage II when --steps1 0")
    ap.add_argument("--init-sae", help="Stage I starts from this SAE (b_dec is set from the first batch all the same)")
    ap.add_argument("--save-init-sae", help="write Stage I's starting point here")
    ap.add_argument("--init-lora", help="Stage II starts from this PEFT adapter")
    ap.add_argument("--save-init-lora", help="write Stage II's starting point here")
    ap.add_argument("--save-sae")
    ap.add_argument("--save-lora")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--seed", type=int, default=42)
    ap.add_argument("--out", help="JSON")
    a = ap.parse_args()
    a.seq_len2 = a.seq_len2 or a.seq_len

    torch.set_num_threads(a.threads)
    from transformers import PreTrainedTokenizerFast
    import peft
    import transformers

    dtype = getattr(torch, a.dtype)
    load_before = os.getloadavg()[0]
    # AutoTokenizer would replace the pre-tokenizer of tokenizer.json for qwen2
    tok = PreTrainedTokenizerFast.from_pretrained(a.model)
    texts = load_texts(a.data, a.template)
    model = load_model(a.model, dtype, a.device)
    result = {
        "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "peft": peft.__version__},
        "threads": torch.get_num_threads(),
        "load_average_before": load_before,
        "rss_after_load_mib": peak_rss_mib(),
    }
    sae = None
    if a.steps1:
        rows = pack(texts, tok, a.seq_len)
        result["rows_stage1"] = len(rows)
        sae, result["stage1"] = stage1(a, model, rows, dtype)
        if a.save_sae:
            save_sae(sae, a.save_sae)
    if a.steps2:
        if sae is None:
            if a.sae:
                sae = load_sae(a.sae)
            else:
                torch.manual_seed(a.seed)
                sae = TopKSae(model.config.hidden_size, a.num_latents, a.k).to(a.device)
        rows = pack(texts, tok, a.seq_len2)
        result["rows_stage2"] = len(rows)
        result["stage2"] = stage2(a, model, sae, rows, dtype)
    if a.out:
        Path(a.out).parent.mkdir(parents=True, exist_ok=True)
        Path(a.out).write_text(json.dumps(result, indent=1))
    for s in ("stage1", "stage2"):
        if s in result:
            r = result[s]
            print(f"{s}: median {r['median_seconds']:.3f} mean {r['mean_seconds']:.3f} s/step, "
                  f"{r['tokens_per_second']:.0f} tokens/s, peak RSS {r['peak_rss_mib']:.0f} MiB, peak GPU {r.get('peak_gpu_mib', 0):.0f} MiB, parts "
                  + ", ".join(f"{k} {v:.3f}" for k, v in r["median_parts"].items())
                  + "; cpu " + ", ".join(f"{k} {v:.2f}" for k, v in r["cpu"].items()))


if __name__ == "__main__":
    sys.exit(main())
