"""llama.cpp through llama-cpp-python's bindings of its C functions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from jquant.core import UserError
from jquant.evaluation.engine import Progress

# Step, logits [n, vocab], which sequences they are of → a token for each.
Sampler = Callable[[int, np.ndarray, Sequence[int]], list[int]]

_ERROR = 4  # ggml_log_level
_said: list[str] = []  # errors that llama.cpp has printed since a model was opened


class LlamaCppEngine:
    def __init__(self, path: Path, *, threads: int) -> None:
        """Raises UserError where llama.cpp cannot load the file, with its reason."""
        import llama_cpp

        self._lib, self._threads = llama_cpp, threads
        _listen()
        _said.clear()
        llama_cpp.llama_backend_init()
        if not path.is_file():
            raise UserError(f"{path}: no such file; give a GGUF file.")
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise UserError(
                f"{path}: llama.cpp cannot load it ({_reason()}); upgrade llama-cpp-python if a type or the "
                "architecture is new."
            )
        self._path = path
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        assert vocab is not None
        self._vocab = vocab
        self.vocab = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        wants = llama_cpp.llama_vocab_get_add_bos(self._vocab)
        self.bos = int(llama_cpp.llama_vocab_bos(self._vocab)) if wants else None
        self._context = None
        self._room = 0, 0  # tokens of a sequence, sequences

    @property
    def facts(self) -> dict[str, object]:
        return {"engine": "llama.cpp", "versions": {"llama-cpp-python": version("llama-cpp-python")}}

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        data = text.encode()
        out = (self._lib.llama_token * (len(data) + 8))()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), out, len(out), False, False)
        if count < 0:
            raise UserError(f"{self._path}: llama.cpp's tokenizer refuses the text.")
        return ([self.bos] if add_bos and self.bos is not None else []) + list(out[:count])

    def text(self, tokens: Sequence[int]) -> str:
        """What the tokens say; special tokens say nothing."""
        buffer = ctypes.create_string_buffer(256)
        pieces = []
        for token in tokens:
            count = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
            pieces.append(buffer.raw[: max(count, 0)])
        return b"".join(pieces).decode(errors="replace")

    def ends(self, token: int) -> bool:
        """Whether generation stops at this token."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def logits(
        self,
        sequences: Sequence[Int32[np.ndarray, " _"]],
        first: Sequence[int],
        progress: Progress = lambda share: None,
    ) -> Iterator[Float32[np.ndarray, "_ vocab"]]:
        self.start(max(map(len, sequences)), 1)
        for i, (tokens, start) in enumerate(zip(sequences, first, strict=True)):
            self.clear()
            wanted = [start <= p < len(tokens) - 1 for p in range(len(tokens))]
            found = self.step(tokens.tolist(), range(len(tokens)), [0] * len(tokens), wanted)
            progress((i + 1) / len(sequences))
            yield found

    def generate(
        self, prompts: Sequence[Sequence[int]], length: int, sampler: Sampler, progress: Progress
    ) -> list[list[int]]:
        """Continue each prompt by `length` tokens, or up to a token that ends it, which is left out.

        sampler(step, logits float32 [n, vocab], sequences [n]) → tokens [n].
        """
        self.start(max(map(len, prompts)) + length, len(prompts))
        self.clear()
        found: list[list[int]] = [[] for _ in prompts]
        live = list(range(len(prompts)))
        fed = [(t, p, i, p == len(one) - 1) for i, one in enumerate(prompts) for p, t in enumerate(one)]
        for step in range(length):
            logits = self.step(*zip(*fed, strict=True))
            chosen = dict(zip(live, sampler(step, logits, live), strict=True))
            live = [i for i in live if not self.ends(chosen[i])]
            progress((step + 1) / length)
            if not live:
                break
            for i in live:
                found[i].append(chosen[i])
            fed = [(chosen[i], len(prompts[i]) + step, i, True) for i in live]
        return found

    def start(self, length: int, sequences: int) -> None:
        """Make room for so many sequences of so many tokens."""
        if (length, sequences) == self._room:
            return
        lib = self._lib
        self._free_context()
        params = lib.llama_context_default_params()
        params.n_ctx = length * sequences
        # All tokens in one step, or logits would depend on how they were split.
        params.n_batch = params.n_ubatch = params.n_ctx
        params.n_seq_max = sequences
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.no_perf = True
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise UserError(
                f"{self._path}: llama.cpp cannot make a context of {params.n_ctx} tokens ({_reason()})."
            )
        self._room = length, sequences

    def clear(self) -> None:
        """Forget all tokens."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def step(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        wanted: Sequence[bool],
    ) -> Float32[np.ndarray, "_ vocab"]:
        """Add tokens, each at its position of its sequence; the logits behind those that are wanted."""
        lib, n = self._lib, len(tokens)
        batch = lib.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, (token, position, sequence, want) in enumerate(
                zip(tokens, positions, sequences, wanted, strict=True)
            ):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, want
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            status = lib.llama_decode(self._context, batch)
        finally:
            lib.llama_batch_free(batch)
        if status != 0:
            raise UserError(f"{self._path}: llama.cpp cannot run it (status {status}: {_reason()}).")
        rows = sum(map(bool, wanted))
        if rows == 0:
            return np.empty((0, self.vocab), np.float32)
        data = lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(data, shape=(rows, self.vocab)).copy()

    def close(self) -> None:
        self._free_context()
        if self._model:
            self._lib.llama_model_free(self._model)
            self._model = None

    def _free_context(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
            self._context = None


def _listen() -> None:
    """Keep what llama.cpp prints off the terminal, and its errors for a message of ours.

    Whoever else uses llama.cpp in this process may have told it to speak elsewhere since the last time.
    """
    import llama_cpp

    llama_cpp.llama_log_set(_hear(), ctypes.c_void_p(0))


@cache  # llama.cpp keeps no reference
def _hear() -> Any:
    import llama_cpp

    @llama_cpp.llama_log_callback
    def hear(level: int, text: bytes, _: object) -> None:
        if level == _ERROR:
            _said.append(text.decode(errors="replace").strip())

    return hear


def _reason() -> str:
    """The first error, without the name of the C function in front."""
    said = _said[0] if _said else "no reason given"
    return said.partition(": ")[2] or said
