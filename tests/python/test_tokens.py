"""Token ids, packing and logits on real text equal to those of the Python tools."""
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support import EXAMPLE, PROBLEMS, SMOLLM2, TEMPLATE, close, head_of, mean_nll, model, packed, perplexity


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    return head_of(PROBLEMS, 30, tmp_path_factory.mktemp("data") / "30.jsonl")


def test_perplexity_of_a_real_model_on_packed_text_is_that_of_transformers(some):
    """A wrong id, a lost row or a wrong logit each move the mean by more than the tolerance."""
    rows = packed(SMOLLM2, some, TEMPLATE, 256)
    ours = perplexity(SMOLLM2, some, TEMPLATE, 256)
    assert ours["tokens"] == rows.shape[0] * (rows.shape[1] - 1)
    close(ours["mean_nll"], mean_nll(model(SMOLLM2), rows), 1e-4)


def test_unusual_text_is_tokenised_and_packed_as_the_python_tools_do(tmp_path):
    problems = [
        "What is 1234567 + 89?", "  two  spaces\t and a tab", "Café naïve — “quotes” … 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
        "日本語 と 한국어 и русский", "emoji 👩‍👩‍👧 🇪🇺 e\u0301", "line\nbreaks\r\n\n\nhere", "<think> inside </think>",
        "{{ not a template }} {% raw %}", "don't can't we'll I'M", "a" * 300, "x_1 = \\frac{1}{2}",
    ]
    lines = [json.dumps({"problem": p, "answer": str(i)}) for i, p in enumerate(problems * 3)]
    (tmp_path / "odd.jsonl").write_text("\n".join(lines) + "\n")
    for folder, template in ((SMOLLM2, TEMPLATE), (EXAMPLE / "target", EXAMPLE / "template.jinja")):
        rows = packed(folder, tmp_path / "odd.jsonl", template, 128)
        ours = perplexity(folder, tmp_path / "odd.jsonl", template, 128)
        assert ours["tokens"] == rows.shape[0] * (rows.shape[1] - 1)
        close(ours["mean_nll"], mean_nll(model(folder), rows), 1e-4)


def test_jsonl_json_and_parquet_hold_the_same_data(tmp_path):
    records = [json.loads(line) for line in (EXAMPLE / "problems.jsonl").read_text().splitlines()[:100]]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "d.json").write_text(json.dumps(records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "d.parquet", row_group_size=33)
    found = [perplexity(EXAMPLE / "target", tmp_path / f"d.{kind}", EXAMPLE / "template.jinja", 128)
             for kind in ("jsonl", "json", "parquet")]
    assert found[0] == found[1] == found[2]
    rows = packed(EXAMPLE / "target", tmp_path / "d.jsonl", EXAMPLE / "template.jinja", 128)
    close(found[0]["mean_nll"], mean_nll(model(EXAMPLE / "target"), rows), 1e-4)
