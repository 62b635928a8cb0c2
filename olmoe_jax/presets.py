"""Named architectures: OLMoE, the models of its paper's experiments, and families to compare with.

Architecture only; how to train one is a file of `experiments/configs/`. Parameter counts are what
`accounting.num_params` gives; `tests/presets_test.py` has those that are published. Sources: the
configuration files of allenai/OLMoE (in brackets below) and allenai/OLMo, and arXiv 2409.02060; for
other families the configurations released with the weights.

The controlled experiments of the paper were run without QK-norm, whereas the released model has it:
`olmoe-64x1024-top8` is the released architecture as those experiments had it.
"""

import dataclasses
import difflib

from olmoe_jax.config import ModelConfig


def _dense(config, **changes):
    return dataclasses.replace(config, num_experts=0, num_experts_per_token=0, **changes)


def _experts(config, num_experts, d_ff, top_k, **changes):
    return dataclasses.replace(
        config, num_experts=num_experts, d_ff=d_ff, num_experts_per_token=top_k, **changes
    )


def _shape(config, num_layers, d_model, num_heads, **changes):
    num_kv_heads = changes.pop("num_kv_heads", num_heads)
    return dataclasses.replace(
        config, num_layers=num_layers, d_model=d_model, num_heads=num_heads,
        num_kv_heads=num_kv_heads, **changes,
    )  # fmt: skip


# [OLMoE-1B-7B-0924]: `mlp_ratio: 1` there means experts of width 1024, as SwiGLU halves it.
_OLMOE = ModelConfig(
    vocab_size=50280, vocab_multiple=128, max_length=4096, num_layers=16, d_model=2048,
    num_heads=16, num_kv_heads=16, d_ff=1024, num_experts=64, num_experts_per_token=8,
    norm="rmsnorm", norm_eps=1e-5, qk_norm=True, rope_theta=10000.0, tie_embeddings=False,
    init_std=0.02, init_cutoff=3.0,
)  # fmt: skip

# The paper's controlled experiments [cx5].
_CONTROLLED = dataclasses.replace(_OLMOE, qk_norm=False)

# OLMo 1B: LayerNorm without parameters, plain normal initialisation.
_OLMO = _dense(_OLMOE, d_ff=8192, norm="layernorm_nonparametric", qk_norm=False, init_cutoff=None)

_LLAMA2 = _dense(_OLMOE, vocab_size=32000, vocab_multiple=1, qk_norm=False, init_cutoff=None)

# OLMo 2 1B [official-0425]: norms on the outputs of attention and FFN, another tokenizer.
_OLMO2 = _dense(
    _OLMOE, d_ff=8192, vocab_size=100278, norm_position="post", norm_eps=1e-6, rope_theta=5e5
)

_PRESETS = {
    "olmoe-1b-7b": _OLMOE,
    # Equal cost, active and total, at four granularities, and the dense control [olmo-1b-…-cx5].
    "olmoe-8x8192-top1": _experts(_CONTROLLED, 8, 8192, 1),
    "olmoe-32x2048-top4": _experts(_CONTROLLED, 32, 2048, 4),
    "olmoe-64x1024-top8": _CONTROLLED,
    "olmoe-128x512-top16": _experts(_CONTROLLED, 128, 512, 16),
    "dense-1b": _dense(_CONTROLLED, d_ff=8192),
    # One shared expert: 31 routed beside it in the paper's text, 32 in its file [cx5-fine-shared].
    "olmoe-31x2048-top3-shared": _experts(_CONTROLLED, 31, 2048, 3, num_shared_experts=1),
    "olmoe-32x2048-top3-shared": _experts(_CONTROLLED, 32, 2048, 3, num_shared_experts=1),
    # Eight experts as wide as the dense FFN: upcycled from OLMo 1B, and its match from scratch.
    "olmoe-upcycled": _experts(_OLMO, 8, 8192, 2),
    # Token against expert choice, MoE in every second layer. The files of that pair are not public:
    # the norm and the initialisation are those of the upcycling pair of the same time.
    "olmoe-token-choice": _experts(_OLMO, 8, 8192, 2, moe_every=2),
    "olmoe-expert-choice": _experts(_OLMO, 8, 8192, 2, moe_every=2, router="expert_choice"),
    # Sizes that exist as files without a published run.
    "olmoe-8x2b": _shape(_OLMOE, 24, 3072, 24, d_ff=1536),
    "olmoe-final-double": _shape(_OLMOE, 24, 2048, 16, d_ff=1536),
    "olmoe-final-double-alt": _shape(_OLMOE, 24, 2560, 16, d_ff=1280),
    "olmoe-8x7b": _experts(_shape(_OLMOE, 32, 4096, 32), 32, 2048, 4),
    "olmoe-8x7b-a7b": _shape(_OLMOE, 32, 4096, 32, d_ff=1408),
    "olmoe-final-densecomp": _dense(_OLMOE),
    "olmoe-final-v2": dataclasses.replace(_OLMOE, vocab_size=100278),
    # Other families.
    "mixtral-8x7b": _experts(
        _shape(_LLAMA2, 32, 4096, 32, num_kv_heads=8),
        8,
        14336,
        2,
        normalize_expert_weights=True,
        rope_theta=1e6,
        max_length=32768,
    ),
    "llama2-7b": _shape(_LLAMA2, 32, 4096, 32, d_ff=11008),
    "llama2-13b": _shape(_LLAMA2, 40, 5120, 40, d_ff=13824),
    "llama2-70b": _shape(_LLAMA2, 80, 8192, 64, num_kv_heads=8, d_ff=28672),
    "olmo-1b": dataclasses.replace(_OLMO, tie_embeddings=True, max_length=2048),
    "olmo-1b-0724": _OLMO,
    "olmo2-1b": _OLMO2,
    "flexolmo-7x7b": _experts(_shape(_OLMO2, 32, 4096, 32, init_cutoff=None), 7, 11008, 5),
    "qwen3-30b-a3b": _experts(
        _shape(_OLMOE, 48, 2048, 32, num_kv_heads=4, head_dim=128, init_cutoff=None),
        128,
        768,
        8,
        vocab_size=151936,
        max_length=40960,
        norm_eps=1e-6,
        qk_norm_per_head=True,
        normalize_expert_weights=True,
        rope_theta=1e6,
    ),
}

NAMES = tuple(_PRESETS)


def get(name, **changes) -> ModelConfig:
    """The architecture called `name`, with fields of ModelConfig changed.

    >>> from olmoe_jax import presets
    >>> presets.get("olmoe-1b-7b").num_experts, presets.get("olmoe-1b-7b", num_layers=2).num_layers
    (64, 2)

    Raises:
      ValueError: there is no such preset (the nearest is named), or the changed config is invalid.
      TypeError: a change is not a field of ModelConfig.
    """
    if name not in _PRESETS:
        near = difflib.get_close_matches(name, NAMES, 1, cutoff=0.0)[0]
        raise ValueError(f"no preset {name!r}: did you mean {near!r}? There are {', '.join(NAMES)}")
    return dataclasses.replace(_PRESETS[name], **changes)
