"""Parameters, FLOPs, bytes and peaks: the one source of every such number. Arithmetic only, no JAX.

Letters: d d_model, h heads, g kv_heads, c head_dim, e experts, k chosen experts, f d_ff of one
expert, v vocabulary rows (padding included), n layers, l length.
"""

import dataclasses
import math

from olmoe_jax.config import Config, ModelConfig

BYTES = {"float32": 4, "bfloat16": 2}
ADAM_MOMENTS = 2  # both float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameter counts of a model.

    Attributes:
      total: everything that is stored.
      active: what one token meets: k of the experts, the shared ones, and all the rest, embedding,
        head and router included (OLMoE-1B-7B: 1,282,017,280). With `share_experts_across_layers`
        an expert counts in every layer, where it may be met again, as the code does with which
        OLMoE's authors tried it: so FLOPs follow from it, and it may exceed `total`.
      embedding: the input embedding [v, d].
      head: the output head [v, d]; 0 where it is the embedding.
      norms: scales, which take part in no matrix product.
      router: of all MoE layers; in `total` and in `active`. What granularity cannot hold equal.

    The biases of `model.router_bias`, one number per expert and MoE layer, are counted nowhere:
    they are state of the balancing, which no gradient trains.
    """

    total: int
    active: int
    embedding: int
    head: int
    norms: int
    router: int

    @property
    def non_embedding(self) -> int:
        """Total without embedding and head."""
        return self.total - self.embedding - self.head

    @property
    def active_non_embedding(self) -> int:
        """Active without embedding and head."""
        return self.active - self.embedding - self.head


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations per token; a multiplication and an addition are two.

    Attributes:
      forward: one forward pass.
      training: forward and backward, three times that. What MFU counts, whatever is recomputed.
      executed: `training`, and under `model.remat` the layers' second forward pass.
      router: the routers' part of `training`.
    """

    forward: int
    training: int
    executed: int
    router: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes that a run leaves behind.

    Attributes:
      num_checkpoints: kept parameter checkpoints, step 0 and the last step included.
      one_checkpoint, one_state: bytes of one kept checkpoint, and of one full train state.
      checkpoints: all kept parameters.
      states: the newest two full states, those of `checkpoint.full_state_at`, one being written.
    """

    num_checkpoints: int
    one_checkpoint: int
    one_state: int
    checkpoints: int
    states: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.checkpoints + self.states


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepBytes:
    """Bytes of the tensors that a train step cannot do without; see `step_bytes`.

    Attributes:
      parameters, gradients, moments: of all parameters.
      activations: what the forward pass leaves for the backward pass.
    """

    parameters: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Estimated bytes of a train step on one device.

    Attributes:
      state: float32 parameters and two moments.
      gradients: float32, and the sum over micro-batches beside it where there are several.
      weights: the copy in the compute dtype, where that is not float32.
      activations: what the backward pass of one micro-batch keeps.
      logits: one chunk of the cross entropy, its softmax and its gradient.
    """

    state: int
    gradients: int
    weights: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The sum; XLA's own temporaries come on top."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peak:
    """Most FLOP/s of one JAX device, dense, and where the figure comes from."""

    flops_per_second: float
    source: str


def num_params(config: ModelConfig) -> Parameters:
    """Counts of a model's parameters, without building it.

    >>> from olmoe_jax import accounting, presets
    >>> p = accounting.num_params(presets.get("olmoe-1b-7b"))
    >>> p.total, p.active
    (6919161856, 1282017280)
    """
    embedding = config.padded_vocab_size * config.d_model
    head = 0 if config.tie_embeddings else embedding
    norms = _norm_params(config)
    rest = embedding + head + norms + config.num_layers * _attention_params(config)
    return Parameters(
        total=rest + _stored_ffn_params(config),
        active=rest + _ffn_params(config, config.num_experts_per_token),
        embedding=embedding,
        head=head,
        norms=norms,
        router=_router_params(config),
    )


def flops_per_token(config: ModelConfig, length: int) -> Flops:
    """FLOPs of one token in a window of `length`, averaged over the window.

    Two per parameter that takes part in a matrix product (the head does, the embedding lookup does
    not), and 2 · h · c · l per layer for attention scores and mixing: causal, so counted in half.
    A sliding window w < l makes that 2 · h · c · w · (2 − w / l): the cut corner of the triangle.
    The experts count as k per token; a backend that computes more does not raise the figure.
    """
    head = 2 * config.padded_vocab_size * config.d_model
    products = _ffn_params(config, config.num_experts_per_token)
    products += config.num_layers * _attention_params(config)
    window = length if config.sliding_window is None else min(config.sliding_window, length)
    keys = 2 * config.num_heads * config.head_size * window * (2 * length - window) // length
    scores = config.num_layers * keys
    layers = 2 * products + scores
    training = 3 * (layers + head)
    executed = training + (layers if config.remat else 0)
    router = 6 * _router_params(config)
    return Flops(forward=layers + head, training=training, executed=executed, router=router)


