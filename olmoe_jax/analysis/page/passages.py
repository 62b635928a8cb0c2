"""Single texts, coloured by where their tokens go."""

from olmoe_jax import reporting
from olmoe_jax.analysis.page import experts

_TITLE = 60  # characters of the text in its title


def blocks(name, routed) -> list:
    """A Passage for each `prompt.Routed` of a model."""
    return [_passage(name, one) for one in routed]


def _passage(name, one):
    text = " ".join(one.text.split())
    text = text if len(text) <= _TITLE else text[: _TITLE - 1] + "…"
    return reporting.Passage(
        title=f"{name}: what the router sees in “{text}”", pieces=one.pieces,
        hints=tuple(f"the model expects “{piece}” next" for piece in one.predicted),
        layers=tuple(map(str, one.info.layers)), experts=one.expert_ids.transpose(1, 0, 2),
        weights=one.weights.transpose(1, 0, 2), start=experts.middle(one.info.layers),
        note="Coloured by the first expert of each token; the token under the pointer, or reached "
        "with the arrow keys, shows all of its experts with their share of the router's "
        "probability.",
    )  # fmt: skip
