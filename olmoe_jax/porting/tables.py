"""One table per model family: where each foreign tensor and config field goes; read both ways.

To add a family: one entry in `FAMILIES`, that is its rows (tensors), its fields (config.json) and
what its class fixes. No other code knows a family by name, but for warnings about other programs
(`configs.reader_warnings`); the tests hold every entry against transformers' class of that name.

Legend of the names: `{layer}` and `{expert}` count from 0; on our side `layers/{layer}/…` is the
parameter of one layer as it lies on disk (`checkpoints.layout`), experts along the first axis.
"""

import dataclasses
import typing


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of foreign tensor and the stored array that it is (a part of).

    A tensor named without `{expert}` whose stored array has experts, and tensors that several rows
    name, are fused: their parts follow one another along the first axis, in the order of the rows.

    Attributes:
      theirs: its name ("model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight").
      ours: name on disk ("layers/{layer}/moe/w_gate").
      transpose: theirs is [out, in], as torch's Linear has it; ours are [in, out].
    """

    theirs: str
    ours: str
    transpose: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What is known about the folders of one foreign model class.

    Attributes:
      name: `model_type` of its config.json; "olmo" for the original training format.
      architecture: class that opens it ("OlmoeForCausalLM"); None where there is none.
      rows: its tensors. Rows whose stored array a model does not have are left out of it: so one
        table covers tied and untied heads.
      fields: their config field → (ModelConfig field, the default of their class).
      constants: ModelConfig fields that the class fixes, where they are not the ModelConfig's
        defaults. A model that differs is not of this family.
      fixed: their config fields that must have this value, or null, where they occur.
      unused: their config fields without any effect on what the model computes, besides those that
        every class has (`configs`).
      ignored: patterns of tensors that may occur and hold nothing (buffers).
      packed: tensors of a folder that transformers 5 saved as it computes → the rows that they are:
        [expert, out, in] with one row's outputs above the next one's; without `{expert}` it is the
        same tensor under another name.
    """

    name: str
    rows: tuple[Row, ...]
    fields: typing.Mapping[str, tuple[str, typing.Any]]
    architecture: str | None = None
    constants: typing.Mapping[str, typing.Any] = dataclasses.field(default_factory=dict)
    fixed: typing.Mapping[str, typing.Any] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    packed: typing.Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


