import contextlib
import os
import pathlib
import subprocess
import sys
import time

import pytest

from olmoe_jax import benchmarking

needs_proc = pytest.mark.skipif(not pathlib.Path("/proc/stat").exists(), reason="needs /proc")
MB = 1 << 20


def quiet(line):
    del line


@pytest.fixture
def loads(monkeypatch):
    """A list of foreign loads; `ForeignLoad` then hands out its first, removing it."""
    given = []

    class Given(contextlib.nullcontext):
        def __enter__(self):
            self.share = given.pop(0)
            return self

    monkeypatch.setattr(benchmarking, "ForeignLoad", Given)
    return given


def contestants(log):
    """Two that count their runs; "slow" needs three times as long as "fast"."""

    def run(name, seconds):
        log.append(name)
        return benchmarking.Sample(seconds * (1 + len(log)), {"run": len(log)})

    return {"slow": lambda: run("slow", 3.0), "fast": lambda: run("fast", 1.0)}


def compare(log, **changes):
    settings = {
        "rounds": 2,
        "repeats": 2,
        "limit": 0.05,
        "prepare": quiet,
        "announce": quiet,
    } | changes
    return benchmarking.compare(contestants(log), **settings)


def test_contestants_take_turns_and_each_is_prepared(loads):
    loads += [0.0] * 4
    log, lines = [], []
    rounds = compare(log, prepare=lambda n: log.append(f"prepare {n}"), announce=lines.append)
    assert log == ["prepare slow", "slow", "prepare fast", "fast"] * 2
    assert [s.values["run"] for s in rounds.samples["fast"]] == [4, 8]
    assert (rounds.foreign_loads, rounds.discarded, rounds.disturbed) == ((0.0, 0.0), 0, 0)
    assert len(lines) == 2 and "slow 9.00 s" in lines[0] and "foreign load 0.0%" in lines[1]


def test_a_disturbed_round_is_repeated(loads):
    loads += [0.01, 0.02, 0.03, 0.3, 0.0, 0.04]  # round 2: the second contestant was disturbed
    rounds = compare(log := [])
    assert log == ["slow", "fast"] * 3 and loads == []
    assert [s.values["run"] for s in rounds.samples["slow"]] == [1, 5]
    assert (rounds.foreign_loads, rounds.discarded, rounds.disturbed) == ((0.02, 0.04), 1, 0)


def test_when_it_never_gets_quiet_the_least_disturbed_rounds_count(loads):
    loads += [x for load in (0.9, 0.2, 0.8, 0.3) for x in (load, 0.0)]
    rounds = compare([])
    assert (rounds.foreign_loads, rounds.discarded, rounds.disturbed) == ((0.2, 0.3), 2, 2)
    loads += [x for load in (0.9, 0.2, 0.04, 0.3) for x in (load, 0.0)]
    rounds = compare([])
    assert (rounds.foreign_loads, rounds.discarded, rounds.disturbed) == ((0.2, 0.04), 2, 1)


def test_where_load_is_unknown_no_round_is_discarded(loads):
    loads += [None] * 4
    rounds = compare([])
    assert (rounds.foreign_loads, rounds.discarded, rounds.disturbed) == ((None, None), 0, 0)


def test_speed_is_compared_within_rounds():
    def samples(*seconds):
        return tuple(
            benchmarking.Sample(s, {"memory": m})
            for s, m in zip(seconds, (5, None, 7), strict=True)
        )

    rounds = benchmarking.Rounds({"a": samples(2, 4, 30), "b": samples(1, 1, 10)}, (0, 0, 0), 0, 0)
    assert rounds.speed("b", against="a") == benchmarking.Summary(3, 2, 4)
    assert rounds.summary("a") == benchmarking.Summary(4, 2, 30)
    assert rounds.summary("a", "memory") == benchmarking.Summary(6, 5, 7)
    assert rounds.summary("a", "never") is None
    assert rounds.summary("a").text(1) == "4.0 (2.0–30.0)"


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
    bare = benchmarking.run_command([sys.executable, "-c", "import time; time.sleep(0.2)"])
    held = benchmarking.run_command([sys.executable, "-c", PARENT])
    expected = 2 * bare.values["peak_anonymous_bytes"] + (31 + 53 + 17) * MB
    assert abs(held.values["peak_anonymous_bytes"] - expected) < 12 * MB
    file = tmp_path / "mapped"
    file.write_bytes(os.urandom(MB) * 61)
    code = "import mmap, sys, time; f = open(sys.argv[1], 'rb')"
    code += "; m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)"
    code += "; total = sum(m[i] for i in range(0, len(m), 4096)); time.sleep(0.2)"
    mapped = benchmarking.run_command([sys.executable, "-c", code, file])
    difference = mapped.values["peak_anonymous_bytes"] - bare.values["peak_anonymous_bytes"]
    assert abs(difference) < 12 * MB


def test_a_command_is_timed_and_its_failure_is_told():
    sample = benchmarking.run_command([sys.executable, "-c", "import time; time.sleep(0.3)"])
    assert 0.3 <= sample.seconds < 30
    code = "t = __import__('time').process_time\nwhile t() < 0.2: pass"
    assert 0.2 <= benchmarking.run_command([sys.executable, "-c", code]).values["cpu_seconds"] < 20
    script = "import sys; print('first'); print('error: the last'); sys.exit(3)"
    with pytest.raises(ValueError, match="status 3: error: the last .it was .*python"):
        benchmarking.run_command([sys.executable, "-c", script])


