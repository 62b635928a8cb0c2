"""Runs that several studies have in common are made once: the other studies link to them.

Most studies have an arm that changes nothing. Verdicts that share an arm are not independent of
each other, which each report says (`notes`).
"""

import contextlib
import os
import pathlib

import jax

from olmoe_jax.studies import pilot, plans, results
from olmoe_jax.training import runs

_RUNS = "*/seed_*"
_PILOT_RUNS = f"{plans.PILOT}/*/rate_*/seed_*"


def adopt(plan, workdirs):
    """Makes runs of a plan that are still to be made links to finished ones of other studies.

    A run is taken if every setting is the same, seed and data included, and it starts from nothing.
    No run stands for two arms of one study: arms that are alike are there to be compared. Where
    several processes make each run together nothing is taken: all must see the same runs done.

    Args:
      plan: a plans.Plan.
      workdirs: of studies; the plan's own among them is left out.
    """
    wanted = [
        (arm, plan.config(arm, seed), plan.path(arm, seed))
        for seed in plan.seeds for arm in plan.configs
    ]  # fmt: skip
    _link(plan, wanted, workdirs, _RUNS)


def adopt_pilot(plan, workdirs):
    """As `adopt`, of the runs of a plan's pilot and those of other pilots."""
    wanted = [(arm, config, path) for arm, _, _, config, path in pilot.wanted_runs(plan)]
    _link(plan, wanted, workdirs, _PILOT_RUNS)


def _link(plan, wanted, workdirs, pattern):
    """Makes those of [(arm, Config, path)] links that lie ready elsewhere."""
    if jax.process_count() > 1:
        return
    known, used = _finished(plan, workdirs, pattern), set()
    for _, _, path in wanted:
        if path.is_symlink() and not path.exists():
            path.unlink()  # what it was a link to is gone
        elif path.is_symlink():
            used.add(path.resolve())
    for arm, config, path in wanted:
        source = known.get(config)
        if source is None or path.exists() or not plan.study.arm(arm).begins_anew:
            continue
        if source.resolve() in used or not _same_data(plan, source):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another process was faster
            path.symlink_to(os.path.relpath(source, path.parent), target_is_directory=True)
        used.add(source.resolve())


def _finished(plan, workdirs, pattern):
    """Config → workdir of a run of another study that is done and no link."""
    found = {}
    for workdir in map(pathlib.Path, workdirs):
        if workdir.resolve() == plan.workdir.resolve():
            continue
        for file in sorted(workdir.glob(f"{pattern}/config.json")):
            path = file.parent
            if path.is_symlink() or not (path / results.DOCUMENTS).is_file():
                continue
            config, _ = runs.read_config(path)
            if runs.finished_record(path, config) is not None:
                found.setdefault(config, path)
    return found


def _same_data(plan, source):
    """Whether the data that a run was made on are those that the plan's runs would read now."""
    config, _ = runs.read_config(source)
    if config.data.path == "embedded":
        own = plan.workdir / "data"  # will be a link to the others' where it is not there yet
        shared = (source / "data").exists() and (
            not own.exists() or (source / "data").resolve() == own.resolve()
        )
        if not shared:
            return False
    try:
        now = runs.open_data(config, source, lambda line: None)
    except (FileNotFoundError, ValueError):
        return False  # gone, or others
    return runs.recorded_identity(source) == runs.identity(now)


def _links(plan):
    """(arm, seed) → path of the runs that are links."""
    every = {pair: plan.path(*pair) for pair in plan.runs}
    return {run: path for run, path in every.items() if path.is_symlink()}


def notes(plan) -> list[str]:
    """What a reader should know of runs that were taken over; empty where there are none."""
    taken = {}
    for (arm, seed), path in _links(plan).items():
        source = path.resolve()
        origin = f"{source.parent.parent.name}/{source.parent.name}"
        taken.setdefault((arm, origin), []).append(str(seed))
    if not taken:
        return []
    listed = "; ".join(
        f"{arm}, seeds {', '.join(seeds)}: {origin}" for (arm, origin), seeds in taken.items()
    )
    return [f"runs shared with other studies, where every setting is the same: {listed}"]


def seconds_left(plan, planned, workdirs=()) -> float:
    """As `plans.seconds_left`, without the runs that `adopt` will take over.

    Args:
      planned: set of the Configs of studies before this one, whose runs will be there; this plan's
        are added to it.
      workdirs: of studies whose finished runs are there already, as of `adopt`.
    """
    known, remaining = _finished(plan, workdirs, _RUNS), plan.remaining
    seconds, own = 0.0, {plan.config(*run) for run in set(plan.runs).difference(remaining)}
    for arm, seed in remaining:
        config = plan.config(arm, seed)
        ready = config in planned or (config in known and _same_data(plan, known[config]))
        if config in own or not ready:
            seconds += plans.estimate(plan, arm, seed)
        own.add(config)
    planned |= own
    return seconds
