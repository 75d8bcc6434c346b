"""Raw figures of a benchmark as JSON, with what they depend on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path


def device() -> dict[str, object]:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((s.split(": ", 1)[1] for s in info.read_text().splitlines() if "model name" in s), cpu)
    root = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "numpy", "gguf", "llama-cpp-python")},
        "commit": commit.stdout.strip(),
    }


def record(args: argparse.Namespace, results: object) -> None:
    """Write to the file of --json: device, settings, results."""
    told = {"device": device(), "settings": vars(args), "results": results}
    args.json.write_text(json.dumps(told, indent=2, default=str))  # paths, and lists of them
