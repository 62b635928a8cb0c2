"""Which runs a study has, at a scale and in a workdir: what is refused, what they cost.

WORKDIR/study.json             which study, at which scale, on which data
WORKDIR/ARM/seed_N/            a training run (`runner` makes it)
"""

import dataclasses
import functools
import json
import os
import pathlib

import jax

from olmoe_jax import files
from olmoe_jax.data import pipeline
from olmoe_jax.studies import causality, declaration, equality, results
from olmoe_jax.training import machine, metrics, preflight, runs

MARKER = "study.json"
PILOT = "pilot"
# Of a run, beside its steps: compiling, checkpoints, validation, losses by document. Measured at
# smoke scale on two Xeon cores, where it is nearly all of a run.
START_SECONDS = 10


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
    def runs(self) -> list[tuple[str, int]]:
        """(arm, seed) of all runs: all arms of a seed, then the next."""
        return [(arm, seed) for seed in self.seeds for arm in self.configs]

    @property
    def made(self) -> list:
        """[(workdir, Config)] of `runs`."""
        return [(self.path(*pair), self.config(*pair)) for pair in self.runs]

    @functools.cached_property
    def prepared(self) -> dict:
        """`source_of` → PreparedData, of the arms whose data are prepared beforehand."""
        sources = {source_of(config): config for config in self.configs.values()}
        return {
            source: runs.open_data(config, self.workdir, lambda line: None)
            for source, config in sources.items()
            if config.data.path != "embedded"
        }

    @property
    def needs_causality(self) -> bool:
        """Whether an outcome is about how losses depend on the text behind."""
        return causality.is_asked_for(self.study)

    @property
    def remaining(self) -> list[tuple[str, int]]:
        """(arm, seed) of the runs still to be made, in the order of `runs`."""
        return [pair for pair in self.runs if not self.is_done(*pair)]


def make_plan(study, workdir, *, scale, seeds=None, data=None, learning_rates=None) -> Plan:
    """The Plan of a study in a workdir, after checking that they belong together.

    Args:
      seeds: instead of the study's.
      data: directory of prepared data to use instead of the base's.
      learning_rates: arm → rate, from a protocol.
    Raises:
      ValueError: the workdir holds another study, an arm that this one lacks, a plain run, or a run
        whose configuration or data are not those of now; a seed is the pilot's; or an argument is
        invalid.
      FileNotFoundError: there are no such data.
    """
    changes = {} if data is None else data_changes(data)
    configs = study.configs(scale, data=changes)
    study.check_equal(configs)  # again: other data bring other sizes
    for arm, rate in (learning_rates or {}).items():
        configs[arm] = declaration.changed(configs[arm], {"optimizer.learning_rate": rate})
    seeds = study.seeds if seeds is None else tuple(seeds)
    declaration.check_seeds(seeds)
    check_pilot_seeds(seeds, study.pilot_seeds)
    plan = Plan(
        study=study, scale=scale, workdir=pathlib.Path(os.path.expanduser(workdir)),
        configs=configs, seeds=seeds, data=changes,
    )  # fmt: skip
    _check_workdir(plan)
    check_same_data(plan.made, plan.prepared)
    return plan


def check_pilot_seeds(seeds, pilot_seeds):
    """Refuses seeds of a verdict that are the pilot's: rates and number were chosen by those."""
    if shared := sorted(set(seeds) & set(pilot_seeds)):
        listed = ", ".join(map(str, shared))
        raise ValueError(f"the pilot's seeds are none of a verdict: choose others than {listed}")


