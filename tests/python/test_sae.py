"""The SAE that `train` writes, read by sparsify."""
import json

import pytest
import torch
from sparsify import SparseCoder

from baseline import layer_output
from support import EXAMPLE, close, engine, head_of, insert_sae, mean_nll, metrics, model, packed, perplexity

LAYER, SEQ_LEN = 2, 256
SOURCE, TARGET, TEMPLATE = EXAMPLE / "source", EXAMPLE / "target", EXAMPLE / "template.jinja"
DATA = EXAMPLE / "problems.jsonl"


@pytest.fixture(scope="module")
def folder(example_run):
    return example_run / "sae" / f"model.layers.{LAYER}"


def test_sparsify_reads_the_configuration(folder):
    sae = SparseCoder.load_from_disk(folder)
    assert (sae.num_latents, sae.cfg.k, sae.d_in) == (256, 8, 96)
    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg["activation"] == "topk" and not cfg["transcode"] and not cfg["skip_connection"]


def test_the_engine_and_sparsify_give_the_same_fvu_for_a_saved_sae(folder, tmp_path):
    """--sae-init finetune sets b_dec to the first batch's mean and the decoder rows to unit norm."""
    engine("train", "--stage", "sae", "--source", SOURCE, "--target", TARGET, "--data", DATA,
           "--template", TEMPLATE, "--layer", LAYER, "--sae-init", "finetune", "--sae", folder,
           "--seq-len", SEQ_LEN, "--sae-batch", 4, "--max-sae-steps", 1, "--dtype", "f32", "--out", tmp_path / "run")
    ours = metrics(tmp_path / "run", "sae")[0]["fvu"]
    x = layer_output(model(SOURCE), LAYER, packed(SOURCE, DATA, TEMPLATE, SEQ_LEN)[:4], True)
    sae = SparseCoder.load_from_disk(folder)
    sae.b_dec.data = x.mean(0)
    sae.set_decoder_norm_to_unit_norm()
    with torch.no_grad():
        close(ours, float(sae(x).fvu), 1e-4)


def test_a_model_with_the_saved_sae_inserted_has_sparsifys_loss(folder, tmp_path):
    text = head_of(DATA, 200, tmp_path / "200.jsonl")
    ours = perplexity(TARGET, text, TEMPLATE, SEQ_LEN, "--sae", folder, "--layer", LAYER)
    lm, rows = model(TARGET), packed(TARGET, text, TEMPLATE, SEQ_LEN)
    plain = mean_nll(lm, rows)
    with torch.no_grad():
        insert_sae(lm, LAYER, SparseCoder.load_from_disk(folder))
        theirs = mean_nll(lm, rows)
    close(ours["mean_nll"], theirs, 1e-4)
    assert abs(theirs - plain) > 1e-2 * plain, "the SAE changes too little to tell anything"


def test_the_reconstruction_error_logged_in_tuning_is_sparsifys(folder, example_run):
    x = layer_output(model(TARGET), LAYER, packed(TARGET, DATA, TEMPLATE, SEQ_LEN)[:1], True)
    with torch.no_grad():
        error = (SparseCoder.load_from_disk(folder)(x).sae_out - x).pow(2).mean()
    close(metrics(example_run, "sft")[0]["sae_mse"], float(error), 1e-4)
