"""What holds for all K types alike: broken weights, and importance of any size."""

from __future__ import annotations

import numpy as np
import pytest
import specs
from helpers import tables
from helpers.k_blocks import encode

K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
every_format = pytest.mark.parametrize("format", tables.formats(K_TYPES, {"Q6_K"}))


@every_format
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_spoils_its_own_block_only(format, value):
    x = specs.gaussian(4, 768)
    spoilt = x.copy()
    spoilt[2, 300] = value
    for importance in (None, specs.importance(768)):
        differs = (encode(format, x, importance) != encode(format, spoilt, importance)).reshape(4, 3, -1)
        assert set(map(tuple, np.argwhere(differs.any(axis=-1)))) <= {(2, 1)}


@every_format
def test_the_size_of_importance_does_not_matter(format):
    x, w = specs.gaussian(16, 256), specs.importance(256)
    reference = encode(format, x, w)
    for scale in (2.0**-100, 2.0**100):
        assert (encode(format, x, w * np.float32(scale)) == reference).all()


@every_format
def test_without_any_importance_in_a_block_all_weights_count_alike(format):
    x = specs.gaussian(16, 256)
    nothing, alike = np.zeros(256, np.float32), np.ones(256, np.float32)
    assert (encode(format, x, nothing) == encode(format, x, alike)).all()
