"""Configs to and from absl flags and JSON.

A `ConfigDict` exists only between a flag and a dataclass and is made *from* the dataclass, so no
field is written twice.
"""

import dataclasses
import difflib
import json
import types
import typing

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from olmoe_jax.config.sections import Config


def to_flags(config) -> ConfigDict:
    """Dataclass → ConfigDict with the same fields: what `get_config()` of an experiment returns.

    An optional field without a value becomes a typed placeholder, so that it can be overridden.
    """
    out = ConfigDict()
    for name, kind in typing.get_type_hints(type(config)).items():
        value, args = getattr(config, name), typing.get_args(kind)
        if types.NoneType in args:
            out[name] = placeholder(next(a for a in args if a is not types.NoneType))
        if value is not None:
            out[name] = to_flags(value) if dataclasses.is_dataclass(value) else value
    return out


def unknown_field(path, name, cls) -> str:
    """One line that names a field that does not exist and the nearest that does."""
    near = difflib.get_close_matches(name, [f.name for f in dataclasses.fields(cls)], 1, cutoff=0.0)
    return f"{path}.{name} does not exist: the nearest field is {path}.{near[0]}"


def from_flags(cls, values, path="config"):
    """ConfigDict or nested dict → dataclass: exactly the fields of `cls`, each of its type.

    Raises:
      ValueError: a field is unknown (the nearest is named) or missing, or a value is out of range.
      TypeError: a value has the wrong type.
    """
    if not hasattr(values, "keys"):
        raise TypeError(f"{path} is {values!r}: expected the fields of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    names = set(values.keys())
    for name in sorted(names):
        if name not in hints:
            raise ValueError(unknown_field(path, name, cls))
    if missing := ", ".join(sorted(set(hints) - names)):
        raise ValueError(f"{path}: missing {missing}; set fields one by one, not a whole section")
    kwargs = {}
    for name, kind in hints.items():
        value = values[name]
        if dataclasses.is_dataclass(kind):
            kwargs[name] = from_flags(kind, value, f"{path}.{name}")
        else:
            kwargs[name] = _checked(value, kind, f"{path}.{name}")
    return cls(**kwargs)


def from_saved(values) -> Config:
    """The Config of a run from its config.json; fields that are newer than it have their defaults.

    Raises:
      ValueError, TypeError: it does not fit this version.
    """
    filled = dataclasses.asdict(Config())
    for name, section in values.items():
        filled[name] = {**filled.get(name, {}), **section}
    return from_flags(Config, filled)


def _checked(value, kind, path):
    """`value` as `kind`; int is accepted for float, a list for a tuple, nothing else."""
    args = typing.get_args(kind)
    if types.NoneType in args:
        if value is None:
            return None
        kind = next(a for a in args if a is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{path} is {value!r}: expected a tuple such as (100, 200)")
        return tuple(_checked(v, args[0], f"{path}[{i}]") for i, v in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        got = type(value).__name__
        raise TypeError(f"{path} is {value!r}: expected {kind.__name__}, got {got}")
    return value


def to_json(config) -> str:
    """A config as indented JSON text."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def differences(a, b, path="config") -> list[str]:
    """Fields in which two configs of one type differ: ["config.model.d_ff: 64 != 128", …]."""
    out = []
    for field in dataclasses.fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if dataclasses.is_dataclass(left):
            out += differences(left, right, f"{path}.{field.name}")
        elif left != right:
            out.append(f"{path}.{field.name}: {left!r} != {right!r}")
    return out
