"""The architecture's promises: who may import whom, no Torch, and what an installation puts where."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.places import ROOT

JQUANT = ROOT / "jquant"

# A wing imports only the floors below it.
FLOORS = (
    {"core"},
    {"formats", "models", "io", "distributed", "int8"},
    {"text", "plan"},
    {"checkpoints"},
    {"calibration"},
    {"smoothquant", "ldlq", "allocation", "evaluation"},
    {"writers"},
)
AT = {wing: floor for floor, wings in enumerate(FLOORS) for wing in wings}


def imported_modules(path: Path) -> set[str]:
    """Absolute names of what a file imports, at its head or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


IMPORTS = {path: imported_modules(path) for part in ("jquant", "cli") for path in (ROOT / part).rglob("*.py")}
WING_OF = {path: path.relative_to(JQUANT).parts[0] for path in JQUANT.glob("*/**/*.py")}


def test_the_house_holds_its_face_and_wings_only():
    assert sorted(path.name for path in JQUANT.iterdir() if path.is_file()) == ["__init__.py", "py.typed"]
    assert set(WING_OF.values()) == set(AT)


def test_a_wing_imports_only_the_floors_below_it():
    up = [
        (str(path), name)
        for path, own in WING_OF.items()
        for name in IMPORTS[path]
        if name.startswith("jquant.")
        and (wing := name.split(".")[1]) != own
        and not AT.get(wing, 99) < AT[own]
    ]
    assert not up


def test_no_wing_addresses_the_private_parts_of_another():
    private = [
        (str(path), name)
        for path, own in WING_OF.items()
        for name in IMPORTS[path]
        if name.startswith("jquant.")
        and name.split(".")[1] != own
        and any(p[0] == "_" for p in name.split(".")[2:])
    ]
    assert not private


def test_the_command_line_and_benchmarks_address_no_private_part():
    paths = [*(ROOT / "cli").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    private = [
        (str(path), name)
        for path in paths
        for name in imported_modules(path)
        if name.startswith("jquant.") and any(p[0] == "_" and p[:2] != "__" for p in name.split("."))
    ]
    assert not private


def test_nothing_imports_the_command_line_nor_another_framework():
    library = {
        name.split(".")[0] for path, names in IMPORTS.items() if JQUANT in path.parents for name in names
    }
    assert not library & {"cli", "jquant_cli"}
    both = {name.split(".")[0] for names in IMPORTS.values() for name in names}
    assert not both & {"torch", "tensorflow", "transformers"}


def test_help_does_not_wait_for_jax_and_importing_everything_leaves_torch_unloaded():
    code = (
        "import pkgutil, sys, jquant, jquant_cli.main\n"
        "assert not {'jax', 'gguf', 'numpy'} & set(sys.modules)\n"
        "assert jquant.__version__ and not {'jax', 'gguf', 'numpy'} & set(sys.modules)\n"
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
    assert packaged == {path.relative_to(ROOT).as_posix() for path in JQUANT.rglob("*.py")}
    presets = {path.relative_to(ROOT).as_posix() for path in (JQUANT / "plan" / "profiles").glob("*.toml")}
    assert presets
    assert {*presets, "jquant/py.typed"} <= set(names)
