"""Tests of what is recorded about the machine, and of its peak."""

import json
import subprocess

import jax
import pytest

from olmoe_jax import accounting
from olmoe_jax.training import machine


def test_environment_is_plain_json_with_the_versions_that_matter(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--an_example")
    found = json.loads(json.dumps(machine.environment()))
    assert found["packages"]["jax"] == jax.__version__
    assert {"jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"} <= set(found["packages"])
    assert found["backend"] == jax.default_backend() and found["devices"] == jax.device_count()
    assert found["variables"]["LIBTPU_INIT_ARGS"] == "--an_example"


def git(folder, *args):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *args], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_commit_of_the_checkout_and_whether_it_was_edited(tmp_path, monkeypatch):
    source = tmp_path / "olmoe_jax" / "training" / "machine.py"
    source.parent.mkdir(parents=True)
    source.write_text("1\n")
    monkeypatch.setattr(machine, "__file__", str(source))
    assert machine._git_commit() is None
    git(tmp_path, "init", "-q")
    assert machine._git_commit() is None  # no commit yet
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "notes.txt").write_text("not tracked\n")
    assert machine._git_commit() == commit
    source.write_text("2\n")
    assert machine._git_commit() == f"{commit}+changes"


def test_an_enclosing_repository_is_not_taken_for_ours(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "one")
    installed = tmp_path / "site-packages" / "olmoe_jax" / "training" / "machine.py"
    installed.parent.mkdir(parents=True)
    monkeypatch.setattr(machine, "__file__", str(installed))
    assert machine._git_commit() is None


def test_the_peak_of_a_cpu_is_measured_once(monkeypatch):
    machine.measure_peak_flops.cache_clear()
    flops, source = machine.measure_peak_flops("float32", 0.05)
    assert 1e8 < flops < 1e14 and "float32 matmul within 0.05 s on" in source
    monkeypatch.setattr(machine.jnp, "ones", None)
    assert machine.measure_peak_flops("float32", 0.05) == (flops, source)


def test_simulated_cpu_devices_share_the_peak(monkeypatch):
    machine.measure_peak_flops.cache_clear()
    alone, _ = machine.measure_peak_flops("float32", 0.05)
    machine.measure_peak_flops.cache_clear()
    monkeypatch.setattr(machine.jax, "local_device_count", lambda: 1000)
    shared, source = machine.measure_peak_flops("float32", 0.05)
    machine.measure_peak_flops.cache_clear()
    assert shared < alone / 50 and "shared by 1000 devices" in source


def test_a_chip_of_the_table_is_not_measured(monkeypatch):
    class Chip:
        device_kind, platform = "NVIDIA H100 80GB HBM3", "gpu"

    machine.measure_peak_flops.cache_clear()
    monkeypatch.setattr(machine.jax, "local_devices", lambda: [Chip()])
    flops, source = machine.measure_peak_flops("bfloat16")
    machine.measure_peak_flops.cache_clear()
    assert flops == accounting.peak(Chip.device_kind).flops_per_second == pytest.approx(989e12)
    assert "NVIDIA data sheet" in source and "H100" in source
