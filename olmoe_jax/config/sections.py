"""The sections of a run's configuration: types, defaults and checks live here and nowhere else."""

import dataclasses
import difflib
import math

NORM_NAMES = ("rmsnorm", "layernorm_nonparametric")
NORM_POSITIONS = ("pre", "post")
DTYPE_NAMES = ("float32", "bfloat16")
ROUTER_SCORES = ("softmax", "sigmoid")
LOAD_BALANCING_CONVENTIONS = ("olmoe", "huggingface", "switch")


def _require(condition, field, value, expected):
    if not condition:
        raise ValueError(f"config.{field} is {value!r}: {expected}")


def _one_of(field, value, choices):
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"config.{field} is {value!r}: must be one of {', '.join(choices)}{hint}")


def _finite(config, section, name):
    """The value of a field; None, where a field may have it, passes."""
    value = getattr(config, name)
    _require(value is None or abs(value) < math.inf, f"{section}.{name}", value, "must be finite")
    return value


def _at_least(config, section, low, *names):
    expected = f"must be at least {low}" if low else "must not be negative"
    for name in names:
        value = _finite(config, section, name)
        _require(value >= low, f"{section}.{name}", value, expected)


def _positive(config, section, *names):
    """None, where a field may have it, passes."""
    for name in names:
        value = _finite(config, section, name)
        _require(value is None or value > 0, f"{section}.{name}", value, "must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a decoder-only Transformer, dense or Mixture-of-Experts.

    Attributes:
      vocab_size: tokens that may occur. The embedding and the head have `padded_vocab_size` rows;
        the rows above `vocab_size` are never targets but take part in the softmax, as in OLMoE.
      vocab_multiple: the embedding is padded up to a multiple of this many rows (OLMoE: 128).
      d_ff: width of one expert, or of the FFN of a dense layer.
      num_experts: experts per MoE layer; 0 makes every layer dense.
      num_experts_per_token: k of the top-k choice; mean experts per token under expert choice.
      num_shared_experts: experts (each of width d_ff) that every token passes through, unweighted.
      share_experts_across_layers: all MoE layers use the same `num_experts` experts, each with a
        router of its own, and shared experts of its own if there are any.
      moe_every: every `moe_every`-th layer is MoE, the last of each group (1: all; 2: 1, 3, …).
      normalize_expert_weights: divide the k chosen scores by their sum (Mixtral does).
      router: a key of `olmoe_jax.model.routing.ROUTERS` (checked there: a new router is one file).
      router_scores: what the router's logits become: "softmax" over the experts, or the "sigmoid"
        of each (DeepSeek-V3, which also divides the chosen ones by their sum).
      router_bias: a bias per expert and MoE layer, added to the scores for the choice of experts
        alone, moved by `losses.router_bias_rate`. Token choice only. Balancing is loss-free only
        with losses.load_balancing_weight=0: otherwise (the default) the loss stays beside it.
      router_dtype: dtype of the router's matrix product. float32 always but to mimic Hugging Face,
        whose bf16 models round the logits to bf16. Softmax and top-k are in float32 either way.
      expert_backend: how experts are computed; "auto" picks by platform (`model.experts`).
      capacity_factor: only for the dropping "capacity" backend.
      norm_position: "pre": h = x + attention(norm(x)); "post": h = x + norm(attention(x)) (OLMo 2,
        FlexOlmo). The same for the FFN; the final norm stays.
      qk_norm: RMS norm of the query and key projections, over their full width as in OLMoE.
      qk_norm_per_head: QK-norm over each head by itself, one scale for all of them (Qwen3-MoE).
      clip_qkv: clamp of q, k, v to ±clip_qkv, after QK-norm as in Hugging Face; None is off.
      clip_before_qk_norm: clamp before QK-norm instead, as the code that trained OLMoE does.
      sliding_window: a query sees itself and the sliding_window − 1 positions before it; None is
        the whole past.
      dtype: compute dtype. Parameters are float32.
      remat: recompute layers in the backward pass. Routing decisions are saved all the same.
    """

    vocab_size: int = 50280
    vocab_multiple: int = 1
    max_length: int = 4096
    num_layers: int = 16
    d_model: int = 2048
    num_heads: int = 16
    num_kv_heads: int = 16
    head_dim: int | None = None
    d_ff: int = 1024
    num_experts: int = 64
    num_experts_per_token: int = 8
    num_shared_experts: int = 0
    share_experts_across_layers: bool = False
    moe_every: int = 1
    router: str = "token_choice"
    router_scores: str = "softmax"
    router_bias: bool = False
    normalize_expert_weights: bool = False
    router_dtype: str = "float32"
    expert_backend: str = "auto"
    capacity_factor: float = 1.25
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    norm_position: str = "pre"
    qk_norm: bool = True
    qk_norm_per_head: bool = False
    clip_qkv: float | None = None
    clip_before_qk_norm: bool = False
    sliding_window: int | None = None
    rope_theta: float = 10000.0
    tie_embeddings: bool = False
    init_std: float = 0.02
    init_cutoff: float | None = 3.0
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        _at_least(self, "model", 1, "vocab_size", "vocab_multiple", "max_length", "num_layers")
        _at_least(self, "model", 1, "d_model", "num_heads", "num_kv_heads", "d_ff", "moe_every")
        _at_least(self, "model", 0, "num_experts", "num_shared_experts", "init_std")
        _positive(self, "model", "capacity_factor", "norm_eps", "rope_theta")
        _positive(self, "model", "head_dim", "clip_qkv", "init_cutoff", "sliding_window")
        if self.num_experts:
            _require(
                1 <= self.num_experts_per_token <= self.num_experts,
                "model.num_experts_per_token", self.num_experts_per_token,
                f"must lie in 1..model.num_experts ({self.num_experts})",
            )  # fmt: skip
        else:
            _require(
                self.num_shared_experts == 0, "model.num_shared_experts", self.num_shared_experts,
                "must be 0 in a dense model (model.num_experts=0)",
            )  # fmt: skip
            _require(
                not self.share_experts_across_layers, "model.share_experts_across_layers", True,
                "a dense model (model.num_experts=0) has none to share",
            )  # fmt: skip
        _require(
            self.num_layers % self.moe_every == 0, "model.moe_every", self.moe_every,
            f"must divide model.num_layers ({self.num_layers})",
        )  # fmt: skip
        _require(
            self.num_heads % self.num_kv_heads == 0, "model.num_kv_heads", self.num_kv_heads,
            f"must divide model.num_heads ({self.num_heads})",
        )  # fmt: skip
        if self.head_dim is None:
            _require(
                self.d_model % self.num_heads == 0, "model.num_heads", self.num_heads,
                f"must divide model.d_model ({self.d_model}), or set model.head_dim",
            )  # fmt: skip
        halves = self.head_size % 2 == 0
        _require(halves, "model.head_dim", self.head_size, "must be even (rotary halves)")
        _require(
            self.qk_norm or not self.qk_norm_per_head,
            "model.qk_norm_per_head", True, "needs model.qk_norm",
        )  # fmt: skip
        _require(
            not self.clip_before_qk_norm or (self.qk_norm and self.clip_qkv is not None),
            "model.clip_before_qk_norm", True, "needs model.qk_norm and model.clip_qkv",
        )  # fmt: skip
        _require(
            not self.router_bias or (self.num_experts and self.router == "token_choice"),
            "model.router_bias", True,
            "needs experts (model.num_experts) that tokens choose (model.router=token_choice)",
        )  # fmt: skip
        _one_of("model.router_scores", self.router_scores, ROUTER_SCORES)
        _one_of("model.norm_position", self.norm_position, NORM_POSITIONS)
        _one_of("model.router_dtype", self.router_dtype, DTYPE_NAMES)
        _one_of("model.norm", self.norm, NORM_NAMES)
        _one_of("model.dtype", self.dtype, DTYPE_NAMES)

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) has experts."""
        return self.num_experts > 0 and layer % self.moe_every == self.moe_every - 1

    @property
    def num_moe_layers(self) -> int:
        """Number of layers with experts."""
        return self.num_layers // self.moe_every if self.num_experts else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run trains on.

    Attributes:
      path: directory written by `experiments.prepare_data`, or "embedded": the offline corpus that
        every installation can build, prepared on first use.
      tokenizer: tokenizer.json that the prepared data must have been made with; None accepts the
        data's own. For the embedded corpus: tokenise with this file instead of training one.
      sequence_length: tokens per window. Must equal the prepared data's.
      start_step: first batch of the data order; an annealing or upcycled run continues from here.
      mask_repetitive_windows: leave windows out of the loss that repeat an n-gram of 1..13 tokens
        at least 32 times in a row, as the code that trained OLMoE does.
      mask_documents: attention does not cross the borders of documents inside a window, in
        training, validation and recorded analyses (`olmoe_jax.training.step` has the details). Off,
        as OLMoE trained, a token sees all that precedes it in its window.
      workers: processes that read ahead; 0 reads in the training process.
      validation_windows: windows evaluated at every checkpoint, spread over the validation split;
        0: all.
    """

    path: str = "embedded"
    tokenizer: str | None = None
    sequence_length: int = 4096
    start_step: int = 0
    mask_repetitive_windows: bool = False
    mask_documents: bool = False
    workers: int = 0
    validation_windows: int = 64

    def __post_init__(self):
        _at_least(self, "data", 2, "sequence_length")
        _at_least(self, "data", 0, "start_step", "workers", "validation_windows")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossesConfig:
    """Weights and conventions of the losses (`olmoe_jax.losses` has the formulas).

    Attributes:
      load_balancing_weight: of the loss; expert choice is balanced by construction and ignores it.
      load_balancing_group: consecutive sequences over which the load-balancing loss takes its
        statistics, expert choice selects and capacity counts; 0: the whole batch. OLMoE: 4.
      count_masked: keep masked positions in the cross entropy's denominator (batch · length), as
        the code that trained OLMoE does; False divides by the real targets.
      router_bias_rate: how far a step moves each bias of `model.router_bias`
        (`training.balancing`); 0 leaves them as they are, as DeepSeek-V3 does towards the end. It
        takes no loss away: load_balancing_weight=0 does.
    """

    load_balancing_weight: float = 0.01
    load_balancing_convention: str = "olmoe"
    load_balancing_group: int = 0
    router_z_weight: float = 0.001
    count_masked: bool = False
    router_bias_rate: float = 0.001

    def __post_init__(self):
        _at_least(self, "losses", 0, "load_balancing_weight", "load_balancing_group")
        _at_least(self, "losses", 0, "router_z_weight", "router_bias_rate")
        convention = self.load_balancing_convention
        _one_of("losses.load_balancing_convention", convention, LOAD_BALANCING_CONVENTIONS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule, counted in tokens.

    Attributes:
      warmup_tokens: linear rise from warmup_start_fraction · learning_rate to learning_rate.
      decay_tokens: token count at which the schedule reaches final_fraction · learning_rate and
        stays there; 0: the run's last step.
      schedule: "cosine", "linear" (annealing: final_fraction 0), or "constant".
      decay_norms, decay_embeddings: whether weight decay covers norm scales; embedding and head.
    """

    learning_rate: float = 4e-4
    schedule: str = "cosine"
    warmup_tokens: int = 0
    warmup_start_fraction: float = 0.1
    decay_tokens: int = 0
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_norms: bool = True
    decay_embeddings: bool = True
    clip_norm: float = 1.0

    def __post_init__(self):
        _one_of("optimizer.schedule", self.schedule, ("cosine", "linear", "constant"))
        _positive(self, "optimizer", "learning_rate", "clip_norm", "eps")
        _at_least(self, "optimizer", 0, "warmup_tokens", "decay_tokens", "weight_decay")
        for name in ("warmup_start_fraction", "final_fraction"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"optimizer.{name}", value, "must lie in 0..1")
        for name in ("beta1", "beta2"):  # with 1 a moment would never see a gradient
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name}", value, "must lie in 0..1, below 1")
        if self.decay_tokens and self.schedule != "constant":
            _require(
                self.warmup_tokens <= self.decay_tokens,
                "optimizer.warmup_tokens", self.warmup_tokens,
                f"must not exceed optimizer.decay_tokens ({self.decay_tokens})",
            )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The loop.

    Attributes:
      batch_size: sequences per step over all devices and processes.
      micro_batches: parts in which a batch is computed; changes memory, never the gradient.
      initial_checkpoint: a model directory to start from (any kind that `olmoe_jax.load` takes).
      initial_optimizer_state: also take the optimizer's moments from it: a step directory of
        another run's `resume/`.
      stop_on_nan: stop at a loss or gradient that is not finite (always reported).
      spike_factor: report a gradient norm above this many times its running mean; 0 is off.
    """

    num_steps: int = 1000
    seed: int = 0
    batch_size: int = 8
    micro_batches: int = 1
    log_interval: int = 1
    initial_checkpoint: str | None = None
    initial_optimizer_state: bool = False
    stop_on_nan: bool = True
    spike_factor: float = 10.0

    def __post_init__(self):
        _at_least(self, "training", 1, "num_steps", "batch_size", "micro_batches", "log_interval")
        _at_least(self, "training", 0, "seed", "spike_factor")
        # What the data's order and JAX's random keys tell apart.
        _require(self.seed < 2**32, "training.seed", self.seed, "must be below 2**32")
        _require(
            self.batch_size % self.micro_batches == 0, "training.micro_batches", self.micro_batches,
            f"must divide training.batch_size ({self.batch_size})",
        )  # fmt: skip
        _require(
            self.initial_checkpoint is not None or not self.initial_optimizer_state,
            "training.initial_optimizer_state", True, "needs training.initial_checkpoint",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept.

    Attributes:
      interval: steps between checkpoints; parameters of every one are kept for ever, step 0 and the
        last step included.
      full_state_at: steps whose whole train state (with the optimizer's) is kept for ever as well.
      dtype: dtype of the kept parameters; the resume state stays float32.
    """

    interval: int = 100
    full_state_at: tuple[int, ...] = ()
    dtype: str = "float32"

    def __post_init__(self):
        _at_least(self, "checkpoint", 1, "interval")
        _one_of("checkpoint.dtype", self.dtype, DTYPE_NAMES)
        for step in self.full_state_at:
            _require(
                step > 0 and step % self.interval == 0, "checkpoint.full_state_at", step,
                f"must be a multiple of checkpoint.interval ({self.interval})",
            )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1: all that remain."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            valid = size >= 1 or size == -1
            _require(valid, f"mesh.{name}", size, "must be positive, or -1 for the rest")
        _require(list(sizes.values()).count(-1) <= 1, "mesh", sizes, "only one axis may be -1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run: what `experiments.train` takes and what its workdir's config.json holds."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    losses: LossesConfig = LossesConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        _require(
            self.data.sequence_length <= self.model.max_length,
            "data.sequence_length", self.data.sequence_length,
            f"must not exceed model.max_length ({self.model.max_length})",
        )  # fmt: skip
        group, batch = self.losses.load_balancing_group, self.training.batch_size
        micro_batch = batch // self.training.micro_batches
        if group:
            _require(
                micro_batch % group == 0, "losses.load_balancing_group", group,
                f"must divide a micro-batch ({batch} sequences / {self.training.micro_batches} "
                f"micro-batches = {micro_batch}); 0 takes the whole batch",
            )  # fmt: skip
        elif self.model.num_experts and (
            self.model.router == "expert_choice" or self.model.expert_backend == "capacity"
        ):
            _require(
                self.training.micro_batches == 1, "losses.load_balancing_group", group,
                "expert choice and capacity over the whole batch need training.micro_batches=1; "
                "name a group",
            )  # fmt: skip

    @property
    def tokens_per_step(self) -> int:
        """Input tokens of one step, over all devices."""
        return self.training.batch_size * self.data.sequence_length
