"""What arms cost, and whether they are equal in what a study holds equal: arithmetic, no JAX.

Parameters and FLOPs are compared exactly, the router's left out: 8 experts and 64 narrower ones
need scores of different number, which no choice of widths makes up for. That difference is shown.
"""

import dataclasses

from olmoe_jax import accounting
from olmoe_jax import config as config_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run costs, from its config.

    Attributes:
      total, active: parameters, and those that one token meets; router included.
      router: the routers' parameters.
      flops_per_token: of training (forward and backward), router included.
      router_flops_per_token: the routers' part.
      tokens: of the whole run.
    """

    total: int
    active: int
    router: int
    flops_per_token: int
    router_flops_per_token: int
    tokens: int

    @property
    def flops(self) -> int:
        """Training FLOPs of the whole run."""
        return self.tokens * self.flops_per_token


def cost(config) -> Cost:
    """The Cost of a run."""
    params = accounting.num_params(config.model)
    flops = accounting.flops_per_token(config.model, config.data.sequence_length)
    return Cost(
        total=params.total,
        active=params.active,
        router=params.router,
        flops_per_token=flops.training,
        router_flops_per_token=flops.router,
        tokens=config.training.num_steps * config.tokens_per_step,
    )


def _data_order(config):
    """What decides which windows a step sees, given the seed."""
    data = dataclasses.replace(config.data, workers=0, mask_documents=False)  # neither reorders
    return {
        f"data.{name}": value for name, value in dataclasses.asdict(data).items()
    } | {"training.batch_size": config.training.batch_size}  # fmt: skip


# Name in Study.equal → (in words, what must be the same in all arms).
HELD_EQUAL = {
    "total_parameters": (
        "parameters outside the router",
        lambda config: cost(config).total - cost(config).router,
    ),
    "active_parameters": (
        "active parameters outside the router",
        lambda config: cost(config).active - cost(config).router,
    ),
    "flops_per_token": (
        "FLOPs per token outside the router",
        lambda config: cost(config).flops_per_token - cost(config).router_flops_per_token,
    ),
    "tokens": ("tokens of training", lambda config: cost(config).tokens),
    "data_order": ("windows in each batch", _data_order),
}


def check(configs, names):
    """Refuses arms that differ in what is held equal.

    Args:
      configs: arm → Config, two or more.
      names: keys of HELD_EQUAL.
    Raises:
      ValueError: the first difference, with both values and the fields that cause it.
    """
    (first, reference), *others = configs.items()
    for name in names:
        words, measure = HELD_EQUAL[name]
        for other, config in others:
            one, two = measure(reference), measure(config)
            if one != two:
                raise ValueError(
                    f"arms {first} and {other} are not equal in {name}: {_shown(one, two, words)}"
                    f"{_causes(reference, config, name)}; change them, or take {name} out of equal"
                )


def held(configs, names, groups) -> list[tuple[tuple, tuple]]:
    """[(arms, names)]: in which of `names` which arms are equal; first those that all arms share.

    Args:
      configs: arm → Config.
      names: keys of HELD_EQUAL.
      groups: tuples of arms that `check` was made for.
    """
    every = tuple(configs)

    def same(name):
        _, measure = HELD_EQUAL[name]
        values = [measure(config) for config in configs.values()]
        return all(value == values[0] for value in values)

    shared = tuple(name for name in names if same(name))
    rest = tuple(name for name in names if name not in shared)
    found = [(every, shared)] if shared else []
    return found + [(tuple(group), rest) for group in groups if rest]


def words(held_equal, configs) -> str:
    """What `held` returns, in words: "tokens; of a, b: total_parameters"; arms where not all."""
    parts = []
    for arms, names in held_equal:
        among = "" if len(arms) == len(configs) else f"of {', '.join(arms)}: "
        parts.append(f"{among}{', '.join(names)}")
    return "; ".join(parts) or "nothing"


def _shown(one, two, words):
    if isinstance(one, dict):
        differ = [f"{key} {one[key]!r} and {two[key]!r}" for key in one if one[key] != two[key]]
        return f"{words}: {', '.join(differ)}"
    return f"{one:,} and {two:,} {words}"


def _causes(one, two, name):
    """The fields in which two configs differ that can cause it, in brackets."""
    if name == "data_order":
        return ""
    sections = ("config.training.", "config.data.") if name == "tokens" else ("config.model.",)
    differ = [d for d in config_lib.differences(one, two) if d.startswith(sections)]
    return f" ({'; '.join(differ)})"


def table(configs) -> str:
    """A few lines for a person: each arm's cost, and the router's part of it apart."""
    rows = [("arm", "parameters", "active", "of them router", "FLOPs/token", "of them router")]
    for name, config in configs.items():
        c = cost(config)
        numbers = (c.total, c.active, c.router, c.flops_per_token, c.router_flops_per_token)
        rows.append((name, *(f"{n:,}" for n in numbers)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row))
        for row in rows
    )
