"""Checkpoints recorded and counted one by one; with and without keeping their traces."""

import dataclasses
import shutil

import numpy as np
import pytest

from olmoe_jax.analysis import (
    counting,
    counts_files,
    recording,
    results,
    saturation,
    sessions,
    suites,
)
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
    left = sorted(path.name for path in (tmp_path / "few").iterdir())
    assert left == ["step0-tokens0K.counted", "step1-tokens1K.counted", "step2-tokens2K"]
    assert [bool(one.traces) for one in few] == [False, False, True]
    as_json = [results.plain(saturation.to_json(one)) for one in (want, found)]
    assert as_json[0] == as_json[1]
    values = [one.topk.value for one in (*found.against_final, *found.neighbours)]
    assert len(values) == 4 and all(0 < value.mean() < 1 for value in values)
    for one, two in zip(_counted(kept), _counted(few), strict=True):
        np.testing.assert_array_equal(one, two)


class Killed(Exception):
    """Stands for a kill."""


def _as_json(found):
    recordings, settled = found
    return _counted(recordings), results.plain(saturation.to_json(settled))


@pytest.fixture(scope="module")
def whole(checkpoints, tmp_path_factory):
    """What a session that is not stopped comes to."""
    return _as_json(_record(checkpoints, tmp_path_factory.mktemp("whole"), keep=False))


def _again(checkpoints, folder, given=None):
    """(steps that were recorded, what a session without kept traces comes to)."""
    said = []
    found = sessions.record(
        checkpoints, given or models.three_texts(), folder, keep=False, announce=said.append
    )
    return [int(line.split("step")[1][0]) for line in said if "recording" in line], found


@pytest.mark.parametrize(
    "where, calls, recorded",
    [
        ("record", 2, [2, 0, 1]),  # step 0 is there, for step 1 to be compared with
        ("delete", 0, [2]),  # the traces of step 0 are in pieces
        ("delete", 1, [2]),
    ],
)
def test_a_stopped_session_goes_on_from_the_counts(
    checkpoints, whole, tmp_path, monkeypatch, where, calls, recorded
):
    module, name = {"record": (recording, "record"), "delete": (shutil, "rmtree")}[where]
    real, count = getattr(module, name), [0]

    def killed(*args, **options):
        if count[0] == calls:
            for file in args[0].glob("*/chunk*") if where == "delete" else ():
                file.unlink()
            raise Killed
        count[0] += 1
        return real(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, name, killed)
        _record(checkpoints, tmp_path, keep=False)
    steps, again = _again(checkpoints, tmp_path)
    assert steps == recorded
    counted, settled = _as_json(again)
    assert settled == whole[1]
    for one, two in zip(counted, whole[0], strict=True):
        np.testing.assert_array_equal(one, two)
    assert not list(tmp_path.glob("*.deleted"))


def test_counts_of_another_session_are_not_taken(checkpoints, tmp_path):
    _record(checkpoints, tmp_path, keep=False)
    assert _again(checkpoints[::2], tmp_path)[0] == [2]
    file = tmp_path / "step1-tokens1K.counted" / "overlaps.npz"
    file.write_bytes(file.read_bytes()[:-9])
    assert _again(checkpoints, tmp_path)[0] == [2, 0, 1]
    # of other texts
    given = [dataclasses.replace(one, domain=f"{one.domain}!") for one in models.three_texts()]
    steps, (found, _) = _again(checkpoints, tmp_path, given)
    assert steps == [2, 0, 1] and list(found[0].parts) == ["a!", "b/c!", "d!"]


def test_what_was_counted_is_not_counted_again(checkpoints, tmp_path, monkeypatch):
    first, _ = _record(checkpoints[-1:], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(counting, "count", None)  # cannot be called
        again, _ = _record(checkpoints[-1:], tmp_path)
    for one, two in zip(first[0].parts.values(), again[0].parts.values(), strict=True):
        assert one.info == two.info and one.vocabulary.keys() == two.vocabulary.keys()
        np.testing.assert_array_equal(one.pairs, two.pairs)


def test_counts_of_another_trace_are_not_taken(checkpoints, tmp_path, monkeypatch):
    (found,), _ = _record(checkpoints[-1:], tmp_path)
    trace = found.traces["a"]
    calls, real = [], counting.count
    monkeypatch.setattr(counting, "count", lambda *a, **o: calls.append(o) or real(*a, **o))
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
