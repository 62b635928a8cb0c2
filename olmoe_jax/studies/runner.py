"""Makes the runs of a study (`plans` says which): one after another, resumed.

    WORKDIR/study.json             which study, at which scale, on which data
    WORKDIR/data/                  the embedded corpus, once for all runs
    WORKDIR/ARM/seed_N/            an ordinary training run
    WORKDIR/pilot/ARM/rate_R/seed_N/   the pilot's
    WORKDIR/routing/               traces of what the routers do (`routing`)
    WORKDIR/{protocol,report}.json, report.html

Any number of processes and machines may work in one workdir: a run belongs to whoever locks its
folder first, and the others go on to the next.
"""

import contextlib
import os
import shutil

import jax
import numpy as np

from olmoe_jax import checkpoints, files
from olmoe_jax.data import pipeline
from olmoe_jax.studies import causality, declaration, documents, plans, results
from olmoe_jax.training import loop, runs


def make_runs(plan, *, arm=None, seed=None, devices=None, announce=print) -> int | None:
    """Makes the runs that are missing, or only those of one arm, of one seed, or of both.

    Returns:
      the signal that stopped it, or None.
    Raises:
      ValueError: there is no such arm or seed, or an arm starts from one that is not finished.
    """
    check_chosen(plan, arm, seed)
    plans.write_marker(plan)
    check_data(plan, announce)
    wanted = [(a, s) for a, s in plan.remaining if arm in (None, a) and seed in (None, s)]
    for number, (name, number_seed) in enumerate(wanted, start=1):
        announce(f"\n{plan.study.name}: {name}, seed {number_seed} ({number} of {len(wanted)})")
        path, config = plan.path(name, number_seed), plan.config(name, number_seed)
        source = _unfinished_source(plan, name, number_seed)
        if source is not None and (plan.study.arm(name).starts_from, number_seed) in wanted:
            announce(f"{path}: starts from {source}, which another process is at")
            continue  # it was passed over above
        with claim(path) as mine:
            if not mine:
                announce(f"{path}: another process is at it")
                continue
            _prepare_start(plan, name, number_seed, config)
            stopped = make_run(
                plan.workdir, path, config, devices=devices, announce=announce,
                causal=plan.needs_causality,
            )  # fmt: skip
        if stopped is not None:
            return stopped
    return None


def check_chosen(plan, arm, seed):
    """Raises ValueError where a plan has no such arm or seed; None is any."""
    if arm is not None:
        plan.study.arm(arm)
    if seed is not None and seed not in plan.seeds:
        listed = ", ".join(map(str, plan.seeds))
        raise ValueError(f"--seed={seed}: the seeds are {listed}")


def check_data(plan, announce) -> dict:
    """Refuses data in which an outcome cannot be measured, or that are not those of the runs that
    are there: before any run is made.

    Returns:
      `plans.source_of` → PreparedData.
    """
    now, evaluated = dict(plan.prepared), set()
    for config in plan.configs.values():
        source = plans.source_of(config)
        if source not in now:
            now[source] = _open_embedded(plan.workdir, config, announce)
        windows = (source, config.data.validation_windows)
        if windows not in evaluated:  # which arms have in common
            _check_domains(plan, config, now[source])
            evaluated.add(windows)
        if plan.needs_causality:
            causality.check(config, now[source])
    plans.check_same_data(plan.made, now)
    return now


def _check_domains(plan, config, data):
    """Refuses a metric of a domain of which no text is evaluated."""
    asked = {o.metric: domain for o in plan.study.outcomes
             if (domain := declaration.domain_of(o.metric))}  # fmt: skip
    if not asked:
        return
    batches = pipeline.validation_batches(
        data, num_windows=config.data.validation_windows, batch_size=config.training.batch_size
    )
    counts = np.zeros(len(data.info.domains), np.int64)
    for batch in batches:
        counts += np.bincount(batch["domains"][batch["loss_mask"]], minlength=len(counts))
    for metric, domain in asked.items():
        if domain not in data.info.domains:
            near = declaration.nearest(domain, data.info.domains)
            raise ValueError(
                f"study {plan.study.name}: metric is {metric!r}: the data have no domain "
                f"{domain!r}{near}: {', '.join(data.info.domains)}"
            )
        if not counts[data.info.domains.index(domain)]:
            raise ValueError(
                f"study {plan.study.name}: metric is {metric!r}: the validation windows hold no "
                f"text of {domain!r}; prepare the data with a larger --validation_fraction"
            )


