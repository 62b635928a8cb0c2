"""The files by which transformers and vLLM open the tokenizer of a model trained here."""

import json

from olmoe_jax.data import tokenizer as tokenizer_lib


def make(tokenizer, max_length):
    """({name: bytes}, end-of-text id, padding id or None) for a `data.tokenizer.Tokenizer`.

    The class that is named is the generic one of the tokenizers library, which takes tokenizer.json
    as it is, in transformers 4 and 5.
    """
    content = json.loads(tokenizer.json)
    ids = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    end, pad = tokenizer.end_of_document, ids.get(tokenizer_lib.PADDING)
    special = {"eos_token": tokenizer.decode([end])}
    if pad is not None:
        special["pad_token"] = tokenizer_lib.PADDING
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    files = {
        "tokenizer.json": tokenizer.json,
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(special),
    }
    return files, end, pad


def _json(value):
    return (json.dumps(value, indent=2) + "\n").encode()
