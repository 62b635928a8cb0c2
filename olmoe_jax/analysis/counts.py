"""Counts: what the analyses need of a trace, gathered in one pass and independent of its length.

Documents are kept apart as far as resampling needs it: document number n belongs to group
n mod GROUPS (loads: as good as single documents) and to fold n mod `folds` (pairs, paths and
vocabulary, whose counts are large). Memory, in bytes: 16 · groups · layers · experts for the
loads, 16 · folds · layers · experts² for pairs, 8 for each distinct (fold, token, expert) of a
vocabulary table; nothing grows with the number of tokens beyond these bounds.

The layers of a block are counted in threads, one per core: NumPy counts and sorts without holding
the interpreter's lock, and no two layers share an array.
"""

import concurrent.futures
import dataclasses
import itertools

import numpy as np

from olmoe_jax import machine
from olmoe_jax.analysis import tallies, trace

GROUPS = 1000
FOLDS = 10
KINDS = ("input", "predicted", "next")
RANKS = ("topk", "top1")
_TOKENS = 1 << 16  # counted at once
_KEYS = 1 << 21  # of pairs, counted at once in each thread: 16 MB


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


class Counter:
    """Counts under construction: `add` every block of a trace, then `result`.

    Args:
      info: of the trace.
      folds: in how many parts documents are kept apart for pairs, paths and vocabulary.
      path_layers: pairs of positions in info.layers.
      vocabulary: whether to count tokens; the largest part of memory and time.
    """

    def __init__(self, info, *, folds=FOLDS, path_layers=None, vocabulary=True):
        layers, experts = len(info.layers), info.num_experts
        if not layers or not 1 <= info.num_experts_per_token <= experts:
            raise ValueError(f"{describe(info)}: expected layers, and 1..experts experts per token")
        self.info, self.folds = info, folds
        self.path_layers = default_paths(layers) if path_layers is None else tuple(path_layers)
        self._tokens, self._documents, self._last = 0, 0, None
        self._groups = {
            "group_tokens": np.zeros(GROUPS, np.int64),
            "group_topk": np.zeros((GROUPS, layers, experts), np.int64),
            "group_top1": np.zeros((GROUPS, layers, experts), np.int64),
            "group_weights": np.zeros((GROUPS, layers, 3)),
        }
        self._weighed = True
        square = (folds, layers, experts, experts)
        self._pairs, self._adjacent = np.zeros(square, np.int64), np.zeros(square, np.int64)
        self._paths = np.zeros((folds, len(self.path_layers), experts, experts), np.int64)
        self._vocabulary, self._occurrences = None, None
        if vocabulary:
            self._vocabulary = {
                (kind, rank): [tallies.Growing() for _ in range(layers)]
                for kind in KINDS
                for rank in RANKS
            }
            self._occurrences = {kind: tallies.Growing() for kind in KINDS}

    def add(self, block):
        """Counts consecutive tokens.

        Raises:
          ValueError: ids out of range, or an expert twice for one token.
        """
        if not len(block):
            return
        _check(block, self.info)
        self._add_documents(block.documents)
        for start in range(0, len(block), _TOKENS):
            self._add(trace.cut(block, slice(start, start + _TOKENS)))

    def _add(self, block):
        fold = (block.documents % self.folds).astype(np.int64)
        group = (block.documents % GROUPS).astype(np.int64)
        self._groups["group_tokens"] += np.bincount(group, minlength=GROUPS)
        words = self._words(block, fold)

        def one(layer):
            ids = np.ascontiguousarray(block.expert_ids[:, layer].T, np.int64)
            none = bool((ids < 0).any())
            self._add_words(layer, ids, words, none)
            if none:
                ids = np.where(ids < 0, self.info.num_experts, ids)
            self._add_loads(layer, ids, group)
            self._add_pairs(layer, ids, fold)

        _in_threads(one, range(len(self.info.layers)))
        self._add_weights(block, group)
        self._add_paths(block.expert_ids[:, :, 0].astype(np.int64), fold)
        self._tokens += len(block)

    def result(self) -> Counts:
        """What was counted so far."""
        last = np.flatnonzero(self._groups["group_tokens"])
        used = int(last[-1]) + 1 if last.size else 0
        groups = {name: array[:used].copy() for name, array in self._groups.items()}
        if not self._weighed:
            groups["group_weights"] = None
        vocabulary = occurrences = None
        if self._vocabulary is not None:
            occurrences = {k: t for k, g in self._occurrences.items() if len(t := g.result())}
            vocabulary = {
                name: tuple(_in_threads(tallies.Growing.result, layers))
                for name, layers in self._vocabulary.items()
                if name[0] in occurrences
            }
        info = dataclasses.replace(
            self.info, num_tokens=self._tokens, num_documents=self._documents
        )
        return Counts(
            info=info, folds=self.folds, topk=groups["group_topk"].sum(0),
            top1=groups["group_top1"].sum(0), pairs=self._pairs.copy(),
            adjacent=self._adjacent.copy(), path_layers=self.path_layers,
            paths=self._paths.copy(), vocabulary=vocabulary, occurrences=occurrences, **groups,
        )  # fmt: skip

    def _add_documents(self, documents):
        """Documents never fall, so a new one is one that differs from the token before."""
        changes = int((documents[1:] != documents[:-1]).sum())
        self._documents += changes + int(documents[0] != self._last)
        self._last = int(documents[-1])

    def _add_loads(self, layer, ids, group):
        """`ids` int64 [k, tokens]; here and in `_add_pairs` num_experts stands for no expert."""
        width = self.info.num_experts + 1
        for name, chosen in (("group_topk", ids), ("group_top1", ids[:1])):
            keys = (group * width + chosen).reshape(-1)
            counted = np.bincount(keys, minlength=GROUPS * width).reshape(GROUPS, width)
            self._groups[name][:, layer] += counted[:, :-1]

    def _add_weights(self, block, group):
        if block.weights is None:
            self._weighed = False
            return
        weights, last = block.weights, block.weights[..., -1]
        real = block.expert_ids >= 0
        if not real.all():
            weights = np.where(real, weights, 0)
            last = np.where(real, weights, np.inf).min(-1)
        first = weights.max(-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = np.log(first / last)
        # a weight that float16 rounds to 0 has no logarithm
        spread = np.where(np.isfinite(spread), spread, 0)
        for number, value in enumerate((weights.sum(-1, dtype=np.float32), first, spread)):
            for layer in range(value.shape[1]):
                self._groups["group_weights"][:, layer, number] += np.bincount(
                    group, value[:, layer], minlength=GROUPS
                )

    def _add_pairs(self, layer, ids, fold):
        experts, width = self.info.num_experts, self.info.num_experts + 1
        loads = np.bincount((fold * width + ids).reshape(-1), minlength=self.folds * width)
        first = (fold * width + ids) * width
        adjacent = self._squares((first[:-1] + ids[1:]).reshape(-1))
        pairs = adjacent.copy()
        # of each two ranks the lower first, the other half of the square by symmetry
        apart = [(a, b) for a, b in itertools.combinations(range(len(ids)), 2) if b > a + 1]
        size = max(1, _KEYS // max(1, len(apart)))
        for start in range(0, len(fold) if apart else 0, size):
            part = slice(start, start + size)
            keys = np.empty((len(apart), len(fold[part])), np.int64)
            for row, (a, b) in zip(keys, apart, strict=True):
                np.add(first[a, part], ids[b, part], out=row)
            pairs += self._squares(keys.reshape(-1))
        diagonal = np.arange(experts)
        if pairs[:, diagonal, diagonal].any():
            raise ValueError(
                f"{describe(self.info)}, layer {self.info.layers[layer]}: a token has one expert "
                "twice"
            )
        pairs += pairs.swapaxes(1, 2).copy()
        pairs[:, diagonal, diagonal] = loads.reshape(self.folds, width)[:, :-1]
        self._pairs[:, layer] += pairs
        self._adjacent[:, layer] += adjacent

    def _squares(self, keys):
        """int64 [F, experts, experts]: how often each key (fold · width + a) · width + b is there,
        width = experts + 1, where both are experts."""
        width = self.info.num_experts + 1
        counted = np.bincount(keys, minlength=self.folds * width**2)
        return counted.reshape(self.folds, width, width)[:, :-1, :-1]

    def _add_paths(self, first, fold):
        experts = self.info.num_experts
        for path, (one, two) in enumerate(self.path_layers):
            a, b = first[:, one], first[:, two]
            keys = ((fold * experts + a) * experts + b)[(a >= 0) & (b >= 0)]
            counted = np.bincount(keys, minlength=self.folds * experts**2)
            self._paths[:, path] += counted.reshape(self.folds, experts, experts)

    def _words(self, block, fold):
        """kind → (which tokens have it or None for all, uint32: the key of each with expert 0)."""
        if self._vocabulary is None:
            return {}
        found, experts = {}, self.info.num_experts
        for kind in KINDS:
            tokens = getattr(block, f"{kind}_ids").astype(np.int64)
            real = tokens >= 0
            if not real.any():
                continue
            if (int(tokens.max()) + 1) * experts * self.folds > 2**32:
                raise ValueError(
                    f"{describe(self.info)}: token id {tokens.max()} with {experts} experts and "
                    f"{self.folds} folds needs keys above 2^32: use fewer folds"
                )
            which, parts = (None, fold) if real.all() else (real, fold[real])
            tokens = tokens if which is None else tokens[which]
            self._occurrences[kind].add((tokens * self.folds + parts).astype(np.uint32))
            found[kind] = which, (tokens * experts * self.folds + parts).astype(np.uint32)
        return found

    def _add_words(self, layer, ids, words, none):
        """`ids` int64 [k, tokens]; `none`: whether some are −1."""
        steps = (ids * self.folds).astype(np.uint32)
        for kind, (which, keys) in words.items():
            there = slice(None) if which is None else which
            found = keys + steps[:, there]
            for rank, part in (("topk", slice(None)), ("top1", slice(1))):
                counted = found[part].reshape(-1)
                if none:
                    counted = counted[(ids[part, there] >= 0).reshape(-1)]
                elif rank == "top1":
                    counted = counted.copy()  # a view would keep all ranks in memory
                self._vocabulary[kind, rank][layer].add(counted)


def _in_threads(function, items):
    """[function(item), …] for items that share nothing that is written."""
    with concurrent.futures.ThreadPoolExecutor(machine.cores()) as pool:
        return list(pool.map(function, items))


def count(source, *, size=65536, **options) -> Counts:
    """Counts of a whole trace; `options` are Counter's.

    Raises:
      ValueError: the trace holds no token, or ids out of range.
    """
    counter = Counter(source.info, **options)
    for block in source.blocks(size):
        counter.add(block)
    counts = counter.result()
    if not counts.info.num_tokens:
        raise ValueError(f"{describe(source.info)}: holds no token: leave this domain out")
    return counts


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


def _check(block, info):
    shape = (len(info.layers), info.num_experts_per_token)
    if block.expert_ids.shape[1:] != shape:
        raise ValueError(
            f"{describe(info)}: expert ids of shape {block.expert_ids.shape}, expected "
            f"[tokens, {shape[0]} layers, {shape[1]} experts per token]"
        )
    low, high = int(block.expert_ids.min()), int(block.expert_ids.max())
    if low < -1 or high >= info.num_experts:
        raise ValueError(
            f"{describe(info)}: expert id {high if low >= -1 else low}; the model has "
            f"{info.num_experts} experts, ids 0..{info.num_experts - 1} (−1: none)"
        )
