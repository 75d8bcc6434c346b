"""Perplexity and KL divergence of GGUF files as llama-perplexity defines them, run by llama.cpp itself.

The text is cut into chunks of `ctx` tokens, each evaluated on its own (its first token replaced by BOS where
the model wants one), and the predictions of the second half are scored.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import llama_cpp
import numpy as np
from scipy.special import log_softmax


class Scores(NamedTuple):
    perplexity: float
    mean_kld: float | None  # to the base model, nats a token
    top1: float | None  # share of tokens on which both models' first choice agrees


def load(path: Path, ctx: int, threads: int) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        str(path),
        n_ctx=ctx,
        n_batch=ctx,
        n_ubatch=ctx,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        verbose=False,
    )


def chunks(llm: llama_cpp.Llama, text: str, ctx: int, most: int | None) -> list[list[int]]:
    """Whole chunks of `ctx` tokens, the first `most` of them."""
    tokens = llm.tokenize(text.encode(), add_bos=True, special=False)
    starts = range(0, len(tokens) - ctx + 1, ctx)[:most]
    found = [tokens[i : i + ctx] for i in starts]
    if llama_cpp.llama_vocab_get_add_bos(llm._model.vocab):
        found = [[llm.token_bos(), *chunk[1:]] for chunk in found]
    return found


def log_probabilities(llm: llama_cpp.Llama, chunk: list[int]) -> np.ndarray:
    """float32 [ctx/2 − 1, vocabulary]: what the model expects at each scored position."""
    llm.reset()
    llm.eval(chunk)
    half = len(chunk) // 2
    return log_softmax(llm.scores[half : len(chunk) - 1].astype(np.float32), axis=-1)


def evaluate(
    paths: list[Path], text: str, *, ctx: int = 512, most: int | None = None, threads: int = 2
) -> Iterator[tuple[Path, Scores]]:
    """Scores of each file; KL divergence and agreement are to the first, the base."""
    models = [load(path, ctx, threads) for path in paths]
    nll = np.zeros(len(models))
    kld, same, count = np.zeros(len(models)), np.zeros(len(models)), 0
    for chunk in chunks(models[0], text, ctx, most):
        targets = np.asarray(chunk[ctx // 2 + 1 :])
        base = log_probabilities(models[0], chunk)
        for i, model in enumerate(models):
            logp = base if i == 0 else log_probabilities(model, chunk)
            nll[i] -= logp[np.arange(len(targets)), targets].sum(dtype=np.float64)
            kld[i] += (np.exp(base) * (base - logp)).sum(dtype=np.float64)
            same[i] += (base.argmax(-1) == logp.argmax(-1)).sum()
        count += len(targets)
    for i, path in enumerate(paths):
        is_base = i == 0
        yield (
            path,
            Scores(
                float(np.exp(nll[i] / count)),
                None if is_base else float(kld[i] / count),
                None if is_base else float(same[i] / count),
            ),
        )
