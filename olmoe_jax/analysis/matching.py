"""Expert matching: which expert of one model is which of another, and how alike are they.

By routing: experts are alike if the same tokens choose them, whatever their weights: for two seeds,
two checkpoints, an upcycled model and its sibling. Similarity is the Jaccard index, tokens that
chose both / tokens that chose either. By weights: the cosine of their matrices; it tells a
checkpoint from an earlier one and copies from copies, but two seeds number the units inside an
expert differently and so have cosines near 0 even where the experts do the same.

The assignment is the one-to-one matching with the largest total (Kuhn–Munkres). Because it picks
the best of very many, even unrelated models match a little: by routing, `chance` is what the same
matching finds when the second model's choices are shifted by half a block of tokens, which keeps
all loads; by weights, the mean similarity of all pairs that are not matched.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping

import numpy as np
from scipy import optimize

from olmoe_jax.analysis import aligned, counts, resampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """The matching of one layer.

    Attributes:
      match: int64 [experts of one], the expert of two; −1 if two has fewer.
      similarity: [experts of one], of each expert with its match; NaN without one.
      matrix: [experts of one, experts of two], similarity of all pairs.
      mean: Estimate, of `similarity`.
      chance: what unrelated models reach, see above.
      same_index: mean similarity of experts of the same number; NaN if the counts differ.
      moved: share of experts whose match has another number; NaN if the counts differ.
      overlap: Estimate, mean over tokens of the share of one's choices that two shares once its
        experts are renumbered; None by weights.
      overlap_same_index: the same without renumbering, which is router saturation; None by weights.
    """

    layer: int
    match: np.ndarray
    similarity: np.ndarray
    matrix: np.ndarray
    mean: resampling.Estimate
    chance: float
    same_index: float
    moved: float
    overlap: resampling.Estimate | None = None
    overlap_same_index: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matching:
    """The matching of two models, layer by layer; by: "routing" or "weights"."""

    one: str
    two: str
    by: str
    layers: tuple[Layer, ...]


def assign(similarity):
    """[experts of one]: its match, so that the matched similarities add up to the most."""
    rows, columns = optimize.linear_sum_assignment(similarity, maximize=True)
    match = np.full(len(similarity), -1)
    match[rows] = columns
    return match


def by_routing(one, two, *, folds=counts.FOLDS, size=65536) -> Matching:
    """Matches experts by the tokens that choose them; experts and k may differ.

    Args:
      one, two: traces of the same tokens, or lists of such traces, one per domain.
    Raises:
      ValueError: traces of different text, or of different numbers of layers.
    """
    pairs = [(one, two)] if hasattr(one, "blocks") else list(zip(one, two, strict=True))
    if not pairs:
        raise ValueError("matching needs at least one trace of each model")
    together, shifted, sums = None, None, None
    for first, second in pairs:
        found = _together(first, second, folds, size)
        if together is None:
            together, shifted, sums = found
        else:
            together, shifted = together + found[0], shifted + found[1]
            sums = [a + b for a, b in zip(sums, found[2], strict=True)]
    layers = []
    for row, layer in enumerate(pairs[0][0].info.layers):
        loads = [array[:, row] for array in sums]
        layers.append(_routing_layer(layer, together[:, row], shifted[row], *loads))
    infos = [trace.info for trace in pairs[0]]
    return Matching(
        one=_called(infos[0]), two=_called(infos[1]), by="routing", layers=tuple(layers)
    )


def _called(info):
    return f"{info.model}, {info.checkpoint}" if info.checkpoint else info.model


def _together(one, two, folds, size):
    """(int64 [F, layers, Ea, Eb] tokens that chose both, [layers, Ea, Eb] the same out of step,
    ([F, layers, Ea], [F, layers, Eb]) loads)."""
    aligned.check(one, two, same_experts=False)
    layers, ea, eb = len(one.info.layers), one.info.num_experts, two.info.num_experts
    both, shifted = np.zeros((folds, layers, ea, eb)), np.zeros((layers, ea, eb))
    loads = [np.zeros((folds, layers, ea)), np.zeros((folds, layers, eb))]
    for a, b in aligned.blocks(one, two, size):
        fold = b.documents % folds
        order = np.argsort(fold, kind="stable")
        bounds = np.searchsorted(fold[order], np.arange(folds + 1))
        for layer in range(layers):
            x = one_hot(a.expert_ids[:, layer], ea)
            y = one_hot(b.expert_ids[:, layer], eb)
            shifted[layer] += x.T @ np.roll(y, len(y) // 2, axis=0)
            x, y = x[order], y[order]
            for part, (start, end) in enumerate(itertools.pairwise(bounds)):
                both[part, layer] += x[start:end].T @ y[start:end]
                loads[0][part, layer] += x[start:end].sum(0)
                loads[1][part, layer] += y[start:end].sum(0)
    return both, shifted, loads


def one_hot(ids, experts):
    """float32 [tokens, experts] of ids [tokens, k]; −1 marks nothing."""
    hot = np.zeros((len(ids), experts + 1), np.float32)
    hot[np.arange(len(ids))[:, None], ids] = 1
    return hot[:, :experts]


def _routing_layer(layer, both, shifted, loads_one, loads_two):
    matrix = jaccard(both.sum(0), loads_one.sum(0), loads_two.sum(0))
    match = assign(matrix)
    chance = jaccard(shifted, loads_one.sum(0), loads_two.sum(0))

    # pairs and loads of a fold in one array, so that folds can be left out together
    folds = np.concatenate([both, loads_one[..., None]], axis=-1)
    extra = np.zeros((len(folds), 1, folds.shape[-1]))
    extra[:, 0, :-1] = loads_two
    folds = np.concatenate([folds, extra], axis=1)

    def matched(sums):
        part = jaccard(sums[:-1, :-1], sums[:-1, -1], sums[-1, :-1])
        return _of_match(part, assign(part)).mean()

    def overlap(sums):
        kept = match >= 0
        return sums[:-1, :-1][kept, match[kept]].sum() / max(sums[:-1, -1].sum(), 1)

    square = matrix.shape[0] == matrix.shape[1]
    slots = max(loads_one.sum(), 1)
    return Layer(
        layer=layer, match=match, similarity=_similarity(matrix, match), matrix=matrix,
        mean=resampling.jackknife(matched, folds),
        chance=float(_of_match(chance, assign(chance)).mean()),
        same_index=float(np.diagonal(matrix).mean()) if square else np.nan,
        moved=_moved(match) if square else np.nan, overlap=resampling.jackknife(overlap, folds),
        overlap_same_index=float(np.trace(both.sum(0)) / slots) if square else None,
    )  # fmt: skip


def jaccard(both, loads_one, loads_two):
    """both / (one + two − both); 0 where no token chose either."""
    either = loads_one[:, None] + loads_two - both
    return np.divide(both, either, out=np.zeros(both.shape, np.float64), where=either > 0)


def _of_match(matrix, match):
    kept = match >= 0
    return matrix[kept, match[kept]]


def _similarity(matrix, match):
    out = np.full(len(match), np.nan)
    out[match >= 0] = _of_match(matrix, match)
    return out


def _moved(match):
    return float((match != np.arange(len(match))).mean())


def cosines(one, two):
    """[experts of one, experts of two]: cosine of all matrices of an expert taken as one vector.

    Args:
      one, two: name → [experts, …], the same names and shapes apart from the number of experts.
    Raises:
      ValueError: names or shapes differ.
    """
    if set(one) != set(two) or not one:
        raise ValueError(f"weights {sorted(one)} and {sorted(two)}: expected the same names")
    dot, squares = 0.0, [0.0, 0.0]
    for name in one:
        x = _flat(one[name])
        y = x if two is one else _flat(two[name])
        if x.shape[1:] != y.shape[1:]:
            raise ValueError(
                f"{name}: an expert has {x.shape[1]} numbers in one model, {y.shape[1]} in the "
                "other"
            )
        dot = dot + x @ y.T
        for place, array in enumerate((x, y)):
            squares[place] = squares[place] + np.einsum("ij,ij->i", array, array, dtype=np.float64)
    norms = np.sqrt(squares[0])[:, None] * np.sqrt(squares[1])
    return np.divide(dot, norms, out=np.zeros(dot.shape, np.float64), where=norms > 0)


def _flat(weights):
    weights = np.asarray(weights)
    return weights.reshape(len(weights), -1).astype(np.float32)


def by_weights(
    one: Iterable[Mapping], two: Iterable[Mapping], *, layers, names=("", "")
) -> Matching:
    """Matches experts by the cosine of their weights.

    Args:
      one, two: for each layer name → [experts, …]; iterators, so that one layer is in memory.
      layers: indices in the model.
      names: of the two models.
    """
    found = []
    for layer, first, second in zip(layers, one, two, strict=True):
        matrix = cosines(first, second)
        match = assign(matrix)
        kept, square = match >= 0, matrix.shape[0] == matrix.shape[1]
        others = np.ones(matrix.shape, bool)
        others[np.flatnonzero(kept), match[kept]] = False
        found.append(
            Layer(
                layer=layer, match=match, similarity=_similarity(matrix, match), matrix=matrix,
                mean=resampling.Estimate(np.asarray(_of_match(matrix, match).mean())),
                chance=float(matrix[others].mean()) if others.any() else np.nan,
                same_index=float(np.diagonal(matrix).mean()) if square else np.nan,
                moved=_moved(match) if square else np.nan,
            )
        )  # fmt: skip
    return Matching(one=names[0], two=names[1], by="weights", layers=tuple(found))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Siblings:
    """How alike the experts of one layer are among themselves; copies start at 1.

    Attributes:
      matrix: [experts, experts], cosines.
      mean, closest: over pairs of different experts, the mean and the largest.
    """

    layer: int
    matrix: np.ndarray
    mean: float
    closest: float


def siblings(weights: Iterable[Mapping], *, layers) -> tuple[Siblings, ...]:
    """Whether the copies of an upcycled model have diverged, by the cosine of their weights."""
    found = []
    for layer, one in zip(layers, weights, strict=True):
        matrix = cosines(one, one)
        if len(matrix) < 2:
            raise ValueError(f"layer {layer} has one expert: nothing to compare it with")
        others = matrix[~np.eye(len(matrix), dtype=bool)]
        found.append(
            Siblings(
                layer=layer, matrix=matrix, mean=float(others.mean()), closest=float(others.max())
            )
        )
    return tuple(found)


def siblings_to_json(checkpoints):
    """expert_siblings.json, from (name of a checkpoint, what `siblings` returned) pairs."""
    return {
        "checkpoints": [
            {
                "name": name,
                "layers": {
                    one.layer: {"matrix": one.matrix, "mean": one.mean, "closest": one.closest}
                    for one in found
                },
            }
            for name, found in checkpoints
        ]
    }


def to_json(result):
    """expert_matching.json."""
    names = ("match", "similarity", "mean", "chance", "same_index", "moved", "overlap",
             "overlap_same_index")  # fmt: skip
    layers = {one.layer: {name: getattr(one, name) for name in names} for one in result.layers}
    return {"one": result.one, "two": result.two, "by": result.by, "layers": layers}
