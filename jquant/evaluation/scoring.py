"""What an engine makes of a text, of questions and of prompts: figures of every scored token.

One chunk's predictions are in memory, compared in slices of some rows. Those of an original lie on the disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32

from jquant.core import UserError, kl_divergence
from jquant.evaluation import coherence
from jquant.evaluation import metrics as evaluate
from jquant.evaluation.coherence import Sample
from jquant.evaluation.engines import Engine, LlamaCppEngine, Progress
from jquant.evaluation.metrics import Accuracy, Tokens
from jquant.io import log_probs
from jquant.io.log_probs import LogProbs, Rows
from jquant.text.questions import Question
from jquant.text.samples import Text, decode

SLICE_BYTES = 1 << 26  # of predictions that are compared at once


def chunks(
    text: Text, engine: Engine, *, context: int, most: int | None
) -> tuple[Int32[np.ndarray, "chunks context"], int]:
    """Whole chunks of the text, at most so many, each begun by BOS where the model wants one; and how many
    the text has. Raises UserError where it has none."""
    tokens = engine.encode(decode(text))
    count = len(tokens) // context
    if count == 0:
        raise UserError(
            f"{text.name}: has {len(tokens)} tokens, fewer than one chunk of {context}; give more text, or a "
            "smaller --context."
        )
    used = count if most is None else min(count, most)
    found = np.array(tokens[: used * context], np.int32).reshape(used, context)
    if engine.bos is not None:
        found[:, 0] = engine.bos
    return found, count


def first_scored(context: int) -> int:
    """The position whose prediction is the first to be scored: by then enough has been read."""
    return context // 2


def score_original(
    path: Path,
    engine: Engine,
    tokens: Int32[np.ndarray, "chunks context"],
    cache: Path | None,
    key: str,
    progress: Progress = lambda share: None,
) -> tuple[LogProbs, Tokens]:
    """The original's predictions, from the folder `cache` under this key or made now, and its own figures.

    Raises UserError where they are no numbers, OutputError where the disk has no room for them.
    """
    n = tokens.shape[1] - 1 - first_scored(tokens.shape[1])
    shape = len(tokens), n, engine.vocab
    found = log_probs.find(cache, key, shape)
    if found is None:
        made = (_encoded(path, part, targets) for part, targets in _logits(engine, tokens, progress))
        found = log_probs.write(cache, key, shape, made)
    nll = np.concatenate([found.read(i).nll for i in range(found.chunks)])
    return found, Tokens(nll)


def score_candidate(
    path: Path,
    engine: Engine,
    tokens: Int32[np.ndarray, "chunks context"],
    original: LogProbs | None,
    progress: Progress = lambda share: None,
) -> Tokens:
    """A file's figures at every scored token; without an original those of its own predictions only."""
    parts = []
    for i, (logits, targets) in enumerate(_logits(engine, tokens, progress)):
        rows = None if original is None else original.read(i)
        parts += [_compared(path, *part) for part in _slices(logits, targets, rows)]
    return evaluate.join(parts)


def _logits(
    engine: Engine, tokens: np.ndarray, progress: Progress
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(logits [n, vocab], the tokens that come [n]) of each chunk."""
    first = first_scored(tokens.shape[1])
    made = engine.logits(list(tokens), [first] * len(tokens), progress)
    for chunk, logits in zip(tokens, made, strict=True):
        yield logits, chunk[first + 1 :]


def _slices(
    logits: np.ndarray, targets: np.ndarray, rows: Rows | None
) -> Iterator[tuple[np.ndarray, np.ndarray, Rows | None]]:
    step = max(SLICE_BYTES // (4 * logits.shape[1]), 1)
    for start in range(0, len(targets), step):
        part = slice(start, start + step)
        yield logits[part], targets[part], None if rows is None else Rows(*(a[part] for a in rows))


def _encoded(path: Path, logits: np.ndarray, targets: np.ndarray) -> Rows:
    parts = []
    for part, wanted, _ in _slices(logits, targets, None):
        logp, nll, top = map(np.array, evaluate.predict(part, wanted))
        _check(path, nll)
        parts.append(log_probs.encode(logp, nll, top))
    return Rows(*map(np.concatenate, zip(*parts, strict=True)))


def _compared(path: Path, logits: np.ndarray, targets: np.ndarray, base: Rows | None) -> Tokens:
    found = evaluate.predict(logits, targets)
    nll = np.asarray(found.nll)
    _check(path, nll)
    if base is None:
        return Tokens(nll)
    kld = np.asarray(kl_divergence(log_probs.decode(base), logits))
    return Tokens(nll, kld, base.nll, base.top == np.asarray(found.top))


def _check(path: Path, nll: Float32[np.ndarray, " n"]) -> None:
    if np.isnan(nll).any():
        raise UserError(f"{path}: its predictions are no numbers; the file is damaged.")


def prompt_of(question: Question) -> str:
    return f"Question: {question.text}\nAnswer:"


def answer_questions(
    engine: Engine, questions: Sequence[Question], progress: Progress = lambda share: None
) -> Accuracy:
    """Each choice's log-likelihood behind its question, in the form that lm-evaluation-harness gives ARC."""
    sequences, first = [], []
    for question in questions:
        before = len(engine.encode(prompt_of(question)))
        for choice in question.choices:
            sequences.append(np.array(engine.encode(f"{prompt_of(question)} {choice}"), np.int32))
            # A choice whose first letters merge with the prompt's last token is scored by its last token.
            first.append(min(before, len(sequences[-1]) - 1) - 1)
    sums = iter(
        -float(np.asarray(evaluate.predict(logits, tokens[start + 1 :]).nll).sum(dtype=np.float64))
        for logits, tokens, start in zip(
            engine.logits(sequences, first, progress), sequences, first, strict=True
        )
    )
    return evaluate.accuracy(
        [np.array([next(sums) for _ in question.choices], np.float32) for question in questions],
        [np.array([len(choice.encode()) for choice in question.choices]) for question in questions],
        [question.answer for question in questions],
    )


def write_texts(engine: LlamaCppEngine, progress: Progress = lambda share: None) -> tuple[Sample, ...]:
    """What the model writes behind the prompts of `coherence`."""
    asked = coherence.prompts()
    tokens = [engine.encode(prompt) for prompt, _ in asked]
    made = engine.generate(tokens, coherence.LENGTH, coherence.sampler(), progress)
    return tuple(
        Sample(prompt, engine.text(text), tuple(text), sampled, len(text) < coherence.LENGTH)
        for (prompt, sampled), text in zip(asked, made, strict=True)
    )


def likelihood(engine: LlamaCppEngine, samples: Sequence[Sample]) -> float:
    """Mean log-likelihood of the sampled texts behind their prompts, nats a token; 0 where all are empty."""
    sequences, first = [], []
    for sample in samples:
        if sample.sampled and sample.tokens:
            prompt = engine.encode(sample.prompt)
            sequences.append(np.array([*prompt, *sample.tokens], np.int32))
            first.append(len(prompt) - 1)
    if not sequences:
        return 0.0
    found = zip(engine.logits(sequences, first), sequences, first, strict=True)
    nll = [np.asarray(evaluate.predict(logits, t[start + 1 :]).nll) for logits, t, start in found]
    return -float(np.concatenate(nll).mean(dtype=np.float64))
