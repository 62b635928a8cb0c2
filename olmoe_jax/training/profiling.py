"""Where the time of a train step goes: a JAX profiler trace of a few steps, and shares by part.

A part is told by the scope that an instruction of the compiled step carries: a module's name, or a
`jax.named_scope`. What another thread does for an instruction without saying so in the trace, such
as the far half of one of Eigen's products on a CPU, counts for nothing: look for it with `perf`.
"""

import collections
import pathlib
import re
import time

import jax

SKIPPED, TRACED = 3, 3  # steps: the first ones compile and warm up

# In this order: the first pattern that an instruction's scope contains names its part.
PARTS = (
    ("optimizer", re.compile(r"\boptimizer\b")),
    ("head and loss", re.compile(r"\bhead\b")),
    ("experts", re.compile(r"\bexperts\b")),
    ("attention", re.compile(r"\battention\b")),
    ("feed-forward", re.compile(r"\b(ffn|shared)\b")),
    ("router", re.compile(r"\bmoe\b")),
    ("norms", re.compile(r"\w+_norm\b")),
)
REST = "rest"  # embedding, residual stream, a layer's parameters out of the stack and back

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$", re.MULTILINE)
_SCOPE = re.compile(r'op_name="([^"]*)"')
_HOLDS_OTHERS = re.compile(r"(?<![\w-])(?:while|conditional|call)\(")


class Profile:
    """Traces a few steps of a run into `directory`; None: does nothing. Steps count from 0 at the
    start of this process."""

    def __init__(self, directory, announce):
        if directory is not None and pathlib.Path(directory).is_file():
            raise ValueError(f"--profile={directory}: a file; expected a directory")
        self._directory, self._announce = directory, announce
        self._parts, self._started, self._reported = None, None, False

    def compile(self, train_step, state, batch):
        """The jitted step; for a profile compiled here, so that its instructions are known."""
        if self._directory is None or self._parts is not None:
            return train_step
        compiled = train_step.lower(state, batch).compile()
        self._parts = parts_of(compiled.as_text())
        return compiled

    def before(self, step):
        if self._directory is not None and step == SKIPPED:
            jax.profiler.start_trace(str(self._directory))
            self._started = time.monotonic()

    def after(self, step, metrics):
        if self._started is not None and step == SKIPPED + TRACED - 1:
            jax.block_until_ready(metrics)
            seconds = (time.monotonic() - self._started) / TRACED
            self._stop()
            self._reported = True
            self._announce(report(self._directory, self._parts, seconds))

    def close(self):
        """Ends a trace under way. Says so if no profile was reported, once."""
        self._stop()
        if self._directory is not None and not self._reported:
            self._reported = True
            self._announce(
                f"no profile in {self._directory}: it is of steps {SKIPPED + 1} to "
                f"{SKIPPED + TRACED} of this process, which made fewer; "
                "a larger config.training.num_steps makes them"
            )

    def _stop(self):
        if self._started is not None:
            self._started = None
            jax.profiler.stop_trace()


def parts_of(hlo_text) -> dict:
    """Instruction → part, of a compiled program's text; those that only run others are left out."""
    found = {}
    for name, rest in _INSTRUCTION.findall(hlo_text):
        if _HOLDS_OTHERS.search(rest):
            continue
        scope = match[1] if (match := _SCOPE.search(rest)) else ""
        found[name] = next((part for part, pattern in PARTS if pattern.search(scope)), REST)
    return found


def seconds_by_part(directory, parts) -> collections.Counter:
    """Seconds of this process's newest trace below `directory`, all threads and devices, by part.

    Args:
      parts: what `parts_of` returns for the program that was traced.
    """
    files = pathlib.Path(directory).glob("**/*.xplane.pb")
    trace = jax.profiler.ProfileData.from_file(str(max(files, key=lambda p: p.stat().st_mtime)))
    seconds = collections.Counter()
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                part = parts.get(event.name.removeprefix("%").split(" ", 1)[0])
                if part is None and plane.name.startswith("/device:GPU"):  # a kernel's own name
                    part = parts.get(dict(event.stats).get("hlo_op"))
                if part is not None:
                    seconds[part] += event.duration_ns / 1e9
    return seconds


def report(directory, parts, step_seconds) -> str:
    """The table for a person: each part's share, largest first."""
    seconds = seconds_by_part(directory, parts)
    total = sum(seconds.values())
    lines = [
        f"profile of {TRACED} steps of {step_seconds:.3g} s: {directory} (TensorBoard, XProf); "
        "time of the compiled step's instructions:"
    ]
    lines += [f"  {part:15}{s / total:6.1%}" for part, s in seconds.most_common()]
    return "\n".join(lines if total else [*lines, "  none in the trace"])
