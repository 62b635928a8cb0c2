"""What the router sees in a single text: its tokens, and the experts of each.

The text passes through the same recording as every other (`recording.record`), so also through a
model that is larger than memory; documents begin with its first token and no token is added.
"""

import dataclasses

import numpy as np

from olmoe_jax.analysis import recording, suites, texts, trace
from olmoe_jax.porting import sources

_ROUND = 64  # tokens that a window is a multiple of: texts of similar length share a program


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Routed:
    """One text through one model.

    Attributes:
      text: as it was given.
      info: trace.TraceInfo.
      input_ids, predicted_ids: int32 [tokens], the token, and the model's most probable next one.
      pieces, predicted: text of the same; of a character's first bytes "�", of its last all of it.
      expert_ids: int16 [tokens, layers, k], by falling weight.
      weights: float32 [tokens, layers, k], softmax over all experts before any renormalisation.
    """

    text: str
    info: trace.TraceInfo
    input_ids: np.ndarray
    predicted_ids: np.ndarray
    pieces: tuple[str, ...]
    predicted: tuple[str, ...]
    expert_ids: np.ndarray
    weights: np.ndarray


class _Kept:
    """Accumulates blocks by keeping them."""

    def __init__(self, info):
        self.info, self.blocks = info, []

    def add(self, block):
        self.blocks.append(block)


def route(model, prompts, tokenizer, **options) -> tuple[Routed, ...]:
    """Sends texts through a model, each for itself.

    Args:
      model: as of `recording.record`, which `options` are passed to.
      prompts: texts.
      tokenizer: data.tokenizer.Tokenizer of the model.
    Raises:
      FileNotFoundError, ValueError: no model; a text without tokens, or longer than the model
        takes.
    """
    checkpoint = model if isinstance(model, suites.Checkpoint) else suites.one(model)
    longest = sources.open_source(checkpoint.path).config.model.max_length
    encoded = tokenizer.encode_batch(prompts)
    for text, ids in zip(prompts, encoded, strict=True):
        if not len(ids):
            raise ValueError(f"prompt {text!r}: holds no token; give a text")
        if len(ids) > longest:
            raise ValueError(
                f"prompt {text[:40]!r}… has {len(ids):,} tokens, {checkpoint.path} takes "
                f"{longest:,} at most: shorten it, or give it as --data"
            )
    window = -(-max((len(ids) for ids in encoded), default=1) // _ROUND) * _ROUND
    given = [
        texts.Text(
            f"prompt {number}", ids.astype(np.int32), np.zeros(len(ids), np.int32),
            min(window, longest), tokenizer,
        )
        for number, ids in enumerate(encoded, 1)
    ]  # fmt: skip
    found = recording.record(checkpoint, given, accumulate=_Kept, **options)
    return tuple(_routed(text, one, tokenizer) for text, one in zip(prompts, found, strict=True))


def _routed(text, recorded, tokenizer):
    block = trace.join(recorded.accumulated.blocks)
    return Routed(
        text=text, info=recorded.info, input_ids=block.input_ids,
        predicted_ids=block.predicted_ids, pieces=pieces(block.input_ids, tokenizer),
        predicted=tuple(tokenizer.decode([token]) for token in block.predicted_ids),
        expert_ids=block.expert_ids, weights=block.weights,
    )  # fmt: skip


def pieces(ids, tokenizer) -> tuple[str, ...]:
    """What each token adds to the text; "�" until the bytes of a character are complete."""
    out, before = [], ""
    for stop in range(1, len(ids) + 1):
        # a token alone loses its leading space in some vocabularies
        text = tokenizer.decode(ids[:stop])
        complete = text.rstrip("�") if text.endswith("�") else text
        out.append(complete[len(before) :] or "�")
        before = complete if len(complete) > len(before) else before
    return tuple(out)


def to_json(routed) -> dict:
    """prompt.json, of the Routed of one model."""
    info = routed[0].info
    return {
        "model": info.model, "checkpoint": info.checkpoint,
        "prompts": [
            {
                "text": one.text,
                "tokens": [
                    {"id": i, "text": piece, "predicted": {"id": j, "text": predicted}}
                    for i, piece, j, predicted in zip(
                        one.input_ids, one.pieces, one.predicted_ids, one.predicted, strict=True
                    )
                ],
                "layers": {
                    layer: {"experts": one.expert_ids[:, row], "weights": one.weights[:, row]}
                    for row, layer in enumerate(one.info.layers)
                },
            }
            for one in routed
        ],
    }  # fmt: skip