def moe_flops_per_token(config: ModelConfig) -> Flops:
    """FLOPs of one token in one MoE layer: router, chosen and shared experts.

    Two per parameter that it meets: 2 · (d · e + 3 · d · f · (k + shared experts)). `training`
    includes the gradient with respect to the layer's input.
    """
    forward = 2 * _moe_params(config, config.num_experts_per_token)
    router = 6 * config.d_model * config.num_experts
    return Flops(forward=forward, training=3 * forward, executed=3 * forward, router=router)


def param_bytes(config: ModelConfig, dtype: str = "float32") -> int:
    """Bytes of all parameters in `dtype`."""
    return num_params(config).total * BYTES[dtype]


def state_bytes(config: ModelConfig) -> int:
    """Bytes of the train state: float32 parameters and AdamW's two moments."""
    return (1 + ADAM_MOMENTS) * param_bytes(config)


def activation_bytes(config: ModelConfig) -> float:
    """Bytes per token that one layer leaves for its backward pass; mean of dense and MoE layers.

    The tensors from which all else follows without computing a matrix product again, each once
    (what is computed element by element — norms, rotation, SiLU, gathered rows — is recomputed
    from them). With s bytes per number of the compute dtype, for one token:

      s · 2d                     the layer's input, and the sum behind the attention
      s · (2h + 2g) c            queries, keys and values as projected, and what attention mixed
      4 · h                      logsumexp of its scores; the scores themselves are recomputed
      s · 2f · (k + shared)      gate and up projections of its experts; 2f in a dense layer
      4 · (e + 2k)               router logits, expert ids, expert weights

    Post-norm layers keep one d more: there both sums follow from the projections' outputs, which
    the norms need. Expert weights are parameters and not counted again.
    """
    c, size = config, BYTES[config.dtype]
    residual = (2 if c.norm_position == "pre" else 3) * c.d_model
    heads = 2 * (c.num_heads + c.num_kv_heads) * c.head_size
    attention = size * (residual + heads) + 4 * c.num_heads
    moe = size * 2 * c.d_ff * (_slots(c) + c.num_shared_experts) + _routing_bytes(c)
    sparse_share = c.num_moe_layers / c.num_layers
    return attention + sparse_share * moe + (1 - sparse_share) * size * 2 * c.d_ff


def step_bytes(config: Config, *, state_dtype: str = "float32") -> StepBytes:
    """Bytes of the tensors that one train step cannot do without, on one device.

    Parameters, gradients and AdamW's two moments in `state_dtype`: four times the parameters (five
    with micro-batches, whose gradients are added up); of the activations, `activation_bytes` of
    each layer and token, and the last layer's output and its gradient, which the cross entropy
    forms in the forward pass. With `model.remat` the layers' inputs, their routing, and the
    activations of one layer. Not counted: a chunk of logits, and whatever lives only within one
    operation of the step. The yardstick of a compiled step; what a device needs is `step_memory`.

    Args:
      config: a run.
      state_dtype: of parameters, gradients and moments.
    """
    model, micro = config.model, config.training.micro_batches
    params = param_bytes(model, state_dtype)
    return StepBytes(
        parameters=params,
        gradients=params * (2 if micro > 1 else 1),
        moments=ADAM_MOMENTS * params,
        activations=round(config.tokens_per_step / micro * _activation_bytes(model)),
    )


def disk(config: Config) -> Disk:
    """Disk that a whole run takes, from its first checkpoint to its last."""
    steps, interval = config.training.num_steps, config.checkpoint.interval
    num_checkpoints = 1 + math.ceil(steps / interval)  # step 0; the last step, if it is no multiple
    one_checkpoint = param_bytes(config.model, config.checkpoint.dtype)
    one_state = state_bytes(config.model)
    kept_states = sum(step <= steps for step in config.checkpoint.full_state_at)
    return Disk(
        num_checkpoints=num_checkpoints,
        one_checkpoint=one_checkpoint,
        one_state=one_state,
        checkpoints=num_checkpoints * one_checkpoint,
        states=(min(2, num_checkpoints) + 1 + kept_states) * one_state,
    )


