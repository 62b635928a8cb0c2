"""What is said about the machine: memory, disk, cores, versions, the commit."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from olmoe_jax import machine

ROOT = pathlib.Path(machine.__file__).parents[1]


def test_environment_is_plain_json_with_the_versions_that_matter(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--an_example")
    found = json.loads(json.dumps(machine.environment()))
    assert {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"} <= set(found["packages"])
    assert found["variables"]["LIBTPU_INIT_ARGS"] == "--an_example"
    assert 0 < found["cores"] <= found["cores_of_machine"] and found["memory_gb"] > 0.5


def test_jax_is_not_imported():
    code = "import sys; from olmoe_jax import machine; machine.environment(); "
    code += "sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_processor_has_a_name(tmp_path):
    assert machine.processor(tmp_path) == os.uname().machine
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor: 0\nmodel name\t: A 7 Chip\nflags: a b\n")
    assert machine.processor(tmp_path) == "A 7 Chip"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity (Linux)")
def test_cores_are_those_that_this_process_may_use():
    code = "import os; from olmoe_jax import machine; os.sched_setaffinity(0, {min("
    code += "os.sched_getaffinity(0))}); print(machine.cores())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1\n"


def test_free_memory_takes_the_container_into_account(tmp_path):
    assert machine.free_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(
        "MemTotal: 99 kB\nMemAvailable:       7000 kB\nMemFree: 1 kB\n"
    )
    assert machine.free_memory(tmp_path) == 7_168_000
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.max").write_text("5000\n")
    (cgroup / "memory.current").write_text("3000\n")
    (cgroup / "memory.stat").write_text("anon 7\ninactive_file 1100\n")
    assert machine.free_memory(tmp_path) == 3100
    (cgroup / "memory.max").write_text("max\n")
    assert machine.free_memory(tmp_path) == 7_168_000


def test_free_disk_is_of_the_folder_that_will_hold_the_path(tmp_path):
    status = os.statvfs(tmp_path)
    found = machine.free_disk(tmp_path / "not" / "yet")
    assert found == pytest.approx(status.f_bavail * status.f_frsize, abs=1e9)


def test_an_object_store_has_no_known_free_disk():
    assert machine.free_disk("gs://bucket/run") is None
    machine.check_disk("gs://bucket/run", 10**30, "runs", "name another")


def test_a_disk_too_small_is_refused_with_what_takes_it_and_what_to_do(monkeypatch):
    monkeypatch.setattr(machine, "free_disk", lambda path: 2_000_000_000)
    machine.check_disk("there", 2_000_000_000, "runs", "name another")
    message = "^there: 2.5 GB are needed for runs but 2.0 GB are free; name another$"
    with pytest.raises(OSError, match=message):
        machine.check_disk("there", 2_500_000_000, "runs", "name another")


def git(folder, *args):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *args], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_commit_of_the_checkout_and_whether_it_was_edited(tmp_path, monkeypatch):
    source = tmp_path / "olmoe_jax" / "machine.py"
    source.parent.mkdir(parents=True)
    source.write_text("1\n")
    monkeypatch.setattr(machine, "__file__", str(source))
    assert machine.commit() is None
    git(tmp_path, "init", "-q")
    assert machine.commit() is None  # no commit yet
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "notes.txt").write_text("not tracked\n")
    assert machine.commit() == commit
    source.write_text("2\n")
    assert machine.commit() == f"{commit}+changes"


def test_an_enclosing_repository_is_not_taken_for_ours(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "one")
    installed = tmp_path / "site-packages" / "olmoe_jax" / "machine.py"
    installed.parent.mkdir(parents=True)
    monkeypatch.setattr(machine, "__file__", str(installed))
    assert machine.commit() is None