def make_run(
    workdir, path, config, *, devices=None, announce=print, causal=False
) -> int | None:  # fmt: skip
    """One run to its end, with its losses by document; a diverged one is marked and counts as done.

    Args:
      causal: measure also what `causality` does.
    Returns:
      the signal that stopped it, or None.
    """
    share_data(workdir, path, config, announce)
    try:
        result = loop.train(config, path, devices=devices, announce=announce)
    except FloatingPointError as error:
        if not jax.process_index():
            files.write_json(path / results.DIVERGED, {"problem": str(error)})
        return None
    if result.finished:
        data = runs.open_data(config, path, announce)
        documents.measure(path, config, data, devices=devices)
        if causal:
            causality.measure(path, config, data, devices=devices)
    return result.signal


def link_data(workdir, shared):
    """Lets a study keep its embedded corpus in the folder `shared`, with other studies.

    Nothing is done where the study has a `data` of its own.
    """
    if jax.process_index():
        return
    shared.mkdir(parents=True, exist_ok=True)
    workdir.mkdir(parents=True, exist_ok=True)
    target = workdir / "data"
    with contextlib.suppress(FileExistsError):  # its own, or another process was faster
        target.symlink_to(os.path.relpath(shared, workdir), target_is_directory=True)


def share_data(workdir, path, config, announce):
    """Makes the embedded corpus once for all runs: their `data` are links to the study's."""
    if config.data.path != "embedded" or jax.process_index():
        return
    path.mkdir(parents=True, exist_ok=True)
    shared = workdir / "data"
    shared.mkdir(exist_ok=True)
    with files.locked(shared / ".lock"):  # others wait: they need it too
        if not (path / "data").exists():
            (path / "data").unlink(missing_ok=True)  # a link to nowhere
            (path / "data").symlink_to(os.path.relpath(shared, path), target_is_directory=True)
        runs.open_data(config, path, announce)


def _open_embedded(workdir, config, announce):
    """The PreparedData of the embedded corpus, which is built in WORKDIR/data if need be."""
    shared = workdir / "data"
    shared.mkdir(parents=True, exist_ok=True)
    with files.locked(shared / ".lock"):
        return runs.open_data(config, workdir, announce)


@contextlib.contextmanager
def claim(path):
    """Whether this process has a run's folder to itself, until the end of the block.

    The lock goes with the process, however it ends.
    """
    if jax.process_index():
        yield True
        return
    path.mkdir(parents=True, exist_ok=True)
    with open(path / ".lock", "w") as lock:
        mine = files.try_lock(lock)
        if not mine and jax.process_count() > 1:  # the others of this job would wait for ever
            raise ValueError(f"{path}: another job is at it; give each job its --arm and --seed")
        yield mine


def _unfinished_source(plan, name, seed):
    """Workdir of the run that an arm starts from, while that is not finished; else None."""
    before = plan.study.arm(name).starts_from
    if before is None:
        return None
    source = plan.path(before, seed)
    finished = runs.finished_record(source, plan.config(before, seed)) is not None
    return None if finished else source


def _prepare_start(plan, name, seed, config):
    """Makes the model directory that an arm starts from, if it starts from another arm."""
    arm = plan.study.arm(name)
    if (unfinished := _unfinished_source(plan, name, seed)) is not None:
        raise ValueError(
            f"arm {name} starts from {unfinished}, which is not finished: "
            f"run --arm={arm.starts_from} --seed={seed} first"
        )
    source = None if arm.starts_from is None else plan.path(arm.starts_from, seed)
    make_start(arm, source, plan.path(name, seed), config)


def make_start(arm, source, path, config):
    """Makes PATH/start, the model directory that the run in `path` starts from, unless it is there.

    Args:
      arm: its declaration.Arm; one that begins anew needs none.
      source: workdir of the finished run that it starts from; None where `arm.start` says it.
    """
    target = path / "start"
    if arm.begins_anew or target.exists() or jax.process_index():
        return
    newest = arm.start if source is None else checkpoints.list_checkpoints(source)[-1][1]
    if arm.convert is None:
        target.symlink_to(os.path.relpath(newest, target.parent), target_is_directory=True)
        return
    partial = target.with_name("start_unfinished")
    shutil.rmtree(partial, ignore_errors=True)
    arm.convert(newest, partial, config)
    os.replace(partial, target)
