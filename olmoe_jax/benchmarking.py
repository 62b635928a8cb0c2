"""How speed is measured: contestants in turn, medians and spreads, memory, and who else was there.

A machine is never quiet and never the same twice, so a figure alone says little. `compare` runs
its contestants one after the other, round after round, and a ratio is taken within each round. It
measures how much of the machine's CPU time went to strangers meanwhile, and repeats disturbed
rounds. What is Linux's alone (/proc: memory of a process tree, foreign load) is None elsewhere.
"""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import re
import resource
import shlex
import statistics
import subprocess
import tempfile
import threading
import time

PROC = pathlib.Path("/proc")
SAMPLING_SECONDS = 0.05
FOREIGN_LIMIT = 0.05  # of all CPU time: a tenth of a core where there are two
KERNEL_THREAD = 0x00200000  # PF_KTHREAD of Linux's sched.h
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes", "orbax-checkpoint", "tensorstore")
VARIABLES = ("XLA_FLAGS", "JAX_PLATFORMS", "LD_PRELOAD", "GLIBC_TUNABLES", "OMP_NUM_THREADS")
READ_BYTES = 8 << 20
PROBES = 256  # pages looked at to see how much of a folder is in memory


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


def summarize(values) -> Summary:
    """Median, lowest and highest of a non-empty list of numbers."""
    return Summary(statistics.median(values), min(values), max(values))


