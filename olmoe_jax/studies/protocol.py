"""What is fixed before the runs that decide: each arm's learning rate, and how many seeds.

The pilot trains every arm at the same few multiples of its learning rate, on seeds that no verdict
uses. Of its numbers only two things are used: which rate suits an arm best, and how much the
difference between arms of one seed varies, which says how many seeds can show the smallest effect
that matters. The size of the effect in the pilot decides nothing. What is asked is fixed as well: a
metric, or a smallest effect, that is chosen once the runs are there could be chosen to please.
"""

import dataclasses
import json
import os
import pathlib

from olmoe_jax import config as config_lib
from olmoe_jax import files
from olmoe_jax.studies import declaration, plans, statistics
from olmoe_jax.training import runs

FEWEST_SEEDS = 3
FILE = "protocol.json"
_OTHER_DATA = "the pilot ran on other data; its rates and seeds are kept"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """The outcome of a pilot; its JSON file is to be committed before the runs that decide.

    Attributes:
      study, scale, variant: which.
      metric: that of the study's first "final" outcome, by which rates are chosen.
      learning_rates: arm → rate of the verdict's runs.
      seeds: of the verdict's runs.
      smallest_effect: of that outcome, which the seeds must be able to show.
      sd: standard deviation over seeds of the difference of its arms at the same multiple of their
        rates, pooled over those, with its degrees of freedom. The number of seeds follows from
        `statistics.sd_bound` of it.
      power: probability that these seeds show the smallest effect, if sd is right.
      pilot: arm → rate, as text → final metric per pilot seed (NaN is written null: diverged).
      pilot_seeds: in the order of those values.
      notes: what a reader should know: a best rate at the edge of the sweep, too few seeds.
      configs: arm → the pilot's config (rate and seed are those of the declaration).
      outcomes: what was asked: the fields of each Outcome, without the paper's words; None in a
        file of an earlier version.
      data_identity: `training.runs.identity` of the pilot's data; empty where that is not known.
    """

    study: str
    scale: str
    variant: str
    metric: str
    learning_rates: dict[str, float]
    seeds: tuple[int, ...]
    smallest_effect: float
    sd: float
    degrees_of_freedom: int
    power: float
    pilot: dict[str, dict[str, list[float | None]]]
    pilot_seeds: tuple[int, ...]
    notes: tuple[str, ...]
    configs: dict[str, dict]
    outcomes: tuple[dict, ...] | None = None
    data_identity: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def sd_bound(self) -> float:
        """What the true sd probably lies below."""
        return statistics.sd_bound(self.sd, self.degrees_of_freedom)


def decide(plan, finals, data_identity=None) -> Protocol:
    """The Protocol that follows from a pilot's numbers.

    Args:
      plan: a plans.Plan.
      data_identity: of the Protocol, if it is known.
      finals: arm → rate → final metric per pilot seed, None where the run diverged.
    Raises:
      ValueError: an arm has no rate at which every run finished.
    """
    study, outcome, notes = plan.study, plan.study.primary, []
    learning_rates = {}
    for arm, by_rate in finals.items():
        best = best_rate(study, arm, by_rate)
        learning_rates[arm] = best
        if len(by_rate) > 1 and best in (min(by_rate), max(by_rate)):
            notes.append(f"{arm}: the best rate, {best:g}, is at the edge of the sweep")
    sd, freedom = statistics.pooled_sd(_differences(study, finals))
    bound = statistics.sd_bound(sd, freedom)
    needed = statistics.seeds_to_decide(outcome.smallest_effect, bound, least=FEWEST_SEEDS)
    count = min(needed or study.max_seeds, study.max_seeds)
    if needed is None or needed > study.max_seeds:
        words = f"{needed} seeds" if needed else f"more than {statistics.MOST_SEEDS} seeds"
        notes.append(
            f"an effect of {outcome.smallest_effect:g} would take {words}, if differences spread "
            f"by {bound:.3g}, the pilot's upper limit; the study stops at {study.max_seeds}"
        )
    return Protocol(
        study=study.name,
        scale=plan.scale,
        variant=study.variant,
        metric=outcome.metric,
        learning_rates=learning_rates,
        seeds=_seeds(study, count),
        smallest_effect=outcome.smallest_effect,
        sd=sd,
        degrees_of_freedom=freedom,
        power=statistics.power(outcome.smallest_effect, sd, count),
        pilot={a: {f"{r:g}": v for r, v in by_rate.items()} for a, by_rate in finals.items()},
        pilot_seeds=study.pilot_seeds,
        notes=tuple(notes),
        configs={arm: dataclasses.asdict(config) for arm, config in plan.configs.items()},
        outcomes=_asked(study),
        data_identity=data_identity or {},
    )


def _asked(study):
    """What a Study asks, as a protocol keeps it."""
    fields = [dataclasses.asdict(outcome) for outcome in study.outcomes]
    return tuple({k: v for k, v in each.items() if k != "paper"} for each in fields)


def best_rate(study, arm, by_rate) -> float:
    """The rate with the least mean of a rate → final metrics; one at which a run diverged is none.

    Raises:
      ValueError: there is no rate at which every run finished.
    """
    usable = {rate: values for rate, values in by_rate.items() if None not in values}
    if not usable:
        raise ValueError(f"study {study.name}, pilot: arm {arm} diverged at every rate")
    return min(usable, key=lambda rate: sum(usable[rate]))


