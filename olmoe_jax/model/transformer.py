"""The decoder-only Transformer: embedding, scanned layers, final norm, head."""

import typing

import flax.linen as nn
import jax
import jax.numpy as jnp

from olmoe_jax import config as config_lib
from olmoe_jax import sharding
from olmoe_jax.grouped_matmul import dense
from olmoe_jax.model import attention, experts, moe, norms, routing


class Output(typing.NamedTuple):
    """What the model returns.

    Attributes:
      logits: [batch, length, vocab] in the compute dtype.
      routing: `routing.Routing` with leading dimensions [MoE layers, batch, length], or None.
    """

    logits: jax.Array
    routing: routing.Routing | None


class Features(typing.NamedTuple):
    """What the layers return, before the head.

    Attributes:
      hidden: [batch, length, d_model], after the final norm.
      routing: as in `Output`; None in a dense model.
      layer_rms: float32 [layers], root mean square of the residual stream behind each layer.
    """

    hidden: jax.Array
    routing: routing.Routing | None
    layer_rms: jax.Array


def _kernel_init(config):
    if config.init_cutoff is None:
        return nn.initializers.normal(config.init_std)
    cut = config.init_cutoff  # in units of init_std, which is that of the uncut normal, as torch's
    return nn.initializers.truncated_normal(config.init_std, lower=-cut, upper=cut)


class Block(nn.Module):
    """One layer. Pre-norm: h = x + attention(norm(x)); h + ffn(norm(h)). Post-norm: h = x +
    norm(attention(x)); h + norm(ffn(h))."""

    config: config_lib.ModelConfig
    is_moe: bool
    routing_group: int

    @nn.compact
    def __call__(
        self, x, positions, segment_ids, token_mask, override=None, expert_weights=None
    ):  # fmt: skip
        c, init = self.config, _kernel_init(self.config)
        attention_norm, ffn_norm = (
            norms.NORMS[c.norm](c.norm_eps, name=name) for name in ("attention_norm", "ffn_norm")
        )
        pre, routed = c.norm_position == "pre", None
        mixed = attention.Attention(
            num_heads=c.num_heads, num_kv_heads=c.num_kv_heads, head_dim=c.head_size,
            rope_theta=c.rope_theta, qk_norm=c.qk_norm, qk_norm_per_head=c.qk_norm_per_head,
            clip_qkv=c.clip_qkv, clip_before_qk_norm=c.clip_before_qk_norm,
            sliding_window=c.sliding_window, norm_eps=c.norm_eps,
            kernel_init=init, name="attention",
        )(attention_norm(x) if pre else x, positions, segment_ids)  # fmt: skip
        x += mixed if pre else attention_norm(mixed)
        h = ffn_norm(x) if pre else x
        if self.is_moe:
            y, routed = moe.MoE(
                num_experts=c.num_experts, num_experts_per_token=c.num_experts_per_token,
                num_shared_experts=c.num_shared_experts, d_ff=c.d_ff, router=c.router,
                router_scores=c.router_scores, router_bias=c.router_bias,
                normalize_expert_weights=c.normalize_expert_weights,
                router_dtype=jnp.dtype(c.router_dtype), expert_backend=c.expert_backend,
                capacity_factor=c.capacity_factor, group=self.routing_group,
                kernel_init=init, name="moe",
            )(h, token_mask, override, expert_weights)  # fmt: skip
        else:
            y = moe.FeedForward(c.d_ff, init, name="ffn")(h)
        x += y if pre else ffn_norm(y)
        rms = jnp.sqrt(jnp.mean(jnp.square(jax.lax.stop_gradient(x).astype(jnp.float32))))
        return x, routed, rms


def _saved(remat):
    """What a layer keeps for its backward pass: the routing, and without `remat` also the results
    of matrix products. Norms, rotation, softmax and sorted rows are cheaper to compute again than
    to write down: of work like OLMoE's, all of them together are 2/3 of the memory of a layer."""
    policies, names = jax.checkpoint_policies, routing.SAVED_NAMES
    if remat:
        return policies.save_only_these_names(*names)
    return policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable,
        policies.save_only_these_names(
            *names, *dense.SAVED_NAMES, *attention.SAVED_NAMES, *experts.SAVED_NAMES
        ),
    )


