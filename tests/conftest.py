"""Every test sees eight simulated CPU devices, whatever the machine has.

The tests compile hundreds of small programs and run each a few times, so XLA spends no time on
machine code that is fast (measured: a train step compiles in 60 % of the time), and tests that run
the same program share it through a cache. Setting XLA_FLAGS overrides the former.
"""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
_CACHE = tempfile.TemporaryDirectory(prefix="olmoe_jax_tests_")
jax.config.update("jax_compilation_cache_dir", _CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, max_examples=20)
hypothesis.settings.load_profile("tests")

_COMPILATIONS = [0]
_MAPS = pathlib.Path("/proc/self/maps")


def _count(event, duration, **kwargs):
    if event == "/jax/core/compile/backend_compile_duration":
        _COMPILATIONS[0] += 1


jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.fixture(autouse=True)
def _few_programs_in_memory():
    """Frees the compiled programs when they hold too many memory maps.

    Linux gives a process 65,530 of them and a train step takes 650 (measured): without this XLA
    dies of a segmentation fault some 95 such tests later.
    """
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture
def compilations():
    """A function that returns how many programs XLA has compiled in this test so far."""
    start = _COMPILATIONS[0]
    return lambda: _COMPILATIONS[0] - start
