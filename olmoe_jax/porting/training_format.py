"""config.yaml of allenai/OLMo, which trained OLMo and OLMoE ↔ ModelConfig.

Only its section `model` describes the model. Source: `olmo/config.py` and `olmo/model.py` of the
branches main and Muennighoff/MoE. Fields whose value needs no translation are in `tables`.

Where they clip q, k and v, they do so before QK-norm; Hugging Face does after it.
"""

from olmoe_jax import config as config_lib
from olmoe_jax.porting import families, translation

# Their defaults, where a missing field does not mean what `tables` and `_FIXED` take it for.
_DEFAULTS = {
    "include_bias": True,
    "rope": False,
    "layer_norm_type": "default",
    "layer_norm_with_affine": True,
    "attention_layer_norm_with_affine": True,
    "embedding_size": 50304,
    "mlp_ratio": 4,
    "moe_num_experts": 8,
    "moe_top_k": 2,
}
_FIXED = {
    "rope": True,
    "rope_full_precision": True,
    "alibi": False,
    "activation_type": "swiglu",
    "include_bias": False,
    "bias_for_layer_norm": False,
    "scale_logits": False,
    "embedding_layer_norm": False,
    "block_group_size": 1,  # groups have other tensor names
    "moe_dropless": True,
    "moe_shared_expert": False,
    "moe_interleave": False,
    "moe_expert_choice": False,
    "moe_expert_choice_grouped": False,
    "share_blocks": False,
    "share_moe": False,
    "share_experts": False,
}
_UNUSED = tuple(
    """
    flash_attention attention_dropout residual_dropout embedding_dropout alibi_bias_max
    eos_token_id pad_token_id init_device init_fn scale_emb_init emb_init_std precision
    moe_mlp_impl moe_log_expert_assignment moe_lbl_in_fp32 moe_loss_weight moe_zloss_weight
    moe_capacity_factor moe_expert_model_parallelism
    """.split()
)
_BLOCKS = {"sequential": False, "moe": True}  # block_type → whether it has experts


def read(config, where) -> tuple[families.Family, config_lib.ModelConfig]:
    """The family and the ModelConfig (compute dtype float32) of a parsed config.yaml.

    Args:
      where: the folder, for messages.

    Raises:
      ValueError: there is no section `model`, or a field has a value that is not covered.
    """
    where = f"{where}: config.yaml"
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ValueError(f"{where} has no section `model`: this is not a config of allenai/OLMo")
    values = _DEFAULTS | {name: _number(value) for name, value in config["model"].items()}
    more = _block(values, where) | _norms(values, where) | _vocabulary(values, where)
    more |= _heads(values, where)
    if values.get("clip_qkv") is not None and more["qk_norm"]:
        more["clip_before_qk_norm"] = True
    family = families.TRAINING
    return family, translation.to_model(
        family, values, where, more=more, fixed=_FIXED, unused=_UNUSED
    )


