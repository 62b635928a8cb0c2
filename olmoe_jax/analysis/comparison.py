"""Models side by side: the same numbers on the same axis, and their differences.

Models differ in the number of layers, experts and k. Layers are placed by depth, 0 the first of
the model and 1 the last; numbers are taken relative to what is possible or to chance, so that 8
experts and 64 compare.
"""

import dataclasses
import itertools

import numpy as np

from olmoe_jax.analysis import resampling

UNITS = {
    "specialisation": "distance of a domain's choices from uniform, mean over domains, 0..1",
    "information": "information between domain and first expert, share of the largest possible",
    "entropy": "entropy of the load, share of the largest possible",
    "max_violation": "largest load over the mean, minus 1",
    "confidence": "sum of the chosen weights",
    "vocabulary": "share of a token's favourite expert, input tokens, first choices",
    "saturation": "overlap with the last checkpoint, of the first checkpoint given",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """A number by layer: depth [n] in 0..1, rising; value Estimate [n]."""

    depth: np.ndarray
    value: resampling.Estimate


def depths(layers, num_layers=None):
    """Depth of layers in a model of num_layers; default: the last one given is the last."""
    last = max(layers) if num_layers is None else num_layers - 1
    if last < max(layers):
        raise ValueError(f"layer {max(layers)} in a model of {num_layers} layers")
    return np.asarray(layers, np.float64) / max(last, 1)


def curves(
    *, num_layers=None, domains=None, load=None, vocabulary=None, layers=None, saturation=None
) -> dict[str, Curve]:
    """Metric → Curve, from the results of the analyses of one model; what is None is left out.

    Args:
      domains: domains.Domains. load: load.Load. saturation: saturation.Saturation.
      vocabulary: what vocabulary.vocabulary returned, with `layers` of its Counts.
    """
    found = {}

    def put(name, at, estimate):
        found[name] = Curve(depth=depths(at, num_layers), value=estimate)

    if domains is not None:
        put("specialisation", domains.layers, _mean_over_domains(domains.topk.tv))
        if domains.top1 is not None and domains.top1.information is not None:
            one = domains.top1.information
            ends = (
                None if a is None else a / one.most for a in (one.corrected.low, one.corrected.high)
            )
            put(
                "information",
                domains.layers,
                resampling.Estimate(one.corrected.value / one.most, *ends),
            )
    if load is not None:
        for name in ("entropy", "max_violation", "confidence"):
            if getattr(load, name) is not None:
                put(name, load.info.layers, getattr(load, name))
    if vocabulary is not None and ("input", "top1") in vocabulary:
        put("vocabulary", layers, vocabulary["input", "top1"].mean)
    if saturation is not None:
        put("saturation", saturation.layers, saturation.against_final[0].topk)
    return found


def _mean_over_domains(estimate):
    """Mean over the second axis; the domains' documents are drawn independently."""
    value = estimate.value.mean(1)
    if estimate.low is None:
        return resampling.Estimate(value)
    half = np.sqrt((((estimate.high - estimate.low) / 2) ** 2).sum(1)) / estimate.value.shape[1]
    return resampling.Estimate(value, value - half, value + half)


def difference(one, two) -> Curve:
    """two − one, at the depths of the curve with fewer layers that both cover.

    The other is interpolated. Ends as of independent estimates: too wide where both models read
    the same documents.
    """
    few, many = (one, two) if len(one.depth) <= len(two.depth) else (two, one)
    inside = (few.depth >= many.depth[0]) & (few.depth <= many.depth[-1])
    at = few.depth[inside]
    values, halves = [], []
    for curve in (one, two):
        values.append(np.interp(at, curve.depth, curve.value.value))
        if curve.value.low is not None:
            half = (curve.value.high - curve.value.low) / 2
            halves.append(np.interp(at, curve.depth, half))
    gap = values[1] - values[0]
    if len(halves) < 2:
        return Curve(depth=at, value=resampling.Estimate(gap))
    half = np.hypot(*halves)
    return Curve(depth=at, value=resampling.Estimate(gap, gap - half, gap + half))


def to_json(models):
    """model_comparison.json, of {model: what `curves` returned}.

    Raises:
      ValueError: fewer than two models.
    """
    if len(models) < 2:
        raise ValueError(f"a comparison needs two models, got {', '.join(models) or 'none'}")
    metrics = {}
    for name, unit in UNITS.items():
        held = {model: found[name] for model, found in models.items() if name in found}
        if not held:
            continue
        differences = {
            f"{b} − {a}": difference(held[a], held[b]) for a, b in itertools.combinations(held, 2)
        }
        metrics[name] = {"unit": unit, "models": _plain(held), "differences": _plain(differences)}
    return {"models": list(models), "metrics": metrics}


def _plain(curves):
    return {
        name: {"depth": curve.depth, "value": curve.value.value, "low": curve.value.low,
               "high": curve.value.high} for name, curve in curves.items()
    }  # fmt: skip
