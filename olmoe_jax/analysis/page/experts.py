"""What the experts of one checkpoint do: shares of domains, load, company, paths."""

import numpy as np

from olmoe_jax import reporting
from olmoe_jax.analysis import domains as domains_lib

GROUPS = 6  # of experts, listed per layer
PATHS = 20  # listed per pair of layers


def blocks(name, found, detail) -> list:
    """Explorers and tables of analyses.Found; `detail`: tokens.Detail."""
    share, even = _shares(found.domains), _even(found.domains)
    out = [
        _each_expert(name, share, even), _each_domain(name, share, even), _heat(name, share),
        _load(name, found.load), _distance(name, found.domains),
    ]  # fmt: skip
    if found.domains.topk.information is not None:
        out.append(_information(name, found.domains))
    if found.coactivation is not None:
        out += [_together(name, found.coactivation, detail), _groups(name, found.coactivation)]
    if found.pooled.paths is not None:
        out += _paths(name, found.pooled)
    return out


def ends(layers) -> tuple[str, ...]:
    """Labels of the first, the middle and the last layer: what the paper's figures show."""
    chosen = sorted({0, (len(layers) - 1) // 2, len(layers) - 1})
    return tuple(str(layers[i]) for i in chosen)


def middle(layers) -> str:
    """Label of the layer in the middle."""
    return str(layers[(len(layers) - 1) // 2])


def numbers(count) -> tuple[str, ...]:
    """Labels 0 … count − 1."""
    return tuple(str(i) for i in range(count))


def by_rank(results) -> dict:
    """Label → one rank's result, from Domains: "top-8" and, where it is known, "top-1"."""
    k = round(results.uniform["topk"] / results.uniform["top1"])
    ranks = {f"top-{k}": results.topk}
    return ranks if results.top1 is None or k == 1 else ranks | {"top-1": results.top1}


def percent(estimates, axes) -> reporting.Cube:
    """Estimates of one shape as a Cube in per cent, stacked along its first axis."""
    arrays = []
    for end in ("value", "low", "high"):
        parts = [getattr(one, end) for one in estimates]
        if all(part is None for part in parts):
            arrays.append(None)
            continue
        empty = np.full(np.shape(estimates[0].value), np.nan)
        arrays.append(100 * np.stack([empty if part is None else part for part in parts]))
    return reporting.Cube(axes=axes, values=arrays[0], low=arrays[1], high=arrays[2])


def _shares(results):
    """Share of each domain's tokens: rank × layer × domain × expert, in per cent."""
    ranks = by_rank(results)
    axes = {
        "rank": tuple(ranks), "layer": tuple(map(str, results.layers)), "domain": results.domains,
        "expert": numbers(results.topk.share.value.shape[-1]),
    }  # fmt: skip
    shape = tuple(len(labels) for labels in axes.values())
    arrays = {}
    for end in ("value", "low", "high"):
        arrays[end] = np.full(shape, np.nan)
        for i, one in enumerate(ranks.values()):
            held = getattr(one.share, end)
            if held is not None:
                columns = [results.domains.index(domain) for domain in one.domains]
                arrays[end][i][:, columns] = 100 * held
    known = not np.isnan(arrays["low"]).all()
    return reporting.Cube(
        axes=axes, values=arrays["value"], low=arrays["low"] if known else None,
        high=arrays["high"] if known else None,
    )  # fmt: skip


def _even(results):
    ranks = by_rank(results)
    values = [100 * results.uniform["topk"], 100 * results.uniform["top1"]][: len(ranks)]
    return reporting.Cube(axes={"rank": tuple(ranks)}, values=np.array(values))


def _each_expert(name, share, even):
    return reporting.Explorer(
        title=f"{name}: tokens that each expert is active for", cube=share, kind="bars",
        x="expert", x_title="expert", y_title="tokens of the domain, %",
        start={"layer": middle(share.axes["layer"])}, level=even, level_name="balanced router",
        note="Top-1 counts the first expert of a token only. Bars: 95 % interval over documents, "
        "where documents are known.",
    )  # fmt: skip


def _each_domain(name, share, even):
    return reporting.Explorer(
        title=f"{name}: one expert in each domain", cube=share, kind="bars", x="domain",
        x_title="", y_title="tokens of the domain, %", level=even, level_name="balanced router",
        start={"layer": middle(share.axes["layer"]), "expert": _specialist(share)},
    )  # fmt: skip


def _specialist(share):
    """Label of the expert of the layer in the middle whose share varies most over domains."""
    layer = share.axes["layer"].index(middle(share.axes["layer"]))
    values = share.values[0, layer]
    return str(int(np.argmax(values.max(0) - values.min(0))))


def _heat(name, share):
    return reporting.Explorer(
        title=f"{name}: experts and domains", cube=share, kind="heat", x="expert", series="domain",
        x_title="expert", y_title="tokens of the domain, %",
        start={"layer": middle(share.axes["layer"])},
        figures=tuple({"layer": layer} for layer in ends(share.axes["layer"])),
    )  # fmt: skip


def _load(name, load):
    layers, experts = tuple(map(str, load.info.layers)), load.info.num_experts
    cube = reporting.Cube(
        axes={"layer": layers, "expert": numbers(experts)}, values=experts * load.load
    )
    return reporting.Explorer(
        title=f"{name}: load of every expert", cube=cube, kind="heat", x="expert", series="layer",
        x_title="expert", y_title="share of the choices ÷ equal share", middle=1.0,
        note="All domains together; 1 is balanced. Experts of one number in different layers have "
        "nothing in common.",
    )  # fmt: skip


def _distance(name, results):
    ranks, every = by_rank(results), results.domains
    values, random = [], []
    for one in ranks.values():
        held = [one.tv[:, one.domains.index(d)] if d in one.domains else None for d in every]
        empty = np.full(len(results.layers), np.nan)
        values.append([[empty if e is None else getattr(e, end) for e in held]
                       for end in ("value", "low", "high")])  # fmt: skip
        random.append(100 * one.random[:, 0].max())
    axes = {"rank": tuple(ranks), "domain": every, "layer": tuple(map(str, results.layers))}
    stacked = [
        None if any(array is None for rank in values for array in rank[i])
        else 100 * np.array([rank[i] for rank in values])
        for i in range(3)
    ]  # fmt: skip
    return reporting.Explorer(
        title=f"{name}: how far from even use", kind="lines", x="layer", series="domain",
        cube=reporting.Cube(axes=axes, values=stacked[0], low=stacked[1], high=stacked[2]),
        x_title="layer", y_title="choices that would have to move, %", level_name="a random router",
        level=reporting.Cube(axes={"rank": tuple(ranks)}, values=np.array(random)),
        note="Total-variation distance between the domain's choices and equal use of all experts.",
    )  # fmt: skip


def _information(name, results):
    ranks = {r: one.information for r, one in by_rank(results).items() if one.information}
    axes = {"rank": tuple(ranks), "layer": tuple(map(str, results.layers))}
    arrays = [
        None if any(getattr(one.corrected, end) is None for one in ranks.values())
        else np.stack([getattr(one.corrected, end) for one in ranks.values()])
        for end in ("value", "low", "high")
    ]  # fmt: skip
    chance = [one.chance for one in ranks.values()]
    known = all(array is not None for array in chance)
    most = next(iter(ranks.values())).most
    return reporting.Explorer(
        title=f"{name}: what a choice tells of the domain", kind="lines", x="layer",
        cube=reporting.Cube(axes=axes, values=arrays[0], low=arrays[1], high=arrays[2]),
        x_title="layer", y_title=f"bits, of at most {most:.3g}",
        level=reporting.Cube(axes=axes, values=np.stack(chance)) if known else None,
        level_name="names of the domains shuffled",
    )  # fmt: skip


def _together(name, result, detail):
    shown = [
        layer for layer in result.layers
        if detail.all_layers_together or str(layer.layer) in ends(result.info.layers)
    ]  # fmt: skip
    labels, experts = tuple(str(one.layer) for one in shown), numbers(result.info.num_experts)
    order = np.empty(len(shown), object)
    order[:] = [one.order for one in shown]
    most = max(len(one.order) for one in shown)
    return reporting.Explorer(
        title=f"{name}: experts that are chosen together", kind="heat", x="with", series="expert",
        cube=reporting.Cube(
            axes={"layer": labels, "expert": experts, "with": experts},
            values=np.round(100 * np.stack([one.matrix.value for one in shown]), 1),
        ),
        x_title="also chosen", y_title="tokens of the row's expert, %",
        start={"layer": middle([one.layer for one in shown])},
        orders={
            f"{most} of the strongest pairs": reporting.Cube(axes={"layer": labels}, values=order)
        },
        note=f"Definition: {result.definition}. Sets drawn at random give {result.chance:.1%}.",
        figures=tuple({"layer": layer} for layer in ends([one.layer for one in shown])),
    )  # fmt: skip


def _groups(name, result):
    rows = []
    for one in result.layers:
        groups = sorted(one.groups, key=lambda group: -group.weakest)[:GROUPS]
        written = [f"{' '.join(map(str, g.experts))} ({g.weakest:.0%})" for g in groups]
        rows.append((str(one.layer), ",  ".join(written) or "none"))
    return reporting.Table(
        title=f"{name}: groups of experts", columns=("layer", "experts"), rows=tuple(rows),
        note=f"Each expert is chosen with every other of its group for at least "
        f"{result.threshold:.0%} of its tokens; by chance {result.chance:.0%}. Of each layer the "
        f"{GROUPS} tightest at most.",
    )  # fmt: skip


def _paths(name, pooled):
    found = {}
    for path in domains_lib.expert_paths(pooled, most=PATHS):
        row = (
            str(path.from_expert), str(path.to_expert), f"{path.tokens:,}",
            f"{float(path.share.value):.1%}", f"{path.expected:.1%}",
        )  # fmt: skip
        found.setdefault(f"{path.from_layer} → {path.to_layer}", []).append(row)
    if not found:
        return
    values = np.empty(len(found), object)
    values[:] = [tuple(rows) for rows in found.values()]
    yield reporting.Explorer(
        title=f"{name}: paths from layer to layer", kind="table",
        cube=reporting.Cube(axes={"layers": tuple(found)}, values=values),
        columns=("first expert", "then", "tokens", "of the first expert's tokens", "of all tokens"),
        note="First choices only, of experts that are first choice of at least "
        f"{domains_lib.PATH_THRESHOLD} times an equal share. Were layers independent, the last two "
        f"columns would be equal. The {PATHS} that most tokens take, at most.",
    )  # fmt: skip
