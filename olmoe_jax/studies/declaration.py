"""What a study is: one question, arms that differ in one thing, what they share, what decides it.

A file of `experiments/studies/` ends with `STUDY = studies.Study(…)`; nothing else needs to know of
it. Every check is made when the declaration is built, so that a mistake costs no run.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from olmoe_jax import config as config_lib
from olmoe_jax.studies import equality, scales

# Metrics that a verdict can be about: name in metrics.jsonl (the last two: `causality`) → unit.
# Lower is better in all.
METRICS = {
    "validation/loss": "nats per token",
    "validation/bits_per_byte": "bits per byte",
    "train/loss": "nats per token",
    "validation/load_balancing_loss": "× balanced",
    "validation/router_z_loss": "nats²",
    "validation/dead_experts": "experts",
    "validation/future_dependence": "nats per token",
    "validation/future_advantage": "nats per token",
}
_DOMAIN_METRIC = re.compile(r"validation/([^/]+)/(loss|bits_per_byte)")
MEASURES = ("final", "tokens", "flops", "seconds")
DIRECTIONS = ("lower", "higher", "equal")
RESERVED = ("data", "pilot", "routing")  # folders of a study's workdir beside those of its arms
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def unit_of(metric) -> str:
    """Unit of a metric of METRICS, or of one domain's loss or bits per byte."""
    if match := _DOMAIN_METRIC.fullmatch(metric):
        metric = f"validation/{match[2]}"
    return METRICS[metric]


def domain_of(metric) -> str | None:
    """DOMAIN of "validation/DOMAIN/loss"; None for a metric of the whole."""
    match = _DOMAIN_METRIC.fullmatch(metric)
    return match[1] if match else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the variants that a study compares.

    Attributes:
      name: its folder in the workdir, and its name in the report.
      changes: field → value in which it differs from the base: {"model.d_ff": 64}. A value may be a
        function of the base's Config, for what follows from the scale.
      starts_from: another arm, whose last checkpoint of the same seed this one starts from.
      start: a model directory from elsewhere that it starts from, with every seed.
      convert: with either of the two, how: `convert(source, target, config)` makes the model
        directory `target` from the one at `source` for a run of `config`. None: as it is.
    """

    name: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    starts_from: str | None = None
    start: str | None = None
    convert: Callable | None = None

    @property
    def begins_anew(self) -> bool:
        """Whether it starts from nothing."""
        return self.starts_from is None and self.start is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One comparison of two arms, and what the paper found.

    Attributes:
      arm, against: names of the arms; the effect is that of `arm` relative to `against`.
      metric: a name of METRICS, or validation/DOMAIN/{loss,bits_per_byte}. Lower is better.
      measure: "final": difference of the metric at the end of training. Else a ratio: what `arm`
        has spent ("tokens", training "flops", or "seconds") when it first has the metric that
        `against` ends with, over what `against` spends in all.
      expected: the paper's direction of the difference ("lower", "higher", "equal"); of a ratio
        "lower" is below 1. None: nothing is expected.
      paper: the paper's outcome in words, with its numbers; empty where `expected` is no paper's.
      smallest_effect: differences below it do not matter; in the unit of the metric, or of a ratio
        its natural logarithm (0.05: about 5 %). Where the paper's own is smaller: that.
    """

    arm: str
    against: str
    metric: str = "validation/loss"
    measure: str = "final"
    expected: str | None = None
    paper: str = ""
    smallest_effect: float = 0.01

    def __post_init__(self):
        known = self.metric in METRICS or domain_of(self.metric)
        _require(known, "metric", self.metric, f"no such metric{nearest(self.metric, METRICS)}")
        for name, choices in (("measure", MEASURES), ("expected", (None, *DIRECTIONS))):
            value = getattr(self, name)
            words = ", ".join(str(choice) for choice in choices)
            _require(value in choices, name, value, f"must be one of {words}")
        positive = isinstance(self.smallest_effect, int | float) and self.smallest_effect > 0
        _require(positive, "smallest_effect", self.smallest_effect, "must be a positive number")
        _require(self.arm != self.against, "against", self.against, "is the arm itself")

    @property
    def title(self) -> str:
        """What is compared, in words."""
        what = "final" if self.measure == "final" else f"{self.measure} to the same"
        return f"{self.arm} against {self.against}: {what} {self.metric}"