class Layers(nn.Module):
    """The repeating pattern of `moe_every` layers, of which the last is MoE: the body of the
    scan."""

    config: config_lib.ModelConfig
    routing_group: int

    @nn.compact
    def __call__(self, x, positions, segment_ids, token_mask, override, expert_weights):
        c, routings, rms = self.config, [], []
        block = nn.remat(Block, policy=_saved(c.remat), prevent_cse=False)  # inside a scan
        for p in range(c.moe_every):
            layer = block(c, c.is_moe_layer(p), self.routing_group, name=f"block_{p}")
            x, routed, layer_rms = layer(
                x, positions, segment_ids, token_mask, override, expert_weights
            )
            routings.append(routed)
            rms.append(layer_rms)
        return x, (routings[-1], jnp.stack(rms))


class Transformer(nn.Module):
    """A decoder-only language model described by a ModelConfig.

    >>> import jax, jax.numpy as jnp, olmoe_jax
    >>> config = olmoe_jax.ModelConfig(
    ...     vocab_size=97, num_layers=2, d_model=16, num_heads=2, num_kv_heads=2, d_ff=8,
    ...     num_experts=4, num_experts_per_token=2)
    >>> model = olmoe_jax.Transformer(config)
    >>> input_ids = jnp.zeros((1, 5), jnp.int32)
    >>> params = model.init(jax.random.key(0), input_ids)["params"]
    >>> out = model.apply({"params": params}, input_ids, return_routing=True)
    >>> out.logits.shape, out.routing.expert_ids.shape
    ((1, 5, 97), (2, 1, 5, 2))

    Attributes:
      config: the architecture.
      routing_group: consecutive sequences from which expert choice selects and over which capacity
        counts; 0 is the whole batch. Token choice does not depend on it.
    """

    config: config_lib.ModelConfig
    routing_group: int = 0

    def setup(self):
        c = self.config
        routing.get(c.router)
        experts.resolve(c.expert_backend)
        shape = (c.padded_vocab_size, c.d_model)
        self.embedding = self.param("embedding", _kernel_init(c), shape, jnp.float32)
        if not c.tie_embeddings:
            self.lm_head = self.param("lm_head", _kernel_init(c), shape, jnp.float32)
        if c.share_experts_across_layers:
            self.experts = moe.SharedAcrossLayers(c.num_experts, c.d_model, c.d_ff, _kernel_init(c))
        scanned = nn.scan(
            Layers,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, nn.broadcast),
            length=c.num_layers // c.moe_every,
        )
        self.layers = scanned(c, self.routing_group)
        self.final_norm = norms.NORMS[c.norm](c.norm_eps)

    def features(
        self, input_ids, *, positions=None, segment_ids=None, token_mask=None, routing_override=None
    ) -> Features:
        """The model without its head; arguments as `__call__`."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        if token_mask is None:
            token_mask = jnp.ones(input_ids.shape, bool)
        # Gathered over fsdp before the lookup: the partitioner cannot move a lookup's result from
        # "split over d_model" to "split over the batch" but by copying it to every device first.
        table = sharding.constrain(self.embedding.astype(self.config.dtype), "vocab", None)
        x = table[input_ids]
        x = sharding.constrain(x, "batch", None, None)
        shared = self.experts() if self.config.share_experts_across_layers else None
        x, (routed, rms) = self.layers(
            x, positions, segment_ids, token_mask, routing_override, shared
        )
        return Features(self.final_norm(x), routed, rms.reshape(-1))

    def __call__(
        self, input_ids, *, positions=None, segment_ids=None, token_mask=None,
        routing_override=None, return_routing=False,
    ) -> Output:  # fmt: skip
        """Next-token logits.

        Args:
          input_ids: int32 [batch, length].
          positions: int32 [batch, length] for the rotary embedding; default 0, 1, 2, ….
          segment_ids: int32 [batch, length]; attention stays within equal ids. Default: one
            segment.
          token_mask: bool [batch, length]; False is padding, which no expert computes. Default:
            all True.
          routing_override: `routing.RoutingOverride` with a first dimension over the MoE layers:
            mute experts, go around them, or route at random.
          return_routing: also return the routing of every MoE layer.
        """
        features = self.features(
            input_ids, positions=positions, segment_ids=segment_ids, token_mask=token_mask,
            routing_override=routing_override,
        )  # fmt: skip
        logits = features.hidden @ self.head_weights().astype(self.config.dtype).T
        return Output(logits, features.routing if return_routing else None)

    def head_weights(self):
        """[vocab, d_model]: the head, or the embedding where they are tied."""
        return self.embedding if self.config.tie_embeddings else self.lm_head


def head_weights(params):
    """The head's [vocab, d_model] in a parameter tree: `lm_head`, or the embedding where they are
    tied."""
    return params["lm_head"] if "lm_head" in params else params["embedding"]
