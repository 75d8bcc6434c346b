"""Options of `jquant quantize` that settle types together: each keeps its place in the order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import gguf
import pytest
from helpers.commands import attempt
from helpers.shapes import WIDE
from helpers.tiny_models import write_tiny

from jquant.checkpoints.weights import Weights
from jquant.core import bits_per_weight
from jquant.io import GgufSource
from jquant_cli import _errors

PROTECTED, PLACE = "blk.1.ffn_down.weight", (3, 5)
PROFILE = """
[[rule]]
match = "blk.0.attn_v"
type = "{some}"

[[rule]]
match = "attn_output"
type = "{some}"

[[rule]]
role = "mlp"
max = "{few}"

[[protect]]
layer = 1
row = {place[0]}
column = {place[1]}
"""


class Case(NamedTuple):
    """A model, the types that its rows hold, and a size for it."""

    sizes: dict[str, int]
    target: int
    some: str  # of attention, by the profile
    few: str  # at most, of the rest, by the profile
    lifted: str  # what super weights are protected with
    text: str = "There was once a little girl who lived in a small house. " * 300


CASES = {
    "narrow": Case({}, 99_300, "Q5_0", "Q4_0", "Q8_0"),
    "wide": Case(WIDE, 750_000, "Q5_K", "Q4_K", "Q6_K"),
}


@pytest.fixture(scope="module", params=["narrow", pytest.param("wide", marks=pytest.mark.slow)])
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "llama", "LlamaForCausalLM", **case.sizes)


@pytest.fixture(scope="module")
def inputs(case, tmp_path_factory) -> tuple[Path, Path]:
    """A profile and a text."""
    at = tmp_path_factory.mktemp("inputs")
    profile, text = at / "mine.toml", at / "text.txt"
    profile.write_text(PROFILE.format(some=case.some, few=case.few, place=PLACE))
    text.write_text(case.text)
    return profile, text


def tensor_types(file: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(str(file)).tensors}


def test_target_profile_rules_super_weights_importance_and_check_in_one_run(case, folder, inputs, tmp_path):
    profile, text = inputs
    out = tmp_path / "out.gguf"
    options = [
        "--target-size",
        f"{case.target}B",
        "--profile",
        profile,
        "--rule",
        "blk.0.attn_v=Q8_0",
        "--check",
    ]
    options += ["--analyze", "--protect-super-weights", "-c", text, "--samples", 8, "--sequence-length", 32]
    done = attempt("quantize", folder, out, *options, "--json", "-q")
    assert done.exit_code == _errors.INCOHERENT, done.output  # random weights write no sense
    report, types = json.loads(done.stdout), tensor_types(out)
    assert not report["check"]["passed"]
    assert 0.99 * case.target < out.stat().st_size <= case.target
    assert types["blk.0.attn_v.weight"] == "Q8_0"  # the rule, before the profile
    assert all(types[f"blk.{i}.attn_output.weight"] == case.some for i in (0, 1))  # the profile
    found = {f"blk.{w['block']}.{w['tensor']}.weight" for w in report["super_weights"]}
    lifted = {t["name"] for t in report["tensors"] if "protected" in t["reason"]}
    assert PROTECTED in lifted <= found | {PROTECTED}
    assert all(bits_per_weight(types[name]) >= bits_per_weight(case.lifted) for name in lifted)
    rest = [name for name in types if ".ffn_" in name and "norm" not in name and name not in lifted]
    assert rest
    assert all(bits_per_weight(types[name]) <= bits_per_weight(case.few) for name in rest)
    about = json.loads(str(GgufSource(out).metadata["jquant.recipe"]))
    assert about["target"] == f"{case.target} bytes"
    assert about["rules"] == ["blk.0.attn_v=Q8_0"]
    assert list(PLACE) in about["protected"][PROTECTED]
    assert GgufSource(out).metadata["quantize.imatrix.dataset"]


@pytest.mark.parametrize("target", [(), ("--target-bpw", 6)], ids=["file type", "target"])
@pytest.mark.parametrize("named", ["more", "few"])
def test_protection_lifts_what_a_rule_names_and_never_lowers_it(
    case, folder, inputs, tmp_path, target, named
):
    named, expected = ("F16", "F16") if named == "more" else (case.few, case.lifted)
    out = tmp_path / "out.gguf"
    rule = f"{PROTECTED.removesuffix('.weight')}={named}"
    done = attempt("quantize", folder, out, "--profile", inputs[0], "--rule", rule, *target, "-q")
    assert done.exit_code == 0, done.output
    assert tensor_types(out)[PROTECTED] == expected


def test_a_super_weight_that_a_profile_names_is_kept_almost_exactly(case, folder, inputs, tmp_path):
    out, plain = tmp_path / "out.gguf", tmp_path / "plain.gguf"
    few = "Q2_K" if case.sizes else "Q4_0"
    options = ("--type", few, "--profile", inputs[0], "--protection-type", few)
    assert attempt("quantize", folder, out, *options, "-q").exit_code == 0
    assert attempt("quantize", folder, plain, "--type", "F32", "-q").exit_code == 0
    before = Weights(GgufSource(plain)).tensor(PROTECTED)[PLACE]
    after = Weights(GgufSource(out)).tensor(PROTECTED)[PLACE]
    assert after == pytest.approx(before, rel=0.02)


@pytest.mark.parametrize(
    ("place", "what"),
    [("layer = 9\nrow = 0", "is not in the model"), ("layer = 1\nrow = 999", "has shape {shape}")],
)
def test_a_super_weight_of_another_model_is_refused(case, folder, tmp_path, place, what):
    profile, out = tmp_path / "other.toml", tmp_path / "out.gguf"
    profile.write_text(f"[[protect]]\n{place}\ncolumn = 0\n")
    done = attempt("quantize", folder, out, "--profile", profile, "-q")
    assert done.exit_code == _errors.INPUT
    assert "other.toml" in done.stderr
    shape = [case.sizes.get("hidden_size", 64), case.sizes.get("intermediate_size", 96)]
    assert what.format(shape=shape) in " ".join(done.stderr.split())
    assert not out.exists()
