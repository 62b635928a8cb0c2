"""Sentences from the numbers: what a reader should know first. Nothing here is fixed text about a
particular model: each sentence follows from values, and says when chance explains them."""

import numpy as np

from olmoe_jax.analysis import interventions, resampling, vocabulary

_CLEAR = 2.0  # times chance from which an overlap or a favourite is worth a sentence
_WEAK = 0.02  # share of the largest information below which experts depend on domains weakly


def specialised(result) -> tuple[str, ...]:
    """How the experts depend on the domain, from domains.Domains."""
    one, info = result.topk, result.topk.information
    if info is None:
        share, row, expert = _most_used(result)
        return (
            f"One domain, {result.domains[0]}: expert {expert} of layer {result.layers[row]} is "
            f"active for {_percent(share)} of its tokens; a balanced router gives "
            f"{_percent(result.uniform['topk'])}.",
        )
    out = []
    permuted = one.baseline == "permuted documents"
    p_value = info.mean_p_value if permuted else one.specific_mean_p
    if p_value > resampling.SURE:
        how = (
            "with the domains' names shuffled over documents"
            if permuted
            else "with every choice drawn from the mean of the domains"
        )
        return (
            f"Domains: no better than chance; {how}, {_percent(p_value)} of the draws differ as "
            "much between domains.",
        )
    best = int(np.argmax(info.corrected.value))
    weakly = " only weakly" if info.corrected.value[best] < _WEAK * info.most else ""
    sentence = (
        f"Experts depend on the domain{weakly}, most in layer {result.layers[best]}: a choice "
        f"tells {info.corrected.value[best]:.2g} of at most {info.most:.2g} bits of the domain"
    )
    if not permuted:
        out.append(f"{sentence} (documents are not known or too few to shuffle names).")
    else:
        out.append(f"{sentence}; shuffled names tell {info.chance[best]:.2g}.")
    out.append(_specialist(result))
    spread = one.tv.value.mean(0)
    strong, weak = int(np.argmax(spread)), int(np.argmin(spread))
    out.append(
        f"{result.domains[strong]} is routed least evenly (on average {_percent(spread[strong])} "
        f"of its choices would have to move to be even), {result.domains[weak]} most evenly "
        f"({_percent(spread[weak])})."
    )
    return tuple(out)


def _specialist(result):
    """The expert whose share in one domain stands out most from the other domains'."""
    share = result.topk.share.value
    count = share.shape[1]
    others = (share.sum(1, keepdims=True) - share) / (count - 1)
    row, domain, expert = np.unravel_index(np.argmax(share - others), share.shape)
    ends = result.topk.share[row, domain, expert]
    between = "" if ends.low is None else f" (95 %: {_percent(ends.low)} to {_percent(ends.high)})"
    return (
        f"The clearest specialist is expert {expert} of layer {result.layers[row]}: active for "
        f"{_percent(ends.value)} of the tokens of {result.domains[domain]}{between}, for "
        f"{_percent(others[row, domain, expert])} in the other domains; a balanced router gives "
        f"{_percent(result.uniform['topk'])}."
    )


def _most_used(result):
    share = result.topk.share.value[:, 0]
    row, expert = np.unravel_index(np.argmax(share), share.shape)
    return share[row, expert], row, expert


def balanced(result) -> tuple[str, ...]:
    """How even the load is, from load.Load."""
    worst = int(np.argmax(result.max_violation.value))
    layers, value = result.info.layers, result.max_violation[worst]
    between = "" if value.low is None else f" (95 %: {value.low + 1:.2f} to {value.high + 1:.2f})"
    out = [
        f"On {result.info.domain} the busiest expert, in layer {layers[worst]}, carries "
        f"{value.value + 1:.2f} times the mean load{between}; over layers the load has "
        f"{_percent(result.entropy.value.mean())} of the largest entropy."
    ]
    dead = sum(len(ids) for ids in result.dead)
    total = len(layers) * result.info.num_experts
    if not dead:
        out.append(f"None of {total} experts is dead.")
    else:
        expected = result.dead_by_chance * len(layers)
        where = ", ".join(str(layers[row]) for row, ids in enumerate(result.dead) if ids)
        verdict = (
            "so few tokens leave as many without one"
            if dead <= expected * _CLEAR
            else f"a balanced router would leave {expected:.2g}"
        )
        out.append(f"{dead} of {total} experts got no token (layers {where}); {verdict}.")
    if result.confidence is not None:
        chance = result.info.num_experts_per_token / result.info.num_experts
        out.append(
            f"The chosen experts hold {_percent(result.confidence.value.mean())} of the router's "
            f"probability; a router that does not care gives {_percent(chance)}."
        )
    return tuple(out)


