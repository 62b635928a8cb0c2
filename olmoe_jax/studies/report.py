"""From a study's finished runs to its report: verdicts, costs and routing as plain numbers."""

import dataclasses
import json
import math

import numpy as np

from olmoe_jax import files
from olmoe_jax.studies import (
    bigram,
    declaration,
    equality,
    page,
    plans,
    results,
    routing,
    verdict,
)
from olmoe_jax.training import metrics, runs

DATA, PAGE, BIGRAM = "report.json", "report.html", "bigram.json"
LOCK = ".report.lock"


def write(plan, *, protocol=None, notes=(), announce=print) -> dict:
    """Judges a study whose runs are all done; writes report.json and report.html in its workdir.

    Where another process is at it, this one waits and then finds the long part done.

    Args:
      plan: a plans.Plan without remaining runs.
      protocol: the protocol.Protocol that the runs follow, or None: no pilot.
      notes: lines that a reader should know.
    Returns:
      what report.json holds.
    Raises:
      ValueError: a run has not recorded a metric that an outcome is about.
    """
    found = read_runs(plan)
    baseline = bigram_baseline(plan, announce)
    bigram_loss = baseline["validation/bigram_loss"]
    findings = [verdict.judge(o, found, bigram_loss=bigram_loss) for o in plan.study.outcomes]
    content = summary(plan, found, findings, baseline, protocol, notes)
    waiting = f"{plan.workdir}: another process writes the report; waiting for it"
    with files.locked(plan.workdir / LOCK, waiting=lambda: announce(waiting)):
        content["routing"] = routing.measure(plan, found, announce=announce)
        files.write_json(plan.workdir / DATA, content)
        files.write_text(plan.workdir / PAGE, page.build(plan, found, findings, content))
    return content


def read_runs(plan) -> dict:
    """(arm, seed) → results.Run of a plan's finished runs.

    Raises:
      ValueError: they read data that differ.
    """
    plans.check_same_data(plan.made, {})
    return {pair: results.read_run(plan.path(*pair), *pair) for pair in plan.runs}


def bigram_baseline(plan, announce) -> dict:
    """`bigram.baseline` of the first arm's data, kept in the study's workdir beside what they are:
    of other data it is computed anew."""
    path, pair = plan.workdir / BIGRAM, plan.runs[0]
    read = runs.recorded_identity(plan.path(*pair))
    if path.is_file():
        found = json.loads(path.read_text())
        if found.pop("data", {}) == read:
            return found
    config = plan.config(*pair)
    data = runs.open_data(config, plan.path(*pair), announce)
    found = bigram.baseline(data, config)
    files.write_json(path, found | {"data": read})
    return found


def summary(plan, found, findings, baseline, protocol, notes) -> dict:
    """What report.json holds: plain numbers and words, no NaN."""
    bigram_loss = baseline["validation/bigram_loss"]
    arms, differing = {}, declaration.differing(plan.configs)
    for arm in plan.configs:
        mine = [found[arm, seed] for seed in plan.seeds]
        arms[arm] = {
            "changes": differing[arm],
            "cost": dataclasses.asdict(equality.cost(plan.configs[arm])),
            "learning_rate": plan.configs[arm].optimizer.learning_rate,
            "tokens_per_second": _mean([run.tokens_per_second for run in mine]),
            "seconds": _mean([verdict.total_tokens(r) / r.tokens_per_second for r in mine]),
            "final": {
                metric: {str(r.seed): _finite(r.final(metric)) for r in mine if not r.problem}
                for metric in metric_names(plan.study)
            },
            "health": health(mine),
            "beats_bigram": verdict.is_below(bigram_loss, mine),
            "diverged": {str(run.seed): run.problem for run in mine if run.problem},
        }
    return {
        "study": plan.study.name,
        "question": plan.study.question,
        "scale": plan.scale,
        "data": next(iter(plan.configs.values())).data.path,
        "data_identity": runs.recorded_identity(plan.path(*plan.runs[0])),
        "seeds": list(plan.seeds),
        "held_equal": [
            {"arms": list(group), "names": list(names)} for group, names in plans.held_equal(plan)
        ],
        "protocol": None if protocol is None else dataclasses.asdict(protocol) | {"configs": None},
        "notes": list(notes),
        "metrics": metric_names(plan.study),
        "outcomes": [_finding(finding) for finding in findings],
        "arms": arms,
        "bigram": {
            "loss": bigram_loss,
            "bits_per_byte": baseline["validation/bigram_bits_per_byte"],
        },
        "environment": runs.read_config(next(iter(found.values())).path)[1].get("environment"),
    }


def health(mine) -> dict | None:
    """Routing of an arm at its last checkpoints, means over seeds; None of a dense arm.

    As `metrics.router_metrics` on the validation windows: the busiest expert's load relative to an
    equal one in the worst layer, the entropy of the loads (1 is balanced), experts without a token.
    """
    loads = [run.load for run in mine if run.load is not None]
    if not loads:
        return None
    each = [metrics.router_metrics(load) for load in loads]
    names = ("max_load", "normalized_entropy", "dead_experts")
    return {name: _mean([m[f"router/{name}"] for m in each]) for name in names}


def metric_names(study) -> list[str]:
    """The metrics that a study is about, the validation loss first."""
    return list(dict.fromkeys(["validation/loss", *(o.metric for o in study.outcomes)]))


def _finding(finding):
    """A Finding for JSON: ratios as ratios, not as their logarithms."""
    outcome, ratio = finding.outcome, finding.outcome.measure != "final"

    def plain(interval, ratio):
        if interval is None:
            return None
        content = dataclasses.asdict(interval)
        for name in ("mean", "low", "high"):
            if ratio and content[name] is not None:
                content[name] = math.exp(content[name])
        return content

    return {
        **dataclasses.asdict(outcome),
        "title": outcome.title,
        "unit": "ratio" if ratio else declaration.unit_of(outcome.metric),
        "effects": {str(seed): math.exp(x) if ratio else x for seed, x in finding.effects.items()},
        "interval": plain(finding.interval, ratio),
        "sd_is_of_logarithms": ratio,
        "documents": plain(finding.documents, False),
        "missing": {str(seed): why for seed, why in finding.missing.items()},
        "seeds_needed": finding.seeds_needed,
        "agreement": finding.agreement,
        "words": finding.words,
    }


def text(content) -> str:
    """The verdicts and where they stand, for a terminal."""
    lines = [f"{content['study']} ({content['scale']}): {content['question']}"]
    for outcome in content["outcomes"]:
        lines.append(f"  {outcome['title']}\n    {outcome['words']}")
        if documents := outcome["documents"]:
            lines.append(
                f"    over {documents['n']} documents, the runs fixed: 95 % interval "
                f"{documents['low']:+.4f} to {documents['high']:+.4f}"
            )
    weak = [arm for arm, row in content["arms"].items() if not row["beats_bigram"]]
    if weak:
        lines.append(
            f"  note: {', '.join(weak)} not below the bigram model "
            f"({content['bigram']['loss']:.4f} nats): runs this short say little"
        )
    lines += [f"  note: {note}" for note in content["notes"]]
    return "\n".join(lines)


def _mean(values):
    return float(np.mean(values))


def _finite(value):
    return value if math.isfinite(value) else None
