"""What changes over training, and over layers: saturation, load, the router's confidence."""

import numpy as np

from olmoe_jax import reporting

MOST_WITH_INTERVALS = 30_000  # numbers of health over training that are shown with intervals
# Label → (attribute of load.Load, factor, what is added).
_METRICS = {
    "load of the busiest expert, times the mean": ("max_violation", 1.0, 1.0),
    "entropy of the load, % of the largest": ("entropy", 100.0, 0.0),
    "router's probability on the chosen experts, %": ("confidence", 100.0, 0.0),
    "weight of the first expert, %": ("first_weight", 100.0, 0.0),
    "gap between the first and last chosen logit, nats": ("logit_spread", 1.0, 0.0),
}


def blocks(name, found) -> list:
    """Explorers of analyses.Found."""
    out = [] if found.saturation is None else _saturation(name, found.saturation)
    return out + _health(name, found.health)


def scales(places) -> dict[str, tuple]:
    """Name → numbers of what training can be measured in.

    Args:
      places: (step, tokens, share of training) of each checkpoint, None where it is not known.
    """
    names = ("steps", "tokens", "share of training, %")
    columns = [
        None if any(value is None for value in column) else column
        for column in zip(*places, strict=True)
    ]
    if columns[2] is not None:
        columns[2] = tuple(100 * share for share in columns[2])
    return {n: tuple(c) for n, c in zip(names, columns, strict=True) if c is not None}


def _points(points, ranks, scale=100.0):
    """(layers, over layers) in per cent, [points, ranks, layers] and [points, ranks, 1]; each as
    value, low, high."""
    out = []
    for suffix in ("", "_mean"):
        arrays = []
        for end in ("value", "low", "high"):
            parts = [[getattr(getattr(p, rank + suffix), end) for rank in ranks] for p in points]
            missing = any(part is None for row in parts for part in row)
            arrays.append(None if missing else scale * np.array(parts, float))
        out.append(arrays)
    layers, means = out
    return layers, [None if a is None else a[..., None] for a in means]


def _saturation(name, result):
    k = round(result.chance["topk"] / result.chance["top1"])
    ranks = {f"top-{k}": "topk", "top-1": "top1"} if k > 1 else {"top-1": "top1"}
    chance = reporting.Cube(
        axes={"rank": tuple(ranks)},
        values=np.array([100 * result.chance[rank] for rank in ranks.values()]),
    )
    labels = tuple(map(str, result.layers))
    against = {"the last checkpoint": result.against_final, "the next": result.neighbours}
    names = tuple(point.name for point in result.against_final)
    parts = [_points(points, ranks.values()) for points in against.values()]
    by_layer, with_mean = [], []
    for end in range(3):
        one = [part[0][end] for part in parts]
        both = [
            None if layers[end] is None or mean[end] is None
            else np.concatenate([mean[end], layers[end]], -1)
            for layers, mean in parts
        ]  # fmt: skip
        by_layer.append(None if any(a is None for a in one) else np.stack(one))
        with_mean.append(None if any(a is None for a in both) else np.stack(both))
    axes = {"held against": tuple(against), "checkpoint": names, "rank": tuple(ranks)}
    same = {
        "kind": "lines", "level": chance, "level_name": "two random routers",
        "y_title": "of the experts chosen, the same as of {held against}, %",
    }  # fmt: skip
    last = f"The last checkpoint is {result.reference}."
    return [
        reporting.Explorer(
            title=f"{name}: router saturation over training", x="checkpoint", series="layer",
            cube=_cube(axes | {"layer": ("mean", *labels)}, with_mean), x_title="checkpoint",
            scales=scales([(p.step, p.train_tokens, p.share) for p in result.against_final]),
            note=last, **same,
        ),
        reporting.Explorer(
            title=f"{name}: router saturation over layers", x="layer", series="checkpoint",
            cube=_cube(axes | {"layer": labels}, by_layer), x_title="layer", note=last, **same,
        ),
    ]  # fmt: skip


def _cube(axes, arrays):
    return reporting.Cube(axes=axes, values=arrays[0], low=arrays[1], high=arrays[2])


def has_room(rows) -> bool:
    """Whether load and health (analyses.Found.health) are few enough to be shown with intervals."""
    layers = len(rows[0][0].info.layers) if rows else 0
    return len(_metrics(rows)) * len(rows) * layers <= MOST_WITH_INTERVALS


def _metrics(rows):
    """Those of _METRICS that are known."""
    return {
        label: what for label, what in _METRICS.items()
        if any(getattr(one, what[0]) is not None for one, _ in rows)
    }  # fmt: skip


def _health(name, rows):
    """Load and health of every checkpoint, domain and layer; rows: (load.Load, share)."""
    names = list(dict.fromkeys(one.info.checkpoint for one, _ in rows))
    every = tuple(dict.fromkeys(one.info.domain for one, _ in rows))
    info = rows[0][0].info
    metrics = _metrics(rows)
    shape = (len(metrics), len(names), len(every), len(info.layers))
    arrays = {end: np.full(shape, np.nan) for end in ("value", "low", "high")}
    places = {}
    for one, share in rows:
        at = names.index(one.info.checkpoint)
        places[at] = (one.info.step, one.info.train_tokens, share)
        for i, (attribute, scale, shift) in enumerate(metrics.values()):
            held = getattr(one, attribute)
            for end, array in arrays.items():
                if held is not None and getattr(held, end) is not None:
                    array[i, at, every.index(one.info.domain)] = scale * getattr(held, end) + shift
    known = has_room(rows) and not np.isnan(arrays["low"]).all()
    cube = reporting.Cube(
        axes={
            "metric": tuple(metrics), "checkpoint": tuple(names), "domain": every,
            "layer": tuple(map(str, info.layers)),
        },
        values=arrays["value"], low=arrays["low"] if known else None,
        high=arrays["high"] if known else None,
    )  # fmt: skip
    out = [
        reporting.Explorer(
            title=f"{name}: load and health over layers", cube=cube, kind="lines", x="layer",
            series="domain", x_title="layer", y_title="{metric}", start={"checkpoint": names[-1]},
            figures=tuple({"metric": metric} for metric in metrics),
        )
    ]  # fmt: skip
    if len(names) > 1:
        out.append(
            reporting.Explorer(
                title=f"{name}: load and health over training", cube=cube, kind="lines",
                x="checkpoint", series="layer", x_title="checkpoint", y_title="{metric}",
                scales=scales([places[i] for i in range(len(names))]),
                figures=tuple({"metric": metric} for metric in metrics),
            )
        )  # fmt: skip
    return out
