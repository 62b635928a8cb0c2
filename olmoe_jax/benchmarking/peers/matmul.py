"""torch's square matrix product: the peer of the suite `matmul_peak`."""

import time

import serving
import torch

_OPERANDS = {}


def describe():
    """Versions and settings."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


def measure(dtype, size, seconds, device):
    """Seconds of the fastest product within `seconds`."""
    if (dtype, size) not in _OPERANDS:
        kind = getattr(torch, dtype)
        _OPERANDS[dtype, size] = [torch.randn(size, size, device=device).to(kind) for _ in range(2)]
    x, y = _OPERANDS[dtype, size]
    best, begun = float("inf"), time.monotonic()
    while best == float("inf") or time.monotonic() - begun < seconds:
        started = time.monotonic()
        x @ y
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.monotonic() - started)
    return {"seconds": best}


if __name__ == "__main__":
    serving.serve({"describe": describe, "measure": measure})
