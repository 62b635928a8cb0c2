"""The kernels of the tokamax library: Mosaic GPU or Triton on CUDA, Mosaic on TPU; optional.

Needs `pip install tokamax jax-triton` (Python 3.12, jax 0.11.1 or newer). Of its implementations
the one over all groups ("xla") is asked for by name on a CPU, where it is the only one, and nowhere
else: left to itself the library falls back to it without a word.
"""

import importlib.util

import jax
import jax.numpy as jnp

from olmoe_jax.grouped_matmul import ragged

IMPLEMENTATIONS = {"cpu": "xla", "gpu": ("mosaic", "triton"), "tpu": "mosaic_tpu"}


def missing() -> str | None:
    """Why this backend cannot run here, as a sentence; None if it can.

    On a GPU, Triton is asked for beside Mosaic, whose kernels take no float32 and have the weights'
    gradient on Hopper only.
    """
    needed = {"tokamax": "tokamax"}
    if jax.default_backend() == "gpu":
        needed["jax_triton"] = "jax-triton"
        device = jax.devices()[0]
        if "NVIDIA" not in device.device_kind or float(device.compute_capability) < 8:
            return (
                f"tokamax has no kernels for {device.device_kind}: an Ampere GPU or newer is needed"
            )
    lacking = [name for module, name in needed.items() if not importlib.util.find_spec(module)]
    if lacking:
        return f"{' and '.join(lacking)} not installed: pip install tokamax jax-triton"
    return None


def matmul(rows, weights, counts, *, transpose):
    """See `grouped_matmul.matmul`."""
    out = _ragged_dot(rows, weights, counts, 1, 2 if transpose else 1, [0], rows.dtype)
    return jnp.where(ragged.used(out, counts), out, 0)


def outer(left, right, counts, *, dtype):
    """See `grouped_matmul.outer`."""
    left, right = (jnp.where(ragged.used(a, counts), a, 0) for a in (left, right))
    return _ragged_dot(left, right, counts, 0, 0, [], dtype)


def _ragged_dot(a, b, counts, contract_a, contract_b, groups, dtype):
    import tokamax

    dimensions = ragged.dimensions(contract_a, contract_b, groups)
    return tokamax.ragged_dot_general(
        a, b, counts, dimensions, preferred_element_type=dtype,
        implementation=IMPLEMENTATIONS[jax.default_backend()],
    )  # fmt: skip
