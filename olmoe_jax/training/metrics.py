"""A run's records: metrics.jsonl, TensorBoard event files, and the progress that a person watches.

metrics.jsonl holds one JSON object per line and logged step, `step` first, each step once. Names
are paths (train/loss, router/layer_03/max_load). Values are numbers, strings
(router/expert_backend, train/problem) or, at checkpoints, a list of lists: router/load [MoE layers,
experts], each expert's share of the choices of its layer on the validation windows. A number that
is not finite is written as Python writes and reads it (NaN, Infinity, -Infinity), which other JSON
readers may refuse.
"""

import json
import math
import os
import pathlib
import re
import socket
import struct
import sys
import time

import jax
import numpy as np
import tqdm
from tensorboardX import record_writer
from tensorboardX.proto import event_pb2, summary_pb2

from olmoe_jax import files

# What TensorBoard shows; metrics.jsonl has everything, per layer.
SUMMARIES = (
    "train/loss",
    "train/load_balancing_loss",
    "train/router_z_loss",
    "train/gradient_norm",
    "train/learning_rate",
    "router/max_load",
    "router/max_violation",
    "router/normalized_entropy",
    "router/dead_experts",
    "perf/tokens_per_second",
    "perf/mfu",
    "validation/loss",
    "validation/bits_per_byte",
)

_STEP = re.compile(rb'\{"step": (\d+)[,}]')


class MetricsWriter:
    """Context manager that appends records to WORKDIR/metrics.jsonl and WORKDIR/tensorboard.

    Opening it cuts metrics.jsonl back to the records of steps below `resume_step` (by writing
    another file and renaming it) and tells TensorBoard to forget the same ones. Every record is
    flushed, so that a killed process loses none. Only process 0 writes.
    """

    def __init__(self, workdir, resume_step=0, *, announce=print):
        self._workdir, self._announce = pathlib.Path(workdir), announce
        self._resume_step = resume_step
        self._jsonl = self._events = None
        self._last = -1

    def __enter__(self):
        if jax.process_index() == 0:
            self._workdir.mkdir(parents=True, exist_ok=True)
            path = self._workdir / "metrics.jsonl"
            self._last = cut_back(path, self._resume_step, announce=self._announce)
            self._jsonl = open(path, "a", encoding="utf-8")
            self._events = _EventFile(self._workdir / "tensorboard", self._resume_step)
        return self

    def __exit__(self, *exc):
        if self._jsonl is not None:
            self._jsonl.close()
            self._events.close()
            self._jsonl = self._events = None

    def write(self, step, record):
        """Adds the record of `step`: a dict name → number, string or list.

        Raises:
          ValueError: a record of this or a later step is there already.
        """
        if self._jsonl is None:
            return
        if step <= self._last:
            raise ValueError(f"metrics of step {step}: the last step written is {self._last}")
        ordered = {"step": int(step)} | {
            name: record[name] for name in sorted(record) if name != "step"
        }
        self._jsonl.write(json.dumps(ordered, default=_plain) + "\n")
        self._jsonl.flush()
        self._last = step
        values = [
            summary_pb2.Summary.Value(tag=name, simple_value=float(record[name]))
            for name in SUMMARIES
            if name in record
        ]
        if values:
            self._events.write(step=int(step), summary=summary_pb2.Summary(value=values))


