"""Code compiled for a TPU topology without a TPU: it compiles, and fits a chip."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
from helpers.places import BENCHMARKS
from helpers.processes import environment

COMPILE = """
import json
import tpu
from jax.experimental import topologies
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
found = [*tpu.hessians(devices[0], [4096]), *tpu.encoders(devices[0], ["Q8_0"])]
found += tpu.feedbacks(devices[0], [14336], ["Q4_K"])
print(json.dumps([len(devices), [one._asdict() for one in found]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install libtpu")
def test_parts_of_an_8b_model_compile_for_v5e_and_fit():
    # In a process of its own: libtpu ends the process that it fails in.
    env = environment()
    command = [sys.executable, "-c", COMPILE]
    ended = subprocess.run(command, cwd=BENCHMARKS, env=env, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-2000:]
    chips, (hessian, encoder, factor, feedback) = json.loads(ended.stdout.splitlines()[-1])
    assert chips == 16
    # 2 · tokens · width², and the matrix at least once in memory.
    assert hessian["flops"] == pytest.approx(2 * 4 * 512 * 4096**2, rel=0.05)
    assert 4 * 4096**2 <= hessian["memory"] < 16e9
    assert encoder["memory"] < 0.1e9
    assert 2 * 4 * 14336**2 <= factor["memory"] < 16e9
    assert 4 * 14336**2 <= feedback["memory"] < 16e9
