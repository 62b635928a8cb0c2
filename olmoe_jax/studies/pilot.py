"""The runs of a study's pilot, in WORKDIR/pilot/ARM/rate_R/seed_N; `protocol` is what they fix."""

import os

from olmoe_jax.studies import declaration, plans, protocol, results, runner
from olmoe_jax.training import metrics, runs

CHECKPOINTS = 4  # beside the first: only the end counts, the others are to resume from


def wanted_runs(plan):
    """[(arm, rate, seed, Config, workdir)] of the pilot of a plans.Plan.

    An arm whose declaration sets the learning rate is about it, and keeps it.
    """
    found = []
    for seed in plan.study.pilot_seeds:
        for arm, config in plan.configs.items():
            for rate in rates(plan.study, arm, config):
                changes = {
                    "optimizer.learning_rate": rate,
                    "training.seed": seed,
                    "checkpoint.interval": max(
                        config.checkpoint.interval, config.training.num_steps // CHECKPOINTS
                    ),
                }
                folder = _folder(plan, arm, rate, seed)
                if not plan.study.arm(arm).begins_anew:
                    changes["training.initial_checkpoint"] = os.path.abspath(folder / "start")
                found.append((arm, rate, seed, declaration.changed(config, changes), folder))
    return found


def _folder(plan, arm, rate, seed):
    return plan.workdir / plans.PILOT / arm / f"rate_{rate:g}" / f"seed_{seed}"


def rates(study, arm, config) -> list[float]:
    """Learning rates at which an arm is tried."""
    rate = config.optimizer.learning_rate
    if "optimizer.learning_rate" in study.arm(arm).changes:
        return [rate]
    return [rate * factor for factor in study.learning_rate_factors]


def run(plan, *, devices=None, announce=print) -> protocol.Protocol | int:
    """Makes the pilot's runs that are missing; the Protocol, or the signal that stopped it.

    Arm by arm: one that starts from another starts from its run of the same seed at its best rate,
    as the runs of the verdict will.

    Raises:
      ValueError: a pilot run was made with another configuration.
    """
    wanted = sorted(wanted_runs(plan), key=lambda run: list(plan.configs).index(run[0]))
    for _, _, _, config, path in wanted:
        plans.check_unchanged(path, config)
    plans.write_marker(plan)
    now = runner.check_data(plan, announce)
    plans.check_same_data([(path, config) for _, _, _, config, path in wanted], now)
    finals = {}
    for number, (arm, rate, seed, config, path) in enumerate(wanted, start=1):
        if _is_done(path, config):
            _note(finals, plan, arm, rate, seed, path)
            continue
        announce(
            f"\n{plan.study.name}, pilot: {arm}, learning rate {rate:g}, seed {seed} "
            f"({number} of {len(wanted)})"
        )
        with runner.claim(path) as mine:
            if not mine:
                announce(f"{path}: another process is at it")
                continue
            declared = plan.study.arm(arm)
            runner.make_start(declared, _source(plan, declared, seed, finals), path, config)
            stopped = runner.make_run(
                plan.workdir, path, config, devices=devices, announce=announce
            )
        if stopped is not None:
            return stopped
        _note(finals, plan, arm, rate, seed, path)
    finals = {}
    for arm, rate, seed, config, path in wanted:
        if not _is_done(path, config):
            raise ValueError(f"{path} is not finished yet: run this again for the protocol")
        _note(finals, plan, arm, rate, seed, path)
    identity = runs.recorded_identity(wanted[0][4])
    return protocol.decide(plan, finals, data_identity=identity)


def describe(plan) -> str:
    """How many runs a pilot makes, and how long the rest of them takes: lines for a person."""
    wanted, left, speeds = wanted_runs(plan), [], {}
    for arm, _, seed, config, path in wanted:
        if _is_done(path, config):
            speeds[arm] = results.read_run(path, arm, seed).tokens_per_second
        else:
            left.append((arm, config))
    seconds = sum(plans.seconds_of(config, speeds.get(arm)) for arm, config in left)
    seeds = ", ".join(map(str, plan.study.pilot_seeds))
    lines = [
        f"pilot of {plan.study.name} ({plan.scale}): {len(wanted)} runs, seeds {seeds}, "
        f"{len(wanted) - len(left)} done"
    ]
    for arm, config in plan.configs.items():
        tried = ", ".join(f"{rate:g}" for rate in rates(plan.study, arm, config))
        lines.append(f"  {arm}: learning rate {tried}")
    if note := plans.data_note(plan):
        lines.append(f"note: {note}")
    if left:
        lines.append(f"the rest takes about {metrics.duration(seconds)} (an estimate)")
    return "\n".join(lines)


def _note(finals, plan, arm, rate, seed, path):
    """Adds a finished run to arm → rate → seed → final metric, None where it diverged."""
    run = results.read_run(path, arm, seed)
    final = None if run.problem else run.final(plan.study.primary.metric)
    finals.setdefault(arm, {}).setdefault(rate, []).append(final)


def _source(plan, arm, seed, finals):
    """Workdir of the pilot's run that an arm starts from; None if it starts from no arm."""
    if arm.starts_from is None:
        return None
    config, by_rate = plan.configs[arm.starts_from], finals.get(arm.starts_from, {})
    tried, seeds = rates(plan.study, arm.starts_from, config), plan.study.pilot_seeds
    if len(by_rate) < len(tried) or any(len(values) < len(seeds) for values in by_rate.values()):
        raise ValueError(
            f"study {plan.study.name}, pilot: arm {arm.name} starts from {arm.starts_from}, whose "
            "runs are not all finished yet: run this again"
        )
    best = protocol.best_rate(plan.study, arm.starts_from, by_rate)
    return _folder(plan, arm.starts_from, best, seed)


def _is_done(path, config):
    if (path / results.DIVERGED).is_file():
        return True
    return runs.finished_record(path, config) is not None
