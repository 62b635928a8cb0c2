"""Router saturation: how early a router chooses as it will at the end of training.

Sat(t) = mean over tokens of |E(t) ∩ E(T)| / k, E the set of a token's k experts, T the last
checkpoint (OLMoE, arXiv 2409.02060, section 5.1); top-1 is the share of tokens whose first expert
is the same. Two routers that know nothing of each other reach k / experts and 1 / experts.
"""

import dataclasses
import itertools

import numpy as np

from olmoe_jax.analysis import aligned, counts, load, resampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
    """How far two traces of the same tokens agree.

    Attributes:
      topk, top1: float64 [groups, layers], sums over tokens of |A ∩ B|, and of equal first experts.
      slots, tokens: float64 [groups, layers], sums of |B| (k · tokens, if no place is empty), and
        of tokens that have a first expert in B.
    """

    topk: np.ndarray
    top1: np.ndarray
    slots: np.ndarray
    tokens: np.ndarray


def overlap(one, two, *, size=32768) -> Overlap:
    """Agreement of a trace with a reference, by groups of documents.

    Raises:
      ValueError: the traces are of different data, layers, experts or k.
    """
    aligned.check(one, two)
    layers = len(one.info.layers)
    sums = {name: np.zeros((counts.GROUPS, layers)) for name in ("topk", "top1", "slots", "tokens")}
    held = np.zeros(counts.GROUPS, bool)
    for a, b in aligned.blocks(one, two, size):
        group = (b.documents % counts.GROUPS).astype(np.int64)
        held[group] = True
        for layer in range(layers):
            x, y = a.expert_ids[:, layer], b.expert_ids[:, layer]
            values = {
                "topk": _common(x, y),
                "top1": (x[:, 0] == y[:, 0]) & (y[:, 0] >= 0),
                "slots": (y >= 0).sum(-1),
                "tokens": y[:, 0] >= 0,
            }
            for name, value in values.items():
                sums[name][:, layer] += np.bincount(group, value, minlength=counts.GROUPS)
    if not held.any():
        raise ValueError(f"{one.info.model} on {one.info.domain}: no token, so no saturation")
    return Overlap(**{name: array[held] for name, array in sums.items()})


def _common(x, y):
    """|set(x) ∩ set(y)| for each row of two arrays [tokens, k]; −1 is no member."""
    found = np.zeros(len(x), np.int64)
    for slot in range(y.shape[1]):
        one = y[:, slot, None]
        found += ((x == one) & (one >= 0)).any(-1)
    return found


