"""A model run layer by layer, straight from its files: one layer's weights, many tokens.

The layer is the module that training scans over, with its parameters read alone. What is read is
cast on the way: the products' matrices to the compute dtype, the router and the norms' scales to
float32, as the model itself casts them.
"""

import concurrent.futures
import functools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np

from olmoe_jax.checkpoints import layout, streamed
from olmoe_jax.model import norms, routing, transformer
from olmoe_jax.porting import sources, transposing

HEAD_TOKENS = 512  # whose float32 logits exist at once
BFLOAT16_ROUNDING = 2.0**-8  # at most, of a number
_READERS = 2  # threads; each holds one slab (about 64 MB)
_ALIGNMENT = 64  # bytes: such host memory XLA takes as it is, without a copy
_GLOBAL = ("embedding", "lm_head", "final_norm")
_SHARED = "experts"  # which all layers of a model with share_experts_across_layers use


class Choices(typing.NamedTuple):
    """What a layer's router chose.

    Attributes:
      expert_ids: int32 [b, l, k], by falling weight; -1 for padding.
      weights: float32 [b, l, k], softmax over all experts (of sigmoid scores their share in the sum
        over all experts), whether or not the model renormalises.
      near_ties: int32 [b], tokens with a near-tie (`is_near_tie`); with a router bias, tokens whose
        choice changes where their logits are rounded to bfloat16.
    """

    expert_ids: jax.Array
    weights: jax.Array
    near_ties: jax.Array


class Weights:
    """The weights of a model, read part by part onto the first device.

    Args:
      source: `porting.sources.Foreign` or `Checkpoint`.
      config: ModelConfig in which to compute; its dtypes may differ from the stored ones.
    """

    def __init__(self, source, config):
        self._source, self.config = source, config
        self._layers, self._shared, self._shared_read = {}, {}, None
        for name in source.leaves:
            first, _, rest = name.partition("/")
            if first == _SHARED:
                self._shared[rest] = name
            elif first not in _GLOBAL:
                index, rest = rest.split("/", 1)
                self._layers.setdefault(int(index), {})[rest] = name

    def verify(self):
        """Recomputes the hashes of the files, where they have any.

        Raises:
          DamagedError: they are not as they were written.
        """
        sources.verify(self._source)

    def num_bytes(self) -> int:
        """Of all parameters as they are in memory."""
        return sum(self._size(name) for name in self._source.leaves)

    def layer_bytes(self) -> int:
        """Of the largest layer, and of experts that all layers share."""
        layers = max(sum(map(self._size, names.values())) for names in self._layers.values())
        return layers + sum(map(self._size, self._shared.values()))

    def embedding(self) -> np.ndarray:
        """[vocab, d_model] on the host, as stored: only rows of it are needed."""
        return self._source.read("embedding")

    def layer(self, index):
        """Parameters of layer number `index`, as `transformer.Block` takes them."""
        return layout.unflatten({n: self._read(own) for n, own in self._layers[index].items()})

    def shared_experts(self):
        """Weights of the experts that all layers share, read once; None: they share none."""
        if self._shared and self._shared_read is None:
            self._shared_read = {name: self._read(own) for name, own in self._shared.items()}
        return self._shared_read

    def head(self):
        """(parameters of the final norm, [vocab, d_model] of the head)."""
        norm = {
            name.split("/", 1)[1]: self._read(name)
            for name in self._source.leaves
            if name.startswith("final_norm/")
        }
        tied = "lm_head" not in self._source.leaves
        return norm, self._read("embedding" if tied else "lm_head")

    def _kind(self, name):
        """The dtype of a parameter in memory."""
        shape, _ = self._source.leaves[name]
        exact = len(shape) < 2 or name.endswith("/router")
        return jnp.dtype("float32" if exact else self.config.dtype)

    def _size(self, name):
        return math.prod(self._source.leaves[name][0]) * self._kind(name).itemsize

    def _read(self, name):
        shape, stored = self._source.leaves[name]
        out = _aligned(shape, self._kind(name))

        def fill(slab):
            rows = self._source.read(name, (slice(*slab),))
            transposing.copy(rows, out[slice(*slab)], transpose=False)

        # A run's checkpoint holds an array in one chunk, which every slab of it would read anew.
        whole = self._source.format is None
        slabs = [(0, shape[0])] if whole else streamed.slabs(shape, stored)
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            list(pool.map(fill, slabs))
        return jax.device_put(out, jax.local_devices()[0], may_alias=True)