def _differences(study, finals):
    """Groups of differences between the primary outcome's arms, one per multiple of the rate."""
    one, two = finals[study.primary.arm], finals[study.primary.against]
    # by place in the sweep; an arm with a rate of its own has one place
    places = max(len(one), len(two))
    groups = []
    for place in range(places):
        pair = [list(by.values())[min(place, len(by) - 1)] for by in (one, two)]
        groups.append([a - b for a, b in zip(*pair, strict=True) if None not in (a, b)])
    return groups


def _seeds(study, count):
    """The study's seeds, and as many more as are needed, none of them the pilot's."""
    seeds = list(study.seeds[:count])
    following = max(study.seeds)
    while len(seeds) < count:
        following += 1
        if following not in study.pilot_seeds:
            seeds.append(following)
    return tuple(seeds)


def write(path, protocol):
    """Writes a Protocol as JSON, whole or not at all."""
    files.write_json(path, dataclasses.asdict(protocol))


def plan(study, workdir, *, scale, data=None, seeds=None, path=None):
    """(the plans.Plan of a study, the Protocol that it follows or None, notes on that).

    Args:
      data: directory of prepared data instead of the base's, or None.
      seeds: instead of the protocol's; without a protocol, of the study's.
      path: of the protocol; default WORKDIR/protocol.json if it is there.
    Raises:
      ValueError, FileNotFoundError: as `read` and `plans.make_plan`.
    """
    here = pathlib.Path(os.path.expanduser(workdir)) / FILE
    followed, notes = None, []
    if path is not None or here.is_file():
        changes = None if data is None else plans.data_changes(data)
        path = here if path is None else os.path.expanduser(path)
        followed, notes = read(path, study, scale, data=changes)
        if seeds is not None and tuple(seeds) != followed.seeds:
            plans.check_pilot_seeds(seeds, followed.pilot_seeds)  # which may be declared anew
            notes.append(f"the seeds are not the protocol's, {list(followed.seeds)}")
    made = plans.make_plan(
        study, workdir, scale=scale, data=data,
        seeds=followed.seeds if followed and seeds is None else seeds,
        learning_rates=followed.learning_rates if followed else None,
    )  # fmt: skip
    if followed and followed.data_identity and _OTHER_DATA not in notes:
        now = [runs.identity(data) for data in made.prepared.values()]
        if any(identity != followed.data_identity for identity in now):  # prepared anew
            notes.append(_OTHER_DATA)
    return made, followed, notes


def read(path, study, scale, *, data=None) -> tuple[Protocol, list[str]]:
    """(the Protocol in a file, notes on how this study differs from the pilot's).

    Args:
      data: changes to the base that other data bring (plans.data_changes), or None. Rates and
        number of seeds carry over to other data; that is noted.
    Raises:
      ValueError: it is no protocol, or of another study, scale, variant, question or configuration.
    """
    found = _parse(path, study)
    if (found.study, found.scale) != (study.name, scale):
        raise ValueError(
            f"{path}: the protocol of study {found.study} at scale {found.scale}, "
            f"not of {study.name} at {scale}"
        )
    if found.variant != study.variant:
        raise ValueError(
            f"{path}: the protocol of variant {found.variant!r} of study {study.name}, not of "
            f"{study.variant!r}. Run --pilot again"
        )
    notes = _check_question(path, study, found)
    differ, other_data = [], False
    for arm, config in study.configs(scale, data=data).items():
        if arm not in found.configs:
            differ.append(f"arm {arm} is new")
            continue
        saved = config_lib.from_saved(found.configs[arm])
        here = runs.differences(saved, config)
        carried = tuple(f"config.{field}" for field in data or ())
        differ += [f"{arm}: {d}" for d in here if not (carried and d.startswith(carried))]
        other_data |= any(carried and d.startswith(carried) for d in here)
    if other_data:
        notes.append(_OTHER_DATA)
    if differ:
        raise ValueError(
            f"{path}: the pilot was made with another declaration (its value != this one): "
            f"{'; '.join(differ)}. Run --pilot again"
        )
    return found, notes


def _parse(path, study):
    """The Protocol in a file."""
    try:
        content = json.loads(pathlib.Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not a protocol: {error}. Run --pilot again") from None
    earlier = {"variant": study.variant, "outcomes": None}  # versions that did not note it
    try:
        content = earlier | content
        names = ("seeds", "pilot_seeds", "notes", *(["outcomes"] if content["outcomes"] else []))
        found = Protocol(**content | {name: tuple(content[name]) for name in names})
        for asked in found.outcomes or ():
            declaration.Outcome(**asked)
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"{path}: not a protocol of this version; run --pilot again") from None
    return found


def _check_question(path, study, found):
    """Refuses a study whose primary outcome is not the one that the pilot was for.

    Returns:
      notes on other outcomes that were changed or added since.
    """
    now, fixed = dataclasses.asdict(study.primary), found.outcomes or ()
    before = {"metric": found.metric, "smallest_effect": found.smallest_effect}
    before |= next((outcome for outcome in fixed if outcome["measure"] == "final"), {})
    if differ := [f"{k} {v!r} != {now[k]!r}" for k, v in before.items() if v != now[k]]:
        raise ValueError(
            f"{path}: the pilot was for another question (its value != this one): "
            f"{'; '.join(differ)}. Ask what was fixed before the runs, or run --pilot again in "
            "another --workdir"
        )
    new = [o.title for o, asked in zip(study.outcomes, _asked(study), strict=True)
           if fixed and asked not in fixed]  # fmt: skip
    gone = [declaration.Outcome(**asked).title for asked in fixed if asked not in _asked(study)]
    notes = [f"not fixed by the protocol, so explored: {'; '.join(new)}"] if new else []
    if gone:
        notes.append(f"fixed by the protocol, but not asked any more: {'; '.join(gone)}")
    return notes