def data_changes(path) -> dict:
    """What a study's base must be changed in to run on prepared data: its path, sizes."""
    path = os.path.normpath(os.path.expanduser(path))
    info = pipeline.open(path).info
    return {
        "data.path": path,
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
        differ = [f"{k} {_shown(found.get(k))}, not {_shown(wanted[k])}" for k in wanted
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
    for path, config in plan.made:
        check_unchanged(path, config)


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
            f"{'; '.join(differ)}. {_advice(differ)}"
        )


def _advice(differ):
    """What to do about runs of another configuration."""
    rates = "config.optimizer.learning_rate:"
    if all(d.startswith(rates) for d in differ):
        return (
            "Rates are the protocol's where there is one: name that which the runs followed "
            "(--protocol), or another --workdir"
        )
    return "Name another --workdir, or remove the run to make it anew"


def _shown(value):
    return "none" if value is None else repr(value)


def source_of(config):
    """What says which prepared data a run reads: runs of one source read the same."""
    data = config.data
    return data.path, data.tokenizer, data.sequence_length, config.model.vocab_size


def check_same_data(made, now):
    """Refuses runs that read other data than each other, or than there are now.

    Data that are prepared anew keep their path, so configs do not tell; what was measured on both
    must not end in one verdict.

    Args:
      made: [(workdir, Config)] of runs; those that were not begun pass.
      now: `source_of` → PreparedData, where known.
    Raises:
      ValueError: names both.
    """
    seen = {source: (data.path, runs.identity(data)) for source, data in now.items()}
    for path, config in made:
        if not (found := runs.recorded_identity(path)):
            continue
        where, first = seen.setdefault(source_of(config), (path, found))
        for name in found.keys() & first.keys():
            if found[name] != first[name]:
                raise ValueError(
                    f"{path} was run on other data than {where} ({name} {found[name][:12]}…, not "
                    f"{first[name][:12]}…): they were prepared anew. Name another --workdir, or "
                    "remove the run to make it anew"
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
        f"held equal: {equality.words(held_equal(plan), plan.configs)}",
        *([f"note: {note}"] if (note := data_note(plan)) else []),
        f"{len(plan.configs)} arms × {len(plan.seeds)} seeds {list(plan.seeds)} = {whole} runs, "
        f"{whole - len(remaining)} done"
        + ("" if len(plan.seeds) > 1 else "; one seed gives no interval"),
    ]
    if remaining:
        lines.append(f"the rest takes about {metrics.duration(seconds_left(plan))} (an estimate)")
    return "\n".join(lines)


def held_equal(plan) -> list[tuple[tuple, tuple]]:
    """`equality.held` of a plan: [(arms, names of HELD_EQUAL in which all of these are equal)]."""
    return equality.held(plan.configs, plan.study.equal, plan.study.compared)


def data_note(plan) -> str | None:
    """How other data change the size of the scale's runs; None if they do not."""
    arm, config = next(iter(plan.configs.items()))
    own = plan.study.configs(plan.scale)[arm]
    sizes = [(c.model.vocab_size, c.data.sequence_length) for c in (own, config)]
    if sizes[0] == sizes[1]:
        return None
    factor = equality.cost(config).flops / equality.cost(own).flops
    (vocab, length), (now_vocab, now_length) = sizes
    return (
        f"{config.data.path} has {now_vocab:,} words and windows of {now_length:,} tokens, so a "
        f"run costs {factor:.3g} × as much as at this scale; data prepared with "
        f"--vocab_size={vocab} --sequence_length={length} keep its size"
    )


def seconds_left(plan) -> float:
    """Seconds that the runs will take that are still to be made: `estimate` of each."""
    return sum(estimate(plan, arm, seed) for arm, seed in plan.remaining)


def estimate(plan, arm, seed) -> float:
    """Seconds that a run will take: by the speed of the arm's finished runs, else by the peak."""
    speed = None
    for other in plan.seeds:
        if plan.is_done(arm, other):
            speed = results.read_run(plan.path(arm, other), arm, other).tokens_per_second
            break
    return seconds_of(plan.config(arm, seed), speed)


def seconds_of(config, tokens_per_second=None) -> float:
    """Seconds that a run takes, with its start; without a speed by the machine's matmul peak."""
    cost = equality.cost(config)
    if tokens_per_second is not None:
        return START_SECONDS + cost.tokens / tokens_per_second
    peak, _ = machine.measure_peak_flops(config.model.dtype)
    return START_SECONDS + cost.flops / (peak * jax.device_count() * preflight.ASSUMED_UTILISATION)


def write_marker(plan):
    """Says in the workdir which study it holds."""
    if not jax.process_index() and not (plan.workdir / MARKER).is_file():
        files.write_json(plan.workdir / MARKER, _identity(plan))
