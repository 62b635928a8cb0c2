"""Which tokens experts take: on average, the tokens of each expert, and any token typed."""

import dataclasses
import json

import numpy as np

from olmoe_jax import reporting
from olmoe_jax.analysis import vocabulary
from olmoe_jax.analysis.page import experts

KINDS = {"input": "the token itself", "predicted": "predicted next", "next": "true next"}
SHOWN = 6  # experts of a token that is searched for


@dataclasses.dataclass(frozen=True)
class Detail:
    """How much of a model a page shows.

    Attributes:
      words: listed per expert.
      all_words: of every kind of token and rank, not of the first only.
      all_layers_together: co-activation of all layers, not of first, middle and last only.
      left_out: what is missing, in words; "" if nothing is.
    """

    words: int
    all_words: bool
    all_layers_together: bool
    left_out: str


# Tried in turn until a page is small enough.
DETAILS = (
    Detail(8, True, True, ""),
    Detail(8, False, True, "tokens of each expert, of all but one kind and rank"),
    Detail(
        4, False, False, "tokens of each expert behind the fourth and of all but one kind and "
        "rank; co-activation in all but three layers",
    ),
)  # fmt: skip


def title(name) -> str:
    """Of the table of each expert's tokens."""
    return f"{name}: tokens of each expert"


def blocks(name, found, detail) -> list:
    """Explorers of analyses.Found, which knows tokens."""
    return [_means(name, found), _each_expert(name, found, detail)]


def _rank_label(rank, info):
    return f"top-{info.num_experts_per_token}" if rank == "topk" else "top-1"


def _ranks(found):
    """Label → rank; first choices first, and of a single expert per token they are all."""
    info, held = found.known.info, {rank for _, rank in found.vocabulary}
    return {_rank_label(rank, info): rank for rank in ("topk", "top1") if rank in held}


def _kinds(found):
    held = {kind for kind, _ in found.vocabulary}
    return {label: kind for kind, label in KINDS.items() if kind in held}


def _means(name, found):
    ranks, kinds, layers = _ranks(found), _kinds(found), found.known.info.layers
    shape = (len(ranks), len(kinds), len(layers))
    arrays = {end: np.full(shape, np.nan) for end in ("value", "low", "high", "random")}
    for i, rank in enumerate(ranks.values()):
        for j, kind in enumerate(kinds.values()):
            one = found.vocabulary.get((kind, rank))
            if one is None:
                continue
            arrays["random"][i, j] = 100 * one.random
            for end in ("value", "low", "high"):
                if getattr(one.mean, end) is not None:
                    arrays[end][i, j] = 100 * getattr(one.mean, end)
    known = not np.isnan(arrays["low"]).all()
    axes = {"rank": tuple(ranks), "token": tuple(kinds), "layer": tuple(map(str, layers))}
    return reporting.Explorer(
        title=f"{name}: vocabulary specialisation", kind="lines", x="layer", series="token",
        cube=reporting.Cube(
            axes=axes, values=arrays["value"], low=arrays["low"] if known else None,
            high=arrays["high"] if known else None,
        ),
        x_title="layer", y_title="of a token's occurrences, at its favourite expert, %",
        start={"rank": "top-1"} if "top-1" in ranks else {},
        level=reporting.Cube(axes=axes, values=arrays["random"]), level_name="chance",
        note=f"Mean over tokens that occur at least {vocabulary.MIN_COUNT} times.",
    )  # fmt: skip


def _each_expert(name, found, detail):
    kinds, ranks, info = _kinds(found), _ranks(found), found.known.info
    start = {"rank": "top-1"} if "top-1" in ranks else {}
    if not detail.all_words:
        kinds = dict(list(kinds.items())[:1])
        ranks = dict(list(ranks.items())[-1:])
    layers, labels = tuple(map(str, info.layers)), experts.numbers(info.num_experts)
    values = np.empty((len(kinds), len(ranks), len(layers), len(labels)), object)
    values.fill(())
    for i, kind in enumerate(kinds.values()):
        for j, rank in enumerate(ranks.values()):
            for row in range(len(layers)) if (kind, rank) in found.vocabulary else ():
                own = vocabulary.expert_tokens(
                    found.known, kind, rank, row, most=detail.words, decode=found.decode
                )
                for expert, words in own.items():
                    values[i, j, row, expert] = tuple(_row(word) for word in words)
    return reporting.Explorer(
        title=title(name), kind="table",
        cube=reporting.Cube(
            axes={"token": tuple(kinds), "rank": tuple(ranks), "layer": layers, "expert": labels},
            values=values,
        ),
        columns=("token", "of its occurrences that go there", "times"),
        start=start | {"layer": _clearest_layer(found)},
        note=f"Of tokens that occur at least {vocabulary.MIN_COUNT} times, those that go to the "
        "expert most reliably.",
    )  # fmt: skip


