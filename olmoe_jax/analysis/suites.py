"""Which checkpoints a directory holds: one model, or a run of many."""

import json
import os
import pathlib
import re
import typing

from olmoe_jax import checkpoints
from olmoe_jax.checkpoints import naming, reading
from olmoe_jax.porting import port, sources

_TOKENS = re.compile(r"step\d+-tokens(\d+)([KMB])")
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}


class Checkpoint(typing.NamedTuple):
    """One set of weights.

    Attributes:
      name: of the checkpoint, as step5000-tokens20B; "" for a model that is one.
      step, tokens: of training; None where they are not known. Tokens of a checkpoint that was not
        trained here are those of its name, which rounds down.
      path: its directory.
      model: name of the model, the same for all its checkpoints.
    """

    name: str
    step: int | None
    tokens: int | None
    path: pathlib.Path
    model: str


def checkpoints_of(directory) -> list[Checkpoint]:
    """All checkpoints in `directory`, by step.

    Args:
      directory: a run's workdir, or a folder of revisions (`step5000-tokens20B/`, …) of any kind
        that `olmoe_jax.load` takes; any other directory of a model is one checkpoint.

    Raises:
      FileNotFoundError: there is no model.
    """
    path = pathlib.Path(os.path.abspath(os.path.expanduser(directory)))
    if found := port.revisions(path):
        return [_describe(revision, path.name) for _, revision in found]
    if sources.kind_of(path) == sources.WORKDIR:
        kept = checkpoints.list_checkpoints(path)
        return [_describe(pathlib.Path(checkpoint), path.name) for _, checkpoint in kept]
    return [one(path)]


def one(directory) -> Checkpoint:
    """The checkpoint that `olmoe_jax.load` takes: of a workdir the newest.

    Raises:
      FileNotFoundError: there is no model.
    """
    path = pathlib.Path(os.path.abspath(os.path.expanduser(directory)))
    if sources.kind_of(path) == sources.WORKDIR:
        return _describe(pathlib.Path(naming.find(path)), path.name)
    if naming.parse_name(path.name) is None:
        return _describe(path, path.name)
    parent = path.parent
    return _describe(path, parent.parent.name if parent.name == naming.CHECKPOINTS else parent.name)


def _describe(path, model):
    step = naming.parse_name(path.name)
    return Checkpoint(path.name if step is not None else "", step, _tokens(path), path, model)


def _tokens(path):
    """Tokens of training: exact for a checkpoint of a run here, else by the name."""
    try:
        content = json.loads((path / reading.CONFIG).read_text())
        if type(content["step"]) is int and not {"ported", "upcycled"} & content.keys():
            return content["step"] * checkpoints.read_config(path).tokens_per_step
    except (OSError, ValueError, KeyError, TypeError):
        pass  # weights from elsewhere
    match = _TOKENS.fullmatch(path.name)
    return int(match[1]) * _UNITS[match[2]] if match else None