def _aligned(shape, dtype):
    """An uninitialised array whose memory JAX on CPU can use as its own."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return memory[first : first + size].view(dtype).reshape(shape)


def is_near_tie(logits, k):
    """Whether rounding to bfloat16 could close the gap between the k-th and the next logit:

        a − b <= 2⁻⁸ · (|a| + |b|)

    where a >= b are the two and 2⁻⁸ is what rounding to nearest changes at most, relative to the
    number. Only the rounding of the logits themselves counts; a bfloat16 model also rounds what
    they are computed from, so more of its choices may differ.

    Args:
      logits: float32 [..., experts].
    Returns:
      bool [...]; False where k is the number of experts.
    """
    if k >= logits.shape[-1]:
        return jnp.zeros(logits.shape[:-1], bool)
    top, _ = jax.lax.top_k(logits, k + 1)
    a, b = top[..., k - 1], top[..., k]
    return a - b <= BFLOAT16_ROUNDING * (jnp.abs(a) + jnp.abs(b))


def embed(table, tokens, config) -> np.ndarray:
    """[b, l, d] in the compute dtype: rows of `Weights.embedding`."""
    return table[tokens].astype(config.dtype)


def apply_layer(
    params, x, token_mask, segment_ids=None, expert_weights=None, *, config, is_moe
):  # fmt: skip
    """One layer, compiled once for all layers of its kind.

    Args:
      params: of `Weights.layer`.
      x: [b, l, d], the compute dtype.
      token_mask: bool [b, l].
      segment_ids: int32 [b, l] or None: as the Transformer takes them.
      expert_weights: of `Weights.shared_experts`.
    Returns:
      ([b, l, d], Choices; None of a dense layer).
    """
    with _exact(config):
        return _layer(
            params, x, token_mask, segment_ids, expert_weights, config=config, is_moe=is_moe
        )


def apply_overridden(
    params, x, token_mask, override, segment_ids=None, expert_weights=None, *, config, is_moe
):  # fmt: skip
    """One layer whose routing is intervened in, compiled once for all layers and interventions.

    Args:
      params, x, token_mask, segment_ids, expert_weights: as of `apply_layer`.
      override: `routing.RoutingOverride` of this layer; a dense layer ignores it.
    Returns:
      [b, l, d].
    """
    with _exact(config):
        return _overridden(
            params, x, token_mask, override, segment_ids, expert_weights, config=config,
            is_moe=is_moe,
        )  # fmt: skip


def _exact(config):
    """float32 products as such: TPUs and GPUs round their factors by default."""
    return jax.default_matmul_precision("highest" if config.dtype == "float32" else None)


def _block(params, x, token_mask, segment_ids, override, expert_weights, config, is_moe):
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    block = transformer.Block(config, is_moe, routing_group=0)
    return block.apply(
        {"params": params}, x, positions, segment_ids, token_mask, override, expert_weights
    )


@functools.partial(jax.jit, static_argnames=("config", "is_moe"))
def _overridden(params, x, token_mask, override, segment_ids, expert_weights, *, config, is_moe):
    return _block(
        params, x, token_mask, segment_ids, override, expert_weights, config, is_moe
    )[0]  # fmt: skip


@functools.partial(jax.jit, static_argnames=("config", "is_moe"))
def _layer(params, x, token_mask, segment_ids, expert_weights, *, config, is_moe):
    x, routed, _ = _block(
        params, x, token_mask, segment_ids, None, expert_weights, config, is_moe
    )  # fmt: skip
    if routed is None:
        return x, None
    probs = routing.probabilities(routed.logits, config.router_scores)
    weights = jnp.take_along_axis(probs, jnp.maximum(routed.expert_ids, 0), axis=-1)
    weights = jnp.where(routed.expert_ids < 0, 0.0, weights)
    if config.router_bias:
        ties = _changes_when_rounded(routed, params["moe"]["router_bias"], token_mask, config)
    else:
        ties = is_near_tie(routed.logits, config.num_experts_per_token)
    ties = jnp.sum(ties & token_mask, axis=1, dtype=jnp.int32)
    return x, Choices(routed.expert_ids, weights, ties)


def _changes_when_rounded(routed, bias, token_mask, config):
    """bool [b, l]: whether logits rounded to bfloat16 lead to other experts."""
    again = routing.route(
        routed.logits.astype(jnp.bfloat16), token_mask, router=config.router,
        k=config.num_experts_per_token, scores=config.router_scores, bias=bias,
    )  # fmt: skip
    one, other = (jnp.sort(r.expert_ids, axis=-1) for r in (routed, again))
    return jnp.any(one != other, axis=-1)


def apply_head(norm, head, x, next_ids, *, config):
    """Final norm and head, a few tokens at a time.

    Args:
      norm, head: of `Weights.head`.
      x: [b, l, d], behind the last layer.
      next_ids: int32 [b, l]; -1: none.
    Returns:
      (int32 [b, l], the most probable next token of those that exist (`vocab_size`); float32
      [b, l], −log p(next_ids) in nats over all rows of the head, NaN where next_ids is -1).
    """
    with _exact(config):
        return _head(norm, head, x, next_ids, config=config)


@functools.partial(jax.jit, static_argnames="config")
def _head(norm, head, x, next_ids, *, config):
    hidden = norms.NORMS[config.norm](config.norm_eps).apply({"params": norm}, x)

    def some(tokens):
        h, targets = tokens  # [t, d], [t]
        logits = jnp.einsum("td,vd->tv", h, head, preferred_element_type=jnp.float32)
        of_target = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
        losses = jnp.where(targets < 0, jnp.nan, jax.nn.logsumexp(logits, axis=1) - of_target)
        return jnp.argmax(logits[:, : config.vocab_size], axis=1).astype(jnp.int32), losses

    # Rows of about as many tokens each. A map over tokens (batch_size) would put the vocabulary in
    # front of them, and a third of the time would go into reading across it.
    count = next_ids.size
    size = -(-count // -(-count // HEAD_TOKENS))
    fill = -count % size
    hidden = jnp.pad(hidden.reshape(count, -1), ((0, fill), (0, 0))).reshape(-1, size, x.shape[-1])
    targets = jnp.pad(next_ids.reshape(-1), (0, fill)).reshape(-1, size)
    found = jax.lax.map(some, (hidden, targets))
    predicted, losses = (a.reshape(-1)[:count].reshape(next_ids.shape) for a in found)
    return predicted, losses
