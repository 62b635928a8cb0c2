"""Load and health of the routers: balance, dead experts, confidence, over training.

MaxViolation = max_e load_e / mean load − 1 (Wang et al., arXiv 2408.15664): 0 is balance,
experts / k − 1 the worst. Entropy is that of the shares of the choices over log2(experts): 1 is
balance. Confidence is the sum of the chosen experts' softmax weights before renormalisation: k /
experts if the router does not care. The scale of the logits shows in ln(first / last chosen
weight), which is exactly the gap between their logits; a shift of all logits changes no choice.
"""

import dataclasses
import math

import numpy as np

from olmoe_jax.analysis import counts as counts_lib
from olmoe_jax.analysis import resampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """Health of each layer of one checkpoint on one domain.

    Attributes:
      info: of the trace.
      load: [layers, experts], shares of the choices.
      max_violation, entropy: Estimate [layers].
      dead: per layer, ids of experts that no token chose.
      dead_by_chance: dead experts expected of a balanced router on as many tokens.
      confidence, first_weight, logit_spread: Estimate [layers]; None without weights.
      rank: "topk" or "top1", what load and what follows from it count.
    """

    info: object
    load: np.ndarray
    max_violation: resampling.Estimate
    entropy: resampling.Estimate
    dead: tuple[tuple[int, ...], ...]
    dead_by_chance: float
    confidence: resampling.Estimate | None
    first_weight: resampling.Estimate | None
    logit_spread: resampling.Estimate | None
    rank: str = "topk"


def load(counts, *, rank="topk", seed=0) -> Load:
    """Load and health from Counts.

    Raises:
      ValueError: no tokens, or the source has no counts of that rank.
    """
    info, loads = counts.info, getattr(counts, rank)
    if loads is None:
        raise ValueError(f"{info.model} on {info.domain}: first choices are not in this source")
    if not info.num_tokens:
        raise ValueError(f"{info.model} on {info.domain}: no token, so no load")
    k = info.num_experts_per_token if rank == "topk" else 1
    groups = getattr(counts, f"group_{rank}")
    sums = [loads[None]] if groups is None else [groups[counts.group_tokens > 0]]
    chance = info.num_experts * (1 - k / info.num_experts) ** info.num_tokens
    weights = _weights(counts, seed) if counts.group_weights is not None else (None, None, None)
    return Load(
        info=info, load=resampling.normalised(loads),
        max_violation=resampling.bootstrap(max_violation, sums, seed=seed),
        entropy=resampling.bootstrap(relative_entropy, sums, seed=seed),
        dead=tuple(tuple(np.flatnonzero(row == 0).tolist()) for row in loads),
        dead_by_chance=float(chance), confidence=weights[0], first_weight=weights[1],
        logit_spread=weights[2], rank=rank,
    )  # fmt: skip


def max_violation(loads):
    """max_e load_e / mean load − 1; loads [..., experts]."""
    return resampling.normalised(loads).max(-1) * loads.shape[-1] - 1


def relative_entropy(loads):
    """Entropy of the shares over its largest value; loads [..., experts]."""
    if loads.shape[-1] == 1:
        return np.ones(loads.shape[:-1])
    return resampling.entropy(resampling.normalised(loads)) / math.log2(loads.shape[-1])


def _weights(counts, seed):
    real = counts.group_tokens > 0
    mean = resampling.bootstrap(
        lambda sums, tokens: sums / np.maximum(tokens, 1)[..., None, None],
        [counts.group_weights[real], counts.group_tokens[real]],
        seed=seed,
    )
    return tuple(mean[..., number] for number in range(3))


def over_training(parts, *, total_steps=None, seed=0):
    """Load of every Counts, by step and domain.

    Args:
      total_steps: of the whole training, for the share of it; default the largest step given.
    Raises:
      ValueError: checkpoints of different models or architectures.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("load over training needs at least one checkpoint")
    counts_lib.check_alike([part.info for part in parts], ("model",))
    steps = [part.info.step for part in parts]
    order = sorted(range(len(parts)), key=lambda i: (steps[i] is None, steps[i] or 0))
    known = [step for step in steps if step is not None]
    total = total_steps or (max(known) if known else None)
    return tuple((load(parts[i], seed=seed), share_of_training(steps[i], total)) for i in order)


def share_of_training(step, total):
    """step / total, or None where one is not known."""
    return None if step is None or not total else step / total


def to_json(rows):
    """load.json, from what `over_training` returned."""
    return {"rows": [_row(one, share) for one, share in rows]}


def _row(one, share):
    info, layers = one.info, {}
    for row, layer in enumerate(info.layers):
        layers[layer] = {"load": one.load[row], "dead": one.dead[row]}
        for name in ("max_violation", "entropy", "confidence", "first_weight", "logit_spread"):
            value = getattr(one, name)
            layers[layer][name] = None if value is None else value[row]
        layers[layer]["dead_by_chance"] = one.dead_by_chance
    return {
        "model": info.model, "checkpoint": info.checkpoint, "step": info.step,
        "train_tokens": info.train_tokens, "share": share, "domain": info.domain,
        "num_tokens": info.num_tokens, "rank": one.rank, "layers": layers,
    }  # fmt: skip
