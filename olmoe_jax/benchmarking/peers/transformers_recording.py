"""Expert choices of transformers' OLMoE over random tokens: the peer of the suite `recording`."""

import gc
import os
import platform
import time

# Kernels from the internet are no part of transformers as installed.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import serving
import torch
import transformers

_GIVEN = {}


def open(folder, tokens, dtype, device, k, rows):
    """Says what all calls share.

    Args:
      folder: a Hugging Face folder.
      tokens: .npy file of int [windows, length].
      dtype: "float32" or "bfloat16".
      k: experts of a token.
      rows: windows computed together.
    """
    tokens = torch.from_numpy(np.load(tokens).astype(np.int64))
    _GIVEN.update(
        folder=folder, tokens=tokens, dtype=getattr(torch, dtype), device=device, k=k, rows=rows
    )
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def tune(implementations, tokens):
    """{"tried": [{"experts": name, "seconds": the second forward pass, or "error": text}, …]}.

    Args:
      implementations: of experts, by transformers' names.
      tokens: of the first window, that each is tried on.
    """
    tried, model = [], None
    for name in implementations:
        try:
            if model is None:
                model = _load(name)
            model.config._experts_implementation = name
            for _ in range(2):
                begun = time.perf_counter()
                _forward(model, _GIVEN["tokens"][:1, :tokens])
                seconds = time.perf_counter() - begun
            tried.append({"experts": name, "seconds": seconds})
        except Exception as error:  # each library raises what it likes
            tried.append({"experts": name, "error": serving.line(error)})
    del model
    gc.collect()
    return {"tried": tried}


def record(experts, output):
    """Loads the model and runs it over all tokens; writes an .npz of expert_ids int16 [tokens,
    layers, k], predicted_ids int32 [tokens], and gaps float32 [tokens, layers]: of the k-th and the
    next router logit, relative to the token's largest.

    Returns:
      {"seconds": of all, "loading": of these until the weights were there}.
    """
    begun = time.perf_counter()
    model = _load(experts)
    loading = time.perf_counter() - begun
    found = [_forward(model, part) for part in _GIVEN["tokens"].split(_GIVEN["rows"])]
    arrays = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    np.savez(output, **arrays)
    seconds = time.perf_counter() - begun
    # Weights may be mapped from the folder's files, which then cannot leave memory.
    del model
    gc.collect()
    return {"seconds": seconds, "loading": loading}


def _load(experts):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        _GIVEN["folder"], dtype=_GIVEN["dtype"], attn_implementation="sdpa",
        experts_implementation=experts,
    )  # fmt: skip
    return model.to(_GIVEN["device"]).eval()


@torch.no_grad()
def _forward(model, tokens):
    """Arrays of `record` for a few windows."""
    k, device = _GIVEN["k"], _GIVEN["device"]
    out = model(input_ids=tokens.to(device), output_router_logits=True, use_cache=False)
    ids, gaps = [], []
    for logits in out.router_logits:
        logits = logits.float()
        top = torch.topk(logits, min(k + 1, logits.shape[-1]), dim=-1)
        ids.append(top.indices[:, :k])
        largest = logits.abs().amax(-1)
        gaps.append((top.values[:, k - 1] - top.values[:, -1]) / largest)
    return {
        "expert_ids": torch.stack(ids, 1).to(torch.int16).cpu().numpy(),
        "predicted_ids": out.logits.argmax(-1).reshape(-1).to(torch.int32).cpu().numpy(),
        "gaps": torch.stack(gaps, 1).cpu().numpy(),
    }


if __name__ == "__main__":
    serving.serve({"open": open, "tune": tune, "record": record})
