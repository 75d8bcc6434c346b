"""What an output depends on, digested: whether processes make the same, and a run may continue another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version

import jax
import numpy as np
from jaxtyping import PyTree

from jquant.checkpoints.model import Model
from jquant.core import VERSION
from jquant.io.paths import AnyPath

_END_BYTES = 1 << 16


def common_facts(model: Model) -> dict[str, str]:
    """What any output of this model depends on; callers add what else theirs does."""
    found = {
        "jquant": VERSION,
        "jax": f"{version('jax')} with jaxlib {version('jaxlib')} on {jax.default_backend()}",
        "model": digest(part for file in model.files for part in _ends(file)),
    }
    return found | {"changes": model.changes} if model.changes else found


def fingerprint(model: Model, facts: Mapping[str, str]) -> str:
    """Of these facts and the times of the model's files, to tell whether a run can continue another."""
    return digest([json.dumps([dict(facts), times_of(model)]).encode()])


def times_of(model: Model) -> list[int]:
    """When each of the model's files was changed. Copies of them may differ in it."""
    return [file.stat().st_mtime_ns for file in model.files]


def _ends(file: AnyPath) -> Iterator[bytes]:
    """Name, size, and some bytes of the beginning and of the end, which tell one training from another."""
    size = file.stat().st_size
    yield f"{file.name} {size}\n".encode()
    with file.open("rb") as opened:
        yield opened.read(_END_BYTES)
        opened.seek(max(size - _END_BYTES, 0))
        yield opened.read(_END_BYTES)


def digest_of_arrays(tree: PyTree) -> str:
    """SHA-256 of all arrays of it and of where they stand."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return digest(part for path, a in leaves for part in (str(path).encode(), np.asarray(a).tobytes()))


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 of all of them."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()
