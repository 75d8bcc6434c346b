"""Predictions on the disk: what is read is what was written, up to a rounding that does not matter."""

from __future__ import annotations

import errno

import jax
import numpy as np
import pytest
from helpers.divergence import distributions, exact_kld

from jquant.core import OutputError, kl_divergence
from jquant.evaluation import metrics as evaluate
from jquant.io import log_probs

TARGETS = np.arange(20, dtype=np.int32)


def rows(logits: np.ndarray) -> log_probs.Rows:
    logp, nll, top = map(np.asarray, evaluate.predict(logits, TARGETS[: len(logits)]))
    return log_probs.encode(logp, nll, top)


def read_back(found: log_probs.Rows):
    return jax.nn.log_softmax(log_probs.decode(found), axis=-1)


def test_a_row_and_itself_diverge_by_less_than_1e_8():
    p, _ = distributions(20, 50_000, 0)
    found = kl_divergence(read_back(rows(p)), evaluate.predict(p, TARGETS).logp)
    assert float(np.abs(found).max()) < 1e-7  # float32 sums of 50,000 terms
    assert float(np.mean(exact_kld(log_probs.decode(rows(p)), p))) < 1e-8


@pytest.mark.parametrize("distance", [1.0, 0.1, 0.02])
def test_the_rounding_changes_a_divergence_by_less_than_a_hundredth_and_the_mean_by_less(distance):
    p, q = distributions(20, 50_000, distance)
    found = exact_kld(log_probs.decode(rows(p)), q)
    np.testing.assert_allclose(found, exact_kld(p, q), rtol=1e-2)
    assert found.mean() == pytest.approx(exact_kld(p, q).mean(), rel=1e-3)


def test_float16_would_be_further_off():
    p, q = distributions(20, 50_000, 0.02)
    logp = np.asarray(evaluate.predict(p, TARGETS).logp)
    ours, half = exact_kld(log_probs.decode(rows(p)), q), exact_kld(logp.astype(np.float16), q)
    wanted = exact_kld(p, q)
    assert np.abs(ours - wanted).max() < np.abs(half - wanted).max()


def test_what_is_impossible_stays_very_improbable():
    p, _ = distributions(2, 10, 0)
    p[0, 3] = -np.inf
    logp = log_probs.decode(rows(p))
    assert np.isfinite(logp).all()
    assert logp[0].max() - logp[0, 3] == pytest.approx(log_probs.RANGE, rel=1e-5)


def test_a_row_without_differences_is_kept():
    found = log_probs.decode(rows(np.zeros((1, 8), np.float32)))
    np.testing.assert_allclose(found, -np.log(8), rtol=1e-6)


@pytest.fixture
def written(tmp_path):
    chunks = [rows(distributions(20, 100, 0, seed)[0]) for seed in range(3)]
    return tmp_path, chunks, log_probs.write(tmp_path, "key", (3, 20, 100), iter(chunks))


def test_chunks_are_read_in_any_order(written):
    folder, chunks, found = written
    for i in (2, 0, 1):
        for a, b in zip(found.read(i), chunks[i], strict=True):
            np.testing.assert_array_equal(a, b)
    again = log_probs.find(folder, "key", (3, 20, 100))
    assert again is not None
    np.testing.assert_array_equal(again.read(1).codes, chunks[1].codes)
    again.close()
    found.close()


def test_another_shape_or_a_cut_file_is_not_found(written):
    folder, _, found = written
    found.close()
    assert log_probs.find(folder, "other", (3, 20, 100)) is None
    assert log_probs.find(folder, "key", (2, 20, 100)) is None
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert log_probs.find(folder, "key", (3, 20, 100)) is None


def test_without_a_folder_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    chunk = rows(distributions(20, 100, 0)[0])
    found = log_probs.write(None, "key", (1, 20, 100), iter([chunk]))
    np.testing.assert_array_equal(found.read(0).codes, chunk.codes)
    found.close()
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_leaves_nothing(tmp_path):
    def chunks():
        yield rows(distributions(20, 100, 0)[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        log_probs.write(tmp_path, "key", (2, 20, 100), chunks())
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_said_before_the_work(tmp_path, monkeypatch):
    def full(file, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    def chunks():
        raise AssertionError("the model was run")
        yield

    monkeypatch.setattr(log_probs, "reserve", full)
    with pytest.raises(OutputError, match=r"40.00 MB of the original's predictions: .*; score fewer"):
        log_probs.write(tmp_path, "key", (2, 20, 500_000), chunks())
    assert not list(tmp_path.iterdir())
