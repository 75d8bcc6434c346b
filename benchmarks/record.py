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
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    args.json.write_text(json.dumps({"device": device(), "settings": settings, "results": results}, indent=2))
