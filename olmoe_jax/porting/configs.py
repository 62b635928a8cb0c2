"""config.json of Hugging Face ↔ ModelConfig, in both spellings; what other readers make of it.

transformers 4 writes `rope_theta`, `rope_scaling` and `torch_dtype`, 5 `rope_parameters` and
`dtype`. Both are read; both are written, because 4.57 silently takes its default for a spelling
that it does not know. The fields of each family are in `tables`.
"""

import hashlib
import json

from olmoe_jax import config as config_lib
from olmoe_jax.porting import families, training_format, translation

read_training = training_format.read
write_training = training_format.write
token_ids = training_format.token_ids

# Training, bookkeeping, token ids, and the generation settings that version 4 wrote here too. The
# dtype is that of the tensors themselves.
_UNUSED = tuple(
    """
    model_type transformers_version _name_or_path name_or_path _commit_hash dtype torch_dtype
    attention_dropout use_cache output_attentions output_hidden_states output_router_logits
    router_aux_loss_coef return_dict torchscript use_bfloat16 tf_legacy_loss tokenizer_class
    _attn_implementation_autoset attn_implementation _attn_implementation prefix
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    id2label label2id num_labels problem_type finetuning_task task_specific_params
    tie_encoder_decoder cross_attention_hidden_size
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()
)
# Fields that a config.json of any class may have, and that must be off.
_OFF = {
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    "partial_rotary_factor": 1.0,
    "rope_parameters": None,  # but for theta: `_with_one_rope`
    "rope_scaling": None,
}
# Of allenai/gpt-neox-olmo-dolma-v1_5, computed from the file in allenai/OLMo.
_OLMOE_TOKENIZER = "161e65c584f763168c143f55629bfa7e62e8a01a172ca9783e027bee6a005629"


def read(config, where) -> tuple[families.Family, config_lib.ModelConfig]:
    """The family and the ModelConfig (compute dtype float32) of a parsed config.json.

    Args:
      where: the folder, for messages.

    Raises:
      ValueError: the architecture is not covered (the message says what it lacks, or which are),
        or a field has a value that is (every such field is listed).
    """
    where = f"{where}: config.json"
    family = _family(config, where)
    values = _with_one_rope(config, where)
    values = _with_one_name(values, family, where)
    fixed = _OFF | {"architectures": [family.architecture]} | _head_dim(values, family)
    return family, translation.to_model(family, values, where, fixed=fixed, unused=_UNUSED)


def _family(config, where):
    known = ", ".join(families.FAMILIES)
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ValueError(f"{where}: model_type is {kind!r}: expected a name; covered are {known}")
    if kind in families.UNSUPPORTED:
        lacking = families.UNSUPPORTED[kind]
        raise ValueError(f"{where}: {kind} is not covered: {lacking}; covered are {known}")
    if kind not in families.FAMILIES:
        raise ValueError(f"{where}: model_type is {kind!r}: covered are {known}")
    return families.FAMILIES[kind]


def _with_one_rope(config, where):
    """`rope_parameters` and `rope_scaling` that only name theta become `rope_theta`."""
    values = dict(config)
    for name in ("rope_parameters", "rope_scaling"):
        given = values.get(name)
        if given is None:
            values.pop(name, None)
            continue
        rest = dict(given) if isinstance(given, dict) else {"": given}
        kinds = {rest.pop("rope_type", "default"), rest.pop("type", "default")}
        theta, whole = rest.pop("rope_theta", None), rest.pop("partial_rotary_factor", 1.0) == 1.0
        if rest or not whole or kinds != {"default"}:
            continue  # stays, as a field that is not covered
        del values[name]
        if values.get("rope_theta") is None and theta is not None:
            values["rope_theta"] = theta
        if theta is not None and values["rope_theta"] != theta:
            raise ValueError(
                f"{where}: rope_theta is {values['rope_theta']!r} but {name} says {theta!r}: "
                "versions of transformers differ in which one they take; leave the right one"
            )
    return values


def _head_dim(values, family):
    """{"head_dim": the one value} of a class that knows no other than hidden_size / heads."""
    names = ("hidden_size", "num_attention_heads")
    width, heads = (values.get(name, family.fields[name][1]) for name in names)
    if "head_dim" not in family.fixed or not type(width) is type(heads) is int or not heads:
        return {}
    return {"head_dim": width // heads}


def _with_one_name(values, family, where):
    """`num_experts` and `num_local_experts` are one field under two names."""
    names = ("num_experts", "num_local_experts")
    for name, other in (names, names[::-1]):
        if name in family.fields and other in values:
            value = values.pop(other)
            if values.setdefault(name, value) != value:
                raise ValueError(f"{where}: {name} is {values[name]!r} but {other} is {value!r}")
    return values


def write(model_config, *, dtype, eos_token_id=None, pad_token_id=None) -> dict:
    """config.json of a model trained here, for transformers 4 and 5.

    Args:
      dtype: name of the dtype of the stored tensors.

    Raises:
      ValueError: no class of transformers computes this model (`family_of`).
    """
    family = family_of(model_config)
    return _written(family, model_config) | {
        "torch_dtype": dtype,
        "dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "use_cache": True,
    }


def _written(family, c):
    out = {"architectures": [family.architecture], "model_type": family.name}
    for name, (field, _) in family.fields.items():
        out[name] = c.padded_vocab_size if field == "vocab_size" else getattr(c, field)
    if out.get("head_dim", 0) is None:
        del out["head_dim"]
    out |= {"rope_scaling": None}
    out |= {"rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta}}
    return out | {name: value for name, value in family.fixed.items() if value is not None}


def family_of(model_config) -> families.Family:
    """The family whose class computes what `model_config` does.

    Raises:
      ValueError: none does; the message has the nearest and the options that it lacks.
    """
    lacking = {}
    for name, family in families.FAMILIES.items():
        try:
            _, theirs = read(_written(family, model_config), "")
        except ValueError:
            continue
        lacking[name] = translation.differences(model_config, theirs)
        dense = not any("/moe/" in row.ours for row in family.rows)
        if dense != (model_config.num_experts == 0):
            lacking[name].append(f"num_experts={model_config.num_experts}")
    nearest = min(lacking, key=lambda name: len(lacking[name]))
    if lacking[nearest]:
        raise ValueError(
            "no class of transformers computes this model; the nearest is "
            f"{families.FAMILIES[nearest].architecture}, but here {'; '.join(lacking[nearest])}"
        )
    return families.FAMILIES[nearest]


def with_dtype(config, dtype) -> dict:
    """A config.json as it was, but for the dtype of its tensors."""
    names = [name for name in ("torch_dtype", "dtype") if name in config]
    return config | dict.fromkeys(names or ("torch_dtype", "dtype"), dtype)


def reader_warnings(family, model_config, tokenizer_json) -> tuple[str, ...]:
    """What other programs would compute differently, one line for each cause.

    Args:
      tokenizer_json: bytes of tokenizer.json, or None where the folder has none.

    Source: the readers' code, vLLM `olmoe.py`, SGLang 0.5.23 and llama.cpp (late 2025).
    """
    c, out = model_config, []
    if family.name != "olmoe":
        return ()
    if c.normalize_expert_weights:
        out.append("vLLM, SGLang and llama.cpp do not renormalise the experts' weights (this model "
                   "does: norm_topk_prob=true)")  # fmt: skip
    if c.norm_eps != 1e-5:
        out.append(f"vLLM, SGLang and llama.cpp take rms_norm_eps=1e-05 (this model: {c.norm_eps})")
    if c.clip_qkv is not None:
        out.append(f"vLLM, SGLang and llama.cpp do not clip q, k, v (this model: {c.clip_qkv})")
    if c.tie_embeddings:
        out.append("vLLM, SGLang and llama.cpp need a head of its own (this model ties it to the "
                   "embedding)")  # fmt: skip
    if c.num_kv_heads != c.num_heads:
        out.append(f"SGLang and llama.cpp do not load num_key_value_heads={c.num_kv_heads} below "
                   f"num_attention_heads={c.num_heads}")  # fmt: skip
    if tokenizer_json is None:
        out.append("vLLM, SGLang and llama.cpp look for the tokenizer in the folder: it has none")
    else:
        try:
            known = tokenizer_fingerprint(tokenizer_json) == _OLMOE_TOKENIZER
        except ValueError as error:
            out.append(f"vLLM, SGLang and llama.cpp will not open the tokenizer: {error}")
        else:
            if not known:
                out.append("llama.cpp converts only tokenizers of its own list: this one is not "
                           "OLMoE's, so its converter may refuse the folder")  # fmt: skip
    return tuple(out)


def tokenizer_fingerprint(tokenizer_json) -> str:
    """SHA-256 of the merges of a byte-pair tokenizer.json and of the ids that they make.

    Two files that differ in added tokens or in how they spell merges have the same; llama.cpp knows
    a tokenizer by the ids of a text, which come from the same numbers.

    Raises:
      ValueError: it could not be read as a tokenizer.json.
    """
    try:
        model = json.loads(tokenizer_json)["model"]
        merges, vocab = model.get("merges") or [], model.get("vocab") or {}
        merges = [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in merges]
        words = ["".join(pair) for pair in merges]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"tokenizer.json could not be read ({reason})") from None
    ids = [vocab.get(word) for word in words] if isinstance(vocab, dict) else []
    return hashlib.sha256(json.dumps([merges, ids]).encode()).hexdigest()