def settled(result) -> tuple[str, ...]:
    """How early the router was what it is at the end, from saturation.Saturation."""
    untrained = result.against_final[0].step == 0
    behind = result.against_final[1:] if untrained else result.against_final
    if not behind:
        return (
            f"Only {result.reference} was trained: there is no earlier checkpoint to compare its "
            "router with but the untrained one.",
        )
    first, chance = behind[0], result.chance["topk"]
    where = "" if first.share is None else f" ({100 * first.share:.2g} % of training)"
    value = first.topk_mean
    low = value.value if value.low is None else value.low
    if low <= chance:
        return (
            f"{first.name}{where} agrees with {result.reference} on {_percent(value.value)} of "
            f"the choices, no better than chance ({_percent(chance)}): the router had not settled.",
        )
    out = [
        f"At {first.name}{where} {_percent(value.value)} of the choices are those of "
        f"{result.reference} (chance: {_percent(chance)}); of the first choices "
        f"{_percent(first.top1_mean.value)} ({_percent(result.chance['top1'])})."
    ]
    if untrained:
        start = result.against_final[0]
        out.append(f"Untrained, at {start.name}, it was {_percent(start.topk_mean.value)}.")
    if len(behind) > 1:
        last = behind[-1]
        out.append(f"At {last.name} it is {_percent(last.topk_mean.value)}.")
    slow = int(np.argmin(first.topk.value))
    quick = int(np.argmax(first.topk.value))
    if slow != quick:
        out.append(
            f"Layer {result.layers[quick]} settled first ({_percent(first.topk.value[quick])}), "
            f"layer {result.layers[slow]} last ({_percent(first.topk.value[slow])})."
        )
    return tuple(out)


def worded(counts, found, *, min_count=vocabulary.MIN_COUNT, decode=None) -> tuple[str, ...]:
    """Whether experts handle particular tokens, from what vocabulary.vocabulary returned."""
    rank = "top1" if any(name[1] == "top1" for name in found) else "topk"
    curves = {kind: one for (kind, r), one in found.items() if r == rank}
    layers, out = counts.info.layers, []
    for kind, one in curves.items():
        low = one.mean.value if one.mean.low is None else one.mean.low
        name = {"input": "input", "predicted": "predicted", "next": "true next"}[kind]
        # shares cannot pass 1, so what is left above chance counts, not the ratio
        above = (one.mean.value - one.random) / np.maximum(1 - one.random, 1e-9)
        if (low <= one.random).all() or above.max() < 0.02:
            out.append(f"By the {name} token the experts on average do no better than chance.")
        else:
            best = int(np.argmax(one.mean.value - one.random))
            out.append(
                f"By the {name} token, most in layer {layers[best]}: a token goes to its favourite "
                f"expert {_percent(one.mean.value[best])} of the time (chance: "
                f"{_percent(one.random[best])})."
            )
        star = vocabulary.clearest(counts, kind, rank, min_count=min_count, decode=decode)
        if star is not None and star.chance <= resampling.SURE:
            token = _token(star.word)
            out.append(
                f"The clearest such expert is {star.expert} of layer {layers[star.layer]}: it "
                f"takes {_percent(star.word.share)} of the {name} token {token} "
                f"({star.word.count:,} times)."
            )
    return tuple(out)


def together(result) -> tuple[str, ...]:
    """Which experts work in groups, from coactivation.Coactivation."""
    found = [(group, layer.layer) for layer in result.layers for group in layer.groups]
    if not found:
        return (
            f"No two experts choose each other's tokens {_percent(result.threshold)} of the time, "
            f"twice what random sets would ({_percent(result.chance)}).",
        )
    group, layer = max(found, key=lambda item: (item[0].weakest, len(item[0].experts)))
    names = " and ".join(str(expert) for expert in group.experts)
    return (
        f"Experts {names} of layer {layer} are the tightest group: each is chosen for at least "
        f"{_percent(group.weakest)} of the tokens of the others (random sets: "
        f"{_percent(result.chance)}).",
    )


