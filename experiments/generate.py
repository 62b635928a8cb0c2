"""Continues a text with a model: greedily, the most probable token each time.

    python -m experiments.generate --model=DIR --prompt='The cat sat on' [--num_tokens=32]

DIR is a run's workdir, one of its checkpoints, an Orbax directory written by
`experiments.port_weights`, or a Hugging Face folder. The tokenizer is the one that lies with it, or
--tokenizer=FILE. Weights that have hashes are verified when they are read. Each token is a plain
forward pass over the whole text so far.
"""

import time

from absl import flags

from experiments import app
from olmoe_jax.data import tokenizer as tokenizer_lib

_MODEL = flags.DEFINE_string("model", None, "Directory of the model.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
_NUM_TOKENS = flags.DEFINE_integer("num_tokens", 32, "Tokens to add.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "tokenizer.json; default: the model's own.")


def main(argv):
    """Prints the prompt and its continuation."""
    del argv
    for flag in (_MODEL, _PROMPT):
        if not flag.value:
            raise ValueError(f"--{flag.name} is required")
    # JAX is slow to import: mistakes above come at once.
    from olmoe_jax import generation, loading
    from olmoe_jax.porting import sources

    sources.kind_of(_MODEL.value)
    tokenizer = _tokenizer()
    prompt_ids = tokenizer.encode_prompt(_PROMPT.value)
    model, params = loading.load(_MODEL.value, verify=loading.has_hashes(_MODEL.value))
    start = time.monotonic()
    ids = generation.greedy(
        model, params, prompt_ids, num_tokens=_NUM_TOKENS.value, end_token=_end_token(tokenizer)
    )
    seconds = time.monotonic() - start
    # Together: alone, a word's first token loses the space before it in some tokenizers.
    text = tokenizer.decode(prompt_ids + ids).removeprefix(tokenizer.decode(prompt_ids))
    print(_PROMPT.value + text)
    app.write_json(
        {
            "prompt": _PROMPT.value,
            "text": text,
            "prompt_ids": prompt_ids,
            "ids": ids,
            "seconds": seconds,
        }
    )


def _tokenizer():
    if _TOKENIZER.value is not None:
        return tokenizer_lib.load(_TOKENIZER.value)
    from olmoe_jax import generation

    found = generation.find_tokenizer(_MODEL.value)
    if found is None:
        raise FileNotFoundError(
            f"{_MODEL.value}: no tokenizer.json lies with this model (nor with a run's data); pass "
            "--tokenizer=FILE, the tokenizer.json that it was trained with"
        )
    return found


def _end_token(tokenizer):
    """Id of the token that ends a document, or None."""
    try:
        return tokenizer.end_of_document
    except ValueError:
        return None


if __name__ == "__main__":
    app.run(main, flags_with_json=True)
