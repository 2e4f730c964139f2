"""What a run leaves behind, and what the example prints, read by other tools."""
import math
import re
import tomllib

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support import EXAMPLE, SAE_STEPS, SFT_STEPS, engine, metrics


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """`resa-engine train` with no option but the folder."""
    out = tmp_path_factory.mktemp("default") / "run"
    return out, engine("train", "--out", out)


def test_metrics_have_every_step_of_both_stages(example_run):
    sae, sft = metrics(example_run, "sae"), metrics(example_run, "sft")
    assert (len(sae), len(sft)) == (SAE_STEPS, SFT_STEPS)
    for rows, batch in ((sae, 4), (sft, 1)):
        assert [r["step"] for r in rows] == list(range(1, len(rows) + 1))
        assert [r["tokens"] for r in rows] == [256 * batch * r["step"] for r in rows]
    common = {"stage", "step", "epoch", "tokens", "seconds", "tokens_per_s", "lr"}
    assert common | {"fvu", "dead_fraction"} <= set(sae[0])
    assert common | {"kl", "kl_per_token", "sae_mse", "grad_norm"} <= set(sft[0])
    assert all(math.isfinite(v) for r in sae + sft for v in r.values() if isinstance(v, (int, float)))
    assert all(abs(r["kl"] / 256 - r["kl_per_token"]) <= 1e-6 * r["kl"] for r in sft)


def test_tensorboard_reads_the_curves(example_run):
    events = EventAccumulator(str(example_run))
    events.Reload()
    tags = events.Tags()["scalars"]
    for key, stage in (("fvu", "sae"), ("kl_per_token", "sft")):
        tag = [t for t in tags if t.endswith(f"/{key}") or t == key]
        assert len(tag) == 1, f"{key} not among {tags}"
        want = [m[key] for m in metrics(example_run, stage)]
        assert [s.value for s in events.Scalars(tag[0])] == pytest.approx(want, rel=1e-6)


def test_the_configuration_written_is_toml_and_complete(example_run):
    config = tomllib.loads((example_run / "config.toml").read_text())
    given = {"dtype": "f32", "seq-len": 256, "latents": 256, "k": 8, "sae-batch": 4, "sft-batch": 1, "lr": 2e-3,
             "lora-r": 8, "lora-alpha": 16, "max-sae-steps": SAE_STEPS, "max-sft-steps": SFT_STEPS}
    not_given = {"lora-dropout": 0.05, "clip": 1.0, "weight-decay": 0.01, "seed": 42, "sae-grad": "stop"}
    for key, value in (given | not_given).items():
        assert config[key] == value, key


def test_the_example_runs_with_no_option_and_leaves_its_files(example):
    out, _ = example
    for name in ("config.toml", "metrics.jsonl", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"):
        assert (out / name).is_file(), name
    assert len(list((out / "sae").glob("model.layers.*/sae.safetensors"))) == 1
    assert len(list((out / "checkpoints").glob("step-*"))) >= 1


def test_the_examples_stages_do_their_work(example):
    out, _ = example
    fvu = [m["fvu"] for m in metrics(out, "sae")]
    kl = [m["kl_per_token"] for m in metrics(out, "sft")]
    assert sum(fvu[-10:]) / 10 < 0.5 * fvu[0]
    assert sum(kl[-10:]) / 10 < 0.5 * kl[0]


def test_the_example_ends_with_its_table(example):
    _, printed = example
    for word in ("FVU", "KL", "Pass@1"):
        assert re.search(re.escape(word), printed), f"{word} not in\n{printed}"
