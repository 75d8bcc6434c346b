"""The two engines give the same logits, and say in one line why they cannot."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from helpers.converted import convert
from helpers.tiny_models import LINES, write_tiny

from jquant.checkpoints.model import open_model
from jquant.core import UserError
from jquant.evaluation import Settings, compare, open_file, scoring
from jquant.evaluation import _compare as comparison
from jquant.evaluation import flax_engine as _flax
from jquant.evaluation.engines import FlaxEngine, LlamaCppEngine, choose
from jquant.plan import plan
from jquant.text.samples import Text
from jquant.writers.gguf import write_gguf

TEXT = Text("lines.txt", "\n".join(LINES * 4).encode())


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return convert(write_tiny(folder / "llama", "LlamaForCausalLM"), folder / "llama.gguf")


@pytest.fixture
def sequences() -> tuple[list[np.ndarray], list[int]]:
    rng = np.random.default_rng(0)
    lengths, first = [40, 17, 2, 40], [20, 0, 0, 38]
    return [rng.integers(3, 390, n).astype(np.int32) for n in lengths], first


def llama(path: Path) -> LlamaCppEngine:
    return LlamaCppEngine(path, threads=1)


def test_the_engines_give_the_same_logits_of_sequences_of_any_length(file, sequences):
    ours, theirs = (list(engine.logits(*sequences)) for engine in (FlaxEngine(file), llama(file)))
    for a, b, tokens, first in zip(ours, theirs, *sequences, strict=True):
        assert a.shape == b.shape == (len(tokens) - 1 - first, 400)
        np.testing.assert_allclose(a, b, atol=0.01 * b.std())


def test_logits_do_not_depend_on_how_many_are_made_at_once(file, sequences, monkeypatch):
    whole = list(FlaxEngine(file).logits(*sequences))
    monkeypatch.setattr(_flax, "LOGITS_BYTES", 4 * 400 * 7)  # seven rows
    monkeypatch.setattr(_flax, "BATCH_TOKENS", 1)
    for a, b in zip(FlaxEngine(file).logits(*sequences), whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_call_reports_how_much_of_it_is_done(file, sequences):
    for engine in (FlaxEngine(file), llama(file)):
        shares: list[float] = []
        list(engine.logits(*sequences, shares.append))
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1)


def test_both_cut_a_text_into_the_chunks_of_llama_perplexity(file):
    wanted = llama_cpp.Llama(str(file), vocab_only=True, verbose=False).tokenize(TEXT.data, add_bos=True)
    bos = wanted[0]
    for engine in (FlaxEngine(file), llama(file)):
        found, count = scoring.chunks(TEXT, engine, context=32, most=3)
        assert (len(found), count) == (3, len(wanted) // 32)
        for i, chunk in enumerate(found.tolist()):
            assert chunk == [bos, *wanted[32 * i + 1 : 32 * i + 32]]


def test_texts_that_are_generated_together_are_those_generated_alone(file):
    def greedy(step, logits, texts):
        return [int(row.argmax()) for row in logits]

    engine = llama(file)
    prompts = [engine.encode(line[:n]) for line, n in zip(LINES, (9, 30, 4, 17), strict=True)]
    together = engine.generate(prompts, 12, greedy, lambda share: None)
    for prompt, text in zip(prompts, together, strict=True):
        expected: list[int] = []
        while len(expected) < 12:
            so_far = np.array([*prompt, *expected, 0], np.int32)
            (row,) = engine.logits([so_far], [len(so_far) - 2])
            token = int(row[0].argmax())
            if engine.ends(token):
                break
            expected.append(token)
        assert text == expected


def test_a_file_that_llama_cpp_cannot_load_is_refused_with_its_reason(tmp_path):
    folder = write_tiny(tmp_path / "llama", "LlamaForCausalLM")
    model = open_model(folder)
    metadata = {**model.metadata, "general.architecture": "nonsense"}
    odd = model._replace(metadata=metadata)
    write_gguf(odd, plan(model.source.specs, model.metadata, "F16"), tmp_path / "odd.gguf")
    for _ in range(2):
        with pytest.raises(UserError, match=r"odd.gguf: llama.cpp cannot load it \(.*nonsense") as refused:
            llama(tmp_path / "odd.gguf")
        assert "\n" not in str(refused.value)
        # Somebody else in this process listens from here on.
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p(0))
    with pytest.raises(UserError, match="architecture 'nonsense' is not known to the engine jax"):
        FlaxEngine(tmp_path / "odd.gguf")


def test_llama_cpp_is_the_default_for_gguf_files_only(monkeypatch):
    assert choose(None, []) == "llama.cpp"
    assert choose(None, [Path("folder")]) == "jax"
    with pytest.raises(UserError, match=r"folder: llama.cpp reads GGUF files only; use --engine jax"):
        choose("llama.cpp", [Path("folder")])
    with pytest.raises(UserError, match=r"engine 'torch': not known; choose from jax, llama.cpp"):
        choose("torch", [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose(None, []) == "jax"
    with pytest.raises(UserError, match=r"not installed: pip install llama-cpp-python"):
        choose("llama.cpp", [])


def test_a_cut_or_foreign_cache_is_made_anew(file, tmp_path):
    engine = FlaxEngine(file)
    tokens, _ = scoring.chunks(TEXT, engine, context=32, most=2)
    key = comparison.cache_key(open_file(file), engine, tokens)
    stale, first = scoring.score_original(file, engine, tokens, tmp_path, key)
    stale.close()
    (stored,) = tmp_path.iterdir()
    stored.write_bytes(stored.read_bytes()[:100])
    made, again = scoring.score_original(file, engine, tokens, tmp_path, key)
    made.close()
    np.testing.assert_array_equal(first.nll, again.nll)
    assert comparison.cache_key(open_file(file), engine, tokens + 1) != key
    assert comparison.cache_key(open_file(file), llama(file), tokens) != key
    copy = file.with_name("copy.gguf")
    copy.write_bytes(file.read_bytes())
    assert comparison.cache_key(open_file(copy), engine, tokens) != key


def test_choices_are_scored_as_llama_cpp_scores_their_tokens(file):
    from jquant.text.questions import Question

    asked = [
        Question("What jumps over the dog?", ("a fox", "the small house", "r"), 0),
        Question("Who lived near the forest?", ("her mother", "café", "a girl"), 2),
    ]
    found = scoring.answer_questions(FlaxEngine(file), asked)
    engine, plain, scaled = llama(file), [], []
    for question in asked:
        prompt = f"Question: {question.text}\nAnswer:"
        sums = []
        for choice in question.choices:
            before, tokens = engine.encode(prompt), engine.encode(f"{prompt} {choice}")
            assert tokens[: len(before)] == before
            (logits,) = engine.logits([np.array(tokens, np.int32)], [0])
            logp = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
            sums.append(sum(logp[i - 1, tokens[i]] for i in range(len(before), len(tokens))))
        plain.append(np.argmax(sums) == question.answer)
        lengths = [len(choice.encode()) for choice in question.choices]
        scaled.append(np.argmax(np.array(sums) / lengths) == question.answer)
    assert (found.plain.value, found.normalized.value) == (np.mean(plain), np.mean(scaled))


def test_a_trained_models_divergence_is_the_same_in_both_engines(shared, tmp_path):
    """Of a file with 4 bits: within 1%. llama.cpp rounds what goes into a matrix to 8 bits, which is of the
    same order as the error of 8-bit weights, so that such files differ more."""
    folder, text = shared("data/models/stories260K"), shared("data/text/tinystories-130kB.txt")
    model = open_model(folder)
    files = []
    for kind in ("F32", "Q4_0"):
        write_gguf(model, plan(model.source.specs, model.metadata, kind), tmp_path / f"{kind}.gguf")
        files.append(open_file(tmp_path / f"{kind}.gguf"))
    data = Text(text.name, text.read_bytes())
    ours, theirs = (
        compare(files, Settings(engine=engine, chunks=12, threads=1), text=data).rows
        for engine in ("jax", "llama.cpp")
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a.scores.perplexity.value == pytest.approx(b.scores.perplexity.value, rel=2e-3)
    assert ours[1].scores.kld.value == pytest.approx(theirs[1].scores.kld.value, rel=0.01)
    assert ours[1].scores.top1.value == pytest.approx(theirs[1].scores.top1.value, abs=0.01)
