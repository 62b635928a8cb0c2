"""Memory of a process tree and load by strangers, with hand-made and with true processes."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from olmoe_jax.benchmarking import processes
from olmoe_jax.benchmarking import rounds as rounds_lib

needs_proc = pytest.mark.skipif(not pathlib.Path("/proc/stat").exists(), reason="needs /proc")
MB = 1 << 20

CHILD = """
import mmap, time
held, shared = bytearray(b"y") * (53 << 20), mmap.mmap(-1, 17 << 20)
for first in range(0, len(shared), 4096):
    shared[first] = 1  # without a temporary
time.sleep(0.4)
"""
PARENT = f"""
import subprocess, sys
held = bytearray(b"x") * (31 << 20)
subprocess.run([sys.executable, "-c", {CHILD!r}], check=True)
"""


@needs_proc
def test_memory_is_of_the_whole_tree_and_only_what_is_anonymous(tmp_path):
    bare = rounds_lib.run_command([sys.executable, "-c", "import time; time.sleep(0.2)"])
    held = rounds_lib.run_command([sys.executable, "-c", PARENT])
    expected = 2 * bare.values["peak_anonymous_bytes"] + (31 + 53 + 17) * MB
    assert abs(held.values["peak_anonymous_bytes"] - expected) < 12 * MB
    file = tmp_path / "mapped"
    file.write_bytes(os.urandom(MB) * 61)
    code = "import mmap, sys, time; f = open(sys.argv[1], 'rb')"
    code += "; m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)"
    code += "; total = sum(m[i] for i in range(0, len(m), 4096)); time.sleep(0.2)"
    mapped = rounds_lib.run_command([sys.executable, "-c", code, file])
    difference = mapped.values["peak_anonymous_bytes"] - bare.values["peak_anonymous_bytes"]
    assert abs(difference) < 12 * MB


def write_proc(directory, cpu, pids):
    """A /proc of hand-made numbers. pids: pid → (parent, flags, user, system, children)."""
    directory.mkdir(exist_ok=True)
    (directory / "stat").write_text(f"cpu  {cpu}\ncpu0 {cpu}\n")
    for pid, (parent, kernel, user, system, children) in pids.items():
        (directory / str(pid)).mkdir(exist_ok=True)
        flags = processes.KERNEL_THREAD | 64 if kernel else 64
        (directory / str(pid) / "stat").write_text(
            f"{pid} (a ) (b) R {parent} 1 1 0 -1 {flags} 0 0 0 0 {user} {system} "
            f"{children} {children} 20 0 1 0 1234 0 0"
        )


def test_foreign_load_is_what_neither_we_nor_the_kernel_used(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PROC", tmp_path / "proc")
    me = os.getpid()
    before = {
        me: (1, 0, 50, 7, 3),
        901: (me, 0, 11, 0, 0),
        902: (2, 1, 0, 5, 0),
        903: (1, 0, 9, 9, 0),
    }
    # user nice system idle iowait irq softirq steal guest guest_nice
    write_proc(tmp_path / "proc", "100 10 20 300 40 1 2 3 0 0", before)
    with processes.ForeignLoad() as load:
        # We: 10 + 2 + 2 × 4 of children; the new child of our child, 905: 6. The kernel, 902: 8.
        after = {me: (1, 0, 60, 9, 7), 901: (me, 0, 11, 0, 0), 902: (2, 1, 0, 13, 0),
                 903: (1, 0, 99, 99, 0), 905: (901, 0, 5, 1, 0)}  # fmt: skip
        # Busy: 60 + 5 + 30 + 15 = 110 of 200 in all; irq and softirq are nobody's.
        write_proc(tmp_path / "proc", "160 15 50 380 45 3 5 18 0 0", after)
    assert load.share == pytest.approx((110 - (10 + 2 + 8 + 6) - 8) / 200)


def test_a_kernel_thread_that_ended_is_not_subtracted(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PROC", tmp_path / "proc")
    me = os.getpid()
    write_proc(tmp_path / "proc", "0 0 0 0 0 0 0 0", {me: (1, 0, 0, 0, 0), 902: (2, 1, 0, 50, 0)})
    with processes.ForeignLoad() as load:
        (tmp_path / "proc" / "902" / "stat").unlink()
        write_proc(tmp_path / "proc", "30 0 0 70 0 0 0 0", {me: (1, 0, 10, 0, 0)})
    assert load.share == pytest.approx((30 - 10) / 100)


@needs_proc
def test_work_of_children_is_our_own_but_not_that_of_an_orphan():
    spin = "t = __import__('time').process_time\nwhile t() < 0.4: pass"

    def own_seconds(code):
        before = processes._cpu_times().own
        subprocess.run([sys.executable, "-c", code], check=True)
        time.sleep(0.5)  # for the orphan to work
        return (processes._cpu_times().own - before) / os.sysconf("SC_CLK_TCK")

    orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {spin!r}])"
    assert own_seconds(spin) > 0.35
    assert own_seconds(orphan) < 0.25


def test_without_proc_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PROC", tmp_path)
    with processes.ForeignLoad() as load:
        sample = rounds_lib.run_command([sys.executable, "-c", "pass"])
    assert load.share is None and sample.values["peak_anonymous_bytes"] is None
