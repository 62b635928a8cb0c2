"""Interventions: what the loss becomes without an expert. Counts are not causes.

For each domain the experts that stand out most in it are intervened in, one at a time, and as a
control as many experts drawn at random from the same layers:

    muted      chosen as before, its output dropped; the weights of the token's other experts stay
               as they are, also in a model that divides them by their sum
    excluded   routed around: the token's next expert steps in, and the probabilities of all that
               are left grow so that they sum to one
    uniform    (of a layer, and of all) every token goes to k experts drawn at random, with the
               weights that the router gave to its own

The result is the change of the loss, nats per token, on every domain. Two kinds of chance are kept
apart. Other documents: intervals are of documents drawn anew, the same for both sides of a
difference. Other experts: few were tried, so the signs of their differences are flipped in all
ways; a difference counts as more than chance if both agree. Of fewer than LEAST experts it never
does: the pattern that was seen is too large a share of all.
"""

import dataclasses
import itertools
import math

import numpy as np

from olmoe_jax import reporting
from olmoe_jax.analysis import counts, resampling

MUTED, EXCLUDED, UNIFORM = "muted", "excluded", "uniform"
SURE = 0.025  # share of sign flips up to which a difference is called more than chance
LEAST = math.ceil(-math.log2(SURE))  # 6: of fewer differences even the largest share is above SURE
_EXACT = 12  # differences of which all 2^n signs are tried


