"""Profiles: what they select, what they change in a plan, and what is refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.commands import printed
from helpers.model_shapes import MODELS
from helpers.tiny_models import write_tiny
from typer.testing import CliRunner

from jquant.core import UserError, bits_per_weight
from jquant.plan import FILE_TYPES, parse_profile, plan, preset_names, preset_text, settle
from jquant.plan.mixtures import layer
from jquant.plan.selection import parse_layers, roles
from jquant_cli import _errors
from jquant_cli.main import app

MODEL = MODELS["llama-gqa4"]()
LAYERS = max(layer(name) for name in MODEL.specs) + 1


def types(text: str, file_type: str = "Q4_K_M", **options) -> dict[str, str]:
    profile = parse_profile(text, "mine.toml")
    made = plan(MODEL.specs, MODEL.metadata, file_type, profile=profile, has_imatrix=True, **options)
    return {entry.name: entry.type for entry in made.entries}


def refusal(text: str) -> str:
    with pytest.raises(UserError) as caught:
        types(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "of_ten"),
    [
        ("first 2", [0, 1]),
        ("last 3", [7, 8, 9]),
        ("0-3", [0, 1, 2, 3]),
        ("7", [7]),
        ("first 25%", [0, 1]),
        ("last 10%", [9]),
        ("50%-70%", [5, 6]),
    ],
)
def test_layer_ranges_hold_for_these_of_ten_layers(text, of_ten):
    assert [i for i in range(10) if parse_layers(text).holds(i, 10)] == of_ten


def test_shares_that_cover_the_depth_hold_for_every_layer_once():
    parts = [parse_layers(text) for text in ("first 30%", "30%-55%", "last 45%")]
    for count in range(1, 100):
        assert all(sum(part.holds(i, count) for part in parts) == 1 for i in range(count))


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("blk.3.attn_qkv.weight", "attention"),
        ("blk.3.ffn_up.weight", "mlp"),
        ("blk.3.ffn_up_shexp.weight", "mlp"),
        ("blk.3.ffn_up_exps.weight", "expert"),
        ("token_embd.weight", "embedding"),
        ("output.weight", "output"),
    ],
)
def test_the_role_of_a_tensor_follows_from_its_name(name, role):
    assert roles(name, is_tied=False) == {role}


def test_tied_embeddings_are_the_output_too():
    assert roles("token_embd.weight", is_tied=True) == {"embedding", "output"}


def test_a_rule_with_a_type_settles_what_it_selects_and_nothing_else():
    # Q4_0 files count no layers: a mixture that does shifts its types over the tensors that are left.
    before = types("", "Q4_0")
    after = types('[[rule]]\nrole = "attention"\nlayers = "first 1"\ntype = "Q8_0"', "Q4_0")
    for name in before:
        expected = "Q8_0" if name.startswith("blk.0.attn_") and "norm" not in name else before[name]
        assert after[name] == expected, name


def test_bounds_lift_and_lower_the_types_of_the_mixture():
    text = 'max = "Q5_K"\n[[rule]]\nrole = "mlp"\nmin = "Q6_K"'
    for name, type in types(text).items():
        if "ffn_" in name and "norm" not in name:
            assert type == "Q6_K", name
        elif type != "F32":
            assert bits_per_weight(type) <= bits_per_weight("Q5_K"), name


def test_the_first_rule_that_holds_wins():
    text = "[[rule]]\nmatch = 'blk.0.ffn_up'\ntype = \"Q8_0\"\n[[rule]]\nmatch = 'ffn_up'\ntype = \"Q3_K\""
    got = types(text)
    assert (got["blk.0.ffn_up.weight"], got["blk.1.ffn_up.weight"]) == ("Q8_0", "Q3_K")


def test_a_rule_of_the_command_line_beats_the_profile():
    from jquant.plan import parse_rule

    got = types('[[rule]]\nrole = "mlp"\ntype = "Q8_0"', rules=[parse_rule("ffn_up=Q2_K")])
    assert (got["blk.1.ffn_up.weight"], got["blk.1.ffn_down.weight"]) == ("Q2_K", "Q8_0")


def test_protected_super_weights_are_read_as_positions():
    text = "[[protect]]\nlayer = 1\nrow = 2070\ncolumn = 7310"
    assert parse_profile(text, "mine.toml").protect == ((1, 2070, 7310),)


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("model", ["llama-gqa4", "mixtral"])
def test_presets_suit_dense_and_expert_models(name, model):
    profile = parse_profile(preset_text(name), name)
    assert profile.about
    assert profile.file_type in FILE_TYPES
    header = MODELS[model]()
    made = plan(header.specs, header.metadata, profile.file_type, profile=profile, has_imatrix=True)
    bounds = settle(header.specs, header.metadata, profile=profile, has_imatrix=True).bounds
    for entry in made.entries:
        if entry.name in bounds and entry.fallback_from is None:
            assert bounds[entry.name].violation(entry.type) is None, entry


def test_the_presets_are_those_that_the_documentation_names():
    assert preset_names() == ["attention-high", "balanced", "compression-max", "mlp-low"]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("\nmin = Q4_K\n", 2, "not valid TOML"),
        ('about = "x"\nmni = "Q4_K"', 2, "did you mean min?"),
        ('min = "Q4_K"\nmax = "Q2_K"', 1, "larger than max"),
        ('\n\nmin = "Q4K"', 3, "did you mean Q4_K"),
        ('file_type = "Q4_KK"', 1, "unknown file type"),
        ('[[rule]]\nrole = "mpl"\nmin = "Q4_K"', 2, "unknown role 'mpl'"),
        ('[[rule]]\nmatch = "("\ntype = "Q4_K"', 2, "unterminated"),
        ('# mine\n[[rule]]\nrole = "mlp"', 2, "asks for nothing"),
        ('[[rule]]\nmin = "Q4_K"\ntype = "Q6_K"', 3, "not both"),
        ('[[rule]]\nlayers = "3-1"\nmin = "Q4_K"', 2, "ends before it begins"),
        ('[[rule]]\nlayers = "first 0"\nmin = "Q4_K"', 2, "give a number from 1"),
        ('[[rule]]\nmatch = "nothing"\nmin = "Q4_K"', 1, "no tensor of this model"),
        (f'[[rule]]\nlayers = "{LAYERS}-200"\nmin = "Q4_K"', 1, f"has {LAYERS} layers"),
        (
            '[[rule]]\nrole = "mlp"\nmin = "Q4_K"\n\n[[rule]]\nmatch = "ffn_up"\nmax = "Q2_K"',
            5,
            "settled all",
        ),
        ('[[rule]]\nrole = "mlp"\nmin = "Q4_K"\n[[rule]]\nrole = "mlp"\nmin = "Q6_K"', 4, "same tensors"),
        ("[[protect]]\nlayer = 1\nrow = -1\ncolumn = 0", 3, "needs row"),
        ("[rule]\nmin = 3", 1, "two brackets"),
        ("min = 4", 1, "must be a string"),
    ],
)
def test_a_profile_that_is_not_sound_is_refused_with_file_and_line(text, line, what):
    message = refusal(text)
    assert message.startswith(f"mine.toml, line {line}: "), message
    assert what in message


def test_candidates_outside_the_bounds_are_refused():
    assert "no candidate" in refusal('max = "Q3_K"\ncandidates = ["Q4_K", "Q6_K"]')


def test_a_created_profile_is_the_preset_and_quantize_takes_it(tmp_path):
    model = write_tiny(tmp_path / "model", "LlamaForCausalLM", hidden_size=256, head_dim=64)
    mine = tmp_path / "mine.toml"
    printed("profile", "create", mine, "--from", "attention-high")
    assert mine.read_text() == preset_text("attention-high")
    assert printed("profile", "show", mine).rstrip() == preset_text("attention-high").rstrip()
    assert "sound" in printed("profile", "validate", mine, "--model", model)
    shown = json.loads(printed("quantize", model, "--profile", mine, "--dry-run", "--json", "-q"))
    got = {tensor["name"]: tensor["type"] for tensor in shown["tensors"]}
    assert shown["file_type"] == "Q4_K_M"
    assert (got["blk.0.attn_v.weight"], got["blk.0.attn_q.weight"]) == ("Q6_K", "Q5_K")


def test_create_does_not_replace_a_file(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text("precious")
    result = CliRunner().invoke(app, ["profile", "create", str(mine)])
    assert result.exit_code == _errors.OUTPUT
    assert mine.read_text() == "precious"


def test_a_preset_that_does_not_exist_is_answered_with_a_similar_one(tmp_path):
    out = tmp_path / "out.gguf"
    result = CliRunner().invoke(app, ["quantize", "model", str(out), "--profile", "balance"])
    assert result.exit_code == _errors.INPUT
    assert "did you mean balanced?" in result.stderr
    assert not Path(out).exists()