def pool(overlaps) -> Overlap:
    """Agreement over several domains; their documents stay apart."""
    names = [field.name for field in dataclasses.fields(Overlap)]
    return Overlap(**{n: np.concatenate([getattr(o, n) for o in overlaps]) for n in names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """Agreement of one checkpoint with a later one.

    Attributes:
      name, step, train_tokens, share: of the earlier checkpoint; share of the whole training.
      topk, top1: Estimate [layers].
      topk_mean, top1_mean: Estimate, over layers.
      to: name of the later one; to_step, to_train_tokens, to_share: its place.
    """

    name: str
    step: int | None
    train_tokens: int | None
    share: float | None
    topk: resampling.Estimate
    top1: resampling.Estimate
    topk_mean: resampling.Estimate
    top1_mean: resampling.Estimate
    to: str
    to_step: int | None
    to_train_tokens: int | None
    to_share: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saturation:
    """Saturation over a training.

    Attributes:
      reference: name of the last checkpoint.
      against_final, neighbours: Points in order of training, one fewer than checkpoints.
      chance: {"topk": k / experts, "top1": 1 / experts}.
    """

    model: str
    domains: tuple[str, ...]
    layers: tuple[int, ...]
    reference: str
    against_final: tuple[Point, ...]
    neighbours: tuple[Point, ...]
    chance: dict


def over_training(checkpoints, *, total_steps=None, seed=0) -> Saturation:
    """Saturation of every checkpoint against the last, and of each against the next.

    Reads the traces of the last checkpoint once for each other one, blocks at a time.

    Args:
      checkpoints: one list per checkpoint of its traces, the same domains in the same order; in
        any order if steps are known, else in order of training.
      total_steps: of the whole training, if it went on after the last checkpoint given; the
        paper's "1 %" is step 5000 of 1,223,842, which is 0.41 %.
    Raises:
      ValueError: fewer than two checkpoints, domains that differ, or traces that do not agree.
    """
    checkpoints = [list(traces) for traces in checkpoints]
    if len(checkpoints) < 2:
        raise ValueError(
            "router saturation compares checkpoints of one training: expected two or more, got "
            f"{len(checkpoints)}"
        )
    domains = [tuple(one.info.domain for one in traces) for traces in checkpoints]
    if len(set(domains)) > 1 or not domains[0]:
        raise ValueError(f"checkpoints were recorded on different domains: {sorted(set(domains))}")
    infos = [traces[0].info for traces in checkpoints]
    counts.check_alike(infos, ("model",))
    if all(info.step is not None for info in infos):
        checkpoints.sort(key=lambda traces: traces[0].info.step)
        steps = [traces[0].info.step for traces in checkpoints]
        if len(set(steps)) < len(steps):
            raise ValueError(f"two checkpoints have the same step, among {steps}")
    *earlier, last = checkpoints
    follower = Follower(last)
    for traces in earlier:
        follower.add(traces)
    return follower.result(total_steps=total_steps, seed=seed)


class Follower:
    """Saturation over a training whose traces come one checkpoint at a time, the last one first.

    Only that one's traces and those of the checkpoint before are read again: others may be gone.

    Args:
      last: traces of the last checkpoint, one per domain.
    """

    def __init__(self, last):
        self._last, self._previous = list(last), None
        self._infos, self._final, self._neighbours = [], [], []

    def add(self, traces) -> tuple[Overlap, Overlap | None]:
        """The next checkpoint, in order of training; domains as of the last one.

        Returns:
          its Overlap with the last one, and that of the one before, if any, with it.
        Raises:
          ValueError: the traces are of other data, layers or experts.
        """
        traces, before = list(traces), self._previous
        overlaps = (
            _agreement(traces, self._last), None if before is None else _agreement(before, traces)
        )  # fmt: skip
        self.add_known(traces[0].info, overlaps, traces)
        return overlaps

    def add_known(self, info, overlaps, traces=None):
        """The next checkpoint, if `add` was told of it in an earlier run.

        Args:
          info: TraceInfo of its first domain.
          overlaps: what `add` returned.
          traces: as of `add`; not needed where the next one is known, too.
        """
        final, neighbour = overlaps
        self._infos.append(info)
        self._final.append(final)
        if neighbour is not None:
            self._neighbours.append(neighbour)
        self._previous = traces

    def result(self, *, total_steps=None, seed=0) -> Saturation:
        """When all were added; arguments as of `over_training`."""
        info = self._last[0].info
        total, every = total_steps or info.step, [*self._infos, info]
        neighbours = [*self._neighbours, self._final[-1]]
        return Saturation(
            model=info.model, domains=tuple(one.info.domain for one in self._last),
            layers=info.layers, reference=info.checkpoint,
            against_final=tuple(
                _point(one, info, both, total, seed)
                for one, both in zip(self._infos, self._final, strict=True)
            ),
            neighbours=tuple(
                _point(one, two, both, total, seed)
                for (one, two), both in zip(itertools.pairwise(every), neighbours, strict=True)
            ),
            chance={
                "topk": info.num_experts_per_token / info.num_experts, "top1": 1 / info.num_experts
            },
        )  # fmt: skip


def _agreement(one, two):
    return pool([overlap(a, b) for a, b in zip(one, two, strict=True)])


def _point(one, two, both, total, seed):
    def estimate(name, whole, mean):
        def statistic(hits, tries):
            shares = hits / np.maximum(tries, 1)
            return shares.mean(-1) if mean else shares

        return resampling.bootstrap(
            statistic, [getattr(both, name), getattr(both, whole)], seed=seed
        )

    return Point(
        name=one.checkpoint, step=one.step, train_tokens=one.train_tokens,
        share=load.share_of_training(one.step, total), to=two.checkpoint, to_step=two.step,
        to_train_tokens=two.train_tokens, to_share=load.share_of_training(two.step, total),
        topk=estimate("topk", "slots", False), top1=estimate("top1", "tokens", False),
        topk_mean=estimate("topk", "slots", True), top1_mean=estimate("top1", "tokens", True),
    )  # fmt: skip


def to_json(result):
    """router_saturation.json."""

    def values(point):
        layers = {
            layer: {"topk": point.topk[row], "top1": point.top1[row]}
            for row, layer in enumerate(result.layers)
        }
        return layers | {"mean": {"topk": point.topk_mean, "top1": point.top1_mean}}

    return {
        "model": result.model,
        "domains": result.domains,
        "layers": result.layers,
        "reference": result.reference,
        "chance": result.chance,
        "checkpoints": [
            {"name": p.name, "step": p.step, "train_tokens": p.train_tokens, "share": p.share,
             "against_final": values(p)} for p in result.against_final
        ],
        "neighbours": [
            {"from": p.name, "to": p.to, "step": p.to_step, "train_tokens": p.to_train_tokens,
             "share": p.to_share, "values": values(p)} for p in result.neighbours
        ],
    }  # fmt: skip
