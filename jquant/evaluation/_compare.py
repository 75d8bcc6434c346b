"""Files beside their original: what `jquant evaluate` computes, and what `quantize --check` asks.

One model is open at a time. The original's predictions are kept on the disk, for later candidates too.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from jquant.checkpoints import AnyModel, Model, open_model
from jquant.core import TensorSpec, UserError
from jquant.evaluation import coherence
from jquant.evaluation import metrics as evaluate
from jquant.evaluation.coherence import Coherence, Sample
from jquant.evaluation.engines import (
    LLAMA_CPP,
    Engine,
    LlamaCppEngine,
    choose,
    open_engine,
    require_llama_cpp,
)
from jquant.evaluation.engines import Progress as Share
from jquant.evaluation.metrics import Tokens
from jquant.evaluation.report import Row
from jquant.evaluation.scoring import (
    answer_questions,
    chunks,
    likelihood,
    score_candidate,
    score_original,
    write_texts,
)
from jquant.io import GgufSource, log_probs
from jquant.io.log_probs import LogProbs
from jquant.io.paths import local
from jquant.text.questions import Question
from jquant.text.samples import Text

_UNUSED = 5  # type of a token that only fills the vocabulary up; converters name it differently

# File, what is done with it, share of that which is done.
Progress = Callable[[str, str, float], None]


@dataclass(frozen=True)
class File:
    """A model on the disk, from its headers."""

    path: Path  # of a GGUF model its file, or the first of its shards
    is_gguf: bool
    specs: tuple[TensorSpec, ...]
    nbytes: int  # of the files with weights
    identity: tuple[tuple[str, int, int], ...]  # name, size and time of change of each file
    tokens: list[str]
    token_types: tuple[int, ...]
    pre_tokenizer: str | None = None  # as `open_file` was given it
    bpw: float = 0.0  # bits per weight, headers not counted


def open_file(file: AnyModel, *, pre_tokenizer: str | None = None, revision: str | None = None) -> File:
    """What `open_model` takes, or a model that is open.

    Raises UserError where it is no model of this machine that can be read, ValueError for an open one that is
    no longer what its files are: engines read files.
    """
    model = file
    if not isinstance(model, Model):
        model = open_model(model, pre_tokenizer=pre_tokenizer, revision=revision)
    if model.changes:
        raise ValueError(f"{model.path}: this model was rescaled since it was opened; write it first.")
    path = local(model.path, "evaluate")
    stats = [(file.name, file.stat()) for file in model.files]
    weights = [stat.st_size for name, stat in stats if name != "config.json"]
    identity = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    is_gguf = isinstance(model.source, GgufSource)
    return File(
        local(model.files[0], "evaluate") if is_gguf else path,
        is_gguf,
        tuple(model.source.specs.values()),
        sum(weights),
        identity,
        *_vocabulary(model),
        pre_tokenizer,
        8 * model.tensor_bytes / max(sum(spec.size for spec in model.source.specs.values()), 1),
    )


def _vocabulary(model: Model) -> tuple[list[str], tuple[int, ...]]:
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    types = model.metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list):
        raise UserError(f"{model.path}: its header has no tokenizer; give a model that has one.")
    return tokens, tuple(types.tolist()) if isinstance(types, np.ndarray) else (1,) * len(tokens)


def check_vocabularies(files: Sequence[File]) -> None:
    """Raises UserError where a file's tokens are not the first one's: no token would mean the same."""
    original, *candidates = files
    for other in candidates:
        if len(other.tokens) != len(original.tokens):
            raise UserError(
                f"{other.path}: has a vocabulary of {len(other.tokens)} tokens, {original.path} one of "
                f"{len(original.tokens)}; compare files of one model."
            )
        pairs = zip(original.tokens, other.tokens, original.token_types, other.token_types, strict=True)
        for i, (a, b, *types) in enumerate(pairs):
            if a != b and _UNUSED not in types:
                raise UserError(
                    f"{other.path}: its token {i} is {b!r}, in {original.path} it is {a!r}; compare files of "
                    "one model."
                )


@dataclass(frozen=True, kw_only=True)
class Settings:
    engine: str
    context: int = 512  # tokens of a chunk; the second half is scored
    chunks: int | None = None  # at most so many; None: all
    cache: Path | None = None  # folder for the original's predictions; None: they are not kept
    threads: int = 2


class Comparison(NamedTuple):
    rows: list[Row]  # the original, then the candidates
    chunks: int = 0  # scored
    chunks_in_text: int = 0
    predictions_bytes: int = 0  # of the original, as they lie on the disk


def compare(
    files: Sequence[File],
    settings: Settings,
    *,
    text: Text | None = None,
    questions: Sequence[Question] = (),
    check: bool = False,
    progress: Progress = lambda name, task, share: None,
) -> Comparison:
    """Score each file on the text and the questions, and with `check` on what it writes.

    Raises UserError where the files do not belong together, cannot be run, or the text is too short.
    """
    check_vocabularies(files)
    rows, texts = [], []
    with contextlib.closing(_Reading(text, settings)) as reading:
        for file, name in zip(files, names(files), strict=True):
            row = Row(name, str(file.path), file.nbytes, file.bpw, file.specs)
            engine = open_engine(
                settings.engine, file.path, threads=settings.threads, pre_tokenizer=file.pre_tokenizer
            )
            with contextlib.closing(engine):
                if text is not None:
                    found = reading.score(file, engine, _shown(progress, name, "text"))
                    row = replace(row, scores=evaluate.summarize(found), tokens=found)
                if questions:
                    shown = _shown(progress, name, "questions")
                    row = replace(row, accuracy=answer_questions(engine, questions, shown))
                if check and isinstance(engine, LlamaCppEngine):
                    texts.append(write_texts(engine, _shown(progress, name, "check")))
            rows.append(row)
    if check:
        verdicts = check_texts(files[0].path, texts, threads=settings.threads)
        rows = [replace(row, coherence=v) for row, v in zip(rows, verdicts, strict=True)]
    return Comparison(rows, len(reading.tokens), reading.in_text, reading.nbytes)


class _Reading:
    """The chunks of a text and what the original, the first file to be scored, predicts of them."""

    def __init__(self, text: Text | None, settings: Settings) -> None:
        self._text, self._settings = text, settings
        self._original: LogProbs | None = None
        self.tokens = np.empty((0, settings.context), np.int32)
        self.in_text = self.nbytes = 0  # chunks that the text has, bytes of the predictions

    def score(self, file: File, engine: Engine, progress: Share) -> Tokens:
        if self._original is not None:
            return score_candidate(file.path, engine, self.tokens, self._original, progress)
        assert self._text is not None
        context, most, cache = self._settings.context, self._settings.chunks, self._settings.cache
        self.tokens, self.in_text = chunks(self._text, engine, context=context, most=most)
        key = cache_key(file, engine, self.tokens)
        self._original, found = score_original(file.path, engine, self.tokens, cache, key, progress)
        self.nbytes = self._original.nbytes
        return found

    def close(self) -> None:
        if self._original is not None:
            self._original.close()


def require_gguf(files: Sequence[File]) -> None:
    """Raises UserError where the check cannot run: llama.cpp writes the texts."""
    require_llama_cpp()
    for file in files:
        if not file.is_gguf:
            raise UserError(f"{file.path}: the check runs in llama.cpp, which reads GGUF files only.")


def engine_for(files: Sequence[File], name: str | None, *, check: bool = False) -> str:
    """The engine to run them all in; `check` needs llama.cpp. Raises UserError where that cannot be."""
    if check:
        require_gguf(files)
        name = name or LLAMA_CPP
    others = [file.path for file in files if not file.is_gguf]
    chosen = choose(name, others)
    if check and chosen != LLAMA_CPP:
        raise UserError("the check runs in llama.cpp; leave --engine out, or use it without --check.")
    return chosen


def names(files: Sequence[File]) -> list[str]:
    """Short names that tell the files apart."""
    stems = [file.path.name.removesuffix(".gguf") for file in files]
    return stems if len(set(stems)) == len(stems) else [str(file.path) for file in files]


def _shown(progress: Progress, name: str, task: str) -> Share:
    return lambda share: progress(name, task, share)


def cache_key(file: File, engine: Engine, tokens: Int32[np.ndarray, "chunks context"]) -> str:
    """Names the original's predictions by what they depend on."""
    return log_probs.key_of(
        {
            "files": [list(one) for one in file.identity],
            **engine.facts,
            "context": tokens.shape[1],
            "tokens": hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest(),
        }
    )


def check_file(path: Path, *, threads: int, progress: Share = lambda share: None) -> Coherence:
    """Whether a GGUF file still speaks, judged by itself. Raises UserError where llama.cpp cannot run it."""
    require_llama_cpp()
    with contextlib.closing(LlamaCppEngine(path, threads=threads)) as engine:
        return coherence.judge(write_texts(engine, progress), coherence.Reference())


def check_texts(original: Path, samples: Sequence[Sequence[Sample]], *, threads: int) -> list[Coherence]:
    """Verdicts on the texts of the original, which come first, and of its candidates."""
    compared = coherence.reference(samples[0])
    with contextlib.closing(LlamaCppEngine(original, threads=threads)) as engine:
        own, *others = [likelihood(engine, texts) for texts in samples]
    verdict = coherence.judge(samples[0], coherence.Reference())
    return [verdict] + [
        coherence.judge(texts, compared, found - own)
        for texts, found in zip(samples[1:], others, strict=True)
    ]
