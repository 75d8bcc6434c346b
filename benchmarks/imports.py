"""The plan of the house in numbers: parts, floors, imports between parts, circles among them and among files.

    python benchmarks/imports.py            # this checkout; --root for another

A part is a wing of `jquant/`, or a file that lies beside the wings. A part stands a floor above the highest
that it imports; parts of a circle share one. An import between parts is a pair of parts of which a file
of the one takes something from the other, at its head or inside a function.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

Graph = Mapping[str, set[str]]


def modules_of(root: Path) -> dict[str, Path]:
    """Every module of the package but its face, by dotted name."""
    files = sorted((root / "jquant").rglob("*.py"))
    named = {".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): f for f in files}
    return {name: file for name, file in named.items() if name != "jquant"}


def imports_of(modules: Mapping[str, Path]) -> dict[str, set[str]]:
    """Module → the modules of the package that it imports from."""
    found = {}
    for name, file in modules.items():
        taken = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                named = [f"{node.module}.{alias.name}" for alias in node.names]
                taken |= {name if name in modules else node.module for name in named}
            elif isinstance(node, ast.Import):
                taken |= {alias.name for alias in node.names}
        found[name] = (taken & set(modules)) - {name}
    return found


def merged(graph: Graph, part) -> dict[str, set[str]]:
    """The graph between parts: part(module) names one."""
    out: dict[str, set[str]] = {part(name): set() for name in graph}
    for name, taken in graph.items():
        out[part(name)] |= {part(other) for other in taken} - {part(name)}
    return out


def circles(graph: Graph) -> list[set[str]]:
    """Sets of more than one node, each of which reaches all others of its set (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            circle = {node}
            while (other := stack.pop()) != node:
                circle.add(other)
            if len(circle) > 1:
                found.append(circle)

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def floors(graph: Graph) -> dict[str, int]:
    """The floor of each node, from 1; those of a circle share one."""
    together = {node: frozenset(circle) for circle in circles(graph) for node in circle}
    whole = merged(graph, lambda node: together.get(node, frozenset({node})))
    of: dict[Iterable, int] = {}

    def floor(group: Iterable) -> int:
        if group not in of:
            of[group] = 1 + max((floor(below) for below in whole[group]), default=0)
        return of[group]

    return {node: floor(together.get(node, frozenset({node}))) for node in graph}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="a checkout")
    root = parser.parse_args().root
    modules = modules_of(root)
    files = imports_of(modules)
    parts = merged(files, lambda name: name.split(".")[1])
    wings = [part for part in parts if (root / "jquant" / part).is_dir()]
    on = floors(parts)
    print(f"wings: {len(wings)}; files beside them: {len(parts) - len(wings)}; files: {len(modules)}")
    print(f"floors: {max(on.values())}; imports between parts: {sum(map(len, parts.values()))}")
    print(f"circles among parts: {len(circles(parts))}; among files: {len(circles(files))}")
    for circle in circles(files):
        print(f"  circle: {', '.join(sorted(circle))}")
    for number in range(max(on.values()), 0, -1):
        print(f"  {number}: {', '.join(sorted(part for part, floor in on.items() if floor == number))}")


if __name__ == "__main__":
    main()
