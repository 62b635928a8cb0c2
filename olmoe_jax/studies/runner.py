"""Makes the runs of a study: which there are, what is refused, one after another, resumed.

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
import dataclasses
import json
import os
import pathlib
import shutil

import jax

from olmoe_jax import checkpoints, files
from olmoe_jax.data import pipeline
from olmoe_jax.studies import causality, declaration, documents, equality, results
from olmoe_jax.training import loop, machine, metrics, preflight, runs

MARKER = "study.json"
PILOT = "pilot"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A study at a scale, with everything set that its runs depend on.

    Attributes:
      study, scale: which.
      workdir: of the study.
      configs: arm → Config, the seed apart.
      seeds: of the runs that the verdict is about.
      data: changes to the base that other data brought; empty for the base's own.
    """

    study: declaration.Study
    scale: str
    workdir: pathlib.Path
    configs: dict
    seeds: tuple[int, ...]
    data: dict

    def path(self, arm, seed) -> pathlib.Path:
        """The workdir of one run."""
        return self.workdir / arm / f"seed_{seed}"

    def config(self, arm, seed):
        """The Config of one run."""
        config = declaration.changed(self.configs[arm], {"training.seed": seed})
        if self.study.arm(arm).begins_anew:
            return config
        start = os.path.abspath(self.path(arm, seed) / "start")
        return declaration.changed(config, {"training.initial_checkpoint": start})

    def is_done(self, arm, seed) -> bool:
        """Whether a run has finished and was measured behind its end, or has diverged."""
        path = self.path(arm, seed)
        if (path / results.DIVERGED).is_file():
            return True
        finished = runs.finished_record(path, self.config(arm, seed)) is not None
        needed = [results.DOCUMENTS, *([causality.FILE] if self.needs_causality else [])]
        return finished and all((path / file).is_file() for file in needed)

    @property
    def needs_causality(self) -> bool:
        """Whether an outcome is about how losses depend on the text behind."""
        return causality.is_asked_for(self.study)

    @property
    def remaining(self) -> list[tuple[str, int]]:
        """(arm, seed) of the runs still to be made, in order: all arms of a seed, then the next."""
        pairs = [(arm, seed) for seed in self.seeds for arm in self.configs]
        return [pair for pair in pairs if not self.is_done(*pair)]


def make_plan(study, workdir, *, scale, seeds=None, data=None, learning_rates=None) -> Plan:
    """The Plan of a study in a workdir, after checking that they belong together.

    Args:
      seeds: instead of the study's.
      data: directory of prepared data to use instead of the base's.
      learning_rates: arm → rate, from a protocol.
    Raises:
      ValueError: the workdir holds another study, an arm that this one lacks, a plain run, or a run
        whose configuration is not what the study now says; or an argument is invalid.
      FileNotFoundError: there are no such data.
    """
    changes = {} if data is None else data_changes(data)
    configs = study.configs(scale, data=changes)
    for arm, rate in (learning_rates or {}).items():
        configs[arm] = declaration.changed(configs[arm], {"optimizer.learning_rate": rate})
    seeds = study.seeds if seeds is None else tuple(seeds)
    declaration.check_seeds(seeds)
    plan = Plan(
        study=study, scale=scale, workdir=pathlib.Path(os.path.expanduser(workdir)),
        configs=configs, seeds=seeds, data=changes,
    )  # fmt: skip
    _check_workdir(plan)
    return plan


def data_changes(path) -> dict:
    """What a study's base must be changed in to run on prepared data: its path, sizes."""
    info = pipeline.open(os.path.expanduser(path)).info
    return {
        "data.path": str(path),
        "data.sequence_length": info.sequence_length,
        "model.max_length": info.sequence_length,
        "model.vocab_size": info.vocab_size,
    }


def _check_workdir(plan):
    """Refuses a workdir that holds anything else than runs of this plan."""
    workdir, study = plan.workdir, plan.study
    if (workdir / "config.json").is_file():
        raise ValueError(f"{workdir} is the workdir of a training run: name another --workdir")
    marker = workdir / MARKER
    if marker.is_file():
        found, wanted = json.loads(marker.read_text()), _identity(plan)
        differ = [f"{k} {found.get(k)!r}, not {wanted[k]!r}" for k in wanted
                  if found.get(k) != wanted[k]]  # fmt: skip
        if differ:
            raise ValueError(
                f"{workdir} holds another study: {'; '.join(differ)}: name another --workdir"
            )
    for folder in sorted(workdir.glob("*/seed_*/config.json")):
        arm = folder.parts[-3]
        if arm not in plan.configs:
            raise ValueError(
                f"{workdir} holds runs of an arm {arm!r}, which study {study.name} does not have "
                f"({', '.join(plan.configs)}): name another --workdir, or move that folder away"
            )
    for seed in plan.seeds:
        for arm in plan.configs:
            check_unchanged(plan.path(arm, seed), plan.config(arm, seed))


