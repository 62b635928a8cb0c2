"""Checkpoints of a run: parameters of every interval, kept for ever, and states to resume from.

`naming` has their names and places, `layout` the form of the parameters on disk, `manifest` the
hashes, `writing` and `reading` the rest; `streamed` writes and reads what is too large for memory,
`partial` makes that complete or absent.
"""

from olmoe_jax.checkpoints.layout import from_stored, to_stored
from olmoe_jax.checkpoints.manifest import DamagedError
from olmoe_jax.checkpoints.naming import checkpoint_name, find, list_checkpoints, parse_name
from olmoe_jax.checkpoints.reading import (
    abstract_params,
    find_state,
    read_config,
    read_params,
    read_state,
    sharding_of_each,
)
from olmoe_jax.checkpoints.writing import Checkpoints

__all__ = [
    "Checkpoints",
    "DamagedError",
    "abstract_params",
    "checkpoint_name",
    "find",
    "find_state",
    "from_stored",
    "list_checkpoints",
    "parse_name",
    "read_config",
    "read_params",
    "read_state",
    "sharding_of_each",
    "to_stored",
]
