"""A run's picture: losses over its steps, and how evenly the experts are used."""

import re

import matplotlib
import numpy as np
from matplotlib import colors, figure
from matplotlib.backends import backend_agg

from olmoe_jax import files
from olmoe_jax.training import metrics

# Okabe and Ito's palette, which the colour-blind can tell apart; black and grey are used by name.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
SMOOTHING = 25  # records of the training loss that the strong line averages

_DOMAIN = re.compile(r"validation/(.+)/loss")
_LAYER = re.compile(r"router/layer_(\d+)/max_load")
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
}


def draw_run(workdir, path, *, unigram_loss=None):
    """Draws WORKDIR/metrics.jsonl into the PNG `path`, whole or not at all.

    Left, training and validation loss, each domain's too; right (unless the model is dense), every
    expert's share of its layer's choices at the last checkpoint, and the busiest one's over time.

    Args:
      unigram_loss: nats of a unigram model on the validation windows; drawn as a dashed line.
    Raises:
      FileNotFoundError: the workdir has no metrics.jsonl.
    """
    curves, load = _collect(workdir)
    with matplotlib.rc_context(STYLE):
        wide = load is not None
        drawing = figure.Figure(figsize=(13 if wide else 7, 5.6), dpi=130, layout="constrained")
        backend_agg.FigureCanvasAgg(drawing)
        left, *right = drawing.subfigures(1, 2 if wide else 1, squeeze=False)[0]
        _draw_losses(left.subplots(), curves, unigram_loss)
        if wide:
            upper, lower = right[0].subplots(2, 1, height_ratios=(5, 4))
            _draw_load(upper, load, _layers(curves, len(load)))
            _draw_max_load(lower, curves)
        save(drawing, path)


def save(drawing, path):
    """Writes a matplotlib figure as PNG, whole or not at all."""
    with files.whole(path) as file:
        drawing.savefig(file, format="png")


def _collect(workdir):
    """(name → (steps, values), the last router/load as an array or None)."""
    points, load = {}, None
    for record in metrics.read(workdir):
        for name, value in record.items():
            wanted = name.startswith(("train/loss", "validation/", "router/")) and name.endswith(
                ("loss", "max_load")
            )
            if wanted:
                points.setdefault(name, []).append((record["step"], value))
        load = record.get("router/load", load)
    curves = {name: np.asarray(values, float).T for name, values in points.items()}
    return curves, None if load is None else np.asarray(load, float)


def _layers(curves, count):
    """Numbers of the MoE layers: from the names of their metrics, where there are as many."""
    found = sorted(int(match[1]) for name in curves if (match := _LAYER.fullmatch(name)))
    return found if len(found) == count else list(range(count))


def _draw_losses(axes, curves, unigram_loss):
    if "train/loss" in curves:
        steps, values = curves["train/loss"]
        smooth = len(values) > 8 * SMOOTHING
        axes.plot(
            steps, values, color="0.75" if smooth else "0.45", linewidth=0.8 if smooth else 1.2,
            label="training, each batch" if smooth else "training",
        )  # fmt: skip
        if smooth:
            axes.plot(_running_mean(steps), _running_mean(values), color="0.35", linewidth=1.6,
                      label=f"training, mean of {SMOOTHING}")  # fmt: skip
    domains = sorted(name for name in curves if _DOMAIN.fullmatch(name))
    styles = ("-", "--", ":", "-.")
    for i, name in enumerate(domains):
        steps, values = curves[name]
        axes.plot(
            steps, values, color=PALETTE[i % len(PALETTE)], linestyle=styles[i // len(PALETTE) % 4],
            linewidth=1.0, label=_DOMAIN.fullmatch(name)[1],
        )  # fmt: skip
    if "validation/loss" in curves:
        steps, values = curves["validation/loss"]
        axes.plot(
            steps,
            values,
            color="black",
            linewidth=2,
            marker="o",
            markersize=3.5,
            label="validation",
        )
    if unigram_loss is not None:
        axes.axhline(
            unigram_loss, color="black", linestyle="--", linewidth=1.2, label="unigram model"
        )
    axes.set(title="Loss", xlabel="step", ylabel="nats per token")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False)


def _running_mean(values):
    return np.convolve(values, np.full(SMOOTHING, 1 / SMOOTHING), mode="valid")


def _draw_load(axes, load, layers):
    relative = load * load.shape[1]
    norm = colors.TwoSlopeNorm(vmin=0, vcenter=1, vmax=max(2, relative.max()))
    axes.grid(False)
    image = axes.imshow(relative, aspect="auto", cmap="PuOr_r", norm=norm, interpolation="nearest")
    every = -(-len(layers) // 12)
    axes.set_yticks(range(0, len(layers), every), layers[::every])
    axes.set(title="Load of each expert at the last checkpoint", xlabel="expert", ylabel="layer")
    bar = axes.figure.colorbar(
        image, ax=axes, label="share ÷ equal share", ticks=[0, 0.5, 1, norm.vmax]
    )
    bar.ax.set_yticklabels(["0", "0.5", "1", f"{norm.vmax:.1f}"])
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_max_load(axes, curves):
    per_layer = [curve for name, curve in curves.items() if _LAYER.fullmatch(name)]
    for i, (steps, values) in enumerate(per_layer):
        axes.plot(
            steps, values, color="0.75", linewidth=0.7, label="each layer" if i == 0 else None
        )
    if "router/max_load" in curves:
        steps, values = curves["router/max_load"]
        axes.plot(steps, values, color=PALETTE[0], linewidth=1.4, label="worst layer")
    axes.axhline(1, color="black", linestyle="--", linewidth=1, label="balanced")
    axes.set(title="Load of the busiest expert in training", xlabel="step", ylabel="÷ equal share")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=3, frameon=False)
