"""Counting a trace: `Counts` of it, made in one pass.

The layers of a block are counted in threads, one per core: NumPy counts and sorts without holding
the interpreter's lock, and no two layers share an array.
"""

import concurrent.futures
import dataclasses
import itertools

import numpy as np

from olmoe_jax import machine
from olmoe_jax.analysis import counts, tallies, trace

_TOKENS = 1 << 16  # counted at once
_KEYS = 1 << 21  # of pairs, counted at once in each thread: 16 MB


class Counter:
    """Counts under construction: `add` every block of a trace, then `result`.

    Args:
      info: of the trace.
      folds: in how many parts documents are kept apart for pairs, paths and vocabulary.
      path_layers: pairs of positions in info.layers.
      vocabulary: whether to count tokens; the largest part of memory and time.
    """

    def __init__(self, info, *, folds=counts.FOLDS, path_layers=None, vocabulary=True):
        layers, experts = len(info.layers), info.num_experts
        if not layers or not 1 <= info.num_experts_per_token <= experts:
            raise ValueError(
                f"{counts.describe(info)}: expected layers, and 1..experts experts per token"
            )
        self.info, self.folds = info, folds
        self.path_layers = (
            counts.default_paths(layers) if path_layers is None else tuple(path_layers)
        )
        self._tokens, self._documents, self._last = 0, 0, None
        self._groups = {
            "group_tokens": np.zeros(counts.GROUPS, np.int64),
            "group_topk": np.zeros((counts.GROUPS, layers, experts), np.int64),
            "group_top1": np.zeros((counts.GROUPS, layers, experts), np.int64),
            "group_weights": np.zeros((counts.GROUPS, layers, 3)),
        }
        self._weighed = True
        square = (folds, layers, experts, experts)
        self._pairs, self._adjacent = np.zeros(square, np.int64), np.zeros(square, np.int64)
        self._paths = np.zeros((folds, len(self.path_layers), experts, experts), np.int64)
        self._vocabulary, self._occurrences = None, None
        if vocabulary:
            self._vocabulary = {
                (kind, rank): [tallies.Growing() for _ in range(layers)]
                for kind in counts.KINDS
                for rank in counts.RANKS
            }
            self._occurrences = {kind: tallies.Growing() for kind in counts.KINDS}

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
        group = (block.documents % counts.GROUPS).astype(np.int64)
        self._groups["group_tokens"] += np.bincount(group, minlength=counts.GROUPS)
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

    def result(self) -> counts.Counts:
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
        return counts.Counts(
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
            counted = np.bincount(keys, minlength=counts.GROUPS * width).reshape(
                counts.GROUPS, width
            )
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
                    group, value[:, layer], minlength=counts.GROUPS
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
                f"{counts.describe(self.info)}, layer {self.info.layers[layer]}: a token has one "
                "expert twice"
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
        for kind in counts.KINDS:
            tokens = getattr(block, f"{kind}_ids").astype(np.int64)
            real = tokens >= 0
            if not real.any():
                continue
            if (int(tokens.max()) + 1) * experts * self.folds > 2**32:
                raise ValueError(
                    f"{counts.describe(self.info)}: token id {tokens.max()} with {experts} experts "
                    f"and {self.folds} folds needs keys above 2^32: use fewer folds"
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


def count(source, *, size=65536, **options) -> counts.Counts:
    """Counts of a whole trace; `options` are Counter's.

    Raises:
      ValueError: the trace holds no token, or ids out of range.
    """
    counter = Counter(source.info, **options)
    for block in source.blocks(size):
        counter.add(block)
    found = counter.result()
    if not found.info.num_tokens:
        raise ValueError(f"{counts.describe(source.info)}: holds no token: leave this domain out")
    return found


def _in_threads(function, items):
    """[function(item), …] for items that share nothing that is written."""
    with concurrent.futures.ThreadPoolExecutor(machine.cores()) as pool:
        return list(pool.map(function, items))


def _check(block, info):
    shape = (len(info.layers), info.num_experts_per_token)
    if block.expert_ids.shape[1:] != shape:
        raise ValueError(
            f"{counts.describe(info)}: expert ids of shape {block.expert_ids.shape}, expected "
            f"[tokens, {shape[0]} layers, {shape[1]} experts per token]"
        )
    low, high = int(block.expert_ids.min()), int(block.expert_ids.max())
    if low < -1 or high >= info.num_experts:
        raise ValueError(
            f"{counts.describe(info)}: expert id {high if low >= -1 else low}; the model has "
            f"{info.num_experts} experts, ids 0..{info.num_experts - 1} (−1: none)"
        )