_EDGES = (
    Row("model.embed_tokens.weight", "embedding"),
    Row("lm_head.weight", "lm_head"),
    Row("model.norm.weight", "final_norm/scale"),
)
_ATTENTION = (
    Row("model.layers.{layer}.self_attn.q_proj.weight", "layers/{layer}/attention/query", True),
    Row("model.layers.{layer}.self_attn.k_proj.weight", "layers/{layer}/attention/key", True),
    Row("model.layers.{layer}.self_attn.v_proj.weight", "layers/{layer}/attention/value", True),
    Row("model.layers.{layer}.self_attn.o_proj.weight", "layers/{layer}/attention/output", True),
)
_QK_NORM = (
    Row(
        "model.layers.{layer}.self_attn.q_norm.weight",
        "layers/{layer}/attention/query_norm/scale",
    ),
    Row("model.layers.{layer}.self_attn.k_norm.weight", "layers/{layer}/attention/key_norm/scale"),
)
# `post_attention_layernorm` is the norm in front of the FFN here …
_PRE_NORM = (
    Row("model.layers.{layer}.input_layernorm.weight", "layers/{layer}/attention_norm/scale"),
    Row("model.layers.{layer}.post_attention_layernorm.weight", "layers/{layer}/ffn_norm/scale"),
)
# … and that of the attention's output here: same name, same shape.
_POST_NORM = (
    Row(
        "model.layers.{layer}.post_attention_layernorm.weight",
        "layers/{layer}/attention_norm/scale",
    ),
    Row("model.layers.{layer}.post_feedforward_layernorm.weight", "layers/{layer}/ffn_norm/scale"),
)
_FFN = (
    Row("model.layers.{layer}.mlp.gate_proj.weight", "layers/{layer}/ffn/w_gate", True),
    Row("model.layers.{layer}.mlp.up_proj.weight", "layers/{layer}/ffn/w_up", True),
    Row("model.layers.{layer}.mlp.down_proj.weight", "layers/{layer}/ffn/w_down", True),
)
_EXPERT = "model.layers.{layer}.mlp.experts.{expert}."
_MOE = (
    Row("model.layers.{layer}.mlp.gate.weight", "layers/{layer}/moe/router", True),
    Row(_EXPERT + "gate_proj.weight", "layers/{layer}/moe/w_gate", True),
    Row(_EXPERT + "up_proj.weight", "layers/{layer}/moe/w_up", True),
    Row(_EXPERT + "down_proj.weight", "layers/{layer}/moe/w_down", True),
)
_PACKED = {
    "model.layers.{layer}.mlp.experts.gate_up_proj": (
        _EXPERT + "gate_proj.weight",
        _EXPERT + "up_proj.weight",
    ),
    "model.layers.{layer}.mlp.experts.down_proj": (_EXPERT + "down_proj.weight",),
}
_MIXTRAL = "model.layers.{layer}.block_sparse_moe."
_MIXTRAL_MOE = (
    Row(_MIXTRAL + "gate.weight", "layers/{layer}/moe/router", True),
    Row(_MIXTRAL + "experts.{expert}.w1.weight", "layers/{layer}/moe/w_gate", True),
    Row(_MIXTRAL + "experts.{expert}.w3.weight", "layers/{layer}/moe/w_up", True),
    Row(_MIXTRAL + "experts.{expert}.w2.weight", "layers/{layer}/moe/w_down", True),
)
_MIXTRAL_PACKED = {
    "model.layers.{layer}.mlp.gate.weight": (_MIXTRAL + "gate.weight",),
    "model.layers.{layer}.mlp.experts.gate_up_proj": (
        _MIXTRAL + "experts.{expert}.w1.weight",
        _MIXTRAL + "experts.{expert}.w3.weight",
    ),
    "model.layers.{layer}.mlp.experts.down_proj": (_MIXTRAL + "experts.{expert}.w2.weight",),
}

# Config fields of transformers' classes → ModelConfig's.
_OURS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "d_ff",
    "moe_intermediate_size": "d_ff",
    "max_position_embeddings": "max_length",
    "num_experts": "num_experts",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "norm_topk_prob": "normalize_expert_weights",
    "rms_norm_eps": "norm_eps",
    "clip_qkv": "clip_qkv",
    "sliding_window": "sliding_window",
    "rope_theta": "rope_theta",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}


def _fields(rope_theta=10000.0, **defaults):
    """`Family.fields` from {their field: default of their class}, and what all of them have."""
    common = dict(rope_theta=rope_theta, tie_word_embeddings=False, initializer_range=0.02)
    return {name: (_OURS[name], default) for name, default in (defaults | common).items()}


def _constants(**different):
    """`Family.constants`: a dense model without QK-norm, but for `different`."""
    off = dict(num_experts=0, num_experts_per_token=0, qk_norm=False, init_cutoff=None)
    return off | different


def _hugging_face(name, architecture, *rows, fixed=(), **more):
    """A Family of transformers: what all of them share, and `more`."""
    common = {"hidden_act": "silu", "attention_bias": False, "sliding_window": None}
    taken = (*more["fields"], *more.get("unused", ()))
    fixed = {n: v for n, v in common.items() if n not in taken} | dict(fixed)
    return Family(
        name=name, architecture=architecture, rows=sum(rows, ()), fixed=fixed,
        ignored=("*rotary_emb.inv_freq",),  # older versions saved the frequencies
        **more,
    )  # fmt: skip


