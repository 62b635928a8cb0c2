"""Tests of the records: metrics.jsonl, event files (read by an own parser), progress, spikes."""

import io
import json
import math
import os
import struct

import numpy as np
import pytest
from tensorboardX import crc32c
from tensorboardX.proto import event_pb2

from olmoe_jax.training import metrics


def lines(workdir):
    return (workdir / "metrics.jsonl").read_text().splitlines()


def write(workdir, steps, resume_step=0, **kwargs):
    with metrics.MetricsWriter(workdir, resume_step, **kwargs) as writer:
        for step in steps:
            writer.write(
                step, {"train/loss": np.float32(step / 7), "router/layer_00/max_load": 1.5}
            )


def test_records_start_with_the_step_and_have_sorted_names(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(
            3, {"train/loss": np.float32(0.1), "perf/mfu": 0.5, "router/load": [[0.25, 0.75]]}
        )
    (line,) = lines(tmp_path)
    assert list(json.loads(line)) == ["step", "perf/mfu", "router/load", "train/loss"]
    loss = float(np.float32(0.1))
    expected = {"step": 3, "perf/mfu": 0.5, "router/load": [[0.25, 0.75]], "train/loss": loss}
    assert json.loads(line) == expected


def test_numbers_that_are_not_finite_come_back(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(0, {"a": math.nan, "b": np.float32(-math.inf)})
    (record,) = metrics.read(tmp_path)
    assert math.isnan(record["a"]) and record["b"] == -math.inf


def test_a_record_is_on_disk_before_the_writer_closes(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(0, {"train/loss": 1.0})
        assert len(lines(tmp_path)) == 1
        assert tags(tmp_path) == {(0, "train/loss"): 1.0}


def test_resuming_cuts_back_so_that_each_step_is_there_once(tmp_path):
    write(tmp_path, range(7))
    write(tmp_path, range(5, 11), resume_step=5)
    assert [record["step"] for record in metrics.read(tmp_path)] == list(range(11))
    write(tmp_path, range(2))
    assert [record["step"] for record in metrics.read(tmp_path)] == [0, 1]


def test_steps_that_only_rise_are_enforced(tmp_path):
    with pytest.raises(ValueError, match="metrics of step 3: the last step written is 3"):
        write(tmp_path, [1, 3, 3])
    with pytest.raises(ValueError, match="metrics of step 2: the last step written is 3"):
        write(tmp_path, [2], resume_step=7)


@pytest.mark.parametrize("cut", [1, 2, 11])
def test_a_line_cut_short_by_a_kill_is_dropped_with_a_note(tmp_path, cut):
    write(tmp_path, range(5))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert [record["step"] for record in metrics.read(tmp_path)] == [0, 1, 2, 3]
    notes = []
    write(tmp_path, [4], resume_step=4, announce=notes.append)
    assert [record["step"] for record in metrics.read(tmp_path)] == [0, 1, 2, 3, 4]
    assert len(notes) == 1 and "metrics.jsonl, line 5: cut short" in notes[0]


def test_a_damaged_line_in_the_middle_is_an_error_and_changes_nothing(tmp_path):
    write(tmp_path, range(3))
    path = tmp_path / "metrics.jsonl"
    damaged = path.read_bytes().replace(b'{"step": 1', b'{"stop": 1')
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a record"):
        write(tmp_path, [2], resume_step=2)
    assert path.read_bytes() == damaged


def test_cutting_back_replaces_the_file_by_a_rename(tmp_path, monkeypatch):
    write(tmp_path, range(5))
    before = lines(tmp_path)

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, [2], resume_step=2)
    assert lines(tmp_path) == before


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    write(tmp_path, range(3))
    assert not list(tmp_path.iterdir())


def test_reading_names_the_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl: not found"):
        list(metrics.read(tmp_path))


def events(workdir):
    """Events of all files in order of writing: TFRecord framing by hand, checksums included."""

    def masked(data):
        crc = crc32c.crc32c(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    out = []
    for path in sorted(
        (workdir / "tensorboard").iterdir(), key=lambda p: int(p.name.split(".")[-1])
    ):
        data, at = path.read_bytes(), 0
        while at < len(data):
            header = data[at : at + 8]
            (length,) = struct.unpack("<Q", header)
            assert struct.unpack("<I", data[at + 8 : at + 12])[0] == masked(header)
            body = data[at + 12 : at + 12 + length]
            assert struct.unpack("<I", data[at + 12 + length : at + 16 + length])[0] == masked(body)
            out.append(event_pb2.Event.FromString(body))
            at += 16 + length
    return out


def tags(workdir):
    """{(step, tag): value} as TensorBoard shows them: a restart at step N voids N and later."""
    out = {}
    for event in events(workdir):
        if event.session_log.status == event_pb2.SessionLog.START:
            out = {key: value for key, value in out.items() if key[0] < event.step}
        for value in event.summary.value:
            out[event.step, value.tag] = value.simple_value
    return out


def test_tensorboard_has_the_summaries_only(tmp_path):
    record = {name: i / 8 for i, name in enumerate(metrics.SUMMARIES)}
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(
            5,
            record
            | {"router/layer_00/max_load": 1.0, "router/load": [[1.0]], "train/problem": "x"},
        )
    assert tags(tmp_path) == {(5, name): value for name, value in record.items()}
    assert 4 <= len(metrics.SUMMARIES) <= 16
    assert events(tmp_path)[0].file_version == "brain.Event:2"


def test_tensorboard_forgets_what_a_resumed_run_repeats(tmp_path):
    write(tmp_path, range(7))
    with metrics.MetricsWriter(tmp_path, 5) as writer:
        writer.write(6, {"train/loss": 100.0})
    expected = {(step, "train/loss"): np.float32(step / 7) for step in range(5)}
    assert tags(tmp_path) == expected | {(6, "train/loss"): 100.0}


def test_resuming_within_a_second_keeps_the_earlier_event_file(tmp_path):
    for step in range(3):
        write(tmp_path, [step], resume_step=step)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_progress_prints_a_line_now_and_then():
    stream, clock = io.StringIO(), Clock()
    progress = metrics.Progress(1000, seconds=5.0, stream=stream, clock=clock)
    for step in range(100, 112):
        record = {"train/loss": 2.5, "train/learning_rate": 4e-4, "perf/tokens_per_second": 12345.6}
        if step == 103:
            record |= {"validation/loss": 3.25}
        progress.show(step, record)
        clock.now += 1
    progress.close()
    printed = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in printed] == [f"step {s}/1000" for s in (100, 103, 108)]
    assert printed[0] == "step 100/1000, loss 2.5000, rate 0.0004, 12,346 tokens/s"
    assert "validation loss 3.2500" in printed[1]
    assert printed[2].endswith(f"{metrics.duration(892)} left")  # one step a second


def test_progress_is_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = metrics.Progress(7, stream=stream)
    for step in range(3, 7):
        progress.show(step, {"train/loss": 2.5})
    progress.show(7, {"validation/loss": 2.25})
    progress.close()
    assert "7/7" in stream.getvalue().split("\r")[-1]


def test_router_metrics_by_hand():
    load = [[0.5, 0.25, 0.25, 0.0, 0.0], [0.2] * 5]
    out = metrics.router_metrics(load, layers=[1, 3])
    entropy = 0.5 * math.log(2) + 0.5 * math.log(4)  # nats
    layer_1 = {"max_load": 2.5, "max_violation": 1.5, "entropy": entropy,
               "normalized_entropy": entropy / math.log(5), "dead_experts": 2}  # fmt: skip
    layer_3 = {"max_load": 1.0, "max_violation": 0.0, "entropy": math.log(5),
               "normalized_entropy": 1.0, "dead_experts": 0}  # fmt: skip
    expected = {f"router/layer_01/{k}": value for k, value in layer_1.items()}
    expected |= {f"router/layer_03/{k}": value for k, value in layer_3.items()}
    expected |= {"router/max_load": 2.5, "router/max_violation": 1.5, "router/dead_experts": 2,
                 "router/entropy": (entropy + math.log(5)) / 2,
                 "router/normalized_entropy": (entropy / math.log(5) + 1) / 2}  # fmt: skip
    assert out == pytest.approx(expected)
    json.dumps(out)


def test_router_metrics_equal_the_definition_on_random_loads():
    counts = np.random.default_rng(0).integers(0, 5, size=(3, 7))
    out = metrics.router_metrics((counts / counts.sum(axis=1, keepdims=True)).astype(np.float32))
    for layer, row in enumerate(counts):
        name = f"router/layer_{layer:02d}"
        assert out[f"{name}/max_violation"] == pytest.approx(
            (row.max() - row.mean()) / row.mean(), rel=1e-6
        )
        assert out[f"{name}/dead_experts"] == (row == 0).sum()
    assert (counts == 0).any(axis=1).sum() > 1
    assert out["router/dead_experts"] == (counts == 0).sum()


def detector(steps=20, factor=10.0):
    """A SpikeDetector that has seen quiet steps of four layers, and those layers' usual norms."""
    out = metrics.SpikeDetector(factor)
    rng, usual = np.random.default_rng(0), np.array([1.0, 2.0, 0.5, 0.1])
    for step in range(steps):
        norms = usual * rng.uniform(0.8, 1.2, 4)
        assert out.check(step, 3.0, float(np.linalg.norm(norms)), np.ones(4), norms) is None
    return out, usual


def test_a_residual_stream_that_is_not_finite_names_its_first_layer():
    found, usual = detector()
    message = found.check(
        20, math.nan, math.nan, [1.0, 1.0, math.inf, math.nan], np.full(4, math.nan)
    )
    assert message.startswith("step 20: loss nan") and "from layer 2 on" in message
    assert found.check(21, 3.0, 2.3, np.ones(4), usual) is None  # NaN did not enter the mean


def test_a_gradient_that_is_not_finite_names_the_last_layer():
    found, _ = detector()
    message = found.check(20, 3.0, math.nan, np.ones(4), [math.nan, math.nan, 0.5, 0.1])
    assert "from layer 1 down" in message


def test_a_loss_that_is_not_finite_outside_the_layers_says_so():
    found, usual = detector()
    assert "look at head" in found.check(20, math.inf, 2.3, np.ones(4), usual)


def test_a_spike_names_the_layer_that_grew_most():
    found, usual = detector()
    message = found.check(20, 4.5, 40.0, np.ones(4), usual * [10, 15, 10, 90])
    assert message.startswith("step 20: gradient norm 40 ") and "layer 3 grew most" in message
    assert found.check(21, 3.0, 2.3, np.ones(4), usual) is None
    assert "layer 0" in found.check(22, 4.5, 40.0, np.ones(4), usual * [30, 15, 10, 9])


def test_spikes_are_off_at_factor_0_and_before_the_mean_means_something():
    assert detector(factor=0.0)[0].check(20, 4.5, 1e6, np.ones(4), np.ones(4)) is None
    assert detector(steps=3)[0].check(3, 4.5, 1e6, np.ones(4), np.ones(4)) is None


def test_a_lasting_rise_becomes_normal():
    found, usual = detector()
    messages = [found.check(20 + i, 3.0, 30.0, np.ones(4), usual * 13) for i in range(200)]
    assert messages[0] is not None and messages[-1] is None
