"""Traces from arrays that other programs made, and what can be wrong with them.

Files of such arrays: `exchange`.
"""

import dataclasses

import numpy as np

from olmoe_jax.analysis import trace

PROBABILITY_SUM = 0.02  # rows that sum to 1 within this are probabilities; bfloat16 loses 1 %
BY_TOKEN = ("input_ids", "predicted_ids", "next_ids", "documents")


def make(
    expert_ids=None, *, weights=None, router_logits=None, k=None, probabilities=False,
    ignore_weights=False, num_experts=None, layers=None, info=None, where="the trace", **fields,
) -> trace.MemoryTrace:  # fmt: skip
    """A trace from arrays that another program made.

    Args:
      expert_ids: integers [tokens, layers, k]; None: chosen by `router_logits`.
      weights: [tokens, layers, k], softmax over all experts, before any renormalisation; the ids
        are then put in the order of falling weight.
      router_logits: [tokens, layers, experts], from which weights are made.
      k: experts per token, where only router_logits are given.
      probabilities: `router_logits` are probabilities already (some versions of transformers
        return those under that name).
      ignore_weights: leave `weights` out, as renormalised ones say less than they seem to.
      num_experts, layers: of the model, and the numbers of the MoE layers; None: by the shape of
        router_logits, and 0, 1, ….
      info: TraceInfo that says what the arrays do not; its sizes must be theirs.
      where: what to call the trace in messages.
      fields: input_ids, predicted_ids, next_ids, documents, losses, and attributes of TraceInfo
        (model, domain, …).

    Raises:
      ValueError: arrays that do not fit each other, ids that are no experts or occur twice,
        probabilities that are called logits, weights that were renormalised.
    """
    columns = {name: fields.pop(name, None) for name in (*BY_TOKEN, "losses")}
    weights = None if ignore_weights else weights
    if router_logits is not None:
        probs = _probabilities(np.asarray(router_logits), probabilities, where)
        num_experts = num_experts or probs.shape[-1]
        if num_experts != probs.shape[-1]:
            raise ValueError(f"{where}: {num_experts} experts, but {probs.shape[-1]} logits")
        if expert_ids is None:
            if k is None or not 1 <= k <= num_experts:
                raise ValueError(f"{where}: k is {k}: router_logits alone need one, of 1..experts")
            expert_ids = np.argsort(-probs, axis=-1, kind="stable")[..., :k]
    elif expert_ids is None:
        raise ValueError(f"{where}: neither expert_ids nor router_logits are there")
    ids = integers(expert_ids, "expert_ids", where)
    if ids.ndim != 3 or not all(ids.shape):
        raise ValueError(f"{where}: expert_ids are {list(ids.shape)}: expected [tokens, layers, k]")
    ids, kept = _without_dense(ids)
    if layers is None and info is not None and len(info.layers) in (len(kept), ids.shape[1]):
        layers = info.layers
    layers = _layers(layers, kept, ids.shape[1], where)
    num_experts = num_experts or (info.num_experts if info else None)
    if num_experts is None:
        raise ValueError(
            f"{where}: num_experts is not known: the ids reach {ids.max()}, but experts that were "
            "never chosen count too; give the model's"
        )
    _check_ids(ids, num_experts, where)
    if router_logits is not None:
        probs = probs[:, kept] if probs.shape[1] == len(kept) else probs
        if probs.shape[:2] != ids.shape[:2]:
            raise ValueError(
                f"{where}: router_logits are {list(probs.shape)}, expert_ids {list(ids.shape)}"
            )
        weights = np.where(ids < 0, 0, np.take_along_axis(probs, np.maximum(ids, 0), axis=-1))
        kept = np.ones(ids.shape[1], bool)
    if weights is not None:
        weights = _weights(np.asarray(weights, np.float32), kept, ids, num_experts, where)
        order = np.argsort(-weights, axis=-1, kind="stable")
        ids, weights = (np.take_along_axis(a, order, axis=-1) for a in (ids, weights))
    block = _block(ids.astype(np.int16), weights, columns, where)
    return trace.MemoryTrace(_info(info, block, layers, num_experts, fields, where), block)


def integers(values, name, where) -> np.ndarray:
    """int64; raises a ValueError for floats and whatever else is no integer."""
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{where}: {name} are {array.dtype}, expected integers")
    return array.astype(np.int64)


def _probabilities(scores, are_probabilities, where):
    """float64 [tokens, layers, experts]: the softmax of logits, or the probabilities themselves."""
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 3 or not all(scores.shape) or not np.isfinite(scores).all():
        raise ValueError(
            f"{where}: router_logits are {list(scores.shape)}: expected finite [tokens, layers, "
            "experts]"
        )
    sums = scores.sum(axis=-1)
    look_like = (scores >= 0).all() and (np.abs(sums - 1) <= PROBABILITY_SUM).all()
    if look_like and not are_probabilities:
        raise ValueError(
            f"{where}: router_logits are probabilities: no value is negative and every row sums to "
            "1; their softmax would be nearly uniform; give the logits, or say that these are "
            "probabilities (--trace_scores=probabilities)"
        )
    if are_probabilities and not look_like:
        raise ValueError(
            f"{where}: rows of probabilities must sum to 1; these sum to {sums.min():.3g}.."
            f"{sums.max():.3g}"
        )
    if are_probabilities:
        return scores / sums[..., None]
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return scores / scores.sum(axis=-1, keepdims=True)


