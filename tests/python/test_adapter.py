"""The adapter that `train` writes, read by peft; the model that `merge` writes, read by transformers."""
import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open

from support import EXAMPLE, close, engine, head_of, mean_nll, model, packed, perplexity

TARGET, TEMPLATE, SEQ_LEN = EXAMPLE / "target", EXAMPLE / "template.jinja", 256


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return head_of(EXAMPLE / "problems.jsonl", 200, tmp_path_factory.mktemp("data") / "200.jsonl")


@pytest.fixture(scope="module")
def with_adapter(example_run):
    return PeftModel.from_pretrained(model(TARGET), example_run / "adapter").eval()


def test_peft_loads_the_adapter_and_gives_the_engines_loss(example_run, with_adapter, text):
    rows = packed(TARGET, text, TEMPLATE, SEQ_LEN)
    ours = perplexity(TARGET, text, TEMPLATE, SEQ_LEN, "--adapter", example_run / "adapter")
    theirs = mean_nll(with_adapter, rows)
    close(ours["mean_nll"], theirs, 1e-4)
    with with_adapter.disable_adapter():
        without = mean_nll(with_adapter, rows)
    assert abs(theirs - without) > 1e-2 * without, "the adapter changes too little to tell anything"


def test_only_trained_layers_are_in_the_adapter(example_run):
    cfg = json.loads((example_run / "adapter" / "adapter_config.json").read_text())
    assert sorted(cfg["layers_to_transform"]) == [3, 4, 5]
    with safe_open(str(example_run / "adapter" / "adapter_model.safetensors"), "pt") as f:
        layers = {int(name.split(".layers.")[1].split(".")[0]) for name in f.keys()}
        assert layers == {3, 4, 5}
        assert len(list(f.keys())) == 3 * 7 * 2


def test_transformers_loads_the_merged_model_with_pefts_logits(example_run, with_adapter, text, tmp_path):
    engine("merge", "--model", TARGET, "--adapter", example_run / "adapter", "--out", tmp_path / "merged")
    ids = packed(TARGET, text, TEMPLATE, SEQ_LEN)[:2]
    # the merged weights are rounded to the base's bfloat16, so peft's are rounded as well
    theirs = PeftModel.from_pretrained(model(TARGET), example_run / "adapter").merge_and_unload()
    for p in theirs.parameters():
        p.data = p.data.bfloat16().float()
    with torch.no_grad():
        got, want = model(tmp_path / "merged")(ids).logits, theirs(ids).logits
    assert float((got - want).norm() / want.norm()) < 1e-3
    close(perplexity(tmp_path / "merged", text, TEMPLATE, SEQ_LEN)["mean_nll"],
          mean_nll(model(tmp_path / "merged"), packed(TARGET, text, TEMPLATE, SEQ_LEN)), 1e-4)


def test_a_merged_model_keeps_config_and_tokenizer(example_run, tmp_path):
    engine("merge", "--model", TARGET, "--adapter", example_run / "adapter", "--out", tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (TARGET / name).read_bytes()
    old, new = (json.loads((d / "config.json").read_text()) for d in (TARGET, tmp_path / "merged"))
    assert old == new
    with safe_open(str(tmp_path / "merged" / "model.safetensors"), "pt") as new:
        with safe_open(str(TARGET / "model.safetensors"), "pt") as old:
            assert set(new.keys()) == set(old.keys())
            assert all(new.get_slice(n).get_dtype() == old.get_slice(n).get_dtype() for n in old.keys())
