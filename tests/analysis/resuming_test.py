"""Recordings that were killed go on where they stopped; finished ones are not made again."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from olmoe_jax.analysis import layerwise, scratch, trace, trace_files
from tests.analysis import models

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.folder(tmp_path_factory.mktemp("model") / "tiny")


class Killed(Exception):
    """Stands for a kill."""


def _kill_after(monkeypatch, calls, name="apply_layer"):
    """Lets the function of `layerwise` work so often; returns how often it was called."""
    real, count = getattr(layerwise, name), [0]

    def counted(*args, **options):
        if count[0] == calls:
            raise Killed
        count[0] += 1
        return real(*args, **options)

    monkeypatch.setattr(layerwise, name, counted)
    return count


@pytest.mark.parametrize("mark_seconds", [0.0, 60.0])
@pytest.mark.parametrize("calls", [0, 1, 5, 7, 12, 17])
def test_streaming_goes_on_where_it_was_killed(model, tmp_path, monkeypatch, calls, mark_seconds):
    monkeypatch.setattr(scratch, "MARK_SECONDS", mark_seconds)
    expected = models.record(model, models.three_texts(), tmp_path / "whole", streamed=True)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        _kill_after(patch, calls)
        models.record(model, models.three_texts(), tmp_path / "out", streamed=True)
    with monkeypatch.context() as patch:
        count = _kill_after(patch, -1)
        found = models.record(model, models.three_texts(), tmp_path / "out", streamed=True)
    batches, layers = 3 + 1 + 2, 3
    kept = calls if mark_seconds == 0 else calls // batches * batches
    assert count[0] == batches * layers - kept
    for a, b in zip(expected, found, strict=True):
        assert a.info == b.info
        models.same(models.whole(a.trace), models.whole(b.trace))
    assert not (tmp_path / "out.scratch").exists()


_CHILD = """
import os, signal, sys
from olmoe_jax.analysis import layerwise, scratch
from tests.analysis import models
scratch.MARK_SECONDS, real, count = 0.0, layerwise.apply_layer, [0]
def apply_layer(*args, **options):
    if count[0] == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    count[0] += 1
    return real(*args, **options)
