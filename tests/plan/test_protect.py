"""Protection of super weights: the plan's types, and the weights as the written bytes give them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers import ggml
from helpers.tables import rows
from helpers.tiny_models import write_tiny
from typer.testing import CliRunner

from jquant.calibration import SuperWeight
from jquant.calibration.super_weights import protected
from jquant.core import TensorSpec, UserError
from jquant.formats import FORMATS
from jquant.io import GgufSource
from jquant.plan import plan, protect
from jquant.writers._loop import run
from jquant_cli.main import app

NAME = "blk.0.ffn_down.weight"
ROW, COLUMN, VALUE = 3, 200, 0.11  # of weights with a deviation of 0.02
POSITIONS = {NAME: [(ROW, COLUMN)]}
# The scales of MXFP4 and NVFP4 have no or three bits of mantissa: too few to meet a given value.
BLOCKED = [f for f in FORMATS.values() if f.can_encode and f.block_size > 1 and f.ggml_type is not None]
SCALED = [f.name for f in BLOCKED if f.name not in ("MXFP4", "NVFP4")]


class Memory:
    """A source of one float32 tensor, and a sink."""

    def __init__(self, x: np.ndarray):
        self.x, self.specs = x, {NAME: TensorSpec(NAME, x.shape, "F32")}
        self.rows: dict[int, np.ndarray] = {}

    def read(self, name, start=0, stop=None):
        return self.x[start:stop].view(np.uint8)

    def write(self, name, start, rows):
        self.rows[start] = rows

    def finish(self, name, start=0, stop=None):
        pass

    def commit(self):
        pass

    def close(self):
        pass


def weights() -> np.ndarray:
    x = 0.02 * np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32)
    x[ROW, COLUMN] = VALUE
    return x


def written(type: str, positions: dict) -> np.ndarray:
    x = weights()
    memory = Memory(x)
    importance = np.random.default_rng(1).uniform(0.5, 2.0, (1, 512)).astype(np.float32)
    metadata = {"general.architecture": "llama", "llama.block_count": np.uint32(1)}
    planned = plan(memory.specs, metadata, type, pure=True, has_imatrix=True)
    run(memory, planned, memory, importance={NAME: importance}, protected=positions, threads=1)
    return memory.rows[0]


# File types are not always named as the type of most of their tensors.
FILE_TYPE = {name: name for name in SCALED}
FILE_TYPE |= {"Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S", "IQ2_S": "IQ2_M"}


@pytest.mark.parametrize("name", rows(SCALED, {"Q4_0", "Q6_K"}))
def test_a_protected_weight_is_kept_and_other_rows_are_as_they_were(name):
    data, before = (written(FILE_TYPE[name], positions) for positions in (POSITIONS, {}))
    ggml_type = FORMATS[name].ggml_type
    assert ggml.decode(ggml_type, data)[ROW, COLUMN] == pytest.approx(VALUE, rel=5e-3)
    others = np.arange(len(data)) != ROW
    np.testing.assert_array_equal(data[others], before[others])


def super_weight(block: int, loss_change: float) -> SuperWeight:
    return SuperWeight(block, ROW, COLUMN, VALUE, 1.0, 1.0, 50.0, loss_change)


STACK = {"blk.4.ffn_down_exps.weight": TensorSpec("blk.4.ffn_down_exps.weight", (4, 8, 512), "F32")}


def test_coverage_keeps_the_costliest_super_weights():
    found = [super_weight(1, 0.5), super_weight(2, 3.0), super_weight(3, 1.5)]
    assert list(protected(found, {}, 1.0)) == [f"blk.{i}.ffn_down.weight" for i in (2, 3, 1)]
    assert list(protected(found, {}, 0.9)) == [f"blk.{i}.ffn_down.weight" for i in (2, 3)]
    assert list(protected(found, {}, 0.6)) == ["blk.2.ffn_down.weight"]
    assert protected(found, {}, 0.0) == {}


def test_rows_of_a_stack_count_through_its_experts():
    found = replace(super_weight(4, 1.0), tensor="ffn_down_exps", expert=2)
    assert protected([found], STACK, 1.0) == {"blk.4.ffn_down_exps.weight": [(2 * 8 + ROW, COLUMN)]}


def small_plan(type: str):
    metadata = {"general.architecture": "llama", "llama.block_count": np.uint32(1)}
    specs = {
        NAME: TensorSpec(NAME, (8, 512), "F32"),
        "blk.0.ffn_up.weight": TensorSpec("blk.0.ffn_up.weight", (8, 512), "F32"),
    }
    return plan(specs, metadata, type, pure=True, has_imatrix=True)


def test_the_plan_raises_and_names_exactly_the_protected_tensors():
    entries = {e.name: e for e in protect(small_plan("IQ2_XXS"), POSITIONS, "Q6_K").entries}
    assert entries[NAME].type == "Q6_K"
    assert f"super weight [{ROW}, {COLUMN}]" in entries[NAME].reason
    assert entries["blk.0.ffn_up.weight"].type == "IQ2_XXS"


def test_a_tensor_of_a_larger_type_keeps_it():
    entries = {e.name: e for e in protect(small_plan("Q8_0"), POSITIONS, "Q6_K").entries}
    assert entries[NAME].type == "Q8_0"
    assert "protected" in entries[NAME].reason


def test_a_protection_type_that_does_not_fit_the_rows_falls_back():
    narrow = {NAME: TensorSpec(NAME, (8, 96), "F32")}
    metadata = {"general.architecture": "llama", "llama.block_count": np.uint32(1)}
    (entry,) = protect(plan(narrow, metadata, "Q4_0"), POSITIONS, "Q6_K").entries
    assert (entry.type, entry.fallback_from) == ("Q8_0", "Q6_K")


def test_an_unknown_protection_type_is_refused():
    with pytest.raises(UserError, match="Q6_X"):
        protect(small_plan("Q4_0"), POSITIONS, "Q6_X")


def test_quantize_measures_importance_and_protects_in_one_go(tmp_path):
    folder = write_tiny(tmp_path, "LlamaForCausalLM")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    out = tmp_path / "out.gguf"
    options = ["--analyze", "--protect-super-weights", "-c", str(text), "--sequence-length", "16"]
    done = CliRunner().invoke(app, ["quantize", str(folder), str(out), "--type", "Q4_0", *options, "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    protected = [t for t in report["tensors"] if "protected" in t["reason"]]
    assert report["super_weights"]
    assert {t["name"].split(".")[2] for t in protected} <= {w["tensor"] for w in report["super_weights"]}
    assert all(t["type"] == "Q8_0" for t in protected)  # rows of 64 fit no Q6_K
    assert len(GgufSource(out).metadata["quantize.imatrix.dataset"]) > 0