def _row(word):
    return (quoted(word), f"{word.share:.0%}", f"{word.count:,}")


def quoted(word) -> str:
    """A token as text whose spaces and line ends can be seen, or its number."""
    return json.dumps(word.text, ensure_ascii=False) if word.text else f"number {word.id}"


def _clearest_layer(found):
    """Where tokens decide most: label of the layer."""
    one = min(found.vocabulary, key=lambda key: (key[1] != "top1", key[0] != "input"))
    return str(found.known.info.layers[int(found.vocabulary[one].mean.value.argmax())])


def search(name, found, num_bytes) -> reporting.Search | None:
    """A search over the most frequent tokens, as many as `num_bytes` of a page hold; None: none."""
    known, kinds, ranks = found.known, _kinds(found), _ranks(found)
    info, shown = known.info, min(SHOWN, found.known.info.num_experts)
    first = next(iter(kinds.values()))
    occurred = {kind: _occurrences(known, kind) for kind in kinds.values()}
    slabs = len(kinds) * len(ranks) * len(info.layers)
    # base64 of an expert (one byte or two) and a share; the name and a count for each kind
    each = slabs * shown * (2 if info.num_experts < 255 else 3) * 4 / 3 + 14 + 5 * len(kinds)
    total = int((occurred[first] > 0).sum())
    count = min(total, int(num_bytes / each))
    if not count:
        return None
    tokens = np.argsort(-occurred[first], kind="stable")[:count]
    chosen = np.full((len(kinds), len(ranks), len(info.layers), count, shown), -1, np.int32)
    shares = np.zeros(chosen.shape, np.float32)
    for i, kind in enumerate(kinds.values()):
        for j, rank in enumerate(ranks.values()):
            for row in range(len(info.layers)) if (kind, rank) in known.vocabulary else ():
                _favourites(known, kind, rank, row, tokens, chosen[i, j, row], shares[i, j, row])
    counts = np.stack([_at(occurred[kind], tokens) for kind in kinds.values()])[:, None, None]
    left = total - count
    return reporting.Search(
        title=f"{name}: search for a token", label="token",
        names=tuple(found.decode(int(t)) if found.decode else f"number {t}" for t in tokens),
        axes={
            "token is": tuple(kinds), "rank": tuple(ranks), "layer": tuple(map(str, info.layers))
        },
        counts=counts, experts=chosen, shares=shares, start={"layer": _clearest_layer(found)},
        note=f"Per cent of the token's occurrences, for its {shown} favourite experts. "
        + (f"The {count:,} most frequent tokens; {left:,} rarer ones are left out for the page's "
           "size." if left else f"All {count:,} tokens of the text."),
    )  # fmt: skip


def _occurrences(known, kind):
    """int64 [largest id + 1], over all folds."""
    tally = known.occurrences[kind]
    tokens = (tally.keys // np.uint32(known.folds)).astype(np.int64)
    return np.bincount(tokens, tally.counts).astype(np.int64)


def _at(occurrences, tokens):
    """Occurrences of tokens, 0 for ids that never came."""
    inside = tokens < len(occurrences)
    return np.where(inside, occurrences[np.where(inside, tokens, 0)], 0)


def _favourites(known, kind, rank, row, tokens, experts_out, shares_out):
    """Fills experts and shares, [tokens, shown], of one layer."""
    found = vocabulary.entries(known, kind, rank, row)
    places = np.full(max(int(tokens.max()), len(found.occurrences)) + 1, -1)
    places[tokens] = np.arange(len(tokens))
    kept = places[found.tokens] >= 0
    place, expert, count = places[found.tokens[kept]], found.experts[kept], found.counts[kept]
    often = found.occurrences[found.tokens[kept]]
    order = np.lexsort((expert, -count, place))
    place, expert, share = place[order], expert[order], (count / often)[order]
    # rank within the token's own run
    starts = np.searchsorted(place, place, side="left")
    behind = np.arange(len(place)) - starts
    shown = behind < experts_out.shape[1]
    experts_out[place[shown], behind[shown]] = expert[shown]
    shares_out[place[shown], behind[shown]] = share[shown]
