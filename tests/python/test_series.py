"""Step by step the same numbers as plain PyTorch on a real model, from the same start, in float32; and
in bf16 the same to 2 %."""
import json
import subprocess
import sys

import pytest

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


def test_fvu_in_bf16_is_within_one_percent_of_that_in_f32_for_eight_steps(data, tmp_path):
    """Later, at an FVU of a few percent, the sign steps oscillate and bf16 takes another course: FVU was then up to
    22 % apart at single steps within 20. Stage II has been seen 10 % apart within 8 steps and is not compared."""
    options = ["--latents", 4096, "--k", 32, "--sae-batch", 1, "--sae-epochs", 2, "--max-sae-steps", 8]
    series = {}
    for dtype in ("bf16", "f32"):
        run = tmp_path / dtype
        engine("train", "--stage", "sae", *options, *common(data, run, dtype))
        series[dtype] = [m["fvu"] for m in metrics(run, "sae")]
    assert len(series["f32"]) == 8
    worst = max(abs(n - w) / w for n, w in zip(series["bf16"], series["f32"]))
    assert 0 < worst < 0.01, series
