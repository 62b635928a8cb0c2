"""Sparse tallies against numpy.unique."""

import numpy as np
import pytest

from olmoe_jax.analysis import tallies


def test_keys_in_any_order_are_counted_up_to_the_largest_and_merged(monkeypatch):
    monkeypatch.setattr(tallies, "_PATIENCE", 20)
    rng, growing, added = np.random.default_rng(0), tallies.Growing(), []
    for size in (7, 0, 300, 1, 41):
        added.append(rng.choice(np.array([0, 3, 17, 2**31, 2**32 - 1], np.uint32), size))
        growing.add(added[-1])
        found = growing.result() if size == 1 else None
        if found is not None:
            assert_counts(found, np.concatenate(added))
    assert_counts(growing.result(), np.concatenate(added))
    assert_counts(growing.result(), np.concatenate(added))
    parts = [tallies.of_keys(keys) for keys in added]
    assert_counts(tallies.merge(parts), np.concatenate(added))
    assert len(tallies.Growing().result()) == len(tallies.merge([])) == 0


def assert_counts(found, keys):
    wanted, often = np.unique(keys, return_counts=True)
    assert found.keys.dtype == found.counts.dtype == np.uint32
    np.testing.assert_array_equal(found.keys, wanted)
    np.testing.assert_array_equal(found.counts, often)


def test_a_count_beyond_32_bits_is_refused_and_the_largest_is_not():
    half = tallies.Tally(np.array([5, 9], np.uint32), np.array([2**31, 1], np.uint32))
    less = tallies.Tally(np.array([5, 9], np.uint32), np.array([2**31 - 1, 1], np.uint32))
    assert tallies.merge([half, less]).counts.tolist() == [2**32 - 1, 2]
    with pytest.raises(ValueError, match=r"2\^32 times: count such a trace in parts"):
        tallies.merge([half, half])