def read(workdir):
    """Iterates over the records of a run, dicts by rising step; a last line cut short is left out.

    Raises:
      FileNotFoundError: the workdir has no metrics.jsonl.
    """
    path = pathlib.Path(workdir) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; expected the workdir of a run that has begun")
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def cut_back(path, step, *, announce=print) -> int:
    """Removes the records of `step` and later from a metrics.jsonl, whole or not at all.

    A last line that is cut short (the process was killed while writing it) goes too, with a note.

    Returns:
      the last step that is left; -1 if none is, or the file is absent.
    Raises:
      ValueError: a line in the middle is not a record.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return -1
    last, broken = -1, None
    with open(path, "rb") as old, files.whole(path) as new:
        for number, line in enumerate(old, start=1):
            if broken is not None:
                raise ValueError(
                    f"{path}, line {broken}: not a record of a step; repair or move the file"
                )
            match = _STEP.match(line)
            if not match or not line.endswith(b"}\n"):
                broken = number
            elif int(match[1]) < step:
                new.write(line)
                last = int(match[1])
    if broken is not None:
        announce(f"note: {path}, line {broken}: cut short, dropped")
    return last


class _EventFile:
    """A TensorBoard event file; on resume it begins by voiding what other files have from there on.

    Only tensorboardX's protocol buffers and checksum are used. Its writers call fsync at every
    flush (5 ms and more, beside checkpoints being written) or keep events in a queue that a kill
    empties, and name files by the second, so that a run resumed within one overwrites its own.
    """

    def __init__(self, directory, resume_step):
        directory.mkdir(parents=True, exist_ok=True)
        earlier = len(list(directory.iterdir()))
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._file = open(directory / f"{name}.{os.getpid()}.{earlier}", "xb", buffering=0)
        self.write(file_version="brain.Event:2")
        if earlier:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self.write(step=resume_step, session_log=start)

    def write(self, **fields):
        """Adds an Event in TFRecord framing: length, its checksum, data, their checksum."""
        data = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        sums = [struct.pack("<I", record_writer.masked_crc32c(part)) for part in (length, data)]
        self._file.write(length + sums[0] + data + sums[1])

    def close(self):
        """Closes the file."""
        self._file.close()


def _plain(value):
    """What json cannot write: NumPy and JAX scalars and arrays."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"metrics: {type(value).__name__} has no JSON form")


class Progress:
    """Shows how a run goes: a bar on a terminal, else a line every `seconds` at most."""

    def __init__(self, num_steps, *, seconds=5.0, stream=None, clock=time.monotonic):
        self._num_steps, self._seconds, self._clock = num_steps, seconds, clock
        self._stream = stream
        terminal = (stream or sys.stderr).isatty()
        self._bar = (
            tqdm.tqdm(total=num_steps, unit="step", file=stream, dynamic_ncols=True)
            if terminal
            else None
        )
        self._first = self._shown = None

    def show(self, step, record):
        """Shows the record of `step`; of those in quick succession only some."""
        if self._bar is not None:
            self._show_bar(step, record)
            return
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        notable = "validation/loss" in record or "train/problem" in record
        if self._shown is None or notable or now - self._shown >= self._seconds:
            self._shown = now
            # stdout, where the run's other lines go: in a log file their order is right
            print(self._line(step, record, now), file=self._stream or sys.stdout, flush=True)

    def close(self):
        """Ends the bar's line."""
        if self._bar is not None:
            self._bar.close()

    def _show_bar(self, step, record):
        if self._first is None:
            self._first = (step, self._clock())
            self._bar.initial = self._bar.n = step  # a resumed run's speed counts from here
            self._bar.start_t = self._bar.last_print_t = time.time()
        if "train/loss" in record:
            self._bar.set_postfix_str(
                ", ".join(_words(record, ("train/loss", "validation/loss"))), refresh=False
            )
        self._bar.update(min(step + 1, self._num_steps) - self._bar.n)

    def _line(self, step, record, now):
        names = ("train/loss", "validation/loss", "train/learning_rate", "perf/tokens_per_second")
        words = [f"step {step}/{self._num_steps}", *_words(record, names)]
        done, seconds = step - self._first[0], now - self._first[1]
        if done > 0 and step < self._num_steps:
            words.append(f"{duration((self._num_steps - step) * seconds / done)} left")
        return ", ".join(words)


_FORMATS = {
    "train/loss": "loss {:.4f}",
    "validation/loss": "validation loss {:.4f}",
    "train/learning_rate": "rate {:.3g}",
    "perf/tokens_per_second": "{:,.0f} tokens/s",
}


def _words(record, names):
    return [_FORMATS[name].format(record[name]) for name in names if name in record]