def check_unchanged(path, config):
    """Refuses a run that was made with another configuration; a folder without one passes.

    Raises:
      ValueError: names the fields, what the run has and what the study now says.
    """
    if not (path / "config.json").is_file():
        return
    found, _ = runs.read_config(path)
    differ = [d for d in runs.differences(found, config)
              if not d.startswith("config.training.initial_checkpoint")]  # fmt: skip
    if differ:
        raise ValueError(
            f"{path} was run with another configuration (its value != the study's now): "
            f"{'; '.join(differ)}. Remove it to run it anew, or name another --workdir"
        )


def _identity(plan):
    return {
        "study": plan.study.name,
        "scale": plan.scale,
        "data": plan.data.get("data.path"),
        "variant": plan.study.variant or None,
    }


def describe(plan) -> str:
    """What the study's runs cost and how long they will take: lines for a person."""
    remaining = plan.remaining
    whole = len(plan.configs) * len(plan.seeds)
    lines = [
        f"study {plan.study.name} ({plan.scale}): {plan.study.question}",
        equality.table(plan.configs),
        f"held equal: {', '.join(plan.study.equal)}",
        f"{len(plan.configs)} arms × {len(plan.seeds)} seeds {list(plan.seeds)} = {whole} runs, "
        f"{whole - len(remaining)} done"
        + ("" if len(plan.seeds) > 1 else "; one seed gives no interval"),
    ]
    if remaining:
        lines.append(f"the rest takes about {metrics.duration(seconds_left(plan))} (an estimate)")
    return "\n".join(lines)


def seconds_left(plan) -> float:
    """Seconds that the runs will take that are still to be made: `estimate` of each."""
    return sum(estimate(plan, arm, seed) for arm, seed in plan.remaining)


def estimate(plan, arm, seed) -> float:
    """Seconds that a run will take: by the arm's finished runs, else by the machine's peak."""
    config = plan.config(arm, seed)
    cost = equality.cost(config)
    for other in plan.seeds:
        if plan.is_done(arm, other):
            return (
                cost.tokens / results.read_run(plan.path(arm, other), arm, other).tokens_per_second
            )
    peak, _ = machine.measure_peak_flops(config.model.dtype)
    return cost.flops / (peak * jax.device_count() * preflight.ASSUMED_UTILISATION)


def make_runs(plan, *, arm=None, seed=None, devices=None, announce=print) -> int | None:
    """Makes the runs that are missing, or only those of one arm, of one seed, or of both.

    Returns:
      the signal that stopped it, or None.
    Raises:
      ValueError: there is no such arm or seed, or an arm starts from one that is not finished.
    """
    if arm is not None:
        plan.study.arm(arm)
    if seed is not None and seed not in plan.seeds:
        raise ValueError(f"--seed={seed}: the seeds are {list(plan.seeds)}")
    write_marker(plan)
    _check_data(plan, announce)
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


def _check_data(plan, announce):
    """Refuses data in which an outcome cannot be measured: no such domain, too few windows."""
    metrics_of_domains = [o.metric for o in plan.study.outcomes if declaration.domain_of(o.metric)]
    if not metrics_of_domains and not plan.needs_causality:
        return
    arm, seed = next(iter(plan.configs)), plan.seeds[0]
    path, config = plan.path(arm, seed), plan.config(arm, seed)
    share_data(plan.workdir, path, config, announce)
    data = runs.open_data(config, path, announce)
    domains = data.info.domains
    if plan.needs_causality:
        causality.check(config, data)
    for metric in metrics_of_domains:
        if (domain := declaration.domain_of(metric)) not in domains:
            near = declaration.nearest(domain, domains)
            raise ValueError(
                f"study {plan.study.name}: metric is {metric!r}: the data have no domain "
                f"{domain!r}{near}: {', '.join(domains)}"
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
            write_json(path / results.DIVERGED, {"problem": str(error)})
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


def write_marker(plan):
    """Says in the workdir which study it holds."""
    if not jax.process_index() and not (plan.workdir / MARKER).is_file():
        plan.workdir.mkdir(parents=True, exist_ok=True)
        write_json(plan.workdir / MARKER, _identity(plan))


def write_json(path, content):
    """Writes a JSON file, whole or not at all."""
    files.write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
