"""The devices that a run has: what config.json says about them, and their peak speed."""

import functools
import time

import jax
import jax.numpy as jnp

from olmoe_jax import accounting
from olmoe_jax import machine as machine_lib

MATMUL_SIZE = 1536


def environment() -> dict:
    """What `olmoe_jax.machine.environment` says, and the devices."""
    device = jax.devices()[0]
    return machine_lib.environment() | {
        "backend": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


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