@dataclasses.dataclass(frozen=True)
class Intervention:
    """One change of the routing.

    Attributes:
      kind: MUTED, EXCLUDED or UNIFORM.
      layer: position among the MoE layers; None: all of them (UNIFORM only).
      expert: its number; None of UNIFORM.
    """

    kind: str
    layer: int | None
    expert: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be tried.

    Attributes:
      domains: names, in the order of what follows.
      layers: indices in the model of the MoE layers.
      own: per domain, the (layer position, expert) that stand out most in it.
      control: per domain, for each of `own` an expert of the same layer; None where none is left.
      share: [layers, domains, experts], share of the domain's tokens with the expert.
      interventions: all that follows, each once; UNIFORM at the end.
    """

    domains: tuple[str, ...]
    layers: tuple[int, ...]
    own: tuple[tuple[tuple[int, int], ...], ...]
    control: tuple[tuple[tuple[int, int] | None, ...], ...]
    share: np.ndarray
    interventions: tuple[Intervention, ...]


def plan(domains, number, *, seed=0) -> Plan:
    """Chooses what to try.

    Args:
      domains: domains.Domains of the model. An expert stands out by its share in the domain minus
        its mean share in the others; by its share, where there is one domain.
      number: N, experts per domain.
    Raises:
      ValueError: number is not 1 or more.
    """
    if number < 1:
        raise ValueError(f"interventions is {number}: expected the number of experts per domain")
    share = domains.topk.share.value
    layers, count, experts = share.shape
    others = (share.sum(1, keepdims=True) - share) / max(count - 1, 1)
    rng, own, control = np.random.default_rng(seed), [], []
    for d in range(count):
        order = np.argsort(-(share - others)[:, d], axis=None, kind="stable")[:number]
        mine = [divmod(int(place), experts) for place in order]
        own.append(tuple(mine))
        control.append(_control(mine, experts, rng))
    tried = dict.fromkeys(
        Intervention(kind, *expert)
        for kind in (MUTED, EXCLUDED)
        for group in (*own, *control)
        for expert in group
        if expert is not None
    )
    everywhere = [Intervention(UNIFORM, layer) for layer in (*range(layers), None)]
    return Plan(
        domains=domains.topk.domains, layers=domains.layers, own=tuple(own),
        control=tuple(control), share=share, interventions=(*tried, *everywhere),
    )  # fmt: skip


def _control(mine, experts, rng):
    """For each expert another one of its layer that is not among `mine`, each once."""
    taken, found = set(mine), []
    for layer, _ in mine:
        left = [e for e in range(experts) if (layer, e) not in taken]
        found.append((layer, int(rng.choice(left))) if left else None)
        taken.add(found[-1])
    return tuple(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Losses:
    """What running the interventions gave on one domain, by groups of documents.

    Attributes:
      tokens: float64 [groups], that have a next token.
      sums: float64 [groups, 1 + interventions], of their losses; first without intervention.
      documents: that hold such tokens; a group may be of several.
    """

    tokens: np.ndarray
    sums: np.ndarray
    documents: int

    @classmethod
    def of(cls, documents, losses):
        """From documents [tokens] and losses [1 + interventions, tokens], NaN where there is no
        next token."""
        group, known = documents % counts.GROUPS, np.isfinite(losses[0])
        tokens = np.bincount(group[known], minlength=counts.GROUPS).astype(np.float64)
        sums = np.stack(
            [np.bincount(group[known], row[known], minlength=counts.GROUPS) for row in losses], 1
        )
        held = len(np.unique(documents[known]))
        return cls(tokens=tokens[tokens > 0], sums=sums[tokens > 0], documents=held)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrast:
    """What intervening in a domain's own experts costs the domain, and what it is held against.

    Attributes:
      own, control, elsewhere: Estimate, mean change of the loss: of the domain by its own experts;
        of the domain by the control; of the other domains by its own experts. Over all domains.
      beyond_control, beyond_elsewhere: Estimate, own − control (pairs that have one) and own −
        elsewhere; None where there is nothing to compare with.
      control_p, elsewhere_p: share of sign flips over experts whose mean is as large.
      control_pairs, elsewhere_pairs: how many experts the two were computed from.
    """

    own: resampling.Estimate
    control: resampling.Estimate | None
    elsewhere: resampling.Estimate | None
    beyond_control: resampling.Estimate | None
    beyond_elsewhere: resampling.Estimate | None
    control_p: float
    elsewhere_p: float
    control_pairs: int
    elsewhere_pairs: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effects:
    """What the interventions of a Plan did.

    Attributes:
      plan: the Plan.
      renormalised: whether the model divides the weights of the chosen experts by their sum.
      tokens, documents: per domain, on which it was measured.
      baseline: Estimate [domains], loss without intervention, nats per token.
      change: Estimate [interventions, domains], of the loss, nats per token.
      contrasts: kind → Contrast, of MUTED and EXCLUDED.
    """

    plan: Plan
    renormalised: bool
    tokens: tuple[int, ...]
    documents: tuple[int, ...]
    baseline: resampling.Estimate
    change: resampling.Estimate
    contrasts: dict[str, Contrast]


def effects(chosen, losses, *, renormalised, seed=0) -> Effects:
    """The changes of the loss with their intervals.

    Args:
      chosen: the Plan.
      losses: Losses of each domain, in the plan's order.
      renormalised: see Effects.
    """
    value = np.stack([one.sums.sum(0) / one.tokens.sum() for one in losses])  # [D, 1 + I]
    draws = None
    if all(len(one.tokens) > 1 for one in losses):
        draws = np.stack([_drawn(one, seed + i) for i, one in enumerate(losses)], 1)
    change = value[:, 1:] - value[:, :1]
    changes = None if draws is None else draws[..., 1:] - draws[..., :1]
    return Effects(
        plan=chosen, renormalised=renormalised,
        tokens=tuple(int(one.tokens.sum()) for one in losses),
        documents=tuple(one.documents for one in losses),
        baseline=_estimate(value[:, 0], None if draws is None else draws[..., 0]),
        change=_estimate(change.T, None if changes is None else changes.swapaxes(1, 2)),
        contrasts={k: _contrast(chosen, k, change, changes, seed) for k in (MUTED, EXCLUDED)},
    )  # fmt: skip


def _drawn(one, seed):
    """[draws, 1 + interventions]: mean losses over documents that are drawn anew."""
    weights = resampling.draw_documents(len(one.tokens), seed=seed)
    return (weights @ one.sums) / (weights @ one.tokens)[:, None]


def _estimate(value, draws):
    if draws is None:
        return resampling.Estimate(np.asarray(value))
    low, high = resampling.percentiles(draws - draws.mean(0))
    return resampling.Estimate(np.asarray(value), value + low, value + high)


def _contrast(chosen, kind, change, changes, seed):
    """The Contrast of a kind, from change [D, I] and its draws [draws, D, I] or None."""
    place = {one: i for i, one in enumerate(chosen.interventions)}
    rows = [
        (d, place[Intervention(kind, *mine)], None if c is None else place[Intervention(kind, *c)])
        for d, (own, control) in enumerate(zip(chosen.own, chosen.control, strict=True))
        for mine, c in zip(own, control, strict=True)
    ]
    paired = [row for row in rows if row[2] is not None]
    many = len(chosen.domains) > 1

    def own(array, of=rows):
        return np.stack([array[..., d, i] for d, i, _ in of], -1)

    def control(array):
        return np.stack([array[..., d, c] for d, _, c in paired], -1)

    def elsewhere(array):
        total = np.stack([array[..., i].sum(-1) for _, i, _ in rows], -1)
        return (total - own(array)) / (len(chosen.domains) - 1)

    def mean(function):
        each = None if changes is None else function(changes).mean(-1)
        return _estimate(function(change).mean(-1), each)

    def beyond_control(array):
        return own(array, paired) - control(array)

    def beyond_elsewhere(array):
        return own(array) - elsewhere(array)

    return Contrast(
        own=mean(own), control=mean(control) if paired else None,
        elsewhere=mean(elsewhere) if many else None,
        beyond_control=mean(beyond_control) if paired else None,
        beyond_elsewhere=mean(beyond_elsewhere) if many else None,
        control_p=sign_flips(beyond_control(change), seed=seed) if paired else 1.0,
        elsewhere_p=sign_flips(beyond_elsewhere(change), seed=seed) if many else 1.0,
        control_pairs=len(paired), elsewhere_pairs=len(rows) if many else 0,
    )  # fmt: skip


def enough(num_domains) -> int:
    """Experts per domain from which a difference can be told from chance.

    >>> enough(1), enough(4)
    (6, 2)
    """
    return -(-LEAST // num_domains)


def sign_flips(differences, *, draws=10_000, seed=0) -> float:
    """Share of sign patterns under which the mean of the differences is at least as large.

    Source: the randomisation test of Fisher, The Design of Experiments, 1935, section 21.

    >>> sign_flips([1.0, 2.0, 4.0])
    0.125
    """
    differences = np.asarray(differences, np.float64)
    if len(differences) <= _EXACT:
        signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    else:
        signs = np.random.default_rng(seed).choice((1, -1), (draws, len(differences)))
        signs[0] = 1  # what was seen is one of the patterns
    return float((signs @ differences >= differences.sum() - 1e-12).mean())


def is_beyond(estimate, p_value) -> bool:
    """Whether neither other documents nor other experts explain a difference above 0."""
    certain = estimate is not None and estimate.low is not None and float(estimate.low) > 0
    return certain and p_value <= SURE


def to_json(result):
    """interventions.json."""
    chosen = result.plan
    roles = {}
    for name in ("own", "control"):
        for domain, group in zip(chosen.domains, getattr(chosen, name), strict=True):
            for expert in group:
                roles.setdefault(expert, []).append({"domain": domain, "as": name})
    rows = []
    for i, one in enumerate(chosen.interventions):
        known = one.expert is not None
        share = chosen.share[one.layer, :, one.expert] if known else None
        rows.append({
            "kind": one.kind, "layer": None if one.layer is None else chosen.layers[one.layer],
            "expert": one.expert, "chosen": roles[one.layer, one.expert] if known else [],
            "domains": {
                domain: {"change": result.change[i, d], "share": share[d] if known else None}
                for d, domain in enumerate(chosen.domains)
            },
        })  # fmt: skip
    domains = {
        domain: {"tokens": result.tokens[d], "documents": result.documents[d],
                 "loss": result.baseline[d]} for d, domain in enumerate(chosen.domains)
    }  # fmt: skip
    return {
        "unit": "nats per token", "weights_renormalised": result.renormalised,
        "domains": domains, "contrasts": result.contrasts, "interventions": rows,
    }  # fmt: skip


def blocks(name, result) -> tuple:
    """Of a page: `reporting` blocks of a model's Effects."""
    chosen, every = result.plan, range(len(result.plan.interventions))
    charts = []
    for kind in (MUTED, EXCLUDED):
        series = []
        for role in ("own", "control"):
            at = [
                (d, i)
                for i in every
                for d, group in enumerate(getattr(chosen, role))
                if (one := chosen.interventions[i]).kind == kind
                and (one.layer, one.expert) in group
            ]
            label = "experts of the domain" if role == "own" else "random experts"
            series.append(_points(label, [_label(chosen, *p) for p in at], result, at))
        charts.append(
            reporting.Chart(
                title=f"{name}: loss with one expert {kind}", series=tuple(series),
                x_title="domain: layer, expert", y_title="more loss on the domain, nats per token",
                zero_line=True, note=_NOTES[kind],
            )
        )  # fmt: skip
    uniform = [i for i in every if chosen.interventions[i].kind == UNIFORM]
    words = ["all" if (at := chosen.interventions[i].layer) is None else str(chosen.layers[at])
             for i in uniform]  # fmt: skip
    charts.append(
        reporting.Chart(
            title=f"{name}: loss with a layer routed at random", x_title="layer",
            series=tuple(
                _points(domain, words, result, [(d, i) for i in uniform])
                for d, domain in enumerate(chosen.domains)
            ),
            y_title="more loss, nats per token", zero_line=True, note=_NOTES[UNIFORM],
        )
    )  # fmt: skip
    return tuple(charts)


_NOTES = {
    MUTED: "Its output is dropped; the other experts' weights stay as they are.",
    EXCLUDED: "Tokens go to the next expert; the remaining probabilities grow to sum to one.",
    UNIFORM: "Every token goes to experts drawn at random, with the weights of its own.",
}


def _label(chosen, domain, intervention):
    one = chosen.interventions[intervention]
    return f"{chosen.domains[domain]}: {chosen.layers[one.layer]}, {one.expert}"


def _points(name, x, result, at):
    """A Series of the changes at (domain, intervention) pairs."""
    found = [result.change[i, d] for d, i in at]
    ends = {
        end: None if found and getattr(found[0], end) is None
        else tuple(float(getattr(one, end)) for one in found)
        for end in ("low", "high")
    }  # fmt: skip
    return reporting.Series(
        name=name, x=tuple(x), y=tuple(float(one.value) for one in found), points=True, **ends
    )
