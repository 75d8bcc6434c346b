"""Several processes on this machine that join each other, as those of a pod do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from helpers.places import TESTS

HEAD = """
import sys, jax
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
from jquant.distributed import mesh
address, processes, process = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
"""
JOIN = HEAD + "mesh.join(address, processes, process)\n"


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def free_address() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


def environment(devices: int = 1) -> dict[str, str]:
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }


def start(commands: Sequence[Sequence[str]], devices: int = 1) -> list[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    env = environment(devices)
    return [subprocess.Popen(c, stdout=pipe, stderr=pipe, text=True, env=env) for c in commands]


def wait(started: Sequence[subprocess.Popen[str]], seconds: float = 900) -> list[Ended]:
    try:
        ended = [(*process.communicate(timeout=seconds), process.returncode) for process in started]
        return [Ended(code, _ours(out), err) for out, err, code in ended]
    finally:
        for process in started:
            process.kill()


def _ours(out: str) -> str:
    """Without what gloo prints to stdout."""
    return "".join(line for line in out.splitlines(keepends=True) if not line.startswith("[Gloo]"))


def run(script: str, processes: int, *arguments: str, devices: int = 1) -> list[Ended]:
    """`script` in so many processes, with JOIN or HEAD before it as it says itself."""
    address = free_address()
    ids = range(processes)
    return wait(
        start(
            [[sys.executable, "-c", script, address, str(processes), str(i), *arguments] for i in ids],
            devices,
        )
    )