def compare(contestants, *, rounds, prepare, repeats, limit, announce):
    """Runs all contestants in turn until `rounds` rounds were undisturbed.

    Args:
      contestants: name → function without arguments that does the work and returns a Sample. They
        run in this order in each round, so one may use what an earlier one left.
      prepare: called with the name just before each contestant; not timed.
      repeats: how many disturbed rounds are replaced. After that the least disturbed ones count.
      limit: foreign load above which a round is disturbed: the highest over its contestants.
      announce: called with a line per round.

    Returns:
      Rounds.
    """
    finished = []  # (samples, foreign load)
    while True:
        clean = [r for r in finished if (r[1] or 0.0) <= limit]
        if len(clean) >= rounds or len(finished) >= rounds + repeats:
            break
        samples, loads = {}, []
        for name, run in contestants.items():
            prepare(name)
            with ForeignLoad() as load:
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
      PeakMemory).

    Raises:
      ValueError: it failed; with the last line that it printed.
    """
    with tempfile.TemporaryFile() as output:
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        process = subprocess.Popen(
            command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            with PeakMemory(process.pid) as memory:
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


@dataclasses.dataclass(frozen=True)
class _Process:
    """From /proc/PID/stat; a tick of user or of system time is a tick."""

    parent: int
    is_kernel: bool
    started: int
    ticks: int
    ticks_of_children: int  # of those that ended and were waited for


def _process(pid) -> _Process | None:
    """The process `pid`; None if there is none any more."""
    try:
        text = (PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    fields = text[text.rindex(b")") + 2 :].split()  # the name before may hold anything
    user, system, children_user, children_system = map(int, fields[11:15])
    return _Process(
        parent=int(fields[1]),
        is_kernel=bool(int(fields[6]) & KERNEL_THREAD),
        started=int(fields[19]),
        ticks=user + system,
        ticks_of_children=children_user + children_system,
    )


def _pids() -> set[int]:
    return {int(name) for name in os.listdir(PROC) if name.isdigit()}


def _add_descendants(tree: set, parents: dict):
    """Adds to `tree` each process of {pid: its parent} that descends from a member."""
    while found := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= found


class PeakMemory:
    """The most anonymous memory that a process and all its descendants held, sampled in a thread.

    A context manager; after it `peak` is in bytes, or None without /proc. Anonymous: RssAnon +
    RssShmem, what a machine must really have; pages of mapped files are not counted, since the
    kernel takes them back when it likes. A page that a process shares with its child counts for
    both; a peak that lasts less than SAMPLING_SECONDS can go unseen.
    """

    def __init__(self, pid):
        self.peak = None
        self._tree, self._seen = {pid}, set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        if (PROC / "stat").exists():
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self):
        while True:
            if held := self._held():  # 0 once all have ended
                self.peak = max(self.peak or 0, held)
            if self._stop.wait(SAMPLING_SECONDS):
                return

    def _held(self):
        pids = _pids()
        new = {pid: process for pid in pids - self._seen if (process := _process(pid))}
        _add_descendants(self._tree, {pid: process.parent for pid, process in new.items()})
        self._tree &= pids
        self._seen = pids
        return sum(_anonymous_bytes(pid) for pid in self._tree)


def _anonymous_bytes(pid):
    try:
        status = (PROC / str(pid) / "status").read_bytes()
    except OSError:
        return 0
    found = re.findall(rb"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.MULTILINE)
    return 1024 * sum(map(int, found))


class ForeignLoad:
    """Share of all CPU time that went to processes other than this one and its descendants.

    A context manager; after it `share` lies in 0..1, or is None without /proc. Time that a
    hypervisor gave to others counts as theirs. The kernel's own threads and interrupts count for
    nobody: they are mostly busy with what we write.
    """

    def __init__(self):
        self.share = None

    def __enter__(self):
        self._before = _cpu_times()
        return self

    def __exit__(self, *_):
        after = _cpu_times()
        if self._before is None or after is None or after.total <= self._before.total:
            return
        kernel = sum(
            ticks - self._before.kernel.get(thread, 0) for thread, ticks in after.kernel.items()
        )
        foreign = after.busy - self._before.busy - (after.own - self._before.own) - kernel
        self.share = max(0.0, foreign / (after.total - self._before.total))


@dataclasses.dataclass(frozen=True)
class _CpuTimes:
    """Ticks since the machine started, of all its cores together.

    Attributes:
      total, busy: with and without waiting; busy leaves interrupts out.
      own: of this process and its descendants.
      kernel: (pid, start) → ticks of each thread of the kernel.
    """

    total: int
    busy: int
    own: int
    kernel: dict


def _cpu_times() -> _CpuTimes | None:
    try:
        line = (PROC / "stat").read_text().split("\n", 1)[0]
    except OSError:
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, line.split()[1:9])
    processes = {pid: process for pid in _pids() if (process := _process(pid))}
    tree = {os.getpid()}
    _add_descendants(tree, {pid: process.parent for pid, process in processes.items()})
    return _CpuTimes(
        total=user + nice + system + idle + iowait + irq + softirq + steal,
        busy=user + nice + system + steal,
        own=sum(p.ticks + p.ticks_of_children for pid, p in processes.items() if pid in tree),
        kernel={(pid, p.started): p.ticks for pid, p in processes.items() if p.is_kernel},
    )


def _files(path) -> list[pathlib.Path]:
    """Every file below a folder, in order."""
    return sorted(p for p in pathlib.Path(path).rglob("*") if p.is_file())


def forget(path):
    """Writes everything to disk and asks the kernel to drop a folder's pages from memory.

    Needs no privilege, unlike dropping all caches. Where the system has no posix_fadvise (macOS)
    the pages stay.
    """
    os.sync()
    if not hasattr(os, "posix_fadvise"):
        return
    for file in _files(path):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(path):
    """Reads every file below a folder, so that its pages are in memory if they fit."""
    buffer = bytearray(READ_BYTES)
    for file in _files(path):
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def resident_share(path) -> float | None:
    """Share of a folder's bytes that are in memory, from a few hundred pages; None if unknown."""
    sizes = {file: file.stat().st_size for file in _files(path)}
    if not hasattr(os, "RWF_NOWAIT") or not any(sizes.values()):
        return None
    there = probes = 0
    for file, size in sizes.items():
        with open(file, "rb") as opened:
            for offset in range(0, size, max(1, sum(sizes.values()) // PROBES)):
                probes += 1
                try:
                    there += os.preadv(opened.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT)
                except OSError:  # not there (EAGAIN), or a file system that cannot say
                    pass
    return there / probes


def environment() -> dict:
    """Versions, cores, memory and the variables that change speed. Does not start JAX."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": cores,
        "cores_of_machine": os.cpu_count(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _processor():
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", (PROC / "cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.machine()


def environment_line(found: dict) -> str:
    """The environment as one line."""
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    variables = "".join(f"; {name}={value}" for name, value in found["variables"].items())
    return (
        f"{found['processor']}, {found['cores']} of {found['cores_of_machine']} cores, "
        f"{found['memory_gb']:.0f} GB; {found['platform']}; Python {found['python']}, "
        f"{packages}{variables}"
    )


def table(rows) -> str:
    """Rows of strings, the first the header, as aligned text: first column left, others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [f"{cell:>{w}}" for cell, w in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:{widths[0]}}", *cells]).rstrip())
    return "\n".join(lines)
