"""What a run runs on: versions and devices for config.json, and the machine's peak speed."""

import functools
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
import time

import jax
import jax.numpy as jnp

from olmoe_jax import accounting

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets", "grain",
    "array_record", "ml_collections", "tokenizers", "libtpu",
)  # fmt: skip
VARIABLES = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_PLATFORMS",
    "JAX_ENABLE_X64",
    "JAX_DEFAULT_MATMUL_PRECISION",
)
MATMUL_SIZE = 1536


def environment() -> dict:
    """Versions, platform, devices, compiler flags and, in a checkout, the commit."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": versions,
        "backend": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "git_commit": _git_commit(),
    }


def _git_commit():
    """Commit of the checkout that this file lies in ("…+changes" if it was edited), or None."""
    root = pathlib.Path(__file__).resolve().parents[2]
    # Installed, the file may lie in somebody else's repository, which says nothing about this code.
    if not (root / ".git").exists():
        return None

    def git(*args):
        command = ["git", "-C", str(root), *args]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def measure_peak_flops(dtype="float32", seconds=0.5) -> tuple[float, str]:
    """(most FLOP/s of one device, where the figure comes from); measured once per process.

    From the table of chips where it knows the device; else the best square matmul within `seconds`.
    On CPU all devices of this process share the cores, so each counts for its part of what one
    matmul reaches.

    Args:
      dtype: "float32" or "bfloat16", of the operands.
    """
    device = jax.local_devices()[0]
    if (known := accounting.peak(device.device_kind, dtype)) is not None:
        return known.flops_per_second, f"{known.source} ({device.device_kind}, {dtype})"
    size = MATMUL_SIZE if device.platform == "cpu" else 4 * MATMUL_SIZE
    x = jax.device_put(jnp.ones((size, size), dtype) / size, device)
    multiply = jax.jit(jnp.matmul)
    x = multiply(x, x).block_until_ready()  # compiles
    best, begun = float("inf"), time.monotonic()
    while best == float("inf") or time.monotonic() - begun < seconds:
        started = time.monotonic()
        multiply(x, x).block_until_ready()
        best = min(best, time.monotonic() - started)
    sharing = jax.local_device_count() if device.platform == "cpu" else 1
    shared = f", shared by {sharing} devices" if sharing > 1 else ""
    source = (
        f"best {size} × {size} {dtype} matmul within {seconds} s on {device.device_kind}{shared}"
    )
    return 2 * size**3 / best / sharing, source
