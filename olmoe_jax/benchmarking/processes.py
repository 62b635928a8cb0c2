"""What processes use: peak memory of a process tree, and load by strangers.

What is Linux's alone (/proc) is None elsewhere.
"""

import dataclasses
import os
import pathlib
import re
import threading

PROC = pathlib.Path("/proc")
SAMPLING_SECONDS = 0.05
KERNEL_THREAD = 0x00200000  # PF_KTHREAD of Linux's sched.h


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