# Field of Study → what its tuple holds.
_TUPLES = {
    "arms": Arm,
    "outcomes": Outcome,
    "equal": str,
    "seeds": int,
    "pilot_seeds": int,
    "learning_rate_factors": int | float,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A question, the runs that answer it, and what decides.

    Attributes:
      name: that of its file.
      question: one line.
      arms: two or more.
      outcomes: the verdicts, the most important first.
      common: changes to the base that all arms share; as an arm's.
      base: scale → Config.
      equal: what the arms of each outcome must have in common, by `equality.HELD_EQUAL`; checked
        of those, and said of no others.
      seeds: of the verdict's runs, where no pilot has set their number. A seed sets initialisation
        and data order; the arms of one seed see the same batches.
      pilot_seeds: of the pilot's runs; none of `seeds`.
      learning_rate_factors: the pilot's sweep, times each arm's optimizer.learning_rate.
      max_seeds: most that the pilot may ask for.
      variant: what tells it from other studies of its name where the configs do not; a workdir
        holds one variant.

    Raises:
      ValueError, TypeError: one line that names the study, the field and what is expected.
    """

    name: str
    question: str
    arms: tuple[Arm, ...]
    outcomes: tuple[Outcome, ...]
    common: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base: Mapping[str, config_lib.Config] = dataclasses.field(default_factory=lambda: scales.BASES)
    equal: tuple[str, ...] = tuple(equality.HELD_EQUAL)
    seeds: tuple[int, ...] = (1, 2, 3)
    pilot_seeds: tuple[int, ...] = (101, 102)
    learning_rate_factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    max_seeds: int = 12
    variant: str = ""

    def __post_init__(self):
        try:
            self._check()
        except (ValueError, TypeError) as error:
            raise type(error)(f"study {self.name}: {error}") from error

    def _check(self):
        for field, kind in _TUPLES.items():
            value = getattr(self, field)
            if not isinstance(value, tuple) or not all(isinstance(one, kind) for one in value):
                words = getattr(kind, "__name__", str(kind))
                raise TypeError(
                    f"{field} is of type {type(value).__name__}: must be a tuple of {words}, of a "
                    "single one with a comma behind it"
                )
        names = [arm.name for arm in self.arms]
        for name in (self.name, *names):
            _require(_NAME.fullmatch(name) and name not in RESERVED, "name", name,
                     f"must be lower-case letters, digits and _, not {RESERVED}")  # fmt: skip
        _require(len(names) == len(set(names)), "arms", names, "a name occurs twice")
        _require(self.outcomes, "outcomes", self.outcomes, "must name at least one")
        _require(any(o.measure == "final" for o in self.outcomes), "outcomes",
                 [o.measure for o in self.outcomes], 'one must have measure="final"')  # fmt: skip
        for name in self.equal:
            near = nearest(name, equality.HELD_EQUAL)
            _require(name in equality.HELD_EQUAL, "equal", name, f"cannot be held equal{near}")
        for outcome in self.outcomes:
            for name in (outcome.arm, outcome.against):
                _require(name in names, "outcomes", name, f"no such arm{nearest(name, names)}")
        _require(self.base, "base", self.base, "must have a scale at least")
        check_seeds(self.seeds)
        several = len(set(self.pilot_seeds)) == len(self.pilot_seeds) > 1
        _require(several and min(self.pilot_seeds) >= 0, "pilot_seeds", self.pilot_seeds,
                 "must be different numbers, two at least: a pilot measures a spread")  # fmt: skip
        _require(self.max_seeds > 1, "max_seeds", self.max_seeds, "must be at least 2")
        factors = self.learning_rate_factors
        _require(factors and min(factors) > 0, "learning_rate_factors", factors,
                 "must be positive numbers, one at least")  # fmt: skip
        shared = set(self.seeds) & set(self.pilot_seeds)
        _require(not shared, "pilot_seeds", self.pilot_seeds, "must not be among the seeds")
        for position, arm in enumerate(self.arms):
            _require(arm.start is None or arm.starts_from is None, "start", arm.start,
                     f"arm {arm.name} starts from {arm.starts_from} already")  # fmt: skip
            if arm.starts_from is not None:
                _require(arm.starts_from in names[:position], "starts_from", arm.starts_from,
                         f"arm {arm.name} must come after the one it starts from")  # fmt: skip
        for scale in self.base:
            self.check_equal(self.configs(scale))

    def check_equal(self, configs):
        """Raises ValueError where arms of an outcome differ in what is held equal.

        Args:
          configs: arm → Config.
        """
        for outcome in self.outcomes:
            pair = {name: configs[name] for name in (outcome.arm, outcome.against)}
            equality.check(pair, self.equal)

    @property
    def primary(self) -> Outcome:
        """The first outcome about a final difference: what the pilot is for."""
        return next(outcome for outcome in self.outcomes if outcome.measure == "final")

    @property
    def compared(self) -> list[tuple[str, ...]]:
        """Arms that outcomes compare, directly or through a third, in order; `equal` holds among
        these."""
        groups = []
        for outcome in self.outcomes:
            pair = {outcome.arm, outcome.against}
            touched = [group for group in groups if group & pair]
            groups = [group for group in groups if not group & pair] + [pair.union(*touched)]
        names = [arm.name for arm in self.arms]
        return [tuple(sorted(group, key=names.index)) for group in groups]

    def arm(self, name) -> Arm:
        """The arm called `name`.

        Raises:
          ValueError: there is none; the nearest is named.
        """
        names = [arm.name for arm in self.arms]
        if name not in names:
            raise ValueError(
                f"study {self.name} has no arm {name!r}{nearest(name, names)}: "
                f"there are {', '.join(names)}"
            )
        return self.arms[names.index(name)]

    def configs(self, scale, *, data=None) -> dict[str, config_lib.Config]:
        """Each arm's Config at a scale, in order; the seed is the base's.

        Args:
          data: changes to the base that other data bring (path, vocabulary, length), or None.
        Raises:
          ValueError: the study has no such scale, or a change is not valid.
        """
        if scale not in self.base:
            raise ValueError(f"study {self.name} has no scale {scale!r}: {', '.join(self.base)}")
        base = changed(self.base[scale], {**(data or {}), **self.common})
        configs = {}
        for arm in self.arms:
            try:
                configs[arm.name] = changed(base, arm.changes)
            except (ValueError, TypeError) as error:
                raise type(error)(f"arm {arm.name}: {error}") from error
        return configs


def changed(config, changes) -> config_lib.Config:
    """A Config with dotted fields changed: {"model.d_ff": 64}; a function is called with `config`.

    >>> from olmoe_jax import config
    >>> changed(config.Config(), {"model.d_ff": lambda c: 8 * c.model.d_ff}).model.d_ff
    8192

    Raises:
      ValueError: a field does not exist (the nearest is named), or the result is invalid.
      TypeError: a value has the wrong type.
    """
    values = dataclasses.asdict(config)
    for dotted, value in changes.items():
        section, _, field = dotted.partition(".")
        if section not in values:
            raise ValueError(config_lib.unknown_field("config", section, config_lib.Config))
        values[section][field] = value(config) if callable(value) else value
    return config_lib.from_flags(config_lib.Config, values)


def differing(configs) -> dict[str, dict]:
    """arm → {dotted field: value}, of the fields that are not the same in all arms.

    Args:
      configs: arm → Config.
    """
    flat = {
        arm: {
            f"{section}.{field}": value
            for section, fields in dataclasses.asdict(config).items()
            for field, value in fields.items()
        }
        for arm, config in configs.items()
    }
    first = next(iter(flat.values()))
    names = [name for name in first if any(each[name] != first[name] for each in flat.values())]
    return {arm: {name: each[name] for name in names} for arm, each in flat.items()}


def check_seeds(seeds):
    """Raises ValueError where a list of seeds is empty, or has one twice or negative."""
    distinct = len(seeds) == len(set(seeds))
    _require(seeds and distinct and min(seeds) >= 0, "seeds", tuple(seeds),
             "must be different numbers, none negative")  # fmt: skip


def _require(condition, field, value, expected):
    if not condition:
        raise ValueError(f"{field} is {value!r}: {expected}")


def nearest(name, choices) -> str:
    """ " (the nearest is 'x')", or nothing where there is no choice."""
    near = difflib.get_close_matches(str(name), list(choices), 1, cutoff=0.0)
    return f" (the nearest is {near[0]!r})" if near else ""
