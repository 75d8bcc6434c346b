"""Rows from one type to another on several devices: the bytes of one, and the same sums."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import specs
from helpers import tables
from helpers.processes import run
from jax.sharding import AxisType, Mesh

from jquant.checkpoints import transcode
from jquant.checkpoints._transcode import SLAB_WEIGHTS
from jquant.formats import FORMATS

TWO = Mesh(np.array(jax.devices()[:2]), ("rows",), axis_types=(AxisType.Auto,))
# Less than a step, steps that two devices cannot share evenly, more than a slab of one device.
SHAPES = [(1, 256), (7, 8192), (SLAB_WEIGHTS // 4096 + 3, 4096)]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("shape", tables.rows(SHAPES, SHAPES[:2]))
@pytest.mark.parametrize("target", tables.rows(["TQ1_0", "Q8_0", "Q2_K"], {"TQ1_0"}))
def test_two_devices_give_the_bytes_of_one(target, shape, weighted):
    x = specs.student_t(*shape).view(np.uint8)
    importance = specs.importance(shape[1])[None] if weighted else None
    alone = transcode(x, FORMATS["F32"], FORMATS[target], importance)
    both = transcode(x, FORMATS["F32"], FORMATS[target], importance, TWO)
    np.testing.assert_array_equal(both.data, alone.data)
    assert both.largest == alone.largest == np.abs(x.view(np.float32)).max()
    assert both.loss == pytest.approx(alone.loss, rel=1e-5)
    assert both.total == pytest.approx(alone.total, rel=1e-5)


@pytest.mark.parametrize("row", [0, -1])
def test_a_weight_that_is_not_finite_is_seen_on_every_device(row):
    x = specs.student_t(16, 8192)
    x[row, 3] = np.nan
    assert transcode(x.view(np.uint8), FORMATS["F32"], FORMATS["Q8_0"], None, TWO).largest == np.inf


def test_the_compiled_loop_talks_to_no_other_device():
    from jquant.checkpoints._transcode import loop_over
    from jquant.core import CPU_GRAIN

    slab = jax.ShapeDtypeStruct((4, CPU_GRAIN.chunk), np.float32)
    steps = jax.ShapeDtypeStruct((2,), np.int32)
    lowered = loop_over(TWO, FORMATS["F32"], FORMATS["Q8_0"], False, CPU_GRAIN).lower(slab, None, steps)
    text = lowered.compile().as_text()
    assert not any(name in text for name in ("all-reduce", "all-gather", "collective-permute", "all-to-all"))


@pytest.mark.processes
def test_a_file_made_on_eight_devices_is_that_of_one(tmp_path):
    script = (
        "import sys, jax\n"
        "from pathlib import Path\n"
        "from helpers.tiny_models import write_tiny\n"
        "from jquant.checkpoints.model import open_model\n"
        "from jquant.writers.gguf import write_gguf\n"
        "from jquant.plan import plan\n"
        "folder = Path(sys.argv[4]) / str(jax.device_count())\n"
        "write_tiny(folder, 'MixtralForCausalLM', hidden_size=256)\n"
        "model = open_model(folder, name='m')\n"
        "planned = plan(model.source.specs, model.metadata, 'Q4_K_M')\n"
        "write_gguf(model, planned, Path(sys.argv[4]) / f'{jax.device_count()}.gguf')\n"
    )
    for devices in (1, 8):
        (ended,) = run(script, 1, str(tmp_path), devices=devices)
        assert ended.code == 0, ended.err
    assert (tmp_path / "8.gguf").read_bytes() == (tmp_path / "1.gguf").read_bytes()
