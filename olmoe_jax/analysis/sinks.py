"""What becomes of the recorded blocks of one text: a trace on disk, an accumulator, or both."""

import dataclasses
import os
import pathlib
import typing
import urllib.parse

import numpy as np

from olmoe_jax.analysis import trace, trace_files


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What was recorded of one text.

    Attributes:
      info: TraceInfo.
      trace: the FileTrace, or None if no `output` was named.
      accumulated: what `accumulate` made, with all blocks added; None without.
      tokens: computed in this call; 0 if the trace was there already.
      seconds: since the call, by what was done: "weights" read, "layers" and "head" computed,
        "scratch" files, "traces" written and accumulated.
    """

    info: trace.TraceInfo
    trace: trace_files.FileTrace | None
    accumulated: typing.Any
    tokens: int
    seconds: dict[str, float]


def trace_folder(output, domain) -> pathlib.Path:
    """Where below `output` a domain's trace lies: its name, with what no file name has as %XX."""
    name = urllib.parse.quote(domain, safe=" ,;=+@()[]")
    return pathlib.Path(os.path.expanduser(output)) / name.replace(".", "%2E", name[0] == ".")


class Sink:
    """Where the blocks of one text go. A context manager.

    Args:
      text: texts.Text.
      info: TraceInfo of it.
      output, accumulate: as of `recording.record`.
      job: what the results depend on beside text and info, as `running.Job.identity`.

    Attributes:
      tokens: added since it was opened.

    Raises:
      ValueError: the trace's folder holds another trace.
    """

    def __init__(self, text, info, output, accumulate, job):
        self.text, self.info, self._accumulate, self._job = text, info, accumulate, job
        self._path = None if output is None else trace_folder(output, text.domain)
        self._writer, self._whole, self._accumulator = None, None, None
        self.tokens, self._near_ties = 0, np.zeros(len(info.layers), np.int64)
        if self._path is not None and self._path.exists():
            self._whole = trace_files.open_trace(self._path)
            _check_same(self._whole, info, job)

    @property
    def is_whole(self):
        """The trace is there already."""
        return self._whole is not None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._writer is not None:
            self._writer.__exit__()

    def open(self) -> int:
        """Begins; returns how many windows are there already."""
        if self._whole is not None:
            return self.text.num_windows
        if self._path is None:
            self._accumulator = self._accumulate(self.info)
            return 0
        self._writer = trace_files.TraceWriter(self._path, self.info, self._job)
        if self._writer.tokens == self.info.num_tokens:
            return self.text.num_windows
        return self._writer.tokens // self.text.context_length

    def add(self, block, near_ties):
        """The next tokens, and per layer how many of them were near-ties."""
        self.tokens += len(block)
        self._near_ties += near_ties
        if self._writer is not None:
            self._writer.add(block, near_ties)
        else:
            self._accumulator.add(block)

    def flush(self):
        """Brings what was added to the disk."""
        if self._writer is not None:
            self._writer.flush()

    def finish(self, seconds) -> Recorded:
        """When all tokens were added."""
        info, whole = self.info, self._whole
        if self._path is None:
            info = dataclasses.replace(info, near_ties=tuple(map(int, self._near_ties)))
            return Recorded(info, None, self._accumulator, self.tokens, dict(seconds))
        if whole is None:
            whole = self._writer.finish()
        if self._accumulate is not None:
            self._accumulator = self._accumulate(whole.info)
            for block in whole.blocks():
                self._accumulator.add(block)
        return Recorded(whole.info, whole, self._accumulator, self.tokens, dict(seconds))


def _check_same(found, info, job):
    pairs = ((f.name, getattr(found.info, f.name), getattr(info, f.name))
             for f in dataclasses.fields(info) if f.name != "near_ties")  # fmt: skip
    if differ := [f"{name}={a!r} instead of {b!r}" for name, a, b in pairs if a != b]:
        raise ValueError(
            f"{found.path}: holds another trace, with {', '.join(differ)}; delete it or name "
            "another output"
        )
    # one without a job is of an earlier version, which did not note it
    if found.job is not None and found.job["contents"] != job["contents"]:
        raise ValueError(
            f"{found.path}: was made from other weights, or before the files of {job['model']} "
            "were written last; delete it or name another output"
        )
