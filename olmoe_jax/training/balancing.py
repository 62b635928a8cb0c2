"""Loss-free balancing: biases that a router adds to its scores, moved by the load.

Without an auxiliary loss, no gradient works against the language model's. The bias enters the
choice of experts alone (`model.routing.token_choice`); what moves it is the load of the batch
before, so no token's expert depends on a later token.

The biases lie among the parameters, as `router_bias` of every MoE layer, so that whatever has the
parameters has them: kept checkpoints (rounded, where `checkpoint.dtype` is bfloat16), the resume
state (exact), `olmoe_jax.load`, recording. The optimizer leaves them alone: no gradient reaches
them, no weight decay covers them (`optimizer.decay_mask`).
"""

import jax
import jax.numpy as jnp

from olmoe_jax import sharding


def move_biases(params, load, rate):
    """bias + rate · sign(mean load − load) in every MoE layer: an overloaded expert becomes dearer.

    Args:
      params: a parameter tree; leaves named `router_bias` are float [MoE layers, experts], all
        others stay as they are.
      load: float32 [MoE layers, experts], real tokens that chose each expert, over the whole batch
        of a step: all micro-batches and all devices. Where there is none, nothing moves.
      rate: the step of every bias.
    Returns:
      the tree with new biases, each of its old dtype.
    Source: Wang et al. (arXiv 2408.15664), algorithm 1, where 0.001 is best; the same in
      DeepSeek-V3 (arXiv 2412.19437). Others also subtract the mean of the movements (torchtitan),
      which shifts all biases of a layer alike and so changes no choice.
    """
    mean = jnp.mean(load, axis=-1, keepdims=True)
    step = rate * jnp.sign(mean - load)

    def one(path, leaf):
        if not sharding.path_name(path).endswith("/router_bias"):
            return leaf
        return (leaf.astype(jnp.float32) + step).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, params)
