"""What llama.cpp predicts with our files, on text that comes with Python."""

from __future__ import annotations

from pathlib import Path

import pytest
from peers import llama_quantize
from typer.testing import CliRunner

from jquant.evaluation import Settings, compare, open_file
from jquant.evaluation.metrics import Scores
from jquant.text.samples import Text
from jquant_cli.demo import package_model
from jquant_cli.main import app

pytestmark = pytest.mark.slow


def scores(files: list[Path], chunks: int) -> list[Scores]:
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))[:20_000]
    settings = Settings(engine="llama.cpp", chunks=chunks)
    rows = compare(list(map(open_file, files)), settings, text=Text("pydoc", text.encode())).rows
    return [row.scores for row in rows]


def quantize(model: Path, out: Path, kind: str) -> Path:
    result = CliRunner().invoke(app, ["quantize", str(model), str(out), "--type", kind, "-q"])
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct at 16 bits."""
    return quantize(package_model(), tmp_path_factory.mktemp("smol") / "f16.gguf", "F16")


def test_q8_0_predicts_as_well_as_f16(original, tmp_path):
    files = [original, quantize(original, tmp_path / "q8.gguf", "Q8_0")]
    base, q8 = scores(files, chunks=2)
    # A few hundred tokens tell no finer: benchmarks/quality.py holds the 0.5% on a whole text.
    assert q8.perplexity.value == pytest.approx(base.perplexity.value, rel=0.02)
    assert q8.kld.value < 0.02


def test_k_types_stay_closer_to_the_original_than_llama_cpps(original, tmp_path):
    # The model's rows of 576 fall back; ffn_down alone is a K type, so the mixture is one of Q3_K there.
    ours = quantize(original, tmp_path / "ours.gguf", "Q3_K_S")
    theirs = tmp_path / "theirs.gguf"
    llama_quantize(original, theirs, "Q3_K_S", threads=2)
    assert ours.stat().st_size == theirs.stat().st_size
    _, mine, peer = scores([original, ours, theirs], chunks=3)
    assert mine.kld.value < peer.kld.value
