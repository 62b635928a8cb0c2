"""Peers as subprocesses: answers, failures, endings, allocator settings."""

import os
import pathlib
import platform
import sys

import pytest

from olmoe_jax.benchmarking import options as options_lib
from olmoe_jax.benchmarking import workers

PEERS = pathlib.Path(workers.__file__).parent / "peers"

SCRIPT = """
import os, sys
import serving
count = 0

def add(numbers):
    global count
    count += 1
    print("a library's greeting")
    os.write(1, b"and one from C")
    return {"sum": sum(numbers), "count": count}

def fail():
    print("a warning", file=sys.stderr)
    raise RuntimeError("no kernel for this")

def variable(name):
    return {"value": os.environ.get(name)}

def text():
    return "no object"

functions = {"add": add, "fail": fail, "variable": variable, "text": text}
serving.serve(functions)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def worker(script, **variables):
    return workers.Worker(
        [sys.executable, script], environment={"PYTHONPATH": str(PEERS), **variables}
    )


def test_requests_are_answered_in_turn_whatever_libraries_print(script):
    with worker(script) as peer:
        assert peer.ask(do="add", numbers=[3, 5]) == {"sum": 8, "count": 1}
        assert peer.ask(do="add", numbers=[-1.5, 7]) == {"sum": 5.5, "count": 2}
        assert os.path.exists(f"/proc/{peer.pid}") or not os.path.exists("/proc")


def test_a_failure_is_one_line_with_the_last_words(script):
    with worker(script) as peer:
        with pytest.raises(ValueError) as error:
            peer.ask(do="fail")
        assert "ended with status 1: RuntimeError: no kernel for this (it was " in str(error.value)
        assert "warning" not in str(error.value) and "\n" not in str(error.value)
        with pytest.raises(ValueError, match="no kernel for this"):  # it is still gone
            peer.ask(do="add", numbers=[])


def test_an_answer_that_is_no_object_is_named(script):
    with worker(script) as peer, pytest.raises(ValueError, match="answered '\"no object\"'"):
        peer.ask(do="text")


def test_leaving_ends_the_process_even_a_deaf_one(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "ENDING_SECONDS", 0.3)
    for code, status in (("import sys; sys.stdin.read()", 0), ("import time; time.sleep(60)", -9)):
        with workers.Worker([sys.executable, "-c", code]) as peer:
            pass
        assert peer._process.returncode == status
    with pytest.raises(KeyError), workers.Worker([sys.executable, "-c", code]) as peer:
        raise KeyError
    assert peer._process.returncode == -15


def test_variables_are_changed_and_removed(script, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with worker(script, OMP_NUM_THREADS=None, GREETING="hello") as peer:
        assert peer.ask(do="variable", name="OMP_NUM_THREADS") == {"value": None}
        assert peer.ask(do="variable", name="GREETING") == {"value": "hello"}


def test_a_peer_gets_our_allocator_settings_or_none(tmp_path, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=3")
    monkeypatch.setenv("PYTHONPATH", "ours")
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(PEERS)!r})\n{SCRIPT}")
    options = options_lib.Options(peer_python=sys.executable)
    for tuned, expected in ((True, workers.GLIBC_TUNABLES), (False, None)):
        with workers.Worker.peer(options, script, allocator_tuned=tuned) as peer:
            assert peer.ask(do="variable", name="GLIBC_TUNABLES") == {"value": expected}
            assert peer.ask(do="variable", name="PYTHONPATH") == {"value": None}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_the_allocator_settings_spare_page_faults():
    code = """
import json, resource, sys
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in sys.stdin:
    x = bytearray(b"x") * (64 << 20)
    del x
    before = faults()
    for _ in range(3):
        x = bytearray(b"x") * (64 << 20)
        del x
    print(json.dumps({"faults": faults() - before}), flush=True)
"""
    found = []
    for tunables in (None, workers.GLIBC_TUNABLES):
        environment = {"GLIBC_TUNABLES": tunables}
        with workers.Worker([sys.executable, "-c", code], environment=environment) as peer:
            found.append(peer.ask()["faults"])
    assert found[0] > 50 and found[1] < 0.1 * found[0]


def test_without_an_interpreter_there_is_no_peer(script):
    options = options_lib.Options()
    with workers.Worker.peer(options, script, allocator_tuned=False) as peer:
        assert peer is None
    missing = options_lib.Options(peer_python="/nowhere/python")
    with pytest.raises(ValueError, match="--peer_python=/nowhere/python: No such file"):
        workers.Worker.peer(missing, script, allocator_tuned=False)
