"""Foreign config fields → ModelConfig by a family's table, and what a table cannot say."""

import dataclasses
import typing

from olmoe_jax import config as config_lib

# What these ModelConfig fields say does not change what a model computes from its weights.
_NOT_THE_FUNCTION = (
    "vocab_size", "vocab_multiple", "dtype", "router_dtype", "remat", "init_std", "init_cutoff",
)  # fmt: skip
_OF_EXPERTS = (
    "num_experts_per_token", "num_shared_experts", "moe_every", "router", "router_scores",
    "router_bias", "normalize_expert_weights", "expert_backend", "capacity_factor",
)  # fmt: skip


def to_model(family, values, where, *, more=(), fixed=(), unused=()):
    """The ModelConfig of foreign `values`: each is translated, unused, or as the class fixes it.

    Args:
      values: {their field: value}; a missing one has the default of their class.
      more: {ModelConfig field: value} that the caller translated.
      fixed, unused: besides `family.fixed` and `family.unused`.

    Raises:
      ValueError: a field is unknown, has a type or a value that cannot be ported: all are listed.
    """
    ours, kinds = dict(family.constants), typing.get_type_hints(config_lib.ModelConfig)
    for name, (field, default) in family.fields.items():
        value = values.get(name, default)
        if field == "num_kv_heads" and value is None:
            continue
        if field == "init_std" and value is None:
            value = default  # of training only
        ours[field] = _typed(value, kinds[field], name, where)
    ours |= dict(more)
    ours.setdefault("num_kv_heads", ours["num_heads"])
    refused, fixed = [], dict(family.fixed) | dict(fixed)
    for name, value in values.items():
        if name in family.fields or name in family.unused or name in unused:
            continue
        if value is None:
            continue  # not set
        if name not in fixed:
            refused.append(f"{name}={value!r} (unknown)")
        elif value != fixed[name]:
            refused.append(f"{name}={value!r} (only {fixed[name]!r})")
    if refused:
        raise ValueError(f"{where}: {family.name} is not covered with {', '.join(refused)}")
    try:
        return config_lib.ModelConfig(**ours)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _typed(value, kind, name, where):
    args = typing.get_args(kind) or (kind,)
    if float in args and type(value) is int:
        return float(value)
    if type(value) not in args:
        expected = " or ".join("null" if a is type(None) else a.__name__ for a in args)
        raise ValueError(f"{where}: {name} is {value!r}: expected {expected}")
    return value


def differences(a, b) -> list[str]:
    """Where two ModelConfigs compute something else: ["num_heads=16, not 8", …]."""
    a, b = _function(a), _function(b)
    names = [f.name for f in dataclasses.fields(a)]
    return [
        f"{name}={getattr(a, name)!r}, not {getattr(b, name)!r}"
        for name in names
        if getattr(a, name) != getattr(b, name)
    ]


def _function(model_config):
    """A ModelConfig whose fields that do not matter have one value."""
    c, default = model_config, config_lib.ModelConfig()
    neutral = {name: getattr(default, name) for name in _NOT_THE_FUNCTION}
    neutral["vocab_size"] = c.padded_vocab_size
    if c.head_size * c.num_heads == c.d_model:
        neutral["head_dim"] = None
    if not c.num_experts:
        neutral |= {name: getattr(default, name) for name in _OF_EXPERTS}
    elif c.expert_backend != "capacity":  # the others differ by rounding alone
        neutral |= {name: getattr(default, name) for name in ("expert_backend", "capacity_factor")}
    return dataclasses.replace(c, **neutral)
