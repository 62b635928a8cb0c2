"""Frozen dataclasses that describe a run (`sections`), to and from flags (`conversion`).

Every message names the field as a person types it (`config.model.d_ff`).
"""

from olmoe_jax.config.conversion import (
    differences,
    from_flags,
    from_saved,
    to_flags,
    to_json,
    unknown_field,
)
from olmoe_jax.config.sections import (
    DTYPE_NAMES,
    LOAD_BALANCING_CONVENTIONS,
    NORM_NAMES,
    NORM_POSITIONS,
    CheckpointConfig,
    Config,
    DataConfig,
    LossesConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)

__all__ = [
    "DTYPE_NAMES",
    "LOAD_BALANCING_CONVENTIONS",
    "NORM_NAMES",
    "NORM_POSITIONS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LossesConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainingConfig",
    "differences",
    "from_flags",
    "from_saved",
    "to_flags",
    "to_json",
    "unknown_field",
]
