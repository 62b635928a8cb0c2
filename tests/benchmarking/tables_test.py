"""What a suite prints."""

import os

from olmoe_jax import machine
from olmoe_jax.benchmarking import tables


def test_the_environment_is_one_line():
    found = machine.environment()
    line = tables.environment_line(found)
    assert "\n" not in line and f"jax {found['packages']['jax']}" in line
    assert f"{found['cores']} of {os.cpu_count()} cores" in line and found["memory_gb"] > 0.5


def test_a_table_is_aligned():
    text = tables.table([("", "seconds"), ("cp", "1.5"), ("a port", "12.25")])
    assert text.split("\n") == ["        seconds", "cp          1.5", "a port    12.25"]
