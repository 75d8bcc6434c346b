"""The examples in the docstrings of public functions run, and every such function has one."""

from __future__ import annotations

import doctest
import inspect

import jax
import jax.numpy as jnp
import pytest
from helpers.tiny_models import LINES, write_tiny

import jquant

OF_WINGS = (
    "ldlq.quantize",
    "smoothquant.scales",
    "calibration.collect",
    "int8.matmul",
    "evaluation.kl_divergence",
)


def public(name: str) -> object:
    value = jquant
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict[str, object]:
    """What an example may use: a small model and a text, open and on the disk, and a folder to write to."""
    out = tmp_path_factory.mktemp("out")
    folder, text = write_tiny(out / "model", "LlamaForCausalLM"), out / "text.txt"
    text.write_text("\n".join(LINES * 4))
    model = jquant.open_model(folder)
    samples = jquant.load_samples(model, text, samples=4, sequence_length=32)
    return {
        "jax": jax,
        "jnp": jnp,
        "jquant": jquant,
        "folder": folder,
        "text": text,
        "out": out,
        "model": model,
        "samples": samples,
        "imatrix": jquant.importance(model, samples),
    }


FUNCTIONS = [name for name in jquant.__all__ if name[0].islower() and not inspect.ismodule(public(name))]


@pytest.mark.parametrize("name", [*FUNCTIONS, *OF_WINGS])
def test_the_example_of(name, names):
    text = inspect.getdoc(public(name)) or ""
    example = doctest.DocTestParser().get_doctest(text, dict(names), name, None, None)
    assert example.examples, "has no example"
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    assert runner.run(example, out=said.append).failed == 0, "".join(said)
