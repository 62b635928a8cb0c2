"""Counts: what the analyses need of a trace, independent of its length; `counting` makes them.

Documents are kept apart as far as resampling needs it: document number n belongs to group
n mod GROUPS (loads: as good as single documents) and to fold n mod `folds` (pairs, paths and
vocabulary, whose counts are large). Memory, in bytes: 16 · groups · layers · experts for the
loads, 16 · folds · layers · experts² for pairs, 8 for each distinct (fold, token, expert) of a
vocabulary table; nothing grows with the number of tokens beyond these bounds.
"""

import dataclasses
import itertools

import numpy as np

from olmoe_jax.analysis import tallies, trace

GROUPS = 1000
FOLDS = 10
KINDS = ("input", "predicted", "next")
RANKS = ("topk", "top1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What was counted over one trace, or over part of one. What a source lacks is None.

    Attributes:
      info: of the trace; num_tokens and num_documents are those counted.
      folds: F.
      topk, top1: int64 [layers, experts], tokens with the expert among their k, and first.
      group_tokens: int64 [groups].
      group_topk, group_top1: int64 [groups, layers, experts].
      group_weights: float64 [groups, layers, 3]: sums over tokens of the chosen weights' sum, the
        first weight, and ln(first / last chosen weight).
      pairs: int64 [F, layers, experts, experts], tokens with both experts among their k;
        symmetric, the diagonal is the load.
      adjacent: int64, same shape: tokens that have a at rank r and b at r + 1.
      path_layers: pairs of positions in info.layers.
      paths: int64 [F, paths, experts, experts], tokens whose first expert is a, and b later.
      vocabulary: (kind, rank) → one Tally per layer, of keys (token · experts + expert) · F + fold;
        a kind that the source does not have is absent. None: nothing known of tokens.
      occurrences: kind → Tally of keys token · F + fold.
    """

    info: trace.TraceInfo
    folds: int = FOLDS
    topk: np.ndarray
    top1: np.ndarray | None = None
    group_tokens: np.ndarray | None = None
    group_topk: np.ndarray | None = None
    group_top1: np.ndarray | None = None
    group_weights: np.ndarray | None = None
    pairs: np.ndarray | None = None
    adjacent: np.ndarray | None = None
    path_layers: tuple[tuple[int, int], ...] = ()
    paths: np.ndarray | None = None
    vocabulary: dict | None = None
    occurrences: dict | None = None


def default_paths(num_layers) -> tuple[tuple[int, int], ...]:
    """Neighbouring layers, and as in the paper's figures 35 and 36 first → middle → last.

    >>> default_paths(4)
    ((0, 1), (1, 2), (2, 3), (1, 3))
    """
    middle = (num_layers - 1) // 2
    far = {(0, middle), (middle, num_layers - 1)}
    near = list(itertools.pairwise(range(num_layers)))
    return (*near, *sorted(pair for pair in far if pair[0] < pair[1] and pair not in near))


def merge(parts) -> Counts:
    """Counts of the parts of one trace: the same as of the whole, counted in one pass.

    The parts share the numbering of documents; a document cut in two counts in both, so
    info.num_documents is an upper bound.
    """
    parts = list(parts)
    _check_alike(parts, ("model", "checkpoint", "domain"))
    return _combine(parts, parts[0].info, _add_groups)


def pool(parts) -> Counts:
    """Counts over several domains of one checkpoint; their documents stay apart."""
    parts = list(parts)
    _check_alike(parts, ("model", "checkpoint"))
    domains = ", ".join(dict.fromkeys(part.info.domain for part in parts))
    return _combine(parts, dataclasses.replace(parts[0].info, domain=domains), np.concatenate)


def check_alike(infos, names=()):
    """Raises ValueError unless layers, experts, k and the fields `names` are the same in all."""
    first, *others = infos
    for other in others:
        for name in ("layers", "num_experts", "num_experts_per_token", *names):
            one, two = getattr(first, name), getattr(other, name)
            if one != two:
                raise ValueError(
                    f"{describe(first)} has {name} {one}, {describe(other)} has {two}: they must "
                    "agree"
                )


def describe(info) -> str:
    """How messages call a trace."""
    checkpoint = f", {info.checkpoint}" if info.checkpoint else ""
    return f"trace of {info.model}{checkpoint} on {info.domain}"


def _check_alike(parts, names):
    if not parts:
        raise ValueError("no counts to put together: expected at least one")
    check_alike([part.info for part in parts], names)
    if len({(part.folds, part.path_layers) for part in parts}) > 1:
        raise ValueError("counts with different folds or paths cannot be put together")


def _combine(parts, info, groups):
    info = dataclasses.replace(
        info,
        num_tokens=sum(part.info.num_tokens for part in parts),
        num_documents=sum(part.info.num_documents for part in parts),
    )
    values = {}
    for field in dataclasses.fields(Counts):
        arrays = [getattr(part, field.name) for part in parts]
        if field.name in ("info", "folds", "path_layers"):
            continue
        if any(array is None for array in arrays):
            values[field.name] = None
        elif field.name.startswith("group_"):
            values[field.name] = groups(arrays)
        elif field.name == "occurrences":
            kinds = set.intersection(*(set(array) for array in arrays))
            values[field.name] = {
                k: tallies.merge(a[k] for a in arrays) for k in KINDS if k in kinds
            }
        elif field.name == "vocabulary":
            names = set.intersection(*(set(array) for array in arrays))
            values[field.name] = {
                name: tuple(
                    tallies.merge(layer) for layer in zip(*(a[name] for a in arrays), strict=True)
                )
                for name in arrays[0]
                if name in names
            }
        else:
            values[field.name] = sum(arrays[1:], arrays[0])
    return Counts(info=info, folds=parts[0].folds, path_layers=parts[0].path_layers, **values)


def _add_groups(arrays):
    longest = max(len(array) for array in arrays)
    total = np.zeros((longest, *arrays[0].shape[1:]), arrays[0].dtype)
    for array in arrays:
        total[: len(array)] += array
    return total
