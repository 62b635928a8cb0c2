"""Train steps of transformers' OLMoE: the peer of the suite `train_step`.

Forward with the load-balancing loss, backward, clipping, fused AdamW: what one step of ours does.
Parameters are in the folder's dtype and so are the moments, as torch keeps them.
"""

import gc
import platform
import resource
import time

import numpy as np
import serving
import torch
import transformers
from transformers.integrations import moe

_RUN = {}


def describe():
    """Versions and what there is to choose from; peak memory of this process so far, bytes."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "experts": ["eager", *sorted(moe.ALL_EXPERTS_FUNCTIONS.keys())],
        "threads": torch.get_num_threads(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def open(folder, batches, dtype, device, balance_weight, clip_norm, optimizer):
    """Says what all runs share; `start` begins one.

    Args:
      folder: a Hugging Face folder.
      batches: .npy file of int [batches, b, l]; step n takes batch n modulo their number.
      dtype: "float32" or "bfloat16".
      balance_weight: of the load-balancing loss.
      optimizer: keyword arguments of torch.optim.AdamW.
    """
    tokens = torch.from_numpy(np.load(batches).astype(np.int64)).to(device)
    _RUN.update(
        folder=folder, tokens=tokens, dtype=getattr(torch, dtype), device=device,
        balance_weight=balance_weight, clip_norm=clip_norm, optimizer=optimizer,
    )  # fmt: skip
    return {}


def start(experts, threads, compiled):
    """The folder's weights again, with an implementation; {"error": …} where it cannot be had."""
    for name in ("model", "forward", "adamw"):
        _RUN.pop(name, None)
    gc.collect()
    torch.compiler.reset()
    torch.set_num_threads(threads)
    try:
        model = transformers.OlmoeForCausalLM.from_pretrained(
            _RUN["folder"], dtype=_RUN["dtype"], attn_implementation="sdpa",
            experts_implementation=experts,
        )  # fmt: skip
    except Exception as error:  # each library raises what it likes
        return {"error": serving.line(error)}
    model.to(_RUN["device"]).train()
    model.router_aux_loss_coef = _RUN["balance_weight"]
    adamw = torch.optim.AdamW(model.parameters(), fused=True, **_RUN["optimizer"])
    forward = torch.compile(model) if compiled else model
    _RUN.update(model=model, forward=forward, adamw=adamw, step=0)
    return {}


def steps(count):
    """{"seconds": of all, "losses": cross entropy plus weighted load-balancing loss of each}."""
    losses, tokens = [], _RUN["tokens"]
    begun = time.perf_counter()
    try:
        for _ in range(count):
            losses.append(_step(tokens[_RUN["step"] % len(tokens)]))
            _RUN["step"] += 1
        losses = [loss.item() for loss in losses]  # waits for the device
    except Exception as error:  # from the compiler, or a kernel that this machine lacks
        return {"error": serving.line(error)}
    return {"seconds": time.perf_counter() - begun, "losses": losses}


def _step(tokens):
    loss = _RUN["forward"](
        input_ids=tokens, labels=tokens, output_router_logits=True, use_cache=False
    ).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(_RUN["model"].parameters(), _RUN["clip_norm"])
    _RUN["adamw"].step()
    _RUN["adamw"].zero_grad(set_to_none=True)
    return loss.detach()


if __name__ == "__main__":
    serving.serve({"describe": describe, "open": open, "start": start, "steps": steps})