def caused(result) -> tuple[str, ...]:
    """What the loss says about the experts that stand out, from interventions.Effects."""
    kept = " (the other experts' weights stay as they are)"
    how = {interventions.MUTED: ("Muting", kept), interventions.EXCLUDED: ("Going around", "")}
    out = []
    for kind, one in result.contrasts.items():
        verb, remark = how[kind]
        sentence = (
            f"{verb} one of the experts that stand out in a domain{remark} changes its loss by "
            f"{_nats(one.own)} on average"
        )
        for against, name, verdict in (
            (one.control, "random experts of the same layers",
             _verdict(one.beyond_control, one.control_p, one.control_pairs)),
            (one.elsewhere, "the same experts in the other domains",
             _verdict(one.beyond_elsewhere, one.elsewhere_p, one.elsewhere_pairs)),
        ):  # fmt: skip
            if against is not None:
                sentence += f"; {name}: {_nats(against)}, {verdict}"
        out.append(f"{sentence}.")
    chosen = result.plan
    uniform = [i for i, one in enumerate(chosen.interventions) if one.layer is None]
    single = [
        i for i, one in enumerate(chosen.interventions)
        if one.kind == interventions.UNIFORM and one.layer is not None
    ]  # fmt: skip
    changes = result.change.value.mean(1)
    most, least = max(single, key=changes.__getitem__), min(single, key=changes.__getitem__)
    sentence = (
        "With experts drawn at random in all layers the loss changes by "
        f"{changes[uniform[0]]:+.2g} nats per token"
    )
    if most != least:
        where = [chosen.layers[chosen.interventions[i].layer] for i in (most, least)]
        sentence += (
            f", in one layer by {changes[most]:+.2g} (layer {where[0]}) to {changes[least]:+.2g} "
            f"(layer {where[1]})"
        )
    return (*out, f"{sentence}.")


def _verdict(beyond, p_value, pairs):
    """Whether the own effect is more than what it is held against, where that can be said."""
    if beyond is None:
        return ""
    if beyond.low is None:
        return "not to be told from chance, as a domain has one document"
    if pairs < interventions.LEAST:
        tried = "1 expert" if pairs == 1 else f"{pairs} experts"
        return (
            f"not to be told from chance with {tried} (at least {interventions.LEAST} are needed)"
        )
    return "less" if interventions.is_beyond(beyond, p_value) else "no better than chance"


def _nats(estimate):
    """+0.12 nats per token (95 %: +0.08 to +0.16)."""
    if estimate.low is None:
        return f"{float(estimate.value):+.2g} nats per token"
    return (
        f"{float(estimate.value):+.2g} nats per token (95 %: {float(estimate.low):+.2g} to "
        f"{float(estimate.high):+.2g})"
    )


def matched(result) -> tuple[str, ...]:
    """Whether two models have the same experts, from matching.Matching."""
    values = np.array([float(layer.mean.value) for layer in result.layers])
    chance = np.array([layer.chance for layer in result.layers])
    lows = [
        v if o.mean.low is None else float(o.mean.low)
        for v, o in zip(values, result.layers, strict=True)
    ]
    best = int(np.argmax(values - chance))
    what = "choose the same tokens" if result.by == "routing" else "have the same weights"
    if (np.array(lows) <= chance).all() or (values - chance).max() < 0.01:
        return (
            f"Matched one to one, the experts of {result.one} and {result.two} {what} no better "
            f"than chance ({values.mean():.2g} against {chance.mean():.2g}).",
        )
    return (
        f"Matched one to one, the experts of {result.one} and {result.two} are alike by "
        f"{values.mean():.2g} on average (1: they {what}; chance {chance.mean():.2g}), most in "
        f"layer {result.layers[best].layer} ({values[best]:.2g}).",
    )


def diverged(found, first=None) -> tuple[str, ...]:
    """Whether the experts of a layer are, or still are, copies of one another.

    Args:
      found: what matching.siblings returned.
      first: (name, the same) of the first checkpoint, if there is an earlier one.
    """
    means = np.array([one.mean for one in found])
    least, most = int(np.argmin(means)), int(np.argmax(means))
    if means.min() > 1 - 1e-3:
        return ("The experts of each layer are still copies of one another (cosine 1).",)
    before = ""
    if first is not None:
        before = f" At {first[0]} it was {np.mean([one.mean for one in first[1]]):.2g}."
    return (
        f"The experts of a layer have a mean cosine of {means.mean():.2g} among themselves: from "
        f"{means[least]:.2g} in layer {found[least].layer} to {means[most]:.2g} in layer "
        f"{found[most].layer}; copies start at 1, strangers at 0.{before}",
    )


def _percent(share):
    """97.7 %, 0.41 %, 100 %."""
    value = 100 * float(share)
    return f"{value:.1f} %" if value >= 1 else f"{value:.2g} %"


def _token(word):
    """A vocabulary.Word in a sentence: white space as Python writes it."""
    if not word.text:
        return f"number {word.id}"
    shown = word.text.isprintable() and not word.text.isspace()
    return f"“{word.text}”" if shown else repr(word.text)
