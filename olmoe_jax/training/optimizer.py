"""AdamW as in the reference run, its learning-rate schedule, clipping, gradient norms by part.

One update is

    norms = global_norms(grads)
    grads = clip(grads, norms.total, config.clip_norm)
    direction = make_optimizer(config).update(grads, …)        m̂ / (√v̂ + eps) + weight_decay · p
    params = apply(params, direction, learning_rate(config, step, …))

The rate stays outside the optax transformation: it is a function of the step that the train state
already holds, so the optimizer's own state is the moments and their count, nothing else.
"""

import re
import typing

import jax
import jax.numpy as jnp
import optax

from olmoe_jax import sharding

CLIP_EPSILON = (
    1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm, and so did the reference run
)

_BLOCK = re.compile(r"layers/block_(\d+)/")

# Group of gradients → the paths in it; the first row that matches counts.
GRADIENT_GROUPS = (
    ("norms", re.compile(r"scale$")),
    ("embedding", re.compile(r"^embedding$")),
    ("lm_head", re.compile(r"^lm_head$")),
    ("attention", re.compile(r"/attention/")),
    ("router", re.compile(r"/moe/router(_bias)?$")),  # the bias has none: it adds nothing
    ("shared_experts", re.compile(r"/moe/shared/")),
    ("experts", re.compile(r"/moe/|^experts/")),
    ("ffn", re.compile(r"/ffn/")),
)


def learning_rate(config, step, tokens_per_step, num_steps):
    """Learning rate of update number `step`: a function of the tokens seen, its own batch included.

    Linear from warmup_start_fraction · peak to the peak over warmup_tokens, then by `schedule` to
    final_fraction · peak at decay_tokens, constant from there. Tokens are counted in steps, because
    5e12 of them fit neither int32 nor float32: (step + 1) / (warmup_tokens / tokens_per_step).

    Args:
      config: an OptimizerConfig.
      step: int or int32 scalar from 0, may be traced.
      tokens_per_step: int.
      num_steps: of the whole run: where the schedule ends if config.decay_tokens is 0.
    Returns:
      float32 scalar.
    Source: OLMoE (arXiv 2409.02060): 4e-4, 10,485,760,000 tokens of warm-up, cosine to a tenth at
      5e12; the anneal stage is "linear" with final_fraction 0 and no warm-up. Appendix B of the
      paper lets the anneal start from 5e-4; we follow the released code and Table 10: 4e-5.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = config.warmup_tokens / tokens_per_step
    end = config.decay_tokens / tokens_per_step if config.decay_tokens else float(num_steps)
    seen = jnp.asarray(step, jnp.float32) + 1
    if config.schedule == "constant":
        after = jnp.float32(peak)
    else:
        decayed = jnp.clip((seen - warmup) / max(end - warmup, 1e-9), 0, 1)
        if config.schedule == "cosine":
            decayed = (1 - jnp.cos(jnp.pi * decayed)) / 2
        after = peak + (final - peak) * decayed
    if warmup == 0:
        return after
    start = config.warmup_start_fraction
    return jnp.where(seen < warmup, peak * (start + (1 - start) * seen / warmup), after)


def decay_mask(params, config):
    """Tree of bool like `params`: where weight decay applies.

    The reference run decays everything. `decay_norms=False` leaves out every norm scale, QK-norms
    included; `decay_embeddings=False` the embedding and the head. A router's bias is never decayed:
    the optimizer, which sees a gradient of zero, leaves it to `balancing`.
    """

    def decays(path, leaf):
        del leaf
        name = sharding.path_name(path)
        if name.endswith("router_bias"):
            return False
        if name.endswith("scale"):
            return config.decay_norms
        return config.decay_embeddings if name in ("embedding", "lm_head") else True

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config) -> optax.GradientTransformation:
    """AdamW of an OptimizerConfig without learning rate, sign and clipping: see `apply`.

    Moments are made in float32 whatever the dtype of parameters and gradients; every update is
    computed in float32 and rounded to the dtype that a moment has. Weight decay is decoupled and
    scaled by the learning rate, as in torch.optim.AdamW.
    """
    adamw = optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(config.weight_decay, lambda params: decay_mask(params, config)),
    )

    def init(params):
        return adamw.init(_float32(params))

    def update(grads, state, params):
        updates, new = adamw.update(_float32(grads), state, _float32(params))
        return updates, jax.tree.map(lambda x, old: x.astype(old.dtype), new, state)

    return optax.GradientTransformation(init, update)


def apply(params, updates, rate):
    """params − rate · updates, computed in float32 and kept in each parameter's dtype."""
    return jax.tree.map(
        lambda p, u: (p.astype(jnp.float32) - rate * u).astype(p.dtype), params, updates
    )


