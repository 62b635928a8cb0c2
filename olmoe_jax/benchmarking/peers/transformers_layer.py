"""transformers' OLMoE MoE block, forward and backward: the peer of the suite `moe_layer`."""

import os
import pathlib
import statistics
import time

# Kernels from the internet are no part of transformers as installed.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import serving
import torch
import transformers
from transformers.models.olmoe import modeling_olmoe

_HELD = {}


def _read(path):
    """A tensor from .npy; bfloat16 is stored as the uint16 of its bits."""
    tensor = torch.from_numpy(np.load(path))
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def _write(path, tensor):
    np.save(path, tensor.detach().float().cpu().numpy())


def open_layer(folder, device, d_model, d_ff, num_experts, num_experts_per_token):
    """Reads x, d_y and the weights of the folder, and makes the block."""
    folder = pathlib.Path(folder)
    config = transformers.OlmoeConfig(
        hidden_size=d_model, intermediate_size=d_ff, num_experts=num_experts,
        num_experts_per_tok=num_experts_per_token, norm_topk_prob=False,
    )  # fmt: skip
    with torch.device("meta"):
        block = modeling_olmoe.OlmoeSparseMoeBlock(config)
    # torch keeps matrices output → input, and gate and up as one.
    gate_up = [_read(folder / f"w_{part}.npy").transpose(1, 2) for part in ("gate", "up")]
    weights = {
        "gate.weight": _read(folder / "router.npy").T,
        "experts.gate_up_proj": torch.cat(gate_up, dim=1),
        "experts.down_proj": _read(folder / "w_down.npy").transpose(1, 2),
    }
    del gate_up
    weights = {name: w.to(device).contiguous() for name, w in weights.items()}
    block.load_state_dict(weights, assign=True)
    for parameter in block.parameters():
        parameter.requires_grad_(True)
    x, d_y = (_read(folder / f"{name}.npy").to(device)[None] for name in ("x", "d_y"))
    _HELD.update(config=config, block=block, x=x.requires_grad_(True), d_y=d_y, compiled={})
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def run(**settings):
    """`_run`; {"error": text} if these settings do not work for this layer."""
    try:
        return _run(**settings)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def _run(experts_implementation, threads, compiled, seconds, tokens=None, limit=None):
    """Median seconds of a forward and backward pass, after one that does not count.

    Args:
      experts_implementation: of transformers.
      compiled: go through torch.compile.
      seconds: passes go on until these are up.
      tokens: only so many.
      limit: if the first pass takes longer than this and compiles nothing, it is the only one.
    """
    torch.set_num_threads(threads)
    block = _HELD["block"]
    _HELD["config"]._experts_implementation = experts_implementation
    if compiled:
        made = _HELD["compiled"]
        if experts_implementation not in made:
            made[experts_implementation] = torch.compile(block)
        block = made[experts_implementation]
    taken = []
    while len(taken) < 2 or sum(taken[1:]) < seconds:
        for tensor in (_HELD["x"], *_HELD["block"].parameters()):
            tensor.grad = None
        _HELD.pop("y", None)
        started = time.monotonic()
        y = block(_HELD["x"][:, :tokens])
        y.backward(_HELD["d_y"][:, :tokens])
        if y.device.type != "cpu":
            torch.cuda.synchronize()
        taken.append(time.monotonic() - started)
        _HELD["y"] = y
        if limit is not None and taken[0] > limit and not compiled:
            return {"seconds": taken[0]}
    return {"seconds": statistics.median(taken[1:])}


def values(folder, rows, experts):
    """Writes y and d_x of the first rows, and the weights' gradients of some experts, float32."""
    folder, block = pathlib.Path(folder), _HELD["block"]
    _write(folder / "got_y.npy", _HELD["y"][0, :rows])
    _write(folder / "got_d_x.npy", _HELD["x"].grad[0, :rows])
    gate_up = block.experts.gate_up_proj.grad[experts].transpose(1, 2)
    for part, gradient in zip(("gate", "up"), gate_up.chunk(2, dim=-1), strict=True):
        _write(folder / f"got_w_{part}.npy", gradient)
    _write(folder / "got_w_down.npy", block.experts.down_proj.grad[experts].transpose(1, 2))
    return {}


if __name__ == "__main__":
    serving.serve({"open_layer": open_layer, "run": run, "values": values})
