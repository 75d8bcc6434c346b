"""Options of `jquant quantize` that settle types together: each keeps its place in the order."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
from helpers.commands import attempt
from helpers.shapes import WIDE
from helpers.tiny_models import write_tiny

from jquant.checkpoints.weights import Weights
from jquant.core import bits_per_weight
from jquant.io import GgufSource
from jquant_cli import _errors

TARGET = 750_000
PROTECTED, PLACE = "blk.1.ffn_down.weight", (3, 5)
PROFILE = f"""
[[rule]]
match = "blk.0.attn_v"
type = "Q5_K"

[[rule]]
match = "attn_output"
type = "Q5_K"

[[rule]]
role = "mlp"
max = "Q4_K"

[[protect]]
layer = 1
row = {PLACE[0]}
column = {PLACE[1]}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "llama", "LlamaForCausalLM", **WIDE)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    """A profile and a text."""
    at = tmp_path_factory.mktemp("inputs")
    profile, text = at / "mine.toml", at / "text.txt"
    profile.write_text(PROFILE)
    text.write_text("There was once a little girl who lived in a small house. " * 300)
    return profile, text


def tensor_types(file: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(str(file)).tensors}


def test_target_profile_rules_super_weights_importance_and_check_in_one_run(folder, inputs, tmp_path):
    profile, text = inputs
    out = tmp_path / "out.gguf"
    options = ["--target-size", f"{TARGET}B", "--profile", profile, "--rule", "blk.0.attn_v=Q8_0", "--check"]
    options += ["--analyze", "--protect-super-weights", "-c", text, "--samples", 8, "--sequence-length", 32]
    done = attempt("quantize", folder, out, *options, "--json", "-q")
    assert done.exit_code == _errors.INCOHERENT, done.output  # random weights write no sense
    report, types = json.loads(done.stdout), tensor_types(out)
    assert not report["check"]["passed"]
    assert 0.99 * TARGET < out.stat().st_size <= TARGET
    assert types["blk.0.attn_v.weight"] == "Q8_0"  # the rule, before the profile
    assert all(types[f"blk.{i}.attn_output.weight"] == "Q5_K" for i in (0, 1))  # the profile
    found = {f"blk.{w['block']}.{w['tensor']}.weight" for w in report["super_weights"]}
    lifted = {t["name"] for t in report["tensors"] if "protected" in t["reason"]}
    assert PROTECTED in lifted <= found | {PROTECTED}
    assert all(bits_per_weight(types[name]) >= bits_per_weight("Q6_K") for name in lifted)
    rest = [name for name in types if ".ffn_" in name and "norm" not in name and name not in lifted]
    assert rest
    assert all(bits_per_weight(types[name]) <= bits_per_weight("Q4_K") for name in rest)
    about = json.loads(str(GgufSource(out).metadata["jquant.recipe"]))
    assert about["target"] == f"{TARGET} bytes"
    assert about["rules"] == ["blk.0.attn_v=Q8_0"]
    assert list(PLACE) in about["protected"][PROTECTED]
    assert GgufSource(out).metadata["quantize.imatrix.dataset"]


@pytest.mark.parametrize("target", [(), ("--target-bpw", 5)], ids=["file type", "target"])
@pytest.mark.parametrize(("named", "expected"), [("Q8_0", "Q8_0"), ("Q4_K", "Q6_K")])
def test_protection_lifts_what_a_rule_names_and_never_lowers_it(
    folder, inputs, tmp_path, target, named, expected
):
    out = tmp_path / "out.gguf"
    rule = f"{PROTECTED.removesuffix('.weight')}={named}"
    done = attempt("quantize", folder, out, "--profile", inputs[0], "--rule", rule, *target, "-q")
    assert done.exit_code == 0, done.output
    assert tensor_types(out)[PROTECTED] == expected


def test_a_super_weight_that_a_profile_names_is_kept_almost_exactly(folder, inputs, tmp_path):
    out, plain = tmp_path / "out.gguf", tmp_path / "plain.gguf"
    options = ("--type", "Q2_K", "--profile", inputs[0], "--protection-type", "Q2_K")
    assert attempt("quantize", folder, out, *options, "-q").exit_code == 0
    assert attempt("quantize", folder, plain, "--type", "F32", "-q").exit_code == 0
    before = Weights(GgufSource(plain)).tensor(PROTECTED)[PLACE]
    after = Weights(GgufSource(out)).tensor(PROTECTED)[PLACE]
    assert after == pytest.approx(before, rel=0.02)


@pytest.mark.parametrize(
    ("place", "what"),
    [("layer = 9\nrow = 0", "is not in the model"), ("layer = 1\nrow = 999", r"has shape [256, 512]")],
)
def test_a_super_weight_of_another_model_is_refused(folder, tmp_path, place, what):
    profile, out = tmp_path / "other.toml", tmp_path / "out.gguf"
    profile.write_text(f"[[protect]]\n{place}\ncolumn = 0\n")
    done = attempt("quantize", folder, out, "--profile", profile, "-q")
    assert done.exit_code == _errors.INPUT
    assert "other.toml" in done.stderr
    assert what in " ".join(done.stderr.split())
    assert not out.exists()
