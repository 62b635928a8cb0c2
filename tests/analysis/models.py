"""Tiny models and texts of random tokens."""

import dataclasses

import numpy as np

from olmoe_jax.analysis import texts
from tests.porting import foreign

VOCAB = foreign.MODEL.vocab_size
LENGTH = 11  # of a window


def folder(directory, **changes):
    """A Hugging Face folder of a random OLMoE model whose activations vary."""
    model = dataclasses.replace(foreign.MODEL, **changes)
    return foreign.write_folder(directory, dtype="float32", model=model, files={}, numbers=True)


def text(domain, tokens, *, seed=0, documents=3, length=LENGTH):
    """A text of random tokens in documents of about equal length."""
    ids = np.random.default_rng(seed).integers(0, VOCAB, tokens).astype(np.int32)
    numbers = (np.arange(tokens) * documents // tokens).astype(np.int32)
    return texts.Text(domain, ids, numbers, length)


def whole(trace):
    """The tokens of a trace as one block."""
    from olmoe_jax.analysis import trace as trace_lib

    return trace_lib.join(list(trace.blocks()))
