"""The architecture's promises: who may import whom, no Torch, and what an installation puts where."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Part of the house → the other parts that it may import. `pipeline` stands for what joins them all.
CORE = {"core"}
MAY_IMPORT = {
    "core": set(),
    "text": set(),
    "space": set(),
    "formats": CORE,
    "models": CORE,
    "io": CORE | {"space", "text"},
    "between": CORE | {"space", "text"},
    "ahead": CORE,
    "calibrate": CORE | {"ahead", "between"},
    "ranges": CORE | {"calibrate"},
    "gradients": CORE | {"between", "calibrate"},
    "token_fisher": CORE | {"calibrate", "gradients"},
    "transforms": CORE,
    "sharding": set(),
    "transcode": CORE | {"sharding"},
    "weights": CORE | {"formats", "transcode"},
    "activations": set(),
    "rounding_kernel": CORE | {"activations"},
    "int8_matmul": CORE | {"rounding_kernel"},
    "transposed": CORE | {"compressed"},
    "schemes": CORE | {"formats", "transposed"},
    "compressed": CORE,
    "plan": CORE | {"formats", "text"},
    "quality": CORE | {"plan"},
    "report": CORE | {"formats", "plan", "text"},
    "pipeline": CORE | {"formats", "plan", "transcode"},
    "mesh": CORE,
    "team": {"mesh"},
    "shared_checkpoint": CORE | {"io", "team"},
    "spread": CORE | {"formats", "plan", "transcode"},
    "fingerprints": {"convert", "io"},
    "gguf_writer": CORE
    | {"convert", "fingerprints", "fitting", "formats", "io", "mesh", "pipeline", "plan", "sequential"}
    | {"spread", "team", "transcode", "tuning"},
    "parallel": CORE | {"between", "calibrate", "mesh", "sharding"},
    "figures": set(),
    "analyze": CORE
    | {"between", "calibrate", "convert", "figures", "io", "mesh", "models", "parallel", "text", "transforms"}
    | {"shared_checkpoint", "team", "weights"},
    "protection": CORE | {"convert", "gradients", "io", "models", "plan", "text", "transforms", "weights"},
    "methods": CORE
    | {"analyze", "between", "calibrate", "convert", "gradients", "io", "mesh", "models"}
    | {"ranges", "weights"},
    "evaluate": set(),
    "coherence": set(),
    "svg": set(),
    "engines": CORE | {"activations", "between", "convert", "io", "models", "weights"},
    "scoring": CORE | {"coherence", "engines", "evaluate", "io"},
    "evaluate_report": CORE | {"coherence", "evaluate", "report", "text"},
    "evaluate_html": CORE | {"evaluate_report", "report", "svg", "text"},
    "comparison": CORE | {"coherence", "convert", "engines", "evaluate", "evaluate_report", "io", "scoring"},
    "usual": set(),
    "sensitivity": CORE | {"between", "formats", "models", "transcode"},
    "output_weights": {"models", "sensitivity"},
    "measured_weights": {"between", "models", "sensitivity"},
    "shares": CORE | {"between", "models"},
    "search": CORE | {"formats", "models", "shares", "transcode", "weights"},
    "dynamic": CORE
    | {
        "convert",
        "gguf_writer",
        "io",
        "measured_weights",
        "models",
        "output_weights",
        "plan",
        "search",
        "sensitivity",
        "text",
    }
    | {"usual", "weights"},
    "stages": set(),
    "streams": CORE | {"between", "calibrate", "stages", "team", "transforms"},
    "sequential": CORE | {"between", "calibrate", "stages", "streams", "team", "transforms"},
    "forecast": CORE | {"calibrate", "sequential", "stages", "streams", "transforms"},
    "moving": CORE | {"formats", "models"},
    "tuning": CORE | {"between", "calibrate", "models", "moving"},
    "fitting": CORE
    | {"forecast", "formats", "io", "models", "parallel", "plan", "sequential", "team", "tuning", "weights"},
    "convert": CORE | {"compressed", "formats", "io", "models", "schemes", "transcode", "transposed"},
    "folder_feedback": CORE
    | {
        "calibrate",
        "fitting",
        "folders",
        "io",
        "models",
        "parallel",
        "sequential",
        "smoothing",
        "team",
        "transforms",
    },
    "folder_writer": CORE
    | {
        "fingerprints",
        "folders",
        "io",
        "mesh",
        "scaled",
        "schemes",
        "spread",
        "team",
        "transcode",
        "transforms",
        "transposed",
    },
    "smooth_report": CORE | {"smoothing", "text"},
    "input_scales": CORE
    | {
        "activations",
        "calibrate",
        "io",
        "models",
        "smooth_passes",
        "smooth_search",
        "smoothing",
        "stages",
        "token_fisher",
        "transforms",
    },
    "w8a8": CORE
    | {
        "calibrate",
        "folders",
        "input_scales",
        "io",
        "smooth_error",
        "smooth_search",
        "smoothing",
        "team",
        "transcode",
        "transforms",
    },
    "scale_export": CORE | {"calibrate", "folders", "io", "transcode", "w8a8"},
    "smoothing": CORE | {"calibrate", "convert", "io", "models", "ranges", "transforms", "weights"},
    "scaled": CORE | {"transforms", "weights"},
    "balancing": CORE
    | {"calibrate", "convert", "fingerprints", "io", "models", "scaled", "team", "transforms", "weights"},
    "smooth_error": CORE | {"activations", "models", "transforms"},
    "smooth_passes": CORE | {"calibrate", "io", "models", "smooth_error", "transforms"},
    "smooth_search": CORE
    | {
        "calibrate",
        "io",
        "models",
        "smooth_error",
        "smooth_passes",
        "smoothing",
        "token_fisher",
        "transforms",
    },
    "folders": CORE
    | {"convert", "io", "models", "scaled", "schemes", "smoothing", "transcode", "transforms", "transposed"},
}
SOURCES = sorted((ROOT / "jquant").rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, at its head or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(path: Path) -> str:
    return path.relative_to(ROOT / "jquant").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_each_part_imports_only_what_it_may(path):
    if path == ROOT / "jquant" / "__init__.py":
        return
    parts = {name.split(".")[1] for name in imported_modules(path) if name.startswith("jquant.")}
    known = {part(p) for p in SOURCES}
    assert (parts & known) - {part(path)} <= MAY_IMPORT[part(path)]


def test_nothing_imports_the_command_line():
    assert not any(
        name.split(".")[0] in {"cli", "jquant_cli"} for path in SOURCES for name in imported_modules(path)
    )


@pytest.mark.parametrize("name", ["torch", "tensorflow", "transformers"])
def test_neither_library_nor_command_line_imports_another_framework(name):
    files = [*SOURCES, *(ROOT / "cli").glob("*.py")]
    assert not any(found.split(".")[0] == name for path in files for found in imported_modules(path))


def test_importing_everything_leaves_torch_unloaded():
    code = (
        "import pkgutil, sys, jquant, jquant_cli.main\n"
        "for m in pkgutil.walk_packages(jquant.__path__, 'jquant.'): __import__(m.name)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_wheel_holds_exactly_jquant_and_jquant_cli(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"jquant", "jquant_cli"}
    packaged = {name for name in names if name.startswith("jquant/") and name.endswith(".py")}
    assert packaged == {str(path.relative_to(ROOT)) for path in SOURCES}
    presets = {str(path.relative_to(ROOT)) for path in (ROOT / "jquant/plan/profiles").glob("*.toml")}
    assert presets
    assert presets <= set(names)


def test_help_does_not_wait_for_jax():
    code = "import sys, jquant_cli.main; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
