"""The page of a study: verdicts first, then curves, differences, costs, routing, method."""

import math

import numpy as np

from olmoe_jax import reporting
from olmoe_jax.studies import declaration, equality, plans, statistics, verdict
from olmoe_jax.training import metrics, preflight


def build(plan, found, findings, content) -> str:
    """The HTML page of a study."""
    study = plan.study
    subtitle = f"{plan.scale} scale, {len(plan.configs)} arms × {len(plan.seeds)} seeds"
    blocks = [
        reporting.Prose(title=f.outcome.title, paragraphs=(f.words,), emphasis=True)
        for f in findings
    ]
    blocks.append(_outcome_table(findings))
    blocks.append(_change_table(plan, content))
    for metric in content["metrics"]:
        blocks += _curves(plan, found, metric)
    if any(f.outcome.measure == "final" for f in findings):
        blocks.append(_differences(findings))
    blocks += [_cost_table(content), _run_table(content), _health_table(content)]
    blocks.append(_routing_table(content))
    blocks += [chart for name in ("router/max_load", "router/normalized_entropy")
               if (chart := _health_chart(plan, found, name))]  # fmt: skip
    blocks.append(
        reporting.Prose(title="How it was done", paragraphs=_method(plan, findings, content))
    )
    return reporting.page(f"{study.name}: {study.question}", subtitle, blocks)


_PAIRED = "Arms that are compared see, with one seed, the same batches. "


def _method(plan, findings, content):
    lines = [
        f"Held equal and checked, the router's own part apart: "
        f"{equality.words(plans.held_equal(plan), plan.configs)}. "
        f"{_PAIRED if 'data_order' in plan.study.equal else ''}Differences are taken per seed; "
        "intervals are Student's t over seeds. The bootstrap over documents draws which text was "
        "evaluated and leaves the runs as they are.",
        *_conditions(content),
    ]
    found = content["protocol"]
    if found is None:
        lines.append(
            f"No pilot: learning rates are those of the declaration; seeds {list(plan.seeds)}."
        )
    else:
        chosen = ", ".join(f"{arm} {rate:g}" for arm, rate in found["learning_rates"].items())
        lines.append(
            f"Fixed by a pilot on seeds {list(found['pilot_seeds'])} before these runs: learning "
            f"rates {chosen}; {len(found['seeds'])} seeds, which show a difference of "
            f"{found['smallest_effect']:g} with probability {found['power']:.2f} if differences "
            f"between seeds spread by {found['sd']:.3g} as in the pilot, {_cautious(found)}."
            f"{_spread(findings)}"
        )
        lines += found["notes"]
    return (*lines, *content["notes"])


def _conditions(content):
    """On which data and machine the runs were made, as far as they say."""
    identity = content["data_identity"].get("data_sha256")
    lines = [f"Data: {content['data']}" + (f" (sha256 {identity[:12]}…)." if identity else ".")]
    if environment := content["environment"]:
        commit = environment.get("git_commit")
        lines.append(
            f"The first run: {environment['devices']} × {environment['device_kind']} "
            f"({environment['processor']}), Python {environment['python']}, jax "
            f"{environment['packages']['jax']}" + (f", commit {commit[:12]}." if commit else ".")
        )
    return lines


def _cautious(found):
    """The power at the spread that the true one is probably below."""
    freedom = found["degrees_of_freedom"]
    bound = statistics.sd_bound(found["sd"], freedom)
    power = statistics.power(found["smallest_effect"], bound, len(found["seeds"]))
    return (
        f"with probability {power:.2f} if by {bound:.3g}, which the true spread is below with "
        f"{statistics.SD_CONFIDENCE:.0%} confidence ({freedom} "
        f"{'degree' if freedom == 1 else 'degrees'} of freedom)"
    )


def _spread(findings):
    """How much the differences of these runs spread, of the outcome that the pilot was for."""
    primary = next(f for f in findings if f.outcome.measure == "final")
    if primary.interval is None or primary.interval.sd is None:
        return ""
    return f" In these runs they spread by {primary.interval.sd:.3g}."