layerwise.apply_layer = apply_layer
models.record(sys.argv[1], models.three_texts(), sys.argv[2], streamed=True)
"""


@pytest.mark.slow
def test_a_process_that_was_killed_lost_nothing(model, tmp_path, monkeypatch):
    command = [sys.executable, "-c", _CHILD, str(model), str(tmp_path / "out")]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == -signal.SIGKILL
    count = _kill_after(monkeypatch, -1)
    found = models.record(model, models.three_texts(), tmp_path / "out", streamed=True)
    assert count[0] == 18 - 10
    expected = models.record(model, models.three_texts(), tmp_path / "whole", streamed=True)
    for a, b in zip(expected, found, strict=True):
        assert a.info == b.info
        models.same(models.whole(a.trace), models.whole(b.trace))


@pytest.mark.parametrize("chunk", [1, 1000])
@pytest.mark.parametrize("calls", [0, 2, 4, 5])
def test_the_last_pass_goes_on_where_it_was_killed(model, tmp_path, monkeypatch, calls, chunk):
    monkeypatch.setattr(trace_files, "CHUNK_TOKENS", chunk)
    expected = models.record(model, models.three_texts(), tmp_path / "whole", streamed=True)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        _kill_after(patch, calls, "apply_head")
        models.record(model, models.three_texts(), tmp_path / "out", streamed=True)
    with monkeypatch.context() as patch:
        layers, heads = _kill_after(patch, -1), _kill_after(patch, -1, "apply_head")
        found = models.record(model, models.three_texts(), tmp_path / "out", streamed=True)
    assert layers[0] == 0
    assert heads[0] == 6 - calls if chunk == 1 else heads[0] in (6, 3, 2)
    for a, b in zip(expected, found, strict=True):
        models.same(models.whole(a.trace), models.whole(b.trace))
        assert a.info == b.info


@pytest.mark.parametrize("calls", [3, 8, 15])
def test_resident_goes_on_where_it_was_killed(model, tmp_path, monkeypatch, calls):
    monkeypatch.setattr(trace_files, "CHUNK_TOKENS", 1)
    expected = models.record(model, models.three_texts(), tmp_path / "whole", streamed=False)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        _kill_after(patch, calls)
        models.record(model, models.three_texts(), tmp_path / "out", streamed=False)
    with monkeypatch.context() as patch:
        count = _kill_after(patch, -1)
        found = models.record(model, models.three_texts(), tmp_path / "out", streamed=False)
    assert count[0] == 18 - calls // 3 * 3
    for a, b in zip(expected, found, strict=True):
        assert a.info == b.info
        models.same(models.whole(a.trace), models.whole(b.trace))


def _change_a_weight(folder):
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-4:] = np.float32(7).tobytes()
    file.write_bytes(data)


def test_what_other_weights_left_is_not_taken_up(model, tmp_path, monkeypatch):
    model = shutil.copytree(model, tmp_path / "tiny")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        _kill_after(patch, 13)
        models.record(model, models.three_texts(), tmp_path / "out", streamed=True)
    _change_a_weight(model)
    with pytest.raises(ValueError, match="left by another job: it had job="):
        models.record(model, models.three_texts(), tmp_path / "out", streamed=True)
    shutil.rmtree(tmp_path / "out")
    count = _kill_after(monkeypatch, -1)
    found = models.record(model, models.three_texts(), tmp_path / "out", streamed=True)
    assert count[0] == 18
    expected = models.record(model, models.three_texts(), tmp_path / "fresh", streamed=True)
    for a, b in zip(expected, found, strict=True):
        models.same(models.whole(a.trace), models.whole(b.trace))


def test_a_group_that_is_done_is_not_computed_again(model, tmp_path, monkeypatch):
    options = {"streamed": True, "carried_tokens": 1}  # a batch per group
    with monkeypatch.context() as patch, pytest.raises(Killed):
        _kill_after(patch, 7)
        models.record(model, models.three_texts(), tmp_path / "out", **options)
    count = _kill_after(monkeypatch, -1)
    found = models.record(model, models.three_texts(), tmp_path / "out", **options)
    assert count[0] == 18 - 7  # two whole groups, and a layer of the third
    for text, one in zip(models.three_texts(), found, strict=True):
        np.testing.assert_array_equal(models.whole(one.trace).input_ids, text.tokens)


def test_a_finished_trace_is_not_recorded_again(model, tmp_path, monkeypatch):
    models.record(model, models.three_texts()[:2], tmp_path / "out", streamed=True)
    with monkeypatch.context() as patch:
        count = _kill_after(patch, -1)
        found = models.record(
            model, models.three_texts(), tmp_path / "out", streamed=True, accumulate=models.Blocks
        )
    assert count[0] == 2 * 3  # the third text only
    assert [one.tokens for one in found] == [0, 0, 33]
    for text, one in zip(models.three_texts(), found, strict=True):
        np.testing.assert_array_equal(trace.join(one.accumulated).input_ids, text.tokens)
    with pytest.raises(ValueError, match="holds another trace, with data=.*delete it"):
        models.record(model, [models.text("a", 50, seed=9)], tmp_path / "out")
    with pytest.raises(ValueError, match="holds another trace, with precision='float32' instead"):
        models.record(model, models.three_texts(), tmp_path / "out", precision="bfloat16")


def test_a_finished_trace_of_other_weights_is_refused(model, tmp_path):
    model = shutil.copytree(model, tmp_path / "tiny")
    models.record(model, models.three_texts()[:1], tmp_path / "out")
    _change_a_weight(model)
    with pytest.raises(ValueError, match="was made from other weights.*delete it"):
        models.record(model, models.three_texts()[:1], tmp_path / "out")
    info = tmp_path / "out" / "a" / "trace.json"
    content = json.loads(info.read_text())
    del content["job"]  # as an earlier version wrote it
    info.write_text(json.dumps(content))
    (found,) = models.record(model, models.three_texts()[:1], tmp_path / "out")
    assert found.tokens == 0 and found.trace.job is None