def update(config, grads, state, params, rate):
    """One step of `make_optimizer`, applied: (new params, new state)."""
    adamw = make_optimizer(config)
    updates, new_state = adamw.update(grads, state, params)
    new_params = apply(params, updates, rate)
    if any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state)):
        # The update is made of moments before they are rounded, so XLA computes it from the old
        # ones, and copies all of those first for the new ones to take their place. Computed again
        # behind the parameters they need no copy: of work A's step 80 ms and 240 MB less.
        old, new_params = jax.lax.optimization_barrier((state, new_params))
        _, new_state = adamw.update(grads, old, params)
    return new_params, new_state


class Norms(typing.NamedTuple):
    """L2 norms of a gradient tree, float32.

    Attributes:
      total: over all leaves.
      groups: dict of GRADIENT_GROUPS' names, those that occur.
      layers: [layers], in layer order; without experts that layers share.
    """

    total: jax.Array
    groups: dict
    layers: jax.Array


def clip(grads, norm, clip_norm):
    """grads · min(1, clip_norm / (norm + 1e-6)), in float32 for what follows.

    A NaN anywhere makes every clipped gradient NaN, as in torch; the caller reports the norm.
    """
    scale = jnp.minimum(1.0, clip_norm / (norm + CLIP_EPSILON))
    # One number, made once: fused into the update it would be computed anew for every element. And
    # gradients that are widened here, not once for the norms too: that would be written down.
    scale, grads = jax.lax.optimization_barrier((scale, grads))
    return jax.tree.map(lambda g: g.astype(jnp.float32) * scale, grads)


def gradient_group(name) -> str:
    """The group of the parameter at path `name`, one of GRADIENT_GROUPS.

    >>> from olmoe_jax.training import optimizer
    >>> optimizer.gradient_group("layers/block_0/attention/query_norm/scale")
    'norms'

    Raises:
      ValueError: no row matches.
    """
    for group, pattern in GRADIENT_GROUPS:
        if pattern.search(name):
            return group
    raise ValueError(f"parameter {name}: no row of optimizer.GRADIENT_GROUPS matches, expected one")


def global_norms(grads) -> Norms:
    """L2 norms of a gradient tree, altogether, by kind of parameter and by layer.

    Args:
      grads: a tree as trained: leaves below layers/block_p are stacked, [n, …].
    """
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(grads), strict=True)
    names = [sharding.path_name(path) for path in paths]
    squares = [
        _square_sum(leaf, keep_first=bool(_BLOCK.match(name)))
        for name, leaf in zip(names, leaves, strict=True)
    ]
    # Every gradient is read once: merged with the sums below, these sums would be made again for
    # each of them.
    squares = jax.lax.optimization_barrier(squares)
    groups, blocks = {}, {}
    for name, square in zip(names, squares, strict=True):
        if match := _BLOCK.match(name):
            block = int(match[1])
            blocks[block] = blocks.get(block, 0) + square
        group = gradient_group(name)
        groups[group] = groups.get(group, 0) + jnp.sum(square)
    # Layer p + moe_every · j is entry j of block p.
    layers = jnp.stack([blocks[p] for p in sorted(blocks)], axis=1).reshape(-1)
    return Norms(
        jnp.sqrt(sum(groups.values())),
        {name: jnp.sqrt(square) for name, square in groups.items()},
        jnp.sqrt(layers),
    )


def _square_sum(x, *, keep_first):
    """Sum of squares in float32: of each layer (the first axis), or of everything."""
    axes = tuple(range(1 if keep_first else 0, x.ndim))
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes)


def _float32(tree):
    """Floating leaves as float32; counters stay."""
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_float(x) else x, tree)
