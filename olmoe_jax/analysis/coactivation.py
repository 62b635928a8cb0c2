"""Expert co-activation: which experts are chosen together.

Coact(E_i, E_j) = tokens with E_i and E_j both among their k / tokens with E_i (OLMoE, arXiv
2409.02060, section 5.2), not symmetric. The script that drew the published figures counts only
pairs whose ranks by weight are neighbours, in either order (7 of a token's 28 pairs at k = 8):
definition "adjacent". Its values are lower, and are the ones to hold against the figures.
"""

import dataclasses

import numpy as np

from olmoe_jax.analysis import counts as counts_lib
from olmoe_jax.analysis import resampling

DEFINITIONS = ("paper", "adjacent")
SHOWN = 16  # experts in a published heat map (its caption says 32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Experts each of which is chosen with every other.

    Attributes:
      weakest: the smallest Coact among the ordered pairs of the group.
    """

    experts: tuple[int, ...]
    weakest: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """Co-activation in one layer.

    Attributes:
      matrix: Estimate [experts, experts], row: given; NaN on the diagonal and in the row of an
        expert that no token chose.
      lift: [experts, experts], times what random sets with the same loads would show (about 1).
      order: the experts that the published heat map would show: those first met in pairs by
        falling value.
      groups: disjoint groups, most tightly bound first.
    """

    layer: int
    matrix: resampling.Estimate
    lift: np.ndarray
    order: tuple[int, ...]
    groups: tuple[Group, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coactivation:
    """Co-activation of one checkpoint.

    Attributes:
      chance: mean of Coact for sets drawn at random: (k − 1) / (experts − 1), of which adjacent
        ranks are 2 / k.
      threshold: Coact that every pair of a group reaches.
    """

    info: object
    definition: str
    chance: float
    threshold: float
    layers: tuple[Layer, ...]


def coactivation(counts, *, definition="paper", threshold=None) -> Coactivation:
    """Co-activation from Counts.

    Args:
      definition: "paper" or "adjacent".
      threshold: for groups; default twice the chance level.
    Raises:
      ValueError: the source has no pairs, k is 1, or an unknown definition.
    """
    info, k = counts.info, counts.info.num_experts_per_token
    if definition not in DEFINITIONS:
        raise ValueError(f"definition {definition!r}: expected one of {', '.join(DEFINITIONS)}")
    if counts.pairs is None or counts.adjacent is None:
        raise ValueError(f"{counts_lib.describe(info)}: pairs of experts are not in this source")
    if k < 2:
        raise ValueError(f"{info.model} sends each token to one expert: nothing is co-activated")
    share = 1 if definition == "paper" else 2 / k
    chance = share * (k - 1) / max(info.num_experts - 1, 1)
    threshold = min(2 * chance, 0.95) if threshold is None else threshold
    layers = []
    for row, layer in enumerate(info.layers):
        both = counts.pairs[:, row]
        loads = np.diagonal(both, axis1=1, axis2=2)
        if definition == "adjacent":
            both = counts.adjacent[:, row]
            both = both + both.transpose(0, 2, 1)
        folds = np.concatenate([both, loads[:, None]], axis=1).astype(np.float64)
        matrix = resampling.jackknife(_matrix, folds)
        layers.append(
            Layer(
                layer=layer, matrix=matrix, order=_order(matrix.value),
                lift=_lift(matrix.value, loads.sum(0), counts.info.num_tokens, k, share),
                groups=groups(matrix.value, threshold),
            )
        )  # fmt: skip
    return Coactivation(
        info=info, definition=definition, chance=chance, threshold=threshold, layers=tuple(layers)
    )


def _matrix(folds):
    """Coact of [experts + 1, experts]: pairs, and the loads in the last row."""
    pairs, loads = folds[:-1], folds[-1]
    out = np.divide(
        pairs, loads[:, None], out=np.full(pairs.shape, np.nan), where=loads[:, None] > 0
    )
    np.fill_diagonal(out, np.nan)
    return out


def _lift(matrix, loads, tokens, k, share):
    experts = len(loads)
    # a set of k distinct experts has room for k − 1 others: less than independence would give
    room = share * (k - 1) / k * experts / max(experts - 1, 1)
    expected = loads / tokens * room
    return np.divide(matrix, expected, out=np.full(matrix.shape, np.nan), where=expected > 0)


def _order(matrix):
    found = []
    for a, b in ranked(matrix):
        found += [e for e in (a, b) if e not in found]
        if len(found) >= SHOWN:
            break
    return tuple(found[:SHOWN])


def ranked(matrix):
    """Ordered pairs (a, b), a ≠ b, by falling value; ties by place."""
    flat = np.where(np.isnan(matrix), -1, matrix)
    order = np.argsort(-flat, axis=None, kind="stable")
    rows, columns = np.unravel_index(order, matrix.shape)
    return [
        (int(a), int(b)) for a, b in zip(rows, columns, strict=True) if not np.isnan(matrix[a, b])
    ]


def groups(matrix, threshold) -> tuple[Group, ...]:
    """Disjoint groups in which every ordered pair reaches the threshold.

    Greedy: from the strongest free pair (by the smaller of its two directions) on, a group takes
    the free expert whose weakest tie to it is strongest, as long as that reaches the threshold.
    """
    ties = np.fmin(matrix, matrix.T)
    ties = np.where(np.isnan(ties), 0, ties)
    np.fill_diagonal(ties, 0)
    free, found = np.ones(len(ties), bool), []
    while free.sum() > 1:
        open_ties = np.where(free[:, None] & free, ties, -1)
        a, b = np.unravel_index(np.argmax(open_ties), ties.shape)
        if open_ties[a, b] < threshold:
            break
        members = [int(a), int(b)]
        while True:
            free[members] = False
            weakest = np.where(free, ties[members].min(0), -1)
            best = int(np.argmax(weakest))
            if weakest[best] < threshold:
                break
            members.append(best)
        inside = ties[np.ix_(members, members)][~np.eye(len(members), dtype=bool)]
        found.append(Group(experts=tuple(members), weakest=float(inside.min())))
    return tuple(sorted(found, key=lambda group: -group.weakest))


def to_json(result, *, most=32):
    """coactivation.json; `most`: pairs listed per layer."""
    info, layers = result.info, {}
    for layer in result.layers:
        pairs = [
            {"experts": [a, b], "value": layer.matrix[a, b], "lift": layer.lift[a, b]}
            for a, b in ranked(layer.matrix.value)[:most]
        ]
        layers[layer.layer] = {
            "matrix": layer.matrix.value, "pairs": pairs, "groups": layer.groups,
            "order": layer.order,
        }  # fmt: skip
    return {
        "model": info.model, "checkpoint": info.checkpoint, "domain": info.domain,
        "definition": result.definition, "chance": result.chance, "threshold": result.threshold,
        "layers": layers,
    }  # fmt: skip
