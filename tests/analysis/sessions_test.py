"""Checkpoints recorded and counted one by one; with and without keeping their traces."""

import dataclasses

import numpy as np
import pytest

from olmoe_jax.analysis import counts, counts_files, results, saturation, sessions, suites
from tests.analysis import models
from tests.porting import foreign, tiny


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite") / "olmoe"
    for number in range(3):
        foreign.write_folder(
            folder / f"step{number}-tokens{number}K", dtype="float32", files={}, numbers=True,
            seed=number,
        )  # fmt: skip
    return suites.checkpoints_of(folder)


def _record(checkpoints, folder, **options):
    return sessions.record(
        checkpoints, models.three_texts(), folder, announce=tiny.quiet, **options
    )


def _counted(recordings):
    return [part.topk for one in recordings for part in one.parts.values()]


def test_without_kept_traces_the_numbers_are_the_same(checkpoints, tmp_path):
    kept, none = _record(checkpoints, tmp_path / "kept")
    assert none is None and all(one.traces for one in kept)
    want = saturation.over_training([list(one.traces.values()) for one in kept], total_steps=9)
    few, found = _record(checkpoints, tmp_path / "few", keep=False, total_steps=9)
    assert [path.name for path in (tmp_path / "few").iterdir()] == ["step2-tokens2K"]
    assert [bool(one.traces) for one in few] == [False, False, True]
    as_json = [results.plain(saturation.to_json(one)) for one in (want, found)]
    assert as_json[0] == as_json[1]
    values = [one.topk.value for one in (*found.against_final, *found.neighbours)]
    assert len(values) == 4 and all(0 < value.mean() < 1 for value in values)
    for one, two in zip(_counted(kept), _counted(few), strict=True):
        np.testing.assert_array_equal(one, two)


def test_what_was_counted_is_not_counted_again(checkpoints, tmp_path, monkeypatch):
    first, _ = _record(checkpoints[-1:], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(counts, "count", None)  # cannot be called
        again, _ = _record(checkpoints[-1:], tmp_path)
    for one, two in zip(first[0].parts.values(), again[0].parts.values(), strict=True):
        assert one.info == two.info and one.vocabulary.keys() == two.vocabulary.keys()
        np.testing.assert_array_equal(one.pairs, two.pairs)


def test_counts_of_another_trace_are_not_taken(checkpoints, tmp_path, monkeypatch):
    (found,), _ = _record(checkpoints[-1:], tmp_path)
    trace = found.traces["a"]
    calls, real = [], counts.count
    monkeypatch.setattr(counts, "count", lambda *a, **o: calls.append(o) or real(*a, **o))
    counts_files.of_trace(trace, vocabulary=False)  # what is kept has more than is asked
    assert not calls
    chunk = trace.path / "chunk_00000.npz"
    chunk.write_bytes(chunk.read_bytes())  # the same bytes, another time
    counts_files.of_trace(trace, vocabulary=False)
    counts_files.of_trace(trace, vocabulary=True)
    assert [call["vocabulary"] for call in calls] == [False, True]
    (trace.path / counts_files.NAME).write_bytes(b"torn")
    again = counts_files.of_trace(trace)
    assert len(calls) == 3 and again.info.num_tokens == trace.info.num_tokens
    other = dataclasses.replace(trace, info=dataclasses.replace(trace.info, domain="other"))
    assert counts_files.of_trace(other).info.domain == "other" and len(calls) == 4
