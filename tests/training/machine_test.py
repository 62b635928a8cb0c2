"""Tests of what is recorded about the devices, and of their peak."""

import json

import jax
import pytest

from olmoe_jax import accounting
from olmoe_jax.training import machine


def test_environment_is_plain_json_with_the_devices(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--an_example")
    found = json.loads(json.dumps(machine.environment()))
    assert found["packages"]["jax"] == jax.__version__
    assert found["backend"] == jax.default_backend() and found["devices"] == jax.device_count()
    assert found["variables"]["LIBTPU_INIT_ARGS"] == "--an_example"


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