def _change_table(plan, content):
    """What the arms differ in."""
    arms = list(plan.configs)
    fields = {name: None for row in content["arms"].values() for name in row["changes"]}
    rows = [
        (name, *(_value(content["arms"][arm]["changes"][name]) for arm in arms)) for name in fields
    ]
    starts = [plan.study.arm(arm).starts_from or plan.study.arm(arm).start for arm in arms]
    if any(starts):
        rows.append(("starts from", *(str(start or "nothing") for start in starts)))
    note = "Every other field of config.json is the same in all arms."
    return reporting.Table(
        title="What the arms change", columns=("field", *arms), rows=tuple(rows), note=note
    )


def _value(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


def _outcome_table(findings):
    rows = []
    for finding in findings:
        ratio = finding.outcome.measure != "final"
        interval = finding.interval
        rows.append(
            (
                finding.outcome.title,
                finding.agreement,
                "–" if interval is None else _effect(interval.mean, ratio),
                _ends(interval, ratio),
                "0" if interval is None else str(interval.n),
                _documents(finding.documents),
            )
        )
    columns = ("comparison", "verdict", "effect", "95 % interval", "seeds", "over documents")
    note = (
        "Differences are arm − other, lower is better; of costs the ratio arm ÷ other. Intervals: "
        "Student's t over seeds; over documents, the runs fixed, a bootstrap."
    )
    return reporting.Table(title="Verdicts", columns=columns, rows=tuple(rows), note=note)


def _documents(interval):
    return "–" if interval is None else f"{_ends(interval, False)} (n = {interval.n})"


def _effect(value, ratio):
    return f"{math.exp(value):.3g} ×" if ratio else f"{value:+.4f}"


def _ends(interval, ratio):
    if interval is None or interval.low is None:
        return "–"
    return f"{_effect(interval.low, ratio)} to {_effect(interval.high, ratio)}"


def _bands(plan, found, metric, x_of):
    """A Series per arm: mean over seeds, band from the smallest to the largest."""
    out = []
    for arm in plan.configs:
        mine = [found[arm, seed] for seed in plan.seeds]
        mine = [run for run in mine if metric in run.curves and not run.problem]
        if not mine:
            continue
        x = x_of(mine)
        values = np.stack([run.curve(metric).values for run in mine])
        out.append(
            reporting.Series(
                name=arm,
                x=tuple(x),
                y=tuple(values.mean(0)),
                low=tuple(values.min(0)),
                high=tuple(values.max(0)),
            )  # fmt: skip
        )
    return tuple(out)


def _curves(plan, found, metric):
    """A metric over tokens, training FLOPs and seconds; nothing of one that has a single value."""
    if all(len(run.curve(metric).tokens) < 2 for run in found.values() if not run.problem):
        return []
    unit = declaration.unit_of(metric)
    axes = {
        "tokens": lambda mine: mine[0].curve(metric).tokens,
        "training FLOPs": lambda mine: (
            mine[0].curve(metric).tokens * verdict.flops_per_token(mine[0])
        ),
        "seconds of training": lambda mine: (
            mine[0].curve(metric).tokens / np.mean([run.tokens_per_second for run in mine])
        ),
    }
    note = "Line: mean over seeds; band: smallest to largest."
    return [
        reporting.Chart(
            title=f"{metric} over {name}", series=_bands(plan, found, metric, x_of),
            x_title=name, y_title=unit, log_x=True,
            note=note + (" Seconds at the mean of the arm's median speeds." if "seconds" in name
                         else ""),
        )
        for name, x_of in axes.items()
    ]  # fmt: skip


def _differences(findings):
    """Final differences: a point per seed, the mean with its interval."""
    each, mean = ([], []), ([], [], [], [])
    for finding in findings:
        outcome, interval = finding.outcome, finding.interval
        if outcome.measure != "final" or interval is None:
            continue
        label = f"{outcome.arm} − {outcome.against}<br>{outcome.metric}"
        for effect in finding.effects.values():
            _append(each, label, effect)
        if interval.low is not None:
            _append(mean, label, interval.mean, interval.low, interval.high)
    series = [reporting.Series(name="each seed", x=tuple(each[0]), y=tuple(each[1]), points=True)]
    if mean[0]:
        x, y, low, high = map(tuple, mean)
        name = "mean, 95 % interval"
        series.append(reporting.Series(name=name, x=x, y=y, low=low, high=high, points=True))
    return reporting.Chart(
        title="Final differences, paired by seed", series=tuple(series), x_title="",
        y_title="difference", zero_line=True, note="Below the line: the first arm is better.",
    )  # fmt: skip


def _append(columns, *row):
    for column, value in zip(columns, row, strict=True):
        column.append(value)


def _health_chart(plan, found, name):
    series = _bands(plan, found, name, lambda mine: mine[0].curve(name).tokens)
    titles = {
        "router/max_load": ("Load of the busiest expert in training", "÷ equal share"),
        "router/normalized_entropy": ("Evenness of the loads in training", "1 is balanced"),
    }
    title, unit = titles[name]
    if not series:
        return None
    return reporting.Chart(title=title, series=series, x_title="tokens", y_title=unit)


def _cost_table(content):
    rows = []
    for arm, row in content["arms"].items():
        names = ("total", "active", "router", "flops_per_token", "router_flops_per_token")
        rows.append((arm, *(f"{row['cost'][name]:,}" for name in names)))
    columns = ("arm", "parameters", "active", "of them router", "training FLOPs/token",
               "of them router")  # fmt: skip
    return reporting.Table(title="What each arm costs", columns=columns, rows=tuple(rows))


def _run_table(content):
    rows = []
    for arm, row in content["arms"].items():
        cost = row["cost"]
        rows.append(
            (
                arm,
                f"{row['learning_rate']:g}",
                f"{cost['tokens']:,}",
                f"{preflight.si(cost['tokens'] * cost['flops_per_token'])}FLOP",
                f"{row['tokens_per_second']:,.0f}",
                metrics.duration(row["seconds"]),
                str(len(row["diverged"])),
            )
        )
    columns = ("arm", "learning rate", "tokens", "training", "tokens/s", "time", "diverged runs")
    note = "Speed: median over steps, mean over seeds, on the machine of the runs."
    return reporting.Table(title="Each run", columns=columns, rows=tuple(rows), note=note)


def _routing_table(content):
    """What the routers do, by `routing.measure`."""
    rows, tokens = [], None
    for arm, row in content["routing"].items():
        if "left_out" in row:
            rows.append((arm, row["left_out"], *["–"] * 4))
            continue
        tokens = row["tokens"]
        early = ", ".join(f"{value:.0%} at {float(share):.0%}"
                          for share, value in row["saturation"].items())  # fmt: skip
        rows.append(
            (
                arm,
                early or "–",
                f"{row['saturation_chance']:.0%}",
                *(_with_chance(row, name) for name in ("specialisation", "imbalance", "matching")),
            )
        )
    columns = ("arm", "choices as at the end, after a share of training", "by chance",
               "specialisation of domains (chance)", "imbalance (chance)",
               "experts of two seeds (chance)")  # fmt: skip
    note = (
        "Means over layers and seeds. Specialisation: half the sum over experts of |share of a "
        "domain's choices − mean of that over domains|; chance: documents dealt to domains at "
        "random (where there are few, tokens). Imbalance: the same distance from 1 / experts; "
        "chance: a balanced random router. "
        "Two seeds: Jaccard index of the tokens of matched experts."
    )
    if tokens is not None:
        note = f"On {tokens:,} tokens of the validation split. {note}"
    return reporting.Table(title="Inside the routers", columns=columns, rows=tuple(rows), note=note)


def _with_chance(row, name):
    """ "0.024 (0.011)"; a dash where there is no such value."""
    return "–" if row[name] is None else f"{row[name]:.3f} ({row[f'{name}_chance']:.3f})"


def _health_table(content):
    rows = []
    for arm, row in content["arms"].items():
        losses = list(row["final"]["validation/loss"].values())
        loss = f"{np.mean(losses):.4f}" if losses else "–"
        routing = row["health"]
        cells = ("dense", "–", "–") if routing is None else (
            f"{routing['max_load']:.2f}", f"{routing['normalized_entropy']:.3f}",
            f"{routing['dead_experts']:.1f}",
        )  # fmt: skip
        beats = "yes" if row["beats_bigram"] else "no"
        rows.append((arm, loss, beats, *cells))
    columns = ("arm", "validation loss", "below the bigram model", "busiest expert ÷ equal",
               "evenness", "dead experts")  # fmt: skip
    note = (
        f"Means over seeds at the last checkpoint, on the validation windows. Bigram model: "
        f"{content['bigram']['loss']:.4f} nats per token; an arm counts as below it if every seed "
        "is. Evenness: entropy of the loads, 1 is balanced."
    )
    return reporting.Table(
        title="Quality and routing", columns=columns, rows=tuple(rows), note=note
    )
