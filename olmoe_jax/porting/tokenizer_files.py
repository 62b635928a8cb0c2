"""The files by which transformers and vLLM open the tokenizer of a model trained here."""

import json

from olmoe_jax.data import tokenizer as tokenizer_lib


def token_ids(tokenizer) -> dict[str, int]:
    """{"eos_token_id": …, "pad_token_id": … if it has one} of a `data.tokenizer.Tokenizer`."""
    added = json.loads(tokenizer.json).get("added_tokens", [])
    ids = {token["content"]: token["id"] for token in added}
    found = {
        "eos_token_id": tokenizer.end_of_document,
        "pad_token_id": ids.get(tokenizer_lib.PADDING),
    }
    return {name: value for name, value in found.items() if value is not None}


def make(tokenizer, max_length) -> dict[str, bytes]:
    """{name: content} for a `data.tokenizer.Tokenizer`.

    The class that is named is the generic one of the tokenizers library, which takes tokenizer.json
    as it is, in transformers 4 and 5.
    """
    ids = token_ids(tokenizer)
    special = {"eos_token": tokenizer.decode([ids["eos_token_id"]])}
    if "pad_token_id" in ids:
        special["pad_token"] = tokenizer_lib.PADDING
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    return {
        "tokenizer.json": tokenizer.json,
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(special),
    }


def _json(value):
    return (json.dumps(value, indent=2) + "\n").encode()
