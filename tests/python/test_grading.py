"""The table of graded answers beside math-verify's verdicts: where they differ, the table says why."""
from math_verify import parse, verify

from support import REPO


def test_every_difference_from_math_verify_is_explained():
    rows = [line.split("\t") for line in (REPO / "tests/fixtures/grading.tsv").read_text().splitlines()[1:]]
    assert len(rows) >= 200
    wrong = []
    for right, given, verdict, why in rows:
        theirs = "same" if verify(parse(f"${right}$"), parse(f"${given}$")) else "different"
        if (theirs != verdict) != bool(why):
            wrong.append(f"{right}   {given}   table: {verdict}   math-verify: {theirs}   {why}")
    assert not wrong, "\n".join(wrong)