def _without_dense(ids):
    """(ids without placeholders for dense layers, bool [layers]: which were kept)."""
    if ids.shape[-1] == 1:  # there all tokens may have chosen expert 0
        return ids, np.ones(ids.shape[1], bool)
    kept = (ids != 0).any(axis=(0, 2))
    return ids[:, kept], kept


def _layers(layers, kept, count, where):
    """Numbers in the model of the layers that were kept."""
    if not count:
        raise ValueError(f"{where}: all ids are 0: the program that wrote it recorded nothing")
    if layers is None:
        return tuple(np.flatnonzero(kept).tolist())
    if len(layers) == len(kept):
        return tuple(int(n) for n, keep in zip(layers, kept, strict=True) if keep)
    if len(layers) != count:
        raise ValueError(f"{where}: {len(layers)} numbers of layers, but ids of {count} layers")
    return tuple(int(n) for n in layers)


def _check_ids(ids, num_experts, where):
    """Raises where an id is no expert, or a token has one twice."""

    def place(mask):
        token, layer = np.argwhere(mask)[0][:2]
        return f"token {token}, layer {layer} of the array: ids {ids[token, layer].tolist()}"

    if ids.shape[-1] > num_experts:
        raise ValueError(f"{where}: {ids.shape[-1]} ids per token, but {num_experts} experts")
    if (wrong := (ids < -1) | (ids >= num_experts)).any():
        raise ValueError(
            f"{where}, {place(wrong)}: expected 0..{num_experts - 1}, or -1 for none; is the "
            "number of experts that of the model?"
        )
    ordered = np.sort(ids, axis=-1)
    if (twice := (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
        raise ValueError(f"{where}, {place(twice)}: an expert occurs twice")


def _weights(weights, kept, ids, num_experts, where):
    """float32 [tokens, layers, k]."""
    if weights.ndim == 3 and weights.shape[1] == len(kept):
        weights = weights[:, kept]
    if weights.shape != ids.shape:
        raise ValueError(f"{where}: weights are {list(weights.shape)}, ids {list(ids.shape)}")
    weights = np.where(ids < 0, 0, weights)
    sums = weights.sum(axis=-1)
    if not ((weights >= 0).all() and (sums <= 1 + PROBABILITY_SUM).all()):
        raise ValueError(
            f"{where}: weights must be softmax values, 0..1 with at most 1 per token; these lie in "
            f"{weights.min():.3g}..{weights.max():.3g} and sum to up to {sums.max():.3g}"
        )
    if ids.shape[-1] < num_experts and (np.abs(sums - 1) <= PROBABILITY_SUM).all():
        raise ValueError(
            f"{where}: the weights of every token sum to 1: they were renormalised, and how sure "
            "the router was is lost; give router_logits, or ignore_weights=True"
        )
    return weights


def _block(ids, weights, columns, where):
    values = {}
    for name, given in columns.items():
        if given is None:
            missing = {"documents": np.zeros(len(ids), np.int32), "losses": None}
            values[name] = missing.get(name, np.full(len(ids), -1, np.int32))
            continue
        if name == "losses":
            array = np.asarray(given, np.float32)
        else:
            array = integers(given, name, where).astype(np.int32)
        if array.shape != (len(ids),):
            raise ValueError(
                f"{where}: {name} are {list(array.shape)}, but there are {len(ids)} tokens with "
                "expert ids (of the last token of a request some programs return none)"
            )
        values[name] = array
    documents = values["documents"]
    if documents[0] < 0 or (np.diff(documents) < 0).any():
        raise ValueError(f"{where}: documents must begin at 0 or above and never fall")
    values["documents"] = np.cumsum(np.diff(documents, prepend=documents[0]) > 0, dtype=np.int32)
    return trace.Block(expert_ids=ids, weights=weights, **values)


def _info(info, block, layers, num_experts, fields, where):
    """TraceInfo of a block: `info` or what `fields` say, and its own sizes."""
    sizes = {
        "layers": layers, "num_experts": num_experts,
        "num_experts_per_token": block.expert_ids.shape[2], "num_tokens": len(block),
        "num_documents": int(block.documents[-1]) + 1,
    }  # fmt: skip
    if info is not None:
        if differ := [n for n, size in sizes.items() if getattr(info, n) != size]:
            name = differ[0]
            raise ValueError(
                f"{where}: {name} is {getattr(info, name)} by its info, {sizes[name]} by its arrays"
            )
        sizes = {}
    known = {f.name for f in dataclasses.fields(trace.TraceInfo)}
    if unknown := sorted(fields.keys() - known):
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; a trace has {sorted(known)}")
    if info is not None:
        return dataclasses.replace(info, **fields)
    return trace.TraceInfo(**{"model": "", "domain": ""} | sizes | fields)
