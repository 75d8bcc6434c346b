"""Our own forward pass, block by block: any size of model in the memory of one block and of the activations.

Weights are decoded as a runtime decodes them and multiplied in float32. Inputs of matrices are rounded where
the model's folder says so. Activations of all sequences lie in
memory or, where they are large, in a temporary file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32

from jquant import models
from jquant.calibration import embed_into, run_through
from jquant.calibration.activations import Scratch
from jquant.checkpoints.model import open_model
from jquant.core import UserError, versions
from jquant.evaluation.engine import Progress
from jquant.int8.rounding import ROUNDINGS, STATIC_ROUNDINGS
from jquant.models import Decoder
from jquant.text import token_ids

LOGITS_BYTES = 1 << 27  # of predictions on the device at once
BATCH_TOKENS = 2048  # through a block at once


class FlaxEngine:
    def __init__(self, path: Path, *, pre_tokenizer: str | None = None) -> None:
        """Reads headers only. Raises UserError where the forward pass or the tokenizer is not known."""
        model = open_model(path, pre_tokenizer=pre_tokenizer)
        architecture = str(model.metadata.get("general.architecture"))
        if architecture not in {gguf.MODEL_ARCH_NAMES[a.gguf] for a in models.ARCHITECTURES.values()}:
            raise UserError(
                f"{path}: architecture {architecture!r} is not known to the engine jax; install "
                "llama-cpp-python (pip install llama-cpp-python) and use --engine llama.cpp."
            )
        self._decoder = model.decoder()
        if model.rounding is not None:
            kind, tensors, scales = model.rounding
            rounding = ROUNDINGS[kind] if scales is None else STATIC_ROUNDINGS[kind]
            self._decoder = self._decoder.rounded(rounding, tensors, scales)
        self._tokenizer = token_ids.from_metadata(model.metadata)
        self.vocab = self._decoder.vocab
        self.bos = self._tokenizer.bos

    @property
    def facts(self) -> dict[str, object]:
        made_by = versions("jax", "jaxlib")
        return {"engine": "jax", "versions": made_by, "device": jax.devices()[0].device_kind}

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        return self._tokenizer.encode(text, add_bos=add_bos)

    def logits(
        self,
        sequences: Sequence[Int32[np.ndarray, " _"]],
        first: Sequence[int],
        progress: Progress = lambda share: None,
    ) -> Iterator[Float32[np.ndarray, "_ vocab"]]:
        decoder, longest = self._decoder, max(map(len, sequences))
        rows = [range(start, len(tokens) - 1) for tokens, start in zip(sequences, first, strict=True)]
        # Work in multiplications: of every token by every block, and of the scored ones by the output.
        per_block = [sum(_active(decoder, i)) * len(sequences) * longest for i in range(len(decoder.blocks))]
        per_row = decoder.vocab * decoder.width
        total = sum(per_block) + per_row * sum(map(len, rows))

        x = self._embed(sequences, longest)
        batch = min(max(BATCH_TOKENS // longest, 1), len(x))
        run_through(
            decoder, x, batch=batch, progress=lambda done, count: progress(sum(per_block[:done]) / total)
        )
        done = sum(per_block)
        for logits in self._project(x, rows):
            done += per_row * len(logits)
            progress(done / total)
            yield logits

    def close(self) -> None:
        pass

    def _embed(self, sequences: Sequence[np.ndarray], longest: int) -> np.ndarray:
        """float32 [sequence, longest, width]; zeros behind the end, which no earlier token sees."""
        x = Scratch().activations(0, (len(sequences), longest, self._decoder.width))
        embed_into(x, self._decoder, np.array([np.pad(one, (0, longest - len(one))) for one in sequences]))
        return x

    def _project(self, x: np.ndarray, rows: list[range]) -> Iterator[np.ndarray]:
        """Logits of the wanted rows of each sequence. They are made so many at a time, whoever they belong
        to: one shape, one compilation, and a bound on memory for any vocabulary."""
        decoder = self._decoder
        most = max(LOGITS_BYTES // (4 * decoder.vocab), 1)
        sequence = np.concatenate([np.full(len(r), i) for i, r in enumerate(rows)])
        position = np.concatenate([np.asarray(r, np.int64) for r in rows])
        most = min(most, len(sequence))
        parts: list[np.ndarray] = []
        wanted, held = iter(map(len, rows)), 0
        need = next(wanted)
        for start in range(0, len(sequence), most):
            inputs = x[sequence[start : start + most], position[start : start + most]]
            padded = np.pad(inputs, ((0, most - len(inputs)), (0, 0)))[None]
            logits = np.asarray(decoder.logits(jnp.asarray(padded)))[0, : len(inputs)]
            parts.append(logits)
            held += len(logits)
            while need is not None and held >= need:
                whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
                yield whole[:need]
                parts, held = [whole[need:]], held - need
                need = next(wanted, None)


def _active(decoder: Decoder, i: int) -> list[int]:
    """Weights of block i's matrices that a token is multiplied by."""
    block = decoder.blocks[i]
    active = []
    for _, shape in block.shapes:
        share = getattr(block, "experts_used", 0) / shape[0] if len(shape) == 3 else 1
        active.append(int(np.prod(shape) * share))
    return active