def write_proc(directory, cpu, processes):
    """A /proc of hand-made numbers. processes: pid → (parent, flags, user, system, children)."""
    directory.mkdir(exist_ok=True)
    (directory / "stat").write_text(f"cpu  {cpu}\ncpu0 {cpu}\n")
    for pid, (parent, kernel, user, system, children) in processes.items():
        (directory / str(pid)).mkdir(exist_ok=True)
        flags = benchmarking.KERNEL_THREAD | 64 if kernel else 64
        (directory / str(pid) / "stat").write_text(
            f"{pid} (a ) (b) R {parent} 1 1 0 -1 {flags} 0 0 0 0 {user} {system} "
            f"{children} {children} 20 0 1 0 1234 0 0"
        )


def test_foreign_load_is_what_neither_we_nor_the_kernel_used(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarking, "PROC", tmp_path / "proc")
    me = os.getpid()
    before = {
        me: (1, 0, 50, 7, 3),
        901: (me, 0, 11, 0, 0),
        902: (2, 1, 0, 5, 0),
        903: (1, 0, 9, 9, 0),
    }
    # user nice system idle iowait irq softirq steal guest guest_nice
    write_proc(tmp_path / "proc", "100 10 20 300 40 1 2 3 0 0", before)
    with benchmarking.ForeignLoad() as load:
        # We: 10 + 2 + 2 × 4 of children; the new child of our child, 905: 6. The kernel, 902: 8.
        after = {me: (1, 0, 60, 9, 7), 901: (me, 0, 11, 0, 0), 902: (2, 1, 0, 13, 0),
                 903: (1, 0, 99, 99, 0), 905: (901, 0, 5, 1, 0)}  # fmt: skip
        # Busy: 60 + 5 + 30 + 15 = 110 of 200 in all; irq and softirq are nobody's.
        write_proc(tmp_path / "proc", "160 15 50 380 45 3 5 18 0 0", after)
    assert load.share == pytest.approx((110 - (10 + 2 + 8 + 6) - 8) / 200)


def test_a_kernel_thread_that_ended_is_not_subtracted(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarking, "PROC", tmp_path / "proc")
    me = os.getpid()
    write_proc(tmp_path / "proc", "0 0 0 0 0 0 0 0", {me: (1, 0, 0, 0, 0), 902: (2, 1, 0, 50, 0)})
    with benchmarking.ForeignLoad() as load:
        (tmp_path / "proc" / "902" / "stat").unlink()
        write_proc(tmp_path / "proc", "30 0 0 70 0 0 0 0", {me: (1, 0, 10, 0, 0)})
    assert load.share == pytest.approx((30 - 10) / 100)


@needs_proc
def test_work_of_children_is_our_own_but_not_that_of_an_orphan():
    spin = "t = __import__('time').process_time\nwhile t() < 0.4: pass"

    def own_seconds(code):
        before = benchmarking._cpu_times().own
        subprocess.run([sys.executable, "-c", code], check=True)
        time.sleep(0.5)  # for the orphan to work
        return (benchmarking._cpu_times().own - before) / os.sysconf("SC_CLK_TCK")

    orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {spin!r}])"
    assert own_seconds(spin) > 0.35
    assert own_seconds(orphan) < 0.25


def test_without_proc_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarking, "PROC", tmp_path)
    with benchmarking.ForeignLoad() as load:
        sample = benchmarking.run_command([sys.executable, "-c", "pass"])
    assert load.share is None and sample.values["peak_anonymous_bytes"] is None
    assert benchmarking.environment()["processor"]


def test_pages_of_files_are_forgotten_and_read_again(tmp_path, monkeypatch):
    if not hasattr(os, "RWF_NOWAIT") or not hasattr(os, "posix_fadvise"):
        pytest.skip("needs Linux's page cache")
    (tmp_path / "below").mkdir()
    for name in ("a", "below/b"):
        (tmp_path / name).write_bytes(os.urandom(3 * MB))
    asked, advise = [], os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: (asked.append(args[1:]), advise(*args)))
    benchmarking.forget(tmp_path)
    assert asked == [(0, 0, os.POSIX_FADV_DONTNEED)] * 2
    gone = benchmarking.resident_share(tmp_path)
    benchmarking.read_once(tmp_path)
    there = benchmarking.resident_share(tmp_path)
    if there == gone:
        pytest.skip("this file system keeps its pages elsewhere")
    assert gone < 0.9 and there == 1


def test_the_environment_is_one_line():
    found = benchmarking.environment()
    line = benchmarking.environment_line(found)
    assert "\n" not in line and f"jax {found['packages']['jax']}" in line
    assert f"{found['cores']} of {os.cpu_count()} cores" in line and found["memory_gb"] > 0.5


def test_a_table_is_aligned():
    text = benchmarking.table([("", "seconds"), ("cp", "1.5"), ("a port", "12.25")])
    assert text.split("\n") == ["        seconds", "cp          1.5", "a port    12.25"]
