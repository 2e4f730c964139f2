"""What the interchange tests share: calling the engine, and the same text in PyTorch."""
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on a busy machine
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

REPO = Path(__file__).resolve().parents[2]
VS_PYTORCH = REPO / "benches" / "vs_pytorch"
sys.path.insert(0, str(VS_PYTORCH))

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import baseline

BIN = Path(os.environ.get("RESA_BIN", REPO / "target" / "release" / "resa-engine")).absolute()
ASSETS = Path(os.environ.get("RESA_ASSETS", REPO / "target" / "assets")).absolute()
EXAMPLE = REPO / "tests" / "fixtures" / "example"
SMOLLM2 = ASSETS / "smollm2"
PROBLEMS = ASSETS / "problems.jsonl"
TEMPLATE = VS_PYTORCH / "template.jinja"
SAE_STEPS, SFT_STEPS = 12, 12


def engine(*args) -> str:
    """Standard output of one call of the binary; its standard error is in the failure message."""
    call = [str(BIN), *map(str, args)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{' '.join(call)}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def metrics(run: Path, stage: str) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if r["stage"] == stage]


def tokenizer(folder: Path):
    """AutoTokenizer would put its own pre-tokenizer in place of a qwen2 folder's tokenizer.json."""
    return PreTrainedTokenizerFast.from_pretrained(folder)


def model(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def packed(folder: Path, data: Path, template: Path, seq_len: int) -> torch.Tensor:
    return baseline.pack(baseline.load_texts(data, template), tokenizer(folder), seq_len)


def head_of(data: Path, lines: int, out: Path) -> Path:
    """The first `lines` records of a JSON Lines file as a file of its own."""
    out.write_text("".join(data.read_text().splitlines(keepends=True)[:lines]))
    return out


@torch.no_grad()
def mean_nll(lm, rows: torch.Tensor) -> float:
    """Negative log-likelihood, in nats, of every token but the first of its row."""
    total = 0.0
    for row in rows.split(4):
        logits = lm(row).logits[:, :-1]
        total += float(F.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten(), reduction="none").double().sum())
    return total / (rows.shape[0] * (rows.shape[1] - 1))


def insert_sae(lm, layer: int, sae):
    """Replace the output of decoder layer `layer` by its reconstruction; the handle takes it out again."""

    def hook(_, __, output):
        h = baseline.first_tensor(output)
        rec = sae(h.flatten(0, 1)).sae_out.view_as(h)
        return (rec,) + output[1:] if isinstance(output, tuple) else rec

    return lm.model.layers[layer].register_forward_hook(hook)


def perplexity(model_dir: Path, data: Path, template: Path, seq_len: int, *more) -> dict:
    out = engine("eval", "--perplexity", "--json", "--model", model_dir, "--data", data,
                 "--template", template, "--seq-len", seq_len, "--dtype", "f32", *more)
    return json.loads(out)


def close(got: float, want: float, tolerance: float):
    assert abs(got - want) <= tolerance * abs(want), f"{got} is not within {tolerance} of {want}"