FAMILIES = {
    "olmoe": _hugging_face(
        "olmoe", "OlmoeForCausalLM",
        _EDGES, _PRE_NORM, _ATTENTION, _QK_NORM, _MOE,
        fields=_fields(
            vocab_size=50304, hidden_size=2048, num_hidden_layers=16, num_attention_heads=16,
            num_key_value_heads=None, intermediate_size=2048, max_position_embeddings=4096,
            rms_norm_eps=1e-5, clip_qkv=None, num_experts=64, num_experts_per_tok=8,
            norm_topk_prob=False,
        ),
        constants=_constants(qk_norm=True),
        packed=_PACKED,
        fixed={"head_dim": None},  # the class builds q_norm hidden_size wide whatever it says
    ),
    "mixtral": _hugging_face(
        "mixtral", "MixtralForCausalLM",
        _EDGES, _PRE_NORM, _ATTENTION, _MIXTRAL_MOE,
        fields=_fields(
            vocab_size=32000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, head_dim=None, intermediate_size=14336,
            max_position_embeddings=131072, rms_norm_eps=1e-5, sliding_window=None,
            num_local_experts=8, num_experts_per_tok=2, rope_theta=1e6,
        ),
        constants=_constants(normalize_expert_weights=True),
        unused=("router_jitter_noise",),
        packed=_MIXTRAL_PACKED,
    ),
    "llama": _hugging_face(
        "llama", "LlamaForCausalLM",
        _EDGES, _PRE_NORM, _ATTENTION, _FFN,
        fields=_fields(
            vocab_size=32000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=None, head_dim=None, intermediate_size=11008,
            max_position_embeddings=2048, rms_norm_eps=1e-6,
        ),
        constants=_constants(),
        fixed={"mlp_bias": False},
        unused=("pretraining_tp",),  # the same sums in another order
    ),
    "olmo": _hugging_face(
        "olmo", "OlmoForCausalLM",
        _EDGES, _ATTENTION, _FFN,
        fields=_fields(
            vocab_size=50304, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=None, head_dim=None, intermediate_size=11008,
            max_position_embeddings=2048, clip_qkv=None,
        ),
        constants=_constants(norm="layernorm_nonparametric", norm_eps=1e-5),
    ),
    "olmo2": _hugging_face(
        "olmo2", "Olmo2ForCausalLM",
        _EDGES, _POST_NORM, _ATTENTION, _QK_NORM, _FFN,
        fields=_fields(
            vocab_size=50304, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=None, head_dim=None, intermediate_size=11008,
            max_position_embeddings=2048, rms_norm_eps=1e-5,
        ),
        constants=_constants(norm_position="post", qk_norm=True),
    ),
    "flex_olmo": _hugging_face(
        "flex_olmo", "FlexOlmoForCausalLM",
        _EDGES, _POST_NORM, _ATTENTION, _QK_NORM, _MOE,
        fields=_fields(
            vocab_size=100352, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=None, head_dim=None, intermediate_size=11008,
            max_position_embeddings=4096, rms_norm_eps=1e-6, num_experts=7, num_experts_per_tok=5,
            norm_topk_prob=False, rope_theta=5e5,
        ),
        constants=_constants(norm_position="post", qk_norm=True),
        packed=_PACKED,
    ),
    "qwen3_moe": _hugging_face(
        "qwen3_moe", "Qwen3MoeForCausalLM",
        _EDGES, _PRE_NORM, _ATTENTION, _QK_NORM, _MOE,
        fields=_fields(
            vocab_size=151936, hidden_size=2048, num_hidden_layers=24, num_attention_heads=32,
            num_key_value_heads=4, head_dim=None, moe_intermediate_size=768,
            max_position_embeddings=32768, rms_norm_eps=1e-6, num_experts=128,
            num_experts_per_tok=8, norm_topk_prob=False,
        ),
        constants=_constants(qk_norm=True, qk_norm_per_head=True),
        packed=_PACKED,
        fixed={"decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False},
        # of dense layers, and of a window that is off
        unused=("intermediate_size", "sliding_window", "max_window_layers"),
    ),
}  # fmt: skip

_BLOCK = "transformer.blocks.{layer}."
_TRAINING_ROWS = (
    Row("transformer.wte.weight", "embedding"),
    Row("transformer.ff_out.weight", "lm_head"),
    Row("transformer.ln_f.weight", "final_norm/scale"),
    Row(_BLOCK + "attn_norm.weight", "layers/{layer}/attention_norm/scale"),
    Row(_BLOCK + "ff_norm.weight", "layers/{layer}/ffn_norm/scale"),
    Row(_BLOCK + "att_proj.weight", "layers/{layer}/attention/query", True),
    Row(_BLOCK + "att_proj.weight", "layers/{layer}/attention/key", True),
    Row(_BLOCK + "att_proj.weight", "layers/{layer}/attention/value", True),
    Row(_BLOCK + "attn_out.weight", "layers/{layer}/attention/output", True),
    Row(_BLOCK + "q_norm.weight", "layers/{layer}/attention/query_norm/scale"),
    Row(_BLOCK + "k_norm.weight", "layers/{layer}/attention/key_norm/scale"),
    Row(_BLOCK + "ff_proj.weight", "layers/{layer}/ffn/w_up", True),  # up, then gate
    Row(_BLOCK + "ff_proj.weight", "layers/{layer}/ffn/w_gate", True),
    Row(_BLOCK + "ff_out.weight", "layers/{layer}/ffn/w_down", True),
    Row(_BLOCK + "ffn.router.layer.weight", "layers/{layer}/moe/router", True),
    Row(_BLOCK + "ffn.experts.mlp.w1", "layers/{layer}/moe/w_gate", True),
    Row(_BLOCK + "ffn.experts.mlp.v1", "layers/{layer}/moe/w_up", True),
    Row(_BLOCK + "ffn.experts.mlp.w2", "layers/{layer}/moe/w_down"),
)
# What trained OLMoE and OLMo: allenai/OLMo, with experts on its branch Muennighoff/MoE. The fields
# are those of `model:` in its config.yaml whose values need no translation; `training_format` has
# the others.
TRAINING = Family(
    name="olmo_training",
    rows=_TRAINING_ROWS,
    fields={
        "d_model": ("d_model", 768),
        "n_heads": ("num_heads", 12),
        "n_kv_heads": ("num_kv_heads", None),
        "n_layers": ("num_layers", 12),
        "clip_qkv": ("clip_qkv", None),
        "rope_theta": ("rope_theta", 10000.0),
        "layer_norm_eps": ("norm_eps", 1e-5),
        "max_sequence_length": ("max_length", 1024),
        "vocab_size": ("vocab_size", 50257),
        "weight_tying": ("tie_embeddings", True),
        "init_std": ("init_std", 0.02),
        "init_cutoff_factor": ("init_cutoff", None),
    },
)

UNSUPPORTED = {
    "gpt2": "learned positions, biases, and an FFN without a gate",
    "gpt_neox": "biases, norms with biases, partial rotary positions, and an FFN without a gate",
    "opt": "learned positions, biases, and an FFN without a gate",
    "phi": "biases, partial rotary positions, and an FFN without a gate",
    "gemma": "GELU in the gate of its FFN and norms whose weights count from 1",
    "gemma2": "GELU in the gate of its FFN, norms on both sides of each sublayer and soft caps",
    "qwen2": "biases of the query, key and value projections",
    "qwen2_moe": "attention biases and a shared expert with a gate",
    "deepseek": "dense layers before the first MoE layer",
    "deepseek_v2": "multi-head latent attention and scaled routing weights",
    "deepseek_v3": "multi-head latent attention and sigmoid routing with a bias per expert",
    "olmo3": "sliding windows on three layers of four",
    "granitemoe": "multipliers of the embedding, the attention, the residuals and the logits",
    "gpt_oss": "attention sinks, biases and a softmax after the choice of experts",
    "phimoe": "LayerNorm with biases, attention biases and sparsemixer routing",
    "jetmoe": "mixtures of attention heads",
    "grok": "soft-capped attention, norms on both sides of each sublayer and multipliers",
    "grok-1": "soft-capped attention, norms on both sides of each sublayer and multipliers",
}
