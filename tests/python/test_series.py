"""Step by step the same numbers as plain PyTorch on a real model, from the same start, in float32; and
what bf16 does to them."""
import json
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from support import PROBLEMS, SMOLLM2, TEMPLATE, VS_PYTORCH, engine, head_of, metrics

LAYER, STEPS, SEQ_LEN, TOLERANCE = 12, 5, 256, 5e-3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return head_of(PROBLEMS, 120, tmp_path_factory.mktemp("data") / "120.jsonl")


@pytest.fixture(scope="module")
def pytorch(data, tmp_path_factory):
    """Both stages by benches/vs_pytorch/baseline.py, which also writes its starting points."""
    dir = tmp_path_factory.mktemp("pytorch")
    subprocess.run([
        sys.executable, VS_PYTORCH / "baseline.py", "--model", SMOLLM2, "--data", data, "--layer", str(LAYER),
        "--num-latents", "4096", "--k", "32", "--seq-len", str(SEQ_LEN), "--batch", "4", "--steps1", str(STEPS),
        "--stage1-forward", "truncated", "--batch2", "2", "--steps2", str(STEPS), "--lr2", "1e-4",
        "--save-init-sae", dir / "init_sae", "--save-init-lora", dir / "init_lora", "--save-sae", dir / "sae",
        "--dtype", "float32", "--out", dir / "out.json",
    ], check=True, stdout=subprocess.DEVNULL)
    return dir, json.loads((dir / "out.json").read_text())


def check(name, got, want):
    assert len(got) == len(want) == STEPS
    worst = max(abs(g - w) / abs(w) for g, w in zip(got, want))
    assert worst < TOLERANCE, f"{name}: engine {got}, PyTorch {want}"


def common(data, out, dtype="f32"):
    return ["--source", SMOLLM2, "--target", SMOLLM2, "--data", data, "--template", TEMPLATE, "--layer", LAYER,
            "--seq-len", SEQ_LEN, "--dtype", dtype, "--device", "cpu", "--out", out]


def test_stage_one_gives_pytorchs_fvu_for_five_steps(pytorch, data, tmp_path):
    start, want = pytorch
    engine("train", "--stage", "sae", "--sae-init", "finetune", "--sae", start / "init_sae", "--sae-batch", 4,
           "--max-sae-steps", STEPS, *common(data, tmp_path / "run"))
    check("FVU", [m["fvu"] for m in metrics(tmp_path / "run", "sae")], want["stage1"]["fvu"])


def test_stage_two_gives_pytorchs_kl_gradient_norm_and_error_for_five_steps(pytorch, data, tmp_path):
    start, want = pytorch
    engine("train", "--stage", "sft", "--sae", start / "sae", "--adapter", start / "init_lora", "--lora-dropout", 0,
           "--lr", "1e-4", "--sft-batch", 2, "--max-sft-steps", STEPS, *common(data, tmp_path / "run"))
    found, want = metrics(tmp_path / "run", "sft"), want["stage2"]
    check("KL", [m["kl"] for m in found], want["kl_batchmean"])
    check("gradient norm", [m["grad_norm"] for m in found], want["grad_norm"])
    check("reconstruction error", [m["sae_mse"] for m in found], want["recon_mse"])


def test_reconstruction_in_bf16_is_within_two_percent_of_that_in_f32_for_twenty_steps(pytorch, data, tmp_path):
    """Of the tokens that are no sinks, and of all tokens while the FVU is above 0.1. Later the FVU of all tokens cannot be
    held to this: small differences grow, in float32 too, where a start from weights rounded to bf16 is enough to leave
    the 2 %. How far bf16 is from float32 then is not compared."""
    start, _ = pytorch
    sae = load_file(start / "init_sae" / "sae.safetensors")
    rounded = tmp_path / "rounded"
    rounded.mkdir()
    shutil.copy(start / "init_sae" / "cfg.json", rounded)
    save_file({name: t.bfloat16().float() for name, t in sae.items()}, rounded / "sae.safetensors")

    def series(name, dtype, init):
        engine("train", "--stage", "sae", "--sae-init", "finetune", "--sae", init, "--sae-batch", 2, "--sae-epochs", 2,
               "--max-sae-steps", 20, *common(data, tmp_path / name, dtype))
        return metrics(tmp_path / name, "sae")

    exact = series("f32", "f32", start / "init_sae")
    narrow, nudged = series("bf16", "bf16", start / "init_sae"), series("nudged", "f32", rounded)
    assert len(exact) == len(narrow) == 20

    def apart(found, field):
        return max(abs(m[field] / e[field] - 1) for m, e in zip(found, exact))

    assert 0 < apart(narrow, "fvu_no_sinks") < 0.02
    large = [i for i, m in enumerate(exact) if m["fvu"] > 0.1]
    assert max(abs(narrow[i]["fvu"] / exact[i]["fvu"] - 1) for i in large) < 0.02
    assert apart(nudged, "fvu") > 0.02, "float32 holds its course: then bf16 should be asked to as well"