def step_memory(
    config: Config, *, param_shards: int = 1, batch_shards: int = 1, logits_chunk: int = 2048
) -> Memory:
    """Estimated memory of one train step on each device: an estimate, not a bound.

    Without the state it is 0.8 to 1.3 times the temporaries that XLA reports on a CPU for
    `experiments/configs/demo.py` with float32, bfloat16, remat, 4 micro-batches, no experts, or
    the `dense` backend.

    Args:
      config: a run.
      param_shards: devices over which parameters, moments and gradients are split.
      batch_shards: devices over which the batch is split.
      logits_chunk: tokens whose float32 logits exist at once.
    """
    model, micro = config.model, config.training.micro_batches
    tokens = config.tokens_per_step / micro / batch_shards
    size = BYTES[model.dtype]
    params = param_bytes(model) / param_shards
    return Memory(
        state=round((1 + ADAM_MOMENTS) * params),
        gradients=round(params * (2 if micro > 1 else 1)),
        weights=0 if model.dtype == "float32" else round(params * size / BYTES["float32"]),
        activations=round(tokens * _activation_bytes(model)),
        logits=round(min(tokens, logits_chunk) * model.padded_vocab_size * (2 * 4 + size)),
    )


# By substring of jax's device_kind, first match: bf16 FLOP/s of a chip without sparsity, the share
# of it for float32 matmuls at JAX's default precision (TPU: one bf16 pass; GPU: TF32), source.
_TPU, _NVIDIA = "Cloud TPU documentation", "NVIDIA data sheet, without sparsity"
_PEAKS = (
    ("TPU v4", 275e12, 1.0, _TPU),
    ("TPU v5 lite", 197e12, 1.0, _TPU),
    ("TPU v5e", 197e12, 1.0, _TPU),
    ("TPU v5", 459e12, 1.0, _TPU),  # v5p calls itself "TPU v5" or "TPU v5p"
    ("TPU v6", 918e12, 1.0, _TPU),
    ("TPU7x", 2307e12 / 2, 1.0, f"{_TPU}, half a chip: JAX shows two devices"),
    ("A100", 312e12, 0.5, _NVIDIA),
    ("H100 PCIe", 756e12, 0.5, _NVIDIA),
    ("H100", 989e12, 0.5, _NVIDIA),
    ("H200", 989e12, 0.5, _NVIDIA),
    ("B200", 2250e12, 0.5, _NVIDIA),
)


def peak(device_kind: str, dtype: str = "bfloat16") -> Peak | None:
    """Peak of one device of jax's `device_kind`; None if the table lacks it (a CPU: measure it).

    >>> from olmoe_jax import accounting
    >>> accounting.peak("NVIDIA H100 80GB HBM3").flops_per_second
    989000000000000.0
    """
    for name, bfloat16, float32_share, source in _PEAKS:
        if name in device_kind:
            share = 1.0 if dtype == "bfloat16" else float32_share
            return Peak(flops_per_second=bfloat16 * share, source=source)
    return None


def _attention_params(config):
    """Of one layer, without norms: q and output, k and v."""
    return 2 * config.d_model * config.head_size * (config.num_heads + config.num_kv_heads)


def _norm_params(config):
    per_layer = 0 if config.norm == "layernorm_nonparametric" else 2 * config.d_model
    if config.qk_norm:
        heads = 2 if config.qk_norm_per_head else config.num_heads + config.num_kv_heads
        per_layer += config.head_size * heads
    final = 0 if config.norm == "layernorm_nonparametric" else config.d_model
    return config.num_layers * per_layer + final


def _router_params(config):
    return config.num_moe_layers * config.d_model * config.num_experts


def _stored_ffn_params(config):
    """Of all layers, each parameter once."""
    everywhere = _ffn_params(config, config.num_experts)
    if not config.share_experts_across_layers:
        return everywhere
    again = (config.num_moe_layers - 1) * config.num_experts
    return everywhere - again * 3 * config.d_model * config.d_ff


def _ffn_params(config, experts):
    """Of all layers, with `experts` experts in each MoE layer."""
    dense_layers = config.num_layers - config.num_moe_layers
    dense = dense_layers * 3 * config.d_model * config.d_ff
    return config.num_moe_layers * _moe_params(config, experts) + dense


def _moe_params(config, experts):
    """Of one MoE layer with `experts` experts, its router and its shared experts."""
    swiglu = 3 * config.d_model * config.d_ff
    return config.d_model * config.num_experts + (experts + config.num_shared_experts) * swiglu


def _activation_bytes(config):
    """Per token, of the whole model; see `step_bytes`."""
    between = BYTES[config.dtype] * config.d_model
    if not config.remat:
        return config.num_layers * activation_bytes(config) + 2 * between
    kept = config.num_layers * between + config.num_moe_layers * _routing_bytes(config)
    return kept + activation_bytes(config) + 2 * between


def _routing_bytes(config):
    """Per token and MoE layer: router logits, chosen ids and their weights, all of four bytes."""
    return 4 * (config.num_experts + 2 * config.num_experts_per_token)


def _slots(config):
    """Experts that compute each token: k, more under a backend that pads or computes all."""
    k = config.num_experts_per_token
    per_token = {"dense": config.num_experts, "capacity": config.capacity_factor * k}
    return per_token.get(config.expert_backend, k)
