"""The coherence check: its parts against counts by hand, and whole files that speak or do not."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from helpers.commands import attempt
from helpers.tiny_models import write_tiny
from scipy.special import softmax

from jquant.evaluation import coherence
from jquant.evaluation.coherence import Reference, Sample


def test_parts_count_what_they_say():
    assert coherence.common_words(["The cat SAT on the mat.", "It's 42 zyxw"]) == pytest.approx(3 / 8)
    assert coherence.common_words(["«—…» 42"]) == 0
    assert coherence.stutter([[1, 1, 1, 2], [5, 6]]) == 2 / 4
    assert coherence.distinct_runs([[1, 2, 3, 1, 2, 3, 1], [7, 8, 9], [1]]) == pytest.approx((3 / 5 + 1) / 2)


def samples(text: str, tokens: list[int]) -> list[Sample]:
    return [Sample("p", text, tuple(tokens), sampled, False) for sampled in (False, True)]


SENTENCE = samples("she was very happy to go back to the house with her dog", list(range(14)))


def test_a_sentence_passes_and_the_score_is_the_product_of_its_parts():
    found = coherence.judge(SENTENCE, Reference(), likeness=-0.5)
    assert found.passed
    assert found.parts["likeness"] == pytest.approx(math.exp(-0.25))
    assert found.score == pytest.approx(math.prod(found.parts.values()))
    assert all(0 <= part <= 1 for part in found.parts.values())


@pytest.mark.parametrize(
    ("broken", "part"),
    [
        (samples("authent corrid incorpor elig interpre dissem", list(range(14))), "words"),
        (samples("Mon Mon Mon Mon the the the the the the", [3] * 14), "steadiness"),
        (samples("it was it was it was it was it was it was", [1, 2, 3] * 12), "variety"),
        (samples("the", [1]), "length"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_way_of_being_broken_fails_and_is_named(broken, part):
    found = coherence.judge(broken, Reference())
    assert not found.passed
    assert found.reason.startswith(coherence.REASONS[part])


def test_texts_that_the_original_would_not_write_fail():
    found = coherence.judge(SENTENCE, Reference(), likeness=-6.0)
    assert not found.passed
    assert found.reason.startswith(coherence.REASONS["likeness"])


def test_a_model_of_another_language_is_compared_with_its_original():
    texts = samples("le petit chat est sur la table de la cuisine", list(range(14)))
    assert not coherence.judge(texts, Reference()).passed
    assert coherence.judge(texts, coherence.reference(texts), likeness=0.0).passed


def test_sampling_draws_from_the_softmax_of_the_best_tokens():
    logits = np.array([2.0, 0.0, 1.0, -1.0], np.float32)
    sampled = len(coherence.PROMPTS)  # the first text that is
    choose = coherence.sampler(seed=1)
    drawn = [choose(step, logits[None], [sampled])[0] for step in range(4000)]
    shares = np.bincount(drawn, minlength=4) / 4000
    wanted = softmax(logits.astype(np.float64) / coherence.TEMPERATURE)
    np.testing.assert_allclose(shares, wanted, atol=4 * 0.5 / math.sqrt(4000))
    assert drawn == [choose(step, logits[None], [sampled])[0] for step in range(4000)]
    assert choose(0, logits[None], [0]) == [0]


def test_tokens_beyond_the_best_forty_are_never_drawn():
    logits = np.concatenate([np.zeros(40), np.full(1000, -1e-3)]).astype(np.float32)
    choose = coherence.sampler()
    drawn = {choose(step, logits[None], [len(coherence.PROMPTS)])[0] for step in range(300)}
    assert drawn <= set(range(40))


def test_quantize_check_fails_a_model_of_random_weights_and_keeps_the_file(tmp_path):
    model = write_tiny(tmp_path / "model", "MistralForCausalLM")
    result = attempt("quantize", model, tmp_path / "out.gguf", "-t", "Q8_0", "--check", "--json", "-q")
    assert result.exit_code == 5, result.output
    assert (tmp_path / "out.gguf").exists()
    (line,) = result.stderr.splitlines()
    assert "out.gguf: makes no sense when it writes: coherence 0." in line
    assert "choose a larger type" in line
    report = json.loads(result.stdout)["check"]
    assert not report["passed"]
    assert report["score"] < coherence.THRESHOLD
    assert len(report["texts"]) == 24


@pytest.mark.parametrize("kind", ["F16", "Q4_0"])
def test_quantize_check_passes_a_story_model(shared, tmp_path, kind):
    model = shared("data/models/stories260K")
    result = attempt("quantize", model, tmp_path / "out.gguf", "-t", kind, "--check")
    assert result.exit_code == 0, result.output
    assert "check: coherence 0.9" in result.stderr


def test_quantize_check_needs_llama_cpp_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr("jquant.evaluation.engines.has_llama_cpp", lambda: False)
    result = attempt("quantize", tmp_path / "absent", tmp_path / "out.gguf", "--check")
    assert result.exit_code == 3
    assert "pip install llama-cpp-python" in result.stderr