def _number(value):
    """YAML 1.1 takes 1e-6 for text; the loader of allenai/OLMo for a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _block(values, where):
    kind = values.pop("block_type", "sequential")
    if kind not in _BLOCKS:
        raise ValueError(f"{where}: block_type is {kind!r}: covered are {', '.join(_BLOCKS)}")
    ratio, width = values.pop("mlp_ratio"), values.pop("mlp_hidden_size", None)
    if width is None and type(ratio) is type(values.get("d_model", 768)) is int:
        width = ratio * values.get("d_model", 768)
    if type(width) is not int or width % 2:
        raise ValueError(
            f"{where}: mlp_hidden_size or mlp_ratio · d_model is {width!r}: expected an even number"
        )
    experts, chosen = values.pop("moe_num_experts"), values.pop("moe_top_k")
    # SwiGLU halves it: gate and up are one projection there.
    block = {"d_ff": width // 2, "num_experts": 0}
    if _BLOCKS[kind]:
        block |= {"num_experts": experts, "num_experts_per_token": chosen}
    return block


def _norms(values, where):
    kind, affine = values.pop("layer_norm_type"), values.pop("layer_norm_with_affine")
    qk_norm = values.pop("attention_layer_norm", False)
    qk_affine = values.pop("attention_layer_norm_with_affine")
    names = {("rms", True): "rmsnorm", ("default", False): "layernorm_nonparametric"}
    if (kind, affine) not in names:
        raise ValueError(
            f"{where}: layer_norm_type is {kind!r} and layer_norm_with_affine {affine}: "
            "covered are 'rms' and True, 'default' and False"
        )
    if qk_norm and (kind, qk_affine) != ("rms", True):
        raise ValueError(
            f"{where}: attention_layer_norm needs layer_norm_type 'rms' and "
            f"attention_layer_norm_with_affine True; they are {kind!r} and {qk_affine}"
        )
    position = "post" if values.pop("norm_after", False) else "pre"
    return {"norm": names[kind, affine], "qk_norm": bool(qk_norm), "norm_position": position}


def _vocabulary(values, where):
    """The embedding has `embedding_size` rows: as a multiple, 128 where that gives it."""
    tokens, rows = values.get("vocab_size", 50257), values.pop("embedding_size")
    if rows is None or rows == tokens:
        return {"vocab_multiple": 1}
    if not (type(tokens) is type(rows) is int and 0 < tokens <= rows):
        raise ValueError(f"{where}: embedding_size is {rows!r}, below vocab_size ({tokens!r})")
    return {"vocab_multiple": 128 if -(-tokens // 128) * 128 == rows else rows}


def _heads(values, where):
    """`multi_query_attention` is the old way to say n_kv_heads=1, or as many as heads."""
    multi_query = values.pop("multi_query_attention", None)
    if multi_query is None:
        return {}
    heads = values.get("n_heads", 12)
    meant = 1 if multi_query else heads
    if values.get("n_kv_heads") not in (None, meant):
        raise ValueError(
            f"{where}: multi_query_attention is {multi_query} but n_kv_heads "
            f"{values['n_kv_heads']}: expected {meant}"
        )
    return {"num_kv_heads": meant}


def write(model_config, *, eos_token_id=None, pad_token_id=None) -> dict:
    """config.yaml of a model, as far as it describes the model.

    Args:
      eos_token_id, pad_token_id: None leaves the code's default.

    Raises:
      ValueError: that code does not compute this model; the message has the options.
    """
    c = model_config
    theta = int(c.rope_theta) if c.rope_theta == int(c.rope_theta) else c.rope_theta
    rms = c.norm == "rmsnorm"
    model = {name: getattr(c, field) for name, (field, _) in families.TRAINING.fields.items()}
    model |= {
        "rope_theta": theta,  # an integer in their schema
        "rope": True,
        "alibi": False,
        "mlp_hidden_size": 2 * c.d_ff,
        "activation_type": "swiglu",
        "block_type": "moe" if c.num_experts else "sequential",
        "attention_layer_norm": c.qk_norm,
        "attention_layer_norm_with_affine": c.qk_norm,
        "layer_norm_type": "rms" if rms else "default",
        "layer_norm_with_affine": rms,
        "norm_after": c.norm_position == "post",
        "include_bias": False,
        "bias_for_layer_norm": False,
        "embedding_size": c.padded_vocab_size,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "init_fn": "normal",
    }
    if c.num_experts:  # the branch main does not have these fields
        experts, chosen = c.num_experts, c.num_experts_per_token
        model |= {"moe_num_experts": experts, "moe_top_k": chosen, "moe_dropless": True}
    ids = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    model |= {name: value for name, value in ids.items() if value is not None}
    _, theirs = read({"model": model}, "the config.yaml to be written")
    if lacking := translation.differences(c, theirs):
        raise ValueError(f"allenai/OLMo does not compute this model: here {'; '.join(lacking)}")
    return {"model": model}


def token_ids(config) -> dict[str, int]:
    """{"eos_token_id": …, "pad_token_id": …} as far as a config names them, for `write`.

    Args:
      config: a parsed config.yaml or config.json; of several ends of text the first is taken.
    """
    values, out = config.get("model"), {}
    values = values if isinstance(values, dict) else config
    for name in ("eos_token_id", "pad_token_id"):
        value = values.get(name)
        if isinstance(value, list) and value:
            value = value[0]
        if type(value) is int:
            out[name] = value
    return out
