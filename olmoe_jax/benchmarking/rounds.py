"""Contestants in turn, round after round; medians, spreads and ratios.

A machine is never quiet and never the same twice, so a figure alone says little. `compare` runs
its contestants one after the other, round after round, and a ratio is taken within each round. It
measures how much of the machine's CPU time went to strangers meanwhile, and repeats disturbed
rounds.
"""

import dataclasses
import resource
import shlex
import statistics
import subprocess
import tempfile
import time

from olmoe_jax.benchmarking import processes

FOREIGN_LIMIT = 0.05  # of all CPU time: a tenth of a core where there are two


@dataclasses.dataclass(frozen=True)
class Sample:
    """What one contestant did in one round.

    Attributes:
      seconds: what ratios are made of.
      values: whatever else is worth a median, by name; a None was not measured.
    """

    seconds: float
    values: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Summary:
    """Median of a few values, with the lowest and the highest."""

    median: float
    low: float
    high: float

    def text(self, digits=2) -> str:
        """As in "1.23 (1.20–1.31)"."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"

    def times(self, factor) -> "Summary":
        """All three multiplied by a positive number."""
        return Summary(self.median * factor, self.low * factor, self.high * factor)


@dataclasses.dataclass(frozen=True)
class Rounds:
    """What `compare` kept.

    Attributes:
      samples: contestant → its Sample of each round kept.
      foreign_loads: per round kept, the highest foreign load during one contestant; None: unknown.
      discarded: rounds thrown away as disturbed.
      disturbed: rounds kept although disturbed, because no better ones came within the limit.
    """

    samples: dict[str, tuple[Sample, ...]]
    foreign_loads: tuple[float | None, ...]
    discarded: int
    disturbed: int

    def summary(self, name, value="seconds") -> Summary | None:
        """Of the contestant's seconds, or of a value of its samples; None if never measured."""
        found = [
            sample.seconds if value == "seconds" else sample.values.get(value)
            for sample in self.samples[name]
        ]
        found = [x for x in found if x is not None]
        return summarize(found) if found else None

    def speed(self, name, *, against) -> Summary:
        """How many times as fast `name` was as `against`, compared round by round."""
        pairs = zip(self.samples[against], self.samples[name], strict=True)
        return summarize([theirs.seconds / ours.seconds for theirs, ours in pairs])

    def account(self) -> dict:
        """What a result says about its rounds; `tables.footer` prints it."""
        return {
            "foreign_loads": self.foreign_loads,
            "foreign_limit": FOREIGN_LIMIT,
            "rounds_discarded": self.discarded,
            "rounds_disturbed": self.disturbed,
        }


def summarize(values) -> Summary:
    """Median, lowest and highest of a non-empty list of numbers."""
    return Summary(statistics.median(values), min(values), max(values))


def _say(line):
    print(line, flush=True)


def compare(
    contestants, *, rounds, prepare=lambda name: None, repeats=None, limit=None, announce=_say
):
    """Runs all contestants in turn until `rounds` rounds were undisturbed.

    Args:
      contestants: name → function without arguments that does the work and returns a Sample. They
        run in this order in each round, so one may use what an earlier one left.
      prepare: called with the name just before each contestant; not timed.
      repeats: how many disturbed rounds are replaced; default: as many as `rounds`. After that the
        least disturbed ones count.
      limit: foreign load above which a round is disturbed: the highest over its contestants;
        default FOREIGN_LIMIT.
      announce: called with a line per round.

    Returns:
      Rounds.
    """
    repeats = rounds if repeats is None else repeats
    limit = FOREIGN_LIMIT if limit is None else limit
    finished = []  # (samples, foreign load)
    while True:
        clean = [r for r in finished if (r[1] or 0.0) <= limit]
        if len(clean) >= rounds or len(finished) >= rounds + repeats:
            break
        samples, loads = {}, []
        for name, run in contestants.items():
            prepare(name)
            with processes.ForeignLoad() as load:
                samples[name] = run()
            loads.append(load.share)
        measured = [x for x in loads if x is not None]
        finished.append((samples, max(measured) if measured else None))
        announce(_round_line(len(finished), *finished[-1], limit))
    order = sorted(range(len(finished)), key=lambda n: max(finished[n][1] or 0.0, limit))
    kept = [finished[n] for n in sorted(order[:rounds])]
    return Rounds(
        samples={name: tuple(samples[name] for samples, _ in kept) for name in contestants},
        foreign_loads=tuple(load for _, load in kept),
        discarded=len(finished) - len(kept),
        disturbed=sum((load or 0.0) > limit for _, load in kept),
    )


def _round_line(number, samples, load, limit):
    seconds = ", ".join(f"{name} {sample.seconds:.2f} s" for name, sample in samples.items())
    if load is None:
        return f"round {number}: {seconds}"
    verdict = f" (disturbed: above {limit:.0%})" if load > limit else ""
    return f"round {number}: {seconds}; foreign load {load:.1%}{verdict}"


def run_command(command, *, cwd=None) -> Sample:
    """Runs a command to its end.

    Returns:
      Sample with `cpu_seconds` of it and all its children, and `peak_anonymous_bytes` (see
      processes.PeakMemory).

    Raises:
      ValueError: it failed; with the last line that it printed.
    """
    with tempfile.TemporaryFile() as output:
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        process = subprocess.Popen(
            command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            with processes.PeakMemory(process.pid) as memory:
                status = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        seconds, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
        if status != 0:
            output.seek(0)
            lines = output.read().decode(errors="replace").strip().splitlines() or ["(silent)"]
            said = f"a command failed with status {status}: {lines[-1]}"
            raise ValueError(f"{said} (it was {shlex.join(map(str, command))})")
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Sample(seconds, {"cpu_seconds": cpu_seconds, "peak_anonymous_bytes": memory.peak})
