"""The page and the picture of the upcycling comparison: the answer first, then the curves."""

import numpy as np

from olmoe_jax import files, reporting
from olmoe_jax.studies import crossings, declaration, upcycling_report
from olmoe_jax.studies.upcycling_report import DENSE, LOSS, SCRATCH, UPCYCLED
from olmoe_jax.training import metrics

BITS = "validation/bits_per_byte"
X_TITLES = {
    "tokens": "tokens of MoE training",
    "flops": "FLOPs of MoE training",
    "flops_with_dense": "training FLOPs, the dense model's included",
    "seconds": "seconds of MoE training",
    "seconds_with_dense": "seconds of training, the dense model's included",
}


def series_on(comparison, metric, axis) -> dict:
    """arm → (x, mean, low, high) over seeds of a metric on an axis; float64 [points] each.

    Places that differ between seeds (seconds) are their means. The dense model's own curve is there
    on the axes that include it; the upcycled one is not where that budget is not known.
    """
    plan, found = comparison.plan, comparison.found
    out = {}
    for arm in plan.configs:
        if arm == DENSE and not axis.endswith("_with_dense"):
            continue
        x, y = [], []
        for seed, budget in comparison.budgets.items():
            run = found[arm, seed]
            before = budget if arm == UPCYCLED else None
            at = crossings.places(run, metric, axis, before) if metric in run.curves else None
            if at is not None:
                x.append(at)
                y.append(run.curve(metric).values)
        if x:
            y = np.stack(y)
            out[arm] = (np.mean(x, axis=0), y.mean(0), y.min(0), y.max(0))
    return out


def write(comparison):
    """Writes compare.json, report.html and compare.png into the study's workdir, each whole."""
    workdir = comparison.plan.workdir
    draw(comparison, workdir / upcycling_report.PICTURE)
    files.write_text(workdir / upcycling_report.PAGE, build(comparison))
    files.write_json(workdir / upcycling_report.DATA, comparison.content)


def build(comparison) -> str:
    """The HTML page."""
    content = comparison.content
    blocks = [
        reporting.Prose(title="Answer", paragraphs=tuple(content["words"]), emphasis=True),
        _crossing_table(comparison),
    ]
    axes = [axis for axis in crossings.AXES if series_on(comparison, LOSS, axis).get(UPCYCLED)]
    blocks += [_chart(comparison, LOSS, axis, "Validation loss") for axis in axes]
    blocks.append(_lead_chart(comparison))
    blocks += [_chart(comparison, BITS, axis, "Bits per byte, all text") for axis in axes]
    for domain in domains(comparison):
        metric = f"validation/{domain}/bits_per_byte"
        blocks += [_chart(comparison, metric, axis, f"Bits per byte, {domain}") for axis in axes]
    blocks += [_run_table(comparison), reporting.Prose(title="How it was done",
                                                       paragraphs=_method(comparison))]  # fmt: skip
    subtitle = f"{content['scale']} scale, seeds {content['seeds']}, {content['variant']}"
    return reporting.page(f"upcycling: {comparison.plan.study.question}", subtitle, blocks)


def domains(comparison) -> list[str]:
    """The domains of the validation text, in order of name."""
    names = {declaration.domain_of(name) for run in comparison.found.values()
             for name in run.curves}  # fmt: skip
    return sorted(names - {None})


def _chart(comparison, metric, axis, title):
    series = tuple(
        reporting.Series(name=arm, x=tuple(x), y=tuple(y), low=tuple(low), high=tuple(high))
        for arm, (x, y, low, high) in series_on(comparison, metric, axis).items()
    )
    return reporting.Chart(
        title=f"{title} over {X_TITLES[axis]}", series=series, x_title=X_TITLES[axis],
        y_title=declaration.unit_of(metric), log_x=not axis.endswith("_with_dense"),
        note="Line: mean over seeds; band: smallest to largest.",
    )  # fmt: skip


def lead_lines(comparison, metric=LOSS) -> dict:
    """seed → (tokens, scratch − upcycled) of a metric."""
    lines = {}
    for seed in comparison.budgets:
        one, two = (comparison.found[arm, seed] for arm in (UPCYCLED, SCRATCH))
        if metric in one.curves:
            curves = [(run.curve(metric).tokens, run.curve(metric).values) for run in (one, two)]
            lines[seed] = crossings.lead(*curves)
    return lines


def _lead_chart(comparison):
    series = tuple(
        reporting.Series(name=f"seed {seed}", x=tuple(x), y=tuple(gap))
        for seed, (x, gap) in lead_lines(comparison).items()
    )
    return reporting.Chart(
        title="How far upcycled leads: scratch's validation loss minus its own", series=series,
        x_title=X_TITLES["tokens"], y_title="nats per token", log_x=True, zero_line=True,
        note=f"Caught up at {crossings.MARGIN:g}, overtaken behind the last crossing of 0.",
    )  # fmt: skip


def _crossing_table(comparison):
    rows = []
    for (axis, kind), summary in comparison.summaries.items():
        each = "; ".join(
            f"{seed}: " + ("–" if c.place is None else upcycling_report.shown(c.place, axis))
            for seed, c in summary.each.items()
        )
        log, share = summary.interval, summary.share
        rows.append(
            (
                f"{kind.replace('_', '-')}, {X_TITLES[axis]}",
                each,
                "–" if log is None else upcycling_report.shown(np.exp(log.mean), axis),
                _range(log, lambda v, axis=axis: upcycling_report.shown(v, axis)),
                "–" if share is None else f"{np.exp(share.mean):.0%}",
                _range(share, lambda v: f"{v:.0%}"),
            )
        )
    columns = ("crossing", "each seed", "mean", "95 % interval", "of the dense budget",
               "95 % interval")  # fmt: skip
    note = "–: not reached within the runs, or not known. Means and intervals of logarithms."
    return reporting.Table(title="Crossings", columns=columns, rows=tuple(rows), note=note)