def duration(seconds) -> str:
    """Seconds in words.

    >>> duration(7.2), duration(754), duration(7380), duration(1e6)
    ('7 s', '12 min 34 s', '2 h 3 min', '11 days 13 h')
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    minutes = seconds // 60
    if minutes < 2 * 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    days = minutes // 1440
    return f"{days} days {minutes % 1440 // 60} h" if days < 1000 else f"{days / 365.25:,.0f} years"


def router_metrics(load, *, layers=None) -> dict:
    """How evenly each MoE layer's choices fall on its experts.

    For each layer router/layer_NN/…: `max_load`, the busiest expert's share relative to an equal
    one (1.0 is balanced, E the worst); `max_violation`, (max − mean) / mean = max_load − 1, named
    MaxVio in the literature; `entropy` of the shares in nats and `normalized_entropy` (1.0 is
    balanced); `dead_experts`, how many no token chose. Over all layers router/…: the largest
    max_load and max_violation, the means of both entropies, the sum of dead_experts.

    Args:
      load: [MoE layers, experts], each expert's share of its layer's choices; rows sum to 1.
      layers: the layers' numbers; default 0, 1, 2, …
    """
    load = np.asarray(load, np.float64)
    num_layers, num_experts = load.shape
    max_load = load.max(axis=1) * num_experts
    entropy = -np.sum(load * np.log(np.where(load > 0, load, 1)), axis=1)
    normalized = entropy / math.log(num_experts) if num_experts > 1 else np.ones(num_layers)
    dead = (load == 0).sum(axis=1)
    columns = {
        "max_load": max_load,
        "max_violation": max_load - 1,
        "entropy": entropy,
        "normalized_entropy": normalized,
        "dead_experts": dead,
    }
    out = {
        "router/max_load": float(max_load.max()),
        "router/max_violation": float(max_load.max() - 1),
        "router/entropy": float(entropy.mean()),
        "router/normalized_entropy": float(normalized.mean()),
        "router/dead_experts": int(dead.sum()),
    }
    for row, layer in enumerate(range(num_layers) if layers is None else layers):
        out |= {
            f"router/layer_{layer:02d}/{name}": column[row].item()
            for name, column in columns.items()
        }
    return out


class SpikeDetector:
    """Notices a loss or a gradient that is not finite, or a gradient far above its running mean.

    The mean is exponential over about the last `horizon` steps and judges nothing before `patience`
    steps. A spike enters it capped at the threshold, so that one does not hide the next and a
    lasting rise becomes normal in time.
    """

    def __init__(self, factor, *, patience=10, horizon=50):
        self._factor, self._patience, self._rate = factor, patience, 1 / horizon
        self._count, self._mean, self._layer_means = 0, 0.0, 0.0

    def check(self, step, loss, gradient_norm, layer_rms, layer_gradient_norms) -> str | None:
        """One line that names step and layer, or None if all is well.

        Args:
          loss, gradient_norm: floats of `step`.
          layer_rms: [layers], of the residual stream behind each layer.
          layer_gradient_norms: [layers].
        """
        rms, norms = np.asarray(layer_rms, np.float64), np.asarray(layer_gradient_norms, np.float64)
        if not np.isfinite([loss, gradient_norm]).all() or not np.isfinite([*rms, *norms]).all():
            where = _first_not_finite(rms, norms)
            return f"step {step}: loss {loss:.6g}, gradient norm {gradient_norm:.6g}: {where}"
        message, limit = None, self._factor * self._mean
        if self._factor and self._count >= self._patience and gradient_norm > limit:
            growth = norms / np.maximum(self._layer_means, np.finfo(np.float64).tiny)
            layer = int(growth.argmax())
            message = (
                f"step {step}: gradient norm {gradient_norm:.4g} is "
                f"{gradient_norm / self._mean:.3g} times its running mean {self._mean:.4g} "
                f"(config.training.spike_factor {self._factor:g}), loss {loss:.4g}: "
                f"layer {layer} grew most, to {norms[layer]:.4g}, "
                f"{growth[layer]:.3g} times its mean"
            )
            norms, gradient_norm = norms * limit / gradient_norm, limit
        self._count += 1
        rate = max(self._rate, 1 / self._count)  # the plain mean at first
        self._mean += rate * (gradient_norm - self._mean)
        self._layer_means = self._layer_means + rate * (norms - self._layer_means)
        return message


def _first_not_finite(rms, norms):
    """Where it began: going forward at the first bad layer, going backward at the last."""
    if (bad := np.flatnonzero(~np.isfinite(rms))).size:
        return f"the residual stream is not finite from layer {bad[0]} on"
    if (bad := np.flatnonzero(~np.isfinite(norms))).size:
        return (
            f"every layer's output is finite; the gradient is not finite from layer {bad[-1]} down"
        )
    return "all layers' outputs and gradients are finite; look at head, embedding and losses"
