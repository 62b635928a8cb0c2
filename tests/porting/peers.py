"""Tiny models with random weights, written by transformers: what the port is held against.

Every setting differs from its class's default, so that one that is overlooked shows.
"""

import copy
import dataclasses

import numpy as np
import pytest

from olmoe_jax import config as config_lib

VOCAB, LAYERS, D_MODEL, HEADS, D_FF, EXPERTS, TOP_K = 61, 3, 24, 6, 20, 7, 3
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": D_MODEL, "intermediate_size": D_FF,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
    "max_position_embeddings": 37, "rope_theta": 700.0, "initializer_range": 0.3,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
_MODEL = config_lib.ModelConfig(
    vocab_size=VOCAB, max_length=37, num_layers=LAYERS, d_model=D_MODEL, num_heads=HEADS,
    num_kv_heads=HEADS, d_ff=D_FF, num_experts=EXPERTS, num_experts_per_token=TOP_K, qk_norm=False,
    norm_eps=3e-4, rope_theta=700.0, init_std=0.3, init_cutoff=None,
)  # fmt: skip
_EPS = {"rms_norm_eps": 3e-4}
_MOE = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K} | _EPS
_DENSE = {"num_experts": 0}

# Family: (model_type, settings of transformers beside _SIZES, ours beside _MODEL).
_FAMILIES = {
    "OLMoE": ("olmoe", _MOE, {"qk_norm": True}),
    "Mixtral": (
        "mixtral",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K} | _EPS,
        {"normalize_expert_weights": True},
    ),
    "Llama": ("llama", _EPS | {"head_dim": 4}, _DENSE | {"head_dim": 4}),
    "OLMo": ("olmo", {}, _DENSE | {"norm": "layernorm_nonparametric", "norm_eps": 1e-5}),
    "OLMo 2": ("olmo2", _EPS, _DENSE | {"norm_position": "post", "qk_norm": True}),
    "FlexOlmo": ("flex_olmo", _MOE, {"norm_position": "post", "qk_norm": True}),
    "Qwen3-MoE": (
        "qwen3_moe",
        _MOE | {"moe_intermediate_size": D_FF, "intermediate_size": 44, "head_dim": 4},
        {"qk_norm": True, "qk_norm_per_head": True, "head_dim": 4},
    ),
}
# Option: (theirs, ours).
_OPTIONS = {
    "norm_topk_prob": ({"norm_topk_prob": True}, {"normalize_expert_weights": True}),
    "grouped-query": ({"num_key_value_heads": 2}, {"num_kv_heads": 2}),
    "clip_qkv": ({"clip_qkv": 0.5}, {"clip_qkv": 0.5}),
    "tied": ({"tie_word_embeddings": True}, {"tie_embeddings": True}),
    "sliding window": ({"sliding_window": 5}, {"sliding_window": 5}),
    "head_dim": ({"head_dim": 6}, {"head_dim": 6}),  # heads · head_dim is not d_model
}
_OPTIONS_OF = {
    "OLMoE": ("norm_topk_prob", "grouped-query", "clip_qkv", "tied"),
    "Mixtral": ("grouped-query", "tied", "head_dim", "sliding window"),
    "Llama": ("grouped-query", "tied", "head_dim"),
    "OLMo": ("grouped-query", "clip_qkv", "tied", "head_dim"),
    "OLMo 2": ("grouped-query", "tied", "head_dim"),
    "FlexOlmo": ("norm_topk_prob", "grouped-query", "tied", "head_dim"),
    "Qwen3-MoE": ("norm_topk_prob", "grouped-query", "tied", "head_dim"),
}
PLAIN, TOGETHER = "plain", "all together"
FAMILIES = tuple(_FAMILIES)
OPTIONS = (PLAIN, *_OPTIONS, TOGETHER)


def _case(family, options):
    model_type, theirs, ours = _FAMILIES[family]
    for option in options:
        theirs, ours = theirs | _OPTIONS[option][0], ours | _OPTIONS[option][1]
    return model_type, theirs, ours


def _cases():
    for family, options in _OPTIONS_OF.items():
        yield f"{family}, {PLAIN}", _case(family, ())
        for option in options:
            yield f"{family}, {option}", _case(family, (option,))
        yield f"{family}, {TOGETHER}", _case(family, options)


# "family, option" → (model_type, settings of transformers, our changes).
CASES = dict(_cases())


def libraries():
    """(torch, transformers); skips the test where they are missing or older than version 5."""
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip(
        "transformers", minversion="5.0", reason="needs transformers 5"
    )
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers


def expected_config(case) -> config_lib.ModelConfig:
    """What reading the folder of `case` must give."""
    return dataclasses.replace(_MODEL, **CASES[case][2])


def make(case, seed=0):
    """The transformers model of `case`, float32; norm scales are not 1, routers not 0."""
    torch, transformers = libraries()
    model_type, settings, _ = CASES[case]
    config = transformers.AutoConfig.for_model(model_type, **_SIZES | settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + (1 if parameter.ndim == 1 else 0))
    return model.float().eval()


def save(case, directory, dtype="float32", max_shard_size=None, seed=0):
    """Writes the folder of `case` and returns its model, which computes in float32.

    Args:
      dtype: "float32", "bfloat16" or "float16", in the folder; the returned model's weights are
        rounded to it. (A model cast as a whole would round its rotary frequencies as well.)
      max_shard_size: bytes of one file, or a string such as "20KB"; None: one file.
    """
    torch, _ = libraries()
    model, kind = make(case, seed), getattr(torch, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(kind))
    more = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    copy.deepcopy(model).to(kind).save_pretrained(directory, **more)
    return model


def run(model, tokens):
    """(logits [b, l, v], router logits [layers, b, l, e] or None) of a transformers model, float32.

    Router logits are taken from the router's input: some versions return probabilities as such.
    """
    torch, _ = libraries()
    seen, hooks = [], []

    def record(module, arguments, _):
        hidden = arguments[0].detach().reshape(-1, module.weight.shape[1])
        seen.append((hidden @ module.weight.detach().T).float().numpy())

    for name, module in model.named_modules():
        if name.endswith(".gate"):
            hooks.append(module.register_forward_hook(record))
    with torch.no_grad():
        logits = model(torch.tensor(np.asarray(tokens, np.int64))).logits.float().numpy()
    for hook in hooks:
        hook.remove()
    return logits, np.array(seen).reshape(len(seen), *tokens.shape, -1) if seen else None


def tokens(b=2, length=17, seed=0):
    """Random int32 token ids [b, length]; the sliding window is shorter."""
    return np.random.default_rng(seed).integers(0, VOCAB, (b, length)).astype(np.int32)