def _range(interval, text):
    if interval is None or interval.low is None:
        return "–"
    return f"{text(np.exp(interval.low))} to {text(np.exp(interval.high))}"


def _run_table(comparison):
    rows = []
    for arm, config in comparison.plan.configs.items():
        mine = [run for (name, _), run in comparison.found.items()
                if name == arm and not run.problem]  # fmt: skip
        if not mine:
            rows.append((arm, *["–"] * 5))
            continue
        budget = [crossings.budget_of(run) for run in mine]
        rows.append(
            (
                arm,
                f"{config.optimizer.learning_rate:g}",
                upcycling_report.shown(budget[0].tokens, "tokens"),
                upcycling_report.shown(budget[0].flops, "flops"),
                metrics.duration(float(np.mean([b.seconds for b in budget]))),
                f"{np.mean([run.final(LOSS) for run in mine]):.4f}",
            )
        )
    columns = ("runs", "learning rate", "tokens", "training", "time", "final validation loss")
    note = "Means over seeds; time on the machine of the runs, validation left out."
    return reporting.Table(title="Each run", columns=columns, rows=tuple(rows), note=note)


def _method(comparison):
    content = comparison.content
    rates = ", ".join(f"{arm} {rate:g}" for arm, rate in content["learning_rates"].items())
    how = (
        "chosen by a pilot on other seeds, arm by arm" if content["protocol"]
        else "those of the declaration, the same for both MoE arms: no pilot"
    )  # fmt: skip
    start = comparison.plan.configs[SCRATCH].data.start_step
    lines = [
        content["definitions"],
        f"Both MoE runs of a seed read the same windows, from step {start:,} of the data order on. "
        f"Peak learning rates: {rates}; {how}. Intervals are Student's t over seeds, of "
        "logarithms; nothing is extrapolated.",
    ]
    if DENSE not in comparison.plan.configs:
        lines.append(
            "The dense model was there already and is the same for all seeds, so the intervals "
            "hold for it alone."
        )
    return (*lines, *content["notes"])


def draw(comparison, path):
    """Draws loss over tokens, FLOPs and time, and the lead, into a PNG; whole or not at all."""
    import matplotlib  # slow to import
    from matplotlib import figure
    from matplotlib.backends import backend_agg

    from olmoe_jax.training import plots

    with matplotlib.rc_context(plots.STYLE):
        drawing = figure.Figure(figsize=(13, 9), dpi=130, layout="constrained")
        backend_agg.FigureCanvasAgg(drawing)
        panels = drawing.subplots(2, 2)
        colours = dict(zip((UPCYCLED, SCRATCH, DENSE), plots.PALETTE, strict=False))
        for axes, axis in zip(panels.flat, ("tokens", "flops", "seconds"), strict=False):
            _draw_losses(axes, comparison, axis, colours)
        _draw_lead(panels[1, 1], comparison, plots.PALETTE)
        plots.save(drawing, path)


def _draw_losses(axes, comparison, axis, colours):
    """Loss on an axis; FLOPs and seconds both with the dense model's and (dashed) without."""
    whole = f"{axis}_with_dense"
    full = series_on(comparison, LOSS, whole) if whole in X_TITLES else {}
    main = whole if UPCYCLED in full else axis
    for arm, (x, y, low, high) in series_on(comparison, LOSS, main).items():
        axes.plot(x, y, color=colours[arm], linewidth=1.8, label=arm)
        axes.fill_between(x, low, high, color=colours[arm], alpha=0.15, linewidth=0)
    if main != axis:
        x, y, *_ = series_on(comparison, LOSS, axis)[UPCYCLED]
        axes.plot(x, y, color=colours[UPCYCLED], linewidth=1.4, linestyle="--",
                  label="upcycled, dense training not counted")  # fmt: skip
    for kind, style in ((crossings.CATCH_UP, ":"), (crossings.OVERTAKING, "-.")):
        summary = comparison.summaries.get((main, kind))
        if summary is not None and summary.interval is not None:
            axes.axvline(np.exp(summary.interval.mean), color="0.3", linestyle=style, linewidth=1.2,
                         label=kind.replace("_", "-"))  # fmt: skip
    axes.set(title=f"Validation loss over {main.split('_')[0]}", xlabel=X_TITLES[main],
             ylabel="nats per token")  # fmt: skip
    axes.legend(frameon=False)


def _draw_lead(axes, comparison, palette):
    """How far upcycled leads, over tokens: every seed's loss, and the mean of each domain."""
    for i, domain in enumerate(domains(comparison)):
        lines = list(lead_lines(comparison, f"validation/{domain}/loss").values())
        if lines:
            axes.plot(lines[0][0], np.mean([gap for _, gap in lines], axis=0), linewidth=1,
                      color=palette[i % len(palette)], label=domain)  # fmt: skip
    for i, (x, gap) in enumerate(lead_lines(comparison).values()):
        axes.plot(x, gap, color="black", linewidth=1.6, label="all, each seed" if not i else None)
    axes.axhline(0, color="0.3", linewidth=1)
    axes.axhline(crossings.MARGIN, color="0.3", linewidth=1, linestyle=":", label="caught up")
    axes.set(title="Scratch's loss minus upcycled's", xlabel=X_TITLES["tokens"],
             ylabel="nats per token")  # fmt: skip
    axes.legend(frameon=False, ncols=2)
