"""How work divides over devices, by what the compiler counts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from helpers.places import BENCHMARKS
from helpers.processes import environment


@pytest.mark.slow
def test_two_devices_compute_half_each_and_talk_only_where_weights_are_split(tmp_path):
    counts = tmp_path / "counts.json"
    command = [sys.executable, "scaling.py", "--devices", "1", "2", "--types", "Q4_0", "--json", str(counts)]
    subprocess.run(command, cwd=BENCHMARKS, env=environment(), check=True, stdout=subprocess.DEVNULL)
    found = {(row["devices"], row["what"]): row for row in json.loads(counts.read_text())["results"]}
    for what in ("block, imatrix, data", "block, imatrix, model", "block, Hessians, model"):
        one, two = found[1, what], found[2, what]
        assert two["flops"] == pytest.approx(one["flops"] / 2, rel=0.01)
        assert two["memory"] < one["memory"]
        assert one["collectives"] == 0
        assert (two["collectives"] == 0) == what.endswith("data")
    assert found[2, "encode Q4_0, a step each"]["collectives"] == 0
    # The sums of squares of k's, output's, down's and gate's inputs.
    assert found[2, "merge, imatrix, data"]["sent"] >= 4 * (4096 * 3 + 14336)
