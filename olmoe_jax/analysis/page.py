"""report.html of routing analyses: what they come to in words, curves by layer, tables."""

from olmoe_jax import reporting
from olmoe_jax.analysis import vocabulary

PATH = "report.html"
WORDS = 8  # tokens listed per expert
PAIRS = 6  # of experts, listed per layer


def build(models, between=(), *, decode=None) -> str:
    """The HTML text.

    Args:
      models: name → analyses.Found.
      between: sentences about pairs of models.
      decode: token id → text, or None.
    """
    blocks = []
    for name, found in models.items():
        blocks.append(reporting.Prose(title=name, paragraphs=found.sentences, emphasis=True))
    if between:
        blocks.append(reporting.Prose(title="Between the models", paragraphs=tuple(between)))
    for name, found in models.items():
        blocks += _of_model(name, found, decode)
    notes = tuple(f"{name}: {note}" for name, found in models.items() for note in found.notes)
    if notes:
        blocks.append(reporting.Prose(title="Notes", paragraphs=notes))
    return reporting.page("Inside the router", ", ".join(models), blocks)


def _of_model(name, found, decode):
    blocks = [_distance(name, found), *_uses(name, found), _violation(name, found)]
    if found.saturation is not None:
        blocks.append(_saturation(name, found.saturation))
    if found.vocabulary:
        blocks.append(_vocabulary(name, found))
        blocks += _tokens(name, found, decode)
    if found.coactivation is not None:
        blocks.append(_pairs(name, found))
    return blocks


def _series(name, layers, estimate, scale=100.0):
    """A curve over layers with its band; estimate: resampling.Estimate [layers]."""
    ends = (None if e is None else tuple(scale * e) for e in (estimate.low, estimate.high))
    low, high = ends
    return reporting.Series(
        name=name, x=layers, y=tuple(scale * estimate.value), low=low, high=high
    )


def _level(name, layers, value):
    return reporting.Series(name=name, x=layers, y=(float(value),) * len(layers))


def _distance(name, found):
    layers, topk = found.domains.layers, found.domains.topk
    series = [_series(d, layers, topk.tv[:, i]) for i, d in enumerate(topk.domains)]
    series.append(_level("a random router", layers, 100 * topk.random[:, 0].max()))
    return reporting.Chart(
        title=f"{name}: how far from even use", series=tuple(series), x_title="layer",
        y_title="choices that would have to move, %",
        note="Total-variation distance between the domain's choices and equal use of all experts.",
    )  # fmt: skip


def _uses(name, found):
    layers, topk = found.domains.layers, found.domains.topk
    uniform = 100 * found.domains.uniform["topk"]
    for position in sorted({0, len(layers) // 2, len(layers) - 1}):
        share = 100 * topk.share.value[position]
        experts = tuple(range(share.shape[1]))
        series = [
            reporting.Series(name=domain, x=experts, y=tuple(share[i]), points=True)
            for i, domain in enumerate(topk.domains)
        ]
        yield reporting.Chart(
            title=f"{name}, layer {layers[position]}: tokens that each expert is active for",
            series=(*series, _level("balanced", experts, uniform)), x_title="expert",
            y_title="tokens of the domain, %",
        )  # fmt: skip


def _violation(name, found):
    load = found.load
    return reporting.Chart(
        title=f"{name}: the busiest expert", x_title="layer", y_title="times the mean load",
        series=(_series("all domains", load.info.layers, load.max_violation, scale=1.0),),
        note="Load of the busiest expert over the mean, minus one (MaxVio); 0 is balanced.",
        zero_line=True,
    )  # fmt: skip


def _saturation(name, found):
    layers = tuple(range(len(found.against_final[0].topk.value)))
    series = [_series(point.name, layers, point.topk) for point in found.against_final]
    series.append(_level("two random routers", layers, 100 * found.chance["topk"]))
    return reporting.Chart(
        title=f"{name}: router saturation, against {found.reference}", series=tuple(series),
        x_title="MoE layer", y_title="of the experts chosen, the same at the end, %",
    )  # fmt: skip


def _vocabulary(name, found):
    layers, ranks = found.known.info.layers, {rank for _, rank in found.vocabulary}
    shown, suffix = ("top1", "") if "top1" in ranks else ("topk", ", top-k")
    series = [
        _series(f"{kind} token{suffix}", layers, one.mean)
        for (kind, rank), one in found.vocabulary.items()
        if rank == shown
    ]
    return reporting.Chart(
        title=f"{name}: vocabulary specialisation", series=tuple(series), x_title="layer",
        y_title="of a token's occurrences, at its favourite expert, %",
        note=f"Mean over tokens that occur at least {vocabulary.MIN_COUNT} times.",
    )  # fmt: skip


def _tokens(name, found, decode):
    """A table of each expert's own tokens, in the layer where experts differ most by the token."""
    if decode is None:
        return
    kind, rank = min(found.vocabulary, key=lambda key: (key[1] != "top1", key[0] != "input"))
    position = int(found.vocabulary[kind, rank].mean.value.argmax())
    own = vocabulary.expert_tokens(found.known, kind, rank, position, most=WORDS, decode=decode)
    rows = tuple(
        (f"expert {expert}", "   ".join(f"{word.text!r} {word.share:.0%}" for word in own[expert]))
        for expert in sorted(own)
    )
    yield reporting.Table(
        title=f"{name}, layer {found.known.info.layers[position]}: {kind} tokens of each expert",
        columns=("", "tokens, and the share of their occurrences that goes there"), rows=rows,
    )  # fmt: skip


def _pairs(name, found):
    result = found.coactivation
    return reporting.Table(
        title=f"{name}: experts that are chosen together", columns=("layer", "groups"),
        rows=tuple((str(one.layer), _groups(one)) for one in result.layers),
        note=f"Each expert is chosen with every other of its group for at least "
        f"{result.threshold:.0%} of its tokens; by chance {result.chance:.0%}.",
    )  # fmt: skip


def _groups(layer):
    groups = sorted(layer.groups, key=lambda group: -group.weakest)[:PAIRS]
    return (
        "   ".join(
            f"{' '.join(str(e) for e in group.experts)} ({group.weakest:.0%})" for group in groups
        )
        or "none"
    )
