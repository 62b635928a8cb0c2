"""The same random weights in transformers' models and in ours give the same logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax import config as config_lib
from olmoe_jax import losses
from olmoe_jax.model import transformer

torch = pytest.importorskip("torch", reason="needs torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

FP32 = 2e-5  # order of summation over three layers, relative to the largest logit

B, LENGTH, VOCAB = 2, 17, 61
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 32,
    "initializer_range": 0.3, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MODEL = config_lib.ModelConfig(
    vocab_size=VOCAB, max_length=32, num_layers=3, d_model=24, num_heads=6, num_kv_heads=6, d_ff=20,
    num_experts=7, num_experts_per_token=3,
)  # fmt: skip
OLMOE, MIXTRAL, LLAMA, OLMO = "Olmoe", "Mixtral", "Llama", "Olmo"
EXPERTS = {
    OLMOE: {"num_experts": 7, "num_experts_per_tok": 3},
    MIXTRAL: {"num_local_experts": 7, "num_experts_per_tok": 3},
}
PLAIN = {"num_experts": 0, "qk_norm": False}

# name: (family, transformers' settings, ours)
CASES = {
    "olmoe": (OLMOE, {"norm_topk_prob": False}, {}),
    "olmoe, normalised": (OLMOE, {"norm_topk_prob": True}, {"normalize_expert_weights": True}),
    "olmoe, grouped": (OLMOE, {"num_key_value_heads": 2}, {"num_kv_heads": 2}),
    "olmoe, clipped": (OLMOE, {"clip_qkv": 0.5}, {"clip_qkv": 0.5}),
    "olmoe, tied": (OLMOE, {"tie_word_embeddings": True}, {"tie_embeddings": True}),
    "mixtral": (
        MIXTRAL,
        {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"num_kv_heads": 2, "rope_theta": 1e6, "qk_norm": False, "normalize_expert_weights": True},
    ),
    "llama": (LLAMA, {"num_key_value_heads": 3}, PLAIN | {"num_kv_heads": 3}),
    "olmo": (OLMO, {}, PLAIN | {"norm": "layernorm_nonparametric"}),
    "olmo, clipped": (
        OLMO,
        {"clip_qkv": 0.5},
        PLAIN | {"norm": "layernorm_nonparametric", "clip_qkv": 0.5},
    ),
}


def _their_model(family, settings):
    torch.manual_seed(0)
    sizes = SIZES | EXPERTS.get(family, {}) | settings
    if family != OLMO:
        sizes["rms_norm_eps"] = 1e-5
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # scales of 1 would hide a scale that is not applied
                parameter += 0.3 * torch.randn_like(parameter)
            elif "gate.weight" in name or "experts" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def _our_params(theirs, config):
    """transformers' weights ([out, in], an entry per layer) as our tree ([in, out], stacked)."""
    w = {name: value.numpy() for name, value in theirs.state_dict().items()}

    def stack(pattern, convert):
        parts = [convert(w[f"model.layers.{i}.{pattern}"]) for i in range(config.num_layers)]
        return np.stack(parts)

    transposed, same = lambda a: np.swapaxes(a, -1, -2), lambda a: a
    attention = {
        ours: stack(f"self_attn.{x}_proj.weight", transposed)
        for ours, x in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o"))
    }
    block = {"attention": attention}
    if config.qk_norm:
        attention["query_norm"] = {"scale": stack("self_attn.q_norm.weight", same)}
        attention["key_norm"] = {"scale": stack("self_attn.k_norm.weight", same)}
    params = {"embedding": w["model.embed_tokens.weight"], "layers": {"block_0": block}}
    if config.norm == "rmsnorm":
        block["attention_norm"] = {"scale": stack("input_layernorm.weight", same)}
        block["ffn_norm"] = {"scale": stack("post_attention_layernorm.weight", same)}
        params["final_norm"] = {"scale": w["model.norm.weight"]}
    if not config.tie_embeddings:
        params["lm_head"] = w["lm_head.weight"]
    if not config.num_experts:
        names = (("w_gate", "gate_proj"), ("w_up", "up_proj"), ("w_down", "down_proj"))
        block["ffn"] = {ours: stack(f"mlp.{x}.weight", transposed) for ours, x in names}
        return params
    if "model.layers.0.mlp.experts.gate_up_proj" not in w:
        pytest.skip(f"transformers {transformers.__version__} keeps experts apart; needs version 5")
    half = config.d_ff
    block["moe"] = {
        "router": stack("mlp.gate.weight", transposed),
        "w_gate": stack("mlp.experts.gate_up_proj", lambda a: transposed(a[:, :half])),
        "w_up": stack("mlp.experts.gate_up_proj", lambda a: transposed(a[:, half:])),
        "w_down": stack("mlp.experts.down_proj", transposed),
    }
    return params


@functools.cache
def _both(case):
    """(their logits, their router logits [n, b, l, e], our Output)."""
    family, settings, changes = CASES[case]
    theirs, config = _their_model(family, settings), dataclasses.replace(MODEL, **changes)
    seen = []
    for layer in theirs.model.layers:
        if (
            config.num_experts
        ):  # the router's own logits: some versions return softmax values as such
            layer.mlp.gate.register_forward_hook(
                lambda module, args, out: seen.append(args[0].reshape(-1, 24) @ module.weight.T)
            )
    tokens = np.random.default_rng(0).integers(0, VOCAB, (B, LENGTH))
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).logits.numpy()
    router_logits = [x.detach().numpy().reshape(B, LENGTH, -1) for x in seen]
    params = _our_params(theirs, config)
    model = transformer.Transformer(config)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))[
        "params"
    ]
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, shapes)
    out = jax.jit(functools.partial(model.apply, return_routing=True))({"params": params}, tokens)
    return logits, np.array(router_logits), out


def _close(got, want):
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=FP32 * np.abs(want).max())


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case):
    logits, router_logits, out = _both(case)
    assert logits.std() > 0.1
    _close(out.logits, logits)
    if len(router_logits):
        _close(out.routing.logits, router_logits)


@pytest.mark.parametrize("padded", [False, True])
def test_load_balancing_loss_equals_that_of_transformers(padded):
    from transformers.models.olmoe import modeling_olmoe

    _, _, out = _both("olmoe")
    mask = np.ones((B, LENGTH), bool)
    if padded:
        mask[0, 5:] = mask[1, 11:] = False
    statistics = losses.routing_statistics(
        out.routing.logits, out.routing.expert_ids, mask, convention="huggingface", group=0
    )
    ours = losses.load_balancing_loss(statistics, convention="huggingface", num_experts_per_token=3)
    theirs = modeling_olmoe.load_balancing_loss_func(
        tuple(torch.tensor(np.array(x)).reshape(-1, 7) for x in out.routing.logits), 7, 3,
        torch.tensor(mask.astype(np.int64)) if padded else None,
    )  # fmt: skip
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
