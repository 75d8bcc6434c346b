"""What the errors of tensors make jquant say."""

from __future__ import annotations

import re

from jquant.checkpoints import LOW_BPW
from jquant.formats import FORMATS
from jquant.plan import Entry, Plan
from jquant.writers.quality import SEVERE, assess


def plan_of(types: dict[str, str]) -> Plan:
    entries = tuple(Entry(name, (512, 512), "F16", type, "") for name, type in types.items())
    return Plan("IQ2_XXS", entries)


def test_a_tensor_far_above_the_others_of_its_type_is_named_with_a_rule_that_mends_it():
    types = {f"blk.{i}.ffn_down.weight": "IQ2_XXS" for i in range(5)} | {"blk.0.attn_v.weight": "Q2_K"}
    errors = dict.fromkeys(types, 0.01) | {"blk.3.ffn_down.weight": 0.05, "blk.0.attn_v.weight": 0.05}
    found = assess(plan_of(types), errors, has_imatrix=True)
    assert found.exceptional == ("blk.3.ffn_down.weight",)
    (warning,) = found.warnings
    assert r"rules=['^blk\.3\.ffn_down\.weight$=IQ3_XXS']" in warning


def test_small_errors_pass_in_silence():
    types = {f"blk.{i}.ffn_down.weight": "IQ3_S" for i in range(3)}
    assert assess(plan_of(types), dict.fromkeys(types, SEVERE / 2), has_imatrix=True).warnings == ()


def test_severe_damage_is_judged_by_the_weights_and_names_the_next_step():
    types = {f"blk.{i}.ffn_down.weight": "IQ1_S" for i in range(3)}
    errors = dict.fromkeys(types, 2 * SEVERE)
    with_imatrix = assess(plan_of(types), errors, has_imatrix=True)
    without = assess(plan_of(types), errors, has_imatrix=False)
    assert with_imatrix.mean == 2 * SEVERE
    assert "choose a larger type, such as IQ2_XS" in with_imatrix.warnings[0]
    assert "imatrix=" not in with_imatrix.warnings[0]
    assert "pass imatrix=FILE, or choose a larger type, such as Q2_K" in without.warnings[0]


def test_nothing_measured_is_nothing_to_say():
    found = assess(plan_of({"a.weight": "Q8_0"}), {}, has_imatrix=False)
    assert found.report()["warnings"] == []
    assert found.mean is None


def test_tensors_that_an_interrupted_run_had_written_are_counted():
    types = {f"blk.{i}.ffn_down.weight": "IQ1_S" for i in range(3)}
    found = assess(plan_of(types), {"blk.2.ffn_down.weight": 0.01}, has_imatrix=True)
    assert found.unmeasured == 2
    assert "2 were written before" in found.notes[0]


def test_every_type_that_is_read_back_has_a_larger_one_that_may_follow():
    measured = [f.name for f in FORMATS.values() if f.bpw <= LOW_BPW]
    for name in measured:
        (warning,) = assess(plan_of({"a.weight": name}), {"a.weight": 1.0}, has_imatrix=False).warnings
        larger = re.search(r"such as (\w+),", warning)[1]
        assert FORMATS[larger].bpw > FORMATS[name].bpw
        assert not FORMATS[larger].needs_importance
