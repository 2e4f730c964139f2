#!/usr/bin/env python3
"""Makes tests/data/fixtures: what the Python tools say about tokenising, packing, templates, Parquet.

    python tests/data/make_fixtures.py PROBLEMS.jsonl

Needs transformers, tokenizers, jinja2 and pyarrow. PROBLEMS.jsonl is any file of
{"problem", "answer"} lines; its first 40 go into the fixtures.
"""
import decimal
import json
import sys
from pathlib import Path

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent / "fixtures"
SEQ_LEN = 67
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ODD = [
    "Caf\u00e9 cafe\u0301 \u212b \ufb01 na\u00efve",
    "\u4f60\u597d\uff0c\u4e16\u754c 2 + 2 = ?",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 emoji\u3000wide",
    "  two  spaces\n\n\n three lines \t\r\n end ",
    "\u0301 starts with a combining mark",
    "ends with spaces   ",
    "<eos> inside <eos>text",
    "it's we'LL 12345 x^2\u00b2 \u00bd \\frac{1}{2}",
]


def byte_level(texts, eos):
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN2), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=420, special_tokens=[eos, "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    return tok


def metaspace(texts):
    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tok.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "<eos>"] + [f"<0x{b:02X}>" for b in range(256)],
        show_progress=False))
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tok


def load_all(records):
    texts = [f"{r['problem']} {r['answer']}" for r in records]
    yield "byte_level", byte_level(texts, "<eos>"), {"eos_token": "<eos>", "pad_token": "<pad>"}
    yield "metaspace_bos", metaspace(texts), {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False,
                      "rstrip": False, "single_word": False},
        "eos_token": "<eos>", "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}
    eos = AddedToken("<eos>", lstrip=True, rstrip=True, special=True)
    yield "strip_eos", byte_level(texts, eos), {"eos_token": "<eos>"}


def pack(texts, tok, seq_len):
    """As the authors of Resa do it: one block, its last short row dropped."""
    joined = tok.eos_token.join([""] + texts)
    rows = tok(joined, max_length=seq_len, truncation=True, return_overflowing_tokens=True)["input_ids"]
    # A full last row, which the authors drop as well, would not show what "short" means.
    assert len(rows[-1]) < seq_len and all(len(r) == seq_len for r in rows[:-1])
    return rows[:-1]


def write_tokenizers(records):
    problems = [r["problem"] for r in records] + ODD
    for name, tok, config in load_all(records):
        folder = HERE / name
        folder.mkdir(parents=True, exist_ok=True)
        tok.save(str(folder / "tokenizer.json"), pretty=False)
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1_000_000}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        fast = PreTrainedTokenizerFast.from_pretrained(folder)
        ids = [fast(text, add_special_tokens=False)["input_ids"] for text in problems]
        expected = {
            "ids": ids,
            "ids_special": [fast(text)["input_ids"] for text in problems],
            "decoded": [fast.decode(i, skip_special_tokens=True) for i in ids],
            "eos_id": fast.eos_token_id,
            "bos_id": fast.bos_token_id if config.get("add_bos_token") else None,
            "length": len(fast),
            "seq_len": SEQ_LEN,
            "rows": pack(problems, fast, SEQ_LEN),
        }
        (folder / "expected.json").write_text(json.dumps(expected, separators=(",", ":")))
    (HERE / "texts.json").write_text(json.dumps(problems))


def write_templates(records):
    cases = [
        "{{ problem }}|{{ question }}|{{ answer }}\n",
        "line\n{% if problem %}yes{% endif %}\n{{ answer }}\n\n",
        "a\r\nb {{ answer | upper }} <b>&\"'\r\n",
        "{% set p = problem | trim %}{{ p }}{# note #} -{{- answer }}",
        "{% for c in ['x', 'y'] -%} {{ loop.index }}{{ c }} {%- endfor %} {{ problem }} {{ answer }}",
    ]
    record = {"problem": " What is <b>1 & 1</b>? \u4f60\n", "answer": "2 & 'two'"}
    values = record | {"question": record["problem"]}
    out = [{"template": c, "text": jinja2.Environment().from_string(c).render(values)} for c in cases]
    (HERE / "templates.json").write_text(json.dumps({"record": record, "cases": out}))


def write_parquet(records):
    problems, answers = [r["problem"] for r in records], [r["answer"] for r in records]
    extra = [[{"role": "user", "content": p}] for p in problems]
    table = pa.table({"id": list(range(len(records))), "question": problems, "messages": extra, "answer": answers})
    for codec in ["snappy", "zstd", "gzip", "brotli", "lz4", "none"]:
        pq.write_table(table.slice(0, 15), HERE / f"{codec}.parquet", compression=codec, row_group_size=6, write_statistics=False)
    numbers = {
        "int64": pa.array([1, -2, 2**62]), "int8": pa.array([1, -2, 3], pa.int8()), "uint32": pa.array([1, 2, 4_000_000_000], pa.uint32()),
        "double": pa.array([0.1, -2.0, 1e-7]), "float": pa.array([0.5, -2.0, 3.25], pa.float32()),
        "decimal": pa.array([decimal.Decimal(x) for x in ("1.50", "-2.25", "0.01")]), "large": pa.array(["a", "b", "c"], pa.large_string()),
        "binary": pa.array([b"a", b"b", b"c"]), "dictionary": pa.array(["a", "b", "a"]).dictionary_encode(),
    }
    for name, column in numbers.items():
        pq.write_table(pa.table({"problem": ["p", "q", "r"], "answer": column}), HERE / f"answer_{name}.parquet")
    wrong = {
        "null": pa.array(["1", None, "3"]), "bool": pa.array([True, False, True]), "list": pa.array([["1"], ["2"], ["3"]]),
        "date": pa.array([1, 2, 3], pa.date32()), "latin1": pa.array([b"a", b"\xe9", b"c"]), "blank": pa.array(["1", " ", "3"]),
    }
    for name, column in wrong.items():
        pq.write_table(pa.table({"problem": ["p", "q", "r"], "answer": column}), HERE / f"wrong_{name}.parquet")


def main():
    HERE.mkdir(exist_ok=True)
    with open(sys.argv[1], encoding="utf-8") as f:
        records = [json.loads(line) for line, _ in zip(f, range(40))]
    write_tokenizers(records)
    write_templates(records)
    write_parquet(records)
    (HERE / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:15]))


if __name__ == "__main__":
    main()
