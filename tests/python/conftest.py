"""Fixtures of the interchange tests: the built binary, the example, the real model.

RESA_BIN     the binary (default: target/release/resa-engine)
RESA_ASSETS  what tests/setup_python.sh made (default: target/assets)
"""
from pathlib import Path

import pytest

from support import ASSETS, BIN, EXAMPLE, SAE_STEPS, SFT_STEPS, engine


def pytest_sessionstart(session):
    if not BIN.is_file():
        pytest.exit(f"{BIN} is missing: cargo build --release, or set RESA_BIN", returncode=2)
    if not (ASSETS / "smollm2" / "config.json").is_file():
        pytest.exit(f"{ASSETS}/smollm2 is missing: run tests/setup_python.sh", returncode=2)


@pytest.fixture(scope="session")
def example_run(tmp_path_factory) -> Path:
    """A short run of both stages on the example pair, with an adapter far from the identity."""
    out = tmp_path_factory.mktemp("example") / "run"
    engine(
        "train", "--source", EXAMPLE / "source", "--target", EXAMPLE / "target",
        "--data", EXAMPLE / "problems.jsonl", "--template", EXAMPLE / "template.jinja",
        "--layer", 2, "--latents", 256, "--k", 8, "--seq-len", 256, "--sae-batch", 4, "--sft-batch", 1,
        "--max-sae-steps", SAE_STEPS, "--max-sft-steps", SFT_STEPS, "--lr", "2e-3", "--lora-r", 8,
        "--lora-alpha", 16, "--dtype", "f32", "--out", out,
    )
    return out
