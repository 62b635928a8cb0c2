"""The routing trace: which experts every token of a text went to, in every layer.

One trace is one checkpoint on one domain. Analyses are functions of traces and never run a model;
they read blocks of tokens, so a trace may be larger than memory.
"""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceInfo:
    """What a trace is of.

    Attributes:
      model: name of the model, the same for all its checkpoints.
      checkpoint: name of the checkpoint, as step5000-tokens20B; "" for a model that is one.
      step, train_tokens: of the checkpoint, or None where they are not known.
      domain: name of the text.
      layers: indices in the model of the MoE layers, in the order of the arrays.
      num_experts, num_experts_per_token: E and k.
      num_tokens, num_documents: in the trace.
      vocab_size: of the model; 0 where it is not known.
      context_length: tokens that were run together; 0 where it is not known.
      tokenizer: SHA-256 of the tokenizer's file, or "".
      data: what identifies text and order: two traces with equal `data` are of the same tokens.
      precision: of the router's product: "float32", "bfloat16", or "" where it is not known.
      near_ties: per layer, how many tokens had a gap between the k-th and the next logit that
        rounding to bfloat16 could close; empty where it is not known.
    """

    model: str
    checkpoint: str = ""
    step: int | None = None
    train_tokens: int | None = None
    domain: str
    layers: tuple[int, ...]
    num_experts: int
    num_experts_per_token: int
    num_tokens: int
    num_documents: int
    vocab_size: int = 0
    context_length: int = 0
    tokenizer: str = ""
    data: str = ""
    precision: str = ""
    near_ties: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Consecutive tokens of a trace.

    Attributes:
      expert_ids: int16 [tokens, layers, k], by falling weight; -1: no expert.
      weights: float32 [tokens, layers, k], softmax over all experts before any renormalisation;
        or None where the source holds no weights.
      input_ids, predicted_ids, next_ids: int32 [tokens]: the token, the model's most probable next
        token, the true next token; -1: none, or not known.
      documents: int32 [tokens], the document's number in the trace, never falling.
      losses: float32 [tokens], −log p(true next token) in nats, NaN where there is none; or None
        where the source holds no losses.
    """

    expert_ids: np.ndarray
    weights: np.ndarray | None
    input_ids: np.ndarray
    predicted_ids: np.ndarray
    next_ids: np.ndarray
    documents: np.ndarray
    losses: np.ndarray | None = None

    def __len__(self):
        return len(self.expert_ids)


class Trace(Protocol):
    """What analyses read: `info`, and the tokens in order."""

    info: TraceInfo

    def blocks(self, size: int = 65536) -> Iterator[Block]:
        """All tokens in order, at most `size` at a time."""


@dataclasses.dataclass(frozen=True)
class MemoryTrace:
    """A trace whose tokens are one Block in memory."""

    info: TraceInfo
    tokens: Block

    def blocks(self, size: int = 65536) -> Iterator[Block]:
        """All tokens in order, at most `size` at a time."""
        for start in range(0, len(self.tokens), size):
            yield cut(self.tokens, slice(start, start + size))


def join(blocks) -> Block:
    """Blocks one behind the other; what one of them lacks, the result lacks."""
    columns = {f.name: [getattr(b, f.name) for b in blocks] for f in dataclasses.fields(Block)}
    return Block(
        **{
            name: None if any(a is None for a in arrays) else np.concatenate(arrays)
            for name, arrays in columns.items()
        }
    )


def cut(block, part) -> Block:
    """The tokens `part` (a slice or a mask) of a block."""
    arrays = {f.name: getattr(block, f.name) for f in dataclasses.fields(Block)}
    return Block(**{name: None if a is None else a[part] for name, a in arrays.items()})
