"""olmoe_jax: train, keep, port and look inside open Mixture-of-Experts language models in JAX."""

from olmoe_jax.config import Config, ModelConfig
from olmoe_jax.model.transformer import Transformer

__all__ = ["Config", "ModelConfig", "Transformer"]
