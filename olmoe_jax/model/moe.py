"""Feed-forward layers: dense SwiGLU, and the Mixture of Experts."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from olmoe_jax import sharding
from olmoe_jax.grouped_matmul import dense
from olmoe_jax.model import experts, routing
from olmoe_jax.model.experts import slots


class FeedForward(nn.Module):
    """SwiGLU: (silu(x @ w_gate) · (x @ w_up)) @ w_down, without biases."""

    d_ff: int
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x):
        d = x.shape[-1]
        w_gate = self.param("w_gate", self.kernel_init, (d, self.d_ff), jnp.float32)
        w_up = self.param("w_up", self.kernel_init, (d, self.d_ff), jnp.float32)
        w_down = self.param("w_down", self.kernel_init, (self.d_ff, d), jnp.float32)
        hidden = slots.swiglu(dense.product(x, w_gate), dense.product(x, w_up))
        return dense.product(hidden, w_down)


def _expert_weights(param, init, shape):
    """The experts' matrices, made by a module's `param`; `shape` is (experts, d_model, d_ff)."""
    e, d, f = shape
    shapes = {"w_gate": (e, d, f), "w_up": (e, d, f), "w_down": (e, f, d)}
    return {name: param(name, init, s, jnp.float32) for name, s in shapes.items()}


class SharedAcrossLayers(nn.Module):
    """The weights of experts that all MoE layers use: what `MoE` takes as `expert_weights`.

    Source: `share_experts` of the branch with which OLMoE's authors tried it (allenai/OLMo,
      Muennighoff/OLMoSE b7b312a, `olmo/model.py`): one set of experts, a router in each layer. Its
      `share_moe` shares the router too.
    """

    num_experts: int
    d_model: int
    d_ff: int
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self):
        """dict of w_gate and w_up [e, d, f], w_down [e, f, d], float32."""
        shape = (self.num_experts, self.d_model, self.d_ff)
        return _expert_weights(self.param, self.kernel_init, shape)


class MoE(nn.Module):
    """Router, experts and optional shared experts.

    Shared experts are one SwiGLU of width num_shared_experts · d_ff, added unweighted: the same as
    that many separate ones, as a SwiGLU's hidden units do not interact.
    """

    num_experts: int
    num_experts_per_token: int
    num_shared_experts: int
    d_ff: int
    router: str
    normalize_expert_weights: bool
    router_dtype: jnp.dtype
    expert_backend: str
    capacity_factor: float
    group: int
    kernel_init: nn.initializers.Initializer
    router_scores: str = "softmax"
    router_bias: bool = False

    @nn.compact
    def __call__(self, x, token_mask, override=None, expert_weights=None):
        """
        Args:
          x: [b, l, d].
          token_mask: bool [b, l]; False (padding) gets no expert.
          override: `routing.RoutingOverride` of this layer, or None.
          expert_weights: of `SharedAcrossLayers`; None: the layer has experts of its own.
        Returns:
          ([b, l, d], `routing.Routing` with leading dimensions b, l).
        """
        d, e, f = x.shape[-1], self.num_experts, self.d_ff
        w_router = self.param("router", self.kernel_init, (d, e), jnp.float32)
        # HIGHEST: on TPU and GPU a float32 product is otherwise rounded to bf16 or TF32.
        router_logits = jnp.einsum(
            "bld,de->ble", x.astype(self.router_dtype), w_router.astype(self.router_dtype),
            precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip
        bias = None
        if self.router_bias:  # no gradient reaches it: `training.balancing` moves it
            bias = self.param("router_bias", nn.initializers.zeros, (e,), jnp.float32)
            bias = bias.astype(jnp.float32)
        routed = routing.route(
            router_logits, token_mask, router=self.router, k=self.num_experts_per_token,
            normalize=self.normalize_expert_weights, group=self.group, scores=self.router_scores,
            bias=bias, override=override,
        )  # fmt: skip
        if expert_weights is None:
            expert_weights = _expert_weights(self.param, self.kernel_init, (e, d, f))
        with jax.named_scope("experts"):
            y = experts.compute(
                x, routed, expert_weights, backend=self.expert_backend,
                capacity_factor=self.capacity_factor, group=self.group,
            )  # fmt: skip
        if self.num_shared_experts:
            width = self.num_shared_experts * f
            y += FeedForward(width, self.kernel_init, name="shared")(x)
        return sharding.constrain(y, "batch", None, None), routed
