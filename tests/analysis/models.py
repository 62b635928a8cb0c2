"""Tiny models and texts of random tokens."""

import dataclasses

import numpy as np

from olmoe_jax.analysis import recording, texts, trace
from tests.porting import foreign, tiny

VOCAB = foreign.MODEL.vocab_size
LENGTH = 11  # of a window
EXPERTS = 7  # of `random_trace`


def folder(directory, **changes):
    """A Hugging Face folder of a random OLMoE model whose activations vary."""
    model = dataclasses.replace(foreign.MODEL, **changes)
    return foreign.write_folder(directory, dtype="float32", model=model, files={}, numbers=True)


def text(domain, tokens, *, seed=0, documents=3, length=LENGTH):
    """A text of random tokens in documents of about equal length."""
    ids = np.random.default_rng(seed).integers(0, VOCAB, tokens).astype(np.int32)
    numbers = (np.arange(tokens) * documents // tokens).astype(np.int32)
    return texts.Text(domain, ids, numbers, length)


def random_trace(tokens=5, layers=(1, 3), k=3, *, seed=0, weights=True, losses=True):
    """(A trace of random choices whose fields all differ, router logits that it follows.)"""
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, 2, (tokens, len(layers), EXPERTS))
    probs = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    ids = np.argsort(-probs, axis=-1)[..., :k].astype(np.int16)
    documents = np.cumsum(np.append(0, rng.integers(0, 2, tokens - 1))).astype(np.int32)
    block = trace.Block(
        expert_ids=ids,
        weights=np.take_along_axis(probs, ids, -1).astype(np.float32) if weights else None,
        input_ids=rng.integers(0, 50, tokens, dtype=np.int32),
        predicted_ids=rng.integers(50, 99, tokens, dtype=np.int32),
        next_ids=rng.integers(-1, 1, tokens, dtype=np.int32),
        documents=documents,
        losses=np.append(rng.random(tokens - 1, np.float32), np.nan).astype(np.float32)
        if losses
        else None,
    )
    info = trace.TraceInfo(
        model="m", checkpoint="step5-tokens2K", step=5, train_tokens=2048, domain="d é",
        layers=tuple(layers), num_experts=EXPERTS, num_experts_per_token=k, num_tokens=tokens,
        num_documents=int(documents[-1]) + 1, vocab_size=99, context_length=4, precision="bfloat16",
        near_ties=tuple(range(len(layers))),
    )  # fmt: skip
    return trace.MemoryTrace(info, block), scores


class Blocks(list):
    """Accumulates by keeping."""

    def __init__(self, info):
        super().__init__()
        self.info = info

    add = list.append


def whole(found):
    """The tokens of a trace as one block."""
    return trace.join(list(found.blocks()))


def three_texts():
    """Of three domains, the second shorter than a window."""
    return [text("a", 50, seed=1), text("b/c", 7, seed=2), text("d", 33)]


def record(model, given, output=None, **options):
    """`recording.record`, all of it, two windows at a time."""
    options = {"announce": tiny.quiet, "tokens_per_batch": 2 * LENGTH} | options
    return list(recording.record(model, given, output, **options))


def same(a, b):
    """Two Blocks are the same bits."""
    for field in dataclasses.fields(trace.Block):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), field.name)
