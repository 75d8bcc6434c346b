"""The metrics of an evaluation, against SciPy and direct formulas in float64."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from helpers.divergence import distributions, exact_kld
from scipy import special, stats

from jquant.core import kl_divergence
from jquant.evaluation import metrics as evaluate
from jquant.evaluation.metrics import Tokens


# The absolute error that is left is that of float32 sums: it matters to files that are almost equal only.
@pytest.mark.parametrize("distance", [2.0, 0.1, 1e-2, 1e-3])
def test_kl_divergence_is_scipys(distance):
    p, q = distributions(20, 50_000, distance)
    targets = np.zeros(20, np.int32)
    found = kl_divergence(evaluate.predict(p, targets).logp, evaluate.predict(q, targets).logp)
    np.testing.assert_allclose(found, exact_kld(p, q), rtol=2e-4, atol=3e-8)


def test_kl_divergence_of_equal_models_is_zero():
    p, _ = distributions(5, 1000, 0)
    logp = evaluate.predict(p, np.zeros(5, np.int32)).logp
    np.testing.assert_allclose(kl_divergence(logp, logp), 0, atol=1e-8)


def test_tokens_that_a_model_excludes_cost_nothing_or_everything():
    with np.errstate(divide="ignore"):
        logp = np.log(np.array([[0.5, 0.5, 0.0], [0.5, 0.25, 0.25]], np.float32))
    found = np.asarray(kl_divergence(logp, logp[::-1].copy()))
    assert found[0] == pytest.approx(0.5 * math.log(2), rel=1e-6)
    assert found[1] == math.inf


def test_predictions_are_log_softmax():
    p, _ = distributions(6, 300, 0)
    targets = np.arange(6, dtype=np.int32) * 7
    found = evaluate.predict(p, targets)
    wanted = special.log_softmax(p.astype(np.float64), axis=-1)
    np.testing.assert_allclose(found.logp, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.nll, -wanted[np.arange(6), targets], rtol=1e-5)
    np.testing.assert_array_equal(found.top, p.argmax(-1))


def test_metrics_are_the_same_inside_jit_and_vmap():
    p, q = (x.reshape(2, 4, 300) for x in distributions(8, 300, 0.5))
    found = jax.vmap(lambda a, b: kl_divergence(jax.nn.log_softmax(a), jax.nn.log_softmax(b)))(p, q)
    np.testing.assert_allclose(found.reshape(-1), exact_kld(p, q).reshape(-1), rtol=1e-4)


@pytest.fixture
def tokens() -> Tokens:
    rng = np.random.default_rng(1)
    nll, base = (rng.gamma(2, 1.2, 997).astype(np.float32) for _ in range(2))
    kld = rng.exponential(0.1, 997).astype(np.float32)
    return Tokens(nll, kld, base, rng.random(997) < 0.9)


def test_means_have_the_standard_error_of_scipy(tokens):
    scores = evaluate.summarize(tokens)
    assert scores.kld is not None
    assert scores.kld.value == pytest.approx(tokens.kld.mean(dtype=np.float64), rel=1e-12)
    assert scores.kld.error == pytest.approx(stats.sem(tokens.kld.astype(np.float64)), rel=1e-9)
    ratio = tokens.nll.astype(np.float64) - tokens.base_nll
    assert scores.log_ratio == pytest.approx((ratio.mean(), stats.sem(ratio)), rel=1e-9)


def test_perplexity_is_the_exponential_of_the_mean(tokens):
    value, error = evaluate.summarize(tokens).perplexity
    nll = tokens.nll.astype(np.float64)
    assert value == pytest.approx(math.exp(nll.mean()), rel=1e-12)
    assert error == pytest.approx(value * stats.sem(nll), rel=1e-9)


def test_quantiles_are_exact(tokens):
    scores = evaluate.summarize(tokens)
    ordered = np.sort(tokens.kld.astype(np.float64))  # 997 tokens: 996 steps
    assert scores.quantiles["kld_median"] == ordered[498]
    at = 0.99 * 996
    between = ordered[986] + (at - 986) * (ordered[987] - ordered[986])
    assert scores.quantiles["kld_99"] == pytest.approx(between, rel=1e-12)
    assert scores.quantiles["kld_999"] == pytest.approx(stats.scoreatpercentile(ordered, 99.9), rel=1e-12)
    assert scores.kld_max == ordered[-1]


def test_a_token_that_the_candidate_excludes_makes_the_mean_infinite(tokens):
    kld = tokens.kld.copy()
    kld[:3] = np.inf
    scores = evaluate.summarize(tokens._replace(kld=kld))
    assert scores.kld.value == scores.kld_max == math.inf
    assert math.isnan(scores.kld.error)
    assert scores.quantiles["kld_median"] == np.sort(kld.astype(np.float64))[498]


def test_change_of_probability_and_its_errors(tokens):
    scores = evaluate.summarize(tokens)
    change = np.exp(-tokens.nll.astype(np.float64)) - np.exp(-tokens.base_nll.astype(np.float64))
    assert scores.delta_p == pytest.approx((change.mean(), stats.sem(change)), rel=1e-9)
    rms = math.sqrt((change**2).mean())
    assert scores.delta_p_rms == pytest.approx((rms, stats.sem(change**2) / (2 * rms)), rel=1e-9)


def test_agreement_has_the_error_of_a_share(tokens):
    share, error = evaluate.summarize(tokens).top1
    assert share == tokens.agrees.mean()
    assert error == pytest.approx(math.sqrt(share * (1 - share) / 996), rel=1e-9)


def test_accuracy_divides_by_length_or_not():
    likelihoods = [np.array([-4, -6], np.float32), np.array([-1, -2, -9], np.float32)]
    lengths = [np.array([2, 6]), np.array([1, 1, 1])]
    found = evaluate.accuracy(likelihoods, lengths, [1, 0])
    assert found.questions == 2
    assert found.plain.value == 0.5  # −4 beats −6
    assert found.normalized.value == 1.0  # −1 beats −2
