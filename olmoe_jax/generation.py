"""Greedy text by plain forward passes: each new token computes the whole sequence again.

model, params = olmoe_jax.load("DIR")
generation.greedy(model, params, [5, 11, 2], num_tokens=8)
"""

import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from olmoe_jax.data import tokenizer as tokenizer_lib
from olmoe_jax.model import experts, transformer

SHORTEST = 64  # positions of the smallest compiled program; the next have twice as many each


def greedy(model, params, input_ids, *, num_tokens, end_token=None) -> list[int]:
    """The most probable continuation, token by token.

    The sequence is padded on the right to the next of 64, 128, 256, … positions, so that few
    programs are compiled. Padding is exact where a token's result depends on earlier tokens only:
    in dense models and under token choice. Expert choice and the "capacity" backend choose among
    all positions at hand; there nothing is padded, each length is compiled, and what is computed is
    the plain forward pass of the sequence so far (not causal: a token may be treated otherwise once
    others follow it).

    Args:
      model: a Transformer; its routing_group is ignored, as there is one sequence.
      params: its parameters, on any devices.
      input_ids: int [length], the prompt.
      num_tokens: tokens to add.
      end_token: stop behind this token, if it comes.

    Returns:
      The new tokens, `end_token` included; equal logits go to the lowest id. Ids from
      `vocab_size` on (padding of the embedding) are never chosen.

    Raises:
      ValueError: the prompt is empty, has ids that the model does not know, or is too long for
        `model.max_length` together with `num_tokens`; or the logits are not finite.
    """
    config, ids = model.config, [int(i) for i in np.asarray(input_ids).reshape(-1)]
    _check(config, ids, num_tokens)
    model, prompt = transformer.Transformer(config), len(ids)
    for _ in range(num_tokens):
        tokens = np.zeros((1, _padded(config, len(ids))), np.int32)
        tokens[0, : len(ids)] = ids
        token, finite = _next_token(model, params, tokens, len(ids))
        if not finite:
            raise ValueError(
                f"the logits behind {len(ids)} tokens are not finite: the weights hold NaN or "
                "infinities, or overflow in this dtype; load them with dtype=float32 to see which"
            )
        ids.append(int(token))
        if ids[-1] == end_token:
            break
    return ids[prompt:]


def find_tokenizer(directory) -> tokenizer_lib.Tokenizer | None:
    """The tokenizer of a model directory; None if it has none.

    Looked for are, in this order: tokenizer.json in the directory itself (a Hugging Face folder,
    prepared data); in its `source/`, where ported weights keep the files that came with them; in
    the prepared data of the run whose workdir it is, or of which it is a checkpoint; in the
    `source/` of a checkpoint in it.

    Raises:
      ValueError: that tokenizer.json is damaged.
    """
    directory = pathlib.Path(os.path.abspath(os.path.expanduser(directory)))
    runs = (directory, directory.parent.parent)  # WORKDIR, WORKDIR/checkpoints/NAME
    folders = [directory, directory / "source", *filter(None, map(data_path, runs))]
    folders += sorted(directory.glob("checkpoints/*/source"))
    for folder in folders:
        if (file := folder / "tokenizer.json").is_file():
            tokenizer = tokenizer_lib.Tokenizer(file.read_bytes(), str(file))
            tokenizer.vocab_size  # noqa: B018  checks the file
            return tokenizer
    return None


def data_path(workdir):
    """Directory of the prepared data that a run's config.json names; None if it names none."""
    try:
        return workdir / json.loads((workdir / "config.json").read_text())["data_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check(config, ids, num_tokens):
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}: must be at least 1")
    if not ids:
        raise ValueError("the prompt has no tokens: expected at least one")
    if unknown := [i for i in ids if not 0 <= i < config.vocab_size]:
        raise ValueError(
            f"the prompt has token {unknown[0]}: this model knows 0..{config.vocab_size - 1}; "
            "was it made with another model's tokenizer?"
        )
    if len(ids) + num_tokens > config.max_length:
        raise ValueError(
            f"the prompt has {len(ids)} tokens and {num_tokens} are to be added: the model's "
            f"max_length is {config.max_length}; shorten the prompt or lower num_tokens"
        )


def _padded(config, length):
    """Positions to compute for a sequence of `length` tokens."""
    if config.num_experts and (
        config.router != "token_choice" or experts.resolve(config.expert_backend) == "capacity"
    ):
        return length
    padded = SHORTEST
    while padded < length:
        padded *= 2
    return min(padded, config.max_length)


@functools.partial(jax.jit, static_argnums=0)
def _next_token(model, params, tokens, length):
    """(the token behind the first `length` of int32 [1, padded], whether its logits are finite)."""
    mask = jnp.arange(tokens.shape[1])[None] < length
    variables = {"params": params}
    features = model.apply(variables, tokens, token_mask=mask, method="features")
    last = features.hidden[0, length - 1]
    head = transformer.head_weights(params)[: model.config.vocab_size]
    logits = (head.astype(last.dtype) @ last).astype(jnp.float32)
    return jnp.argmax(logits), jnp.isfinite(logits).all()
