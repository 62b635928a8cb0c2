"""Which documents are held out, and documents packed into windows: streams over pieces."""

import collections
import dataclasses
import heapq
import json
import struct

import numpy as np

from olmoe_jax.data import layout, pieces

MAX_DOMAINS = 255  # a domain is a uint8
LEAST_WINDOWS, LEAST_SHARE = (
    8,
    0.1,
)  # held out of a domain (the smaller) where the fraction gives less
LARGEST_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Plan:
    """The split of a corpus.

    Attributes:
      paths: the pieces, in order.
      thresholds: {domain: key below which a document is held out}.
    """

    paths: list[str]
    thresholds: dict[str, float]

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, sorted; their positions are the numbers in the windows."""
        return tuple(sorted(self.thresholds))

    def held_out(self, piece) -> np.ndarray:
        """bool [documents] of a piece: belongs to validation."""
        limits = [self.thresholds[record["domain"]] for record in piece.records]
        return piece.keys < np.array(limits, np.float64)


def plan(paths, fraction, sequence_length) -> Plan:
    """Chooses the documents held out: `fraction` of each domain, by the hash of their text.

    From a domain where that is less than LEAST_WINDOWS windows and less than LEAST_SHARE of its
    tokens, more is taken, but never above LARGEST_SHARE: a domain of one document has no
    validation.

    Raises:
      ValueError: the pieces hold no text, or more than MAX_DOMAINS domains.
    """
    enough = LEAST_WINDOWS * sequence_length
    candidates = collections.defaultdict(list)  # heaps of (-key, tokens): the smallest keys
    in_heap, totals, below = collections.Counter(), collections.Counter(), collections.Counter()
    for path in paths:
        piece = pieces.load(path)
        for key, tokens, record in zip(
            piece.keys.tolist(), piece.lengths.tolist(), piece.records, strict=True
        ):
            domain = record["domain"]
            totals[domain] += tokens
            if len(totals) > MAX_DOMAINS:
                raise ValueError(
                    f'more than {MAX_DOMAINS} domains (values of "source", such as {domain!r}): '
                    'give the records a field "domain" with fewer values'
                )
            below[domain] += tokens if key < fraction else 0
            heapq.heappush(candidates[domain], (-key, tokens))
            in_heap[domain] += tokens
            while in_heap[domain] - candidates[domain][0][1] >= enough:
                in_heap[domain] -= heapq.heappop(candidates[domain])[1]
    if not totals:
        raise ValueError("the corpus is empty: no record holds any text")
    thresholds = {}
    for domain, total in totals.items():
        wanted = max(min(enough, LEAST_SHARE * total), min(sequence_length, LARGEST_SHARE * total))
        thresholds[domain] = fraction
        if 0 < fraction and below[domain] < wanted:
            smallest = sorted(
                (-negative_key, tokens) for negative_key, tokens in candidates[domain]
            )
            thresholds[domain] = _threshold(smallest, wanted, LARGEST_SHARE * total)
    return Plan(list(paths), thresholds)


def _threshold(smallest, wanted, most):
    """Key below which the first documents hold `wanted` tokens, none skipped, at most `most`."""
    threshold, taken = 0.0, 0
    for key, tokens in smallest:
        if taken >= wanted or taken + tokens > most:
            break
        taken += tokens
        threshold = float(np.nextafter(key, 2))
    return threshold


def write_documents(directory, plan, sequence_length):
    """Writes the document table; returns ({split: SplitInfo}, number of documents)."""
    tokens, text_bytes = ({s: collections.Counter() for s in layout.SPLITS} for _ in range(2))
    documents, offset = collections.Counter(), 0
    with (
        open(directory / layout.DOCUMENTS, "wb") as file,
        open(directory / layout.OFFSETS, "wb") as offsets,
    ):
        for path in plan.paths:
            piece = pieces.load(path)
            columns = (
                piece.records,
                piece.lengths.tolist(),
                piece.text_bytes.tolist(),
                plan.held_out(piece).tolist(),
            )
            for record, length, size, held_out in zip(*columns, strict=True):
                split = layout.SPLITS[held_out]
                tokens[split][record["domain"]] += length
                text_bytes[split][record["domain"]] += size
                documents[split] += 1
                line = (
                    json.dumps({**record, "split": split, "tokens": length, "text_bytes": size})
                    + "\n"
                )
                offsets.write(struct.pack("<q", offset))
                offset += file.write(line.encode())
        offsets.write(struct.pack("<q", offset))
    splits = {}
    for split in layout.SPLITS:
        total = tokens[split].total()
        splits[split] = layout.SplitInfo(
            windows=-(-total // sequence_length),
            documents=documents[split],
            tokens=total,
            text_bytes=text_bytes[split].total(),
            domain_tokens=dict(sorted(tokens[split].items())),
            domain_text_bytes=dict(sorted(text_bytes[split].items())),
        )
    return splits, documents.total()


def windows(plan, split, sequence_length):
    """Yields the split's windows: documents one after the other, cut every sequence_length tokens.

    Each is {"tokens": int32, "documents": int32, "domains": uint8}, [sequence_length]; the last is
    padded with token 0, document PADDING_DOCUMENT and domain 0.
    """
    number_of = {domain: i for i, domain in enumerate(plan.domains)}
    rest, first = _stream([], [], []), 0
    for path in plan.paths:
        piece = pieces.load(path)
        keep = np.repeat(plan.held_out(piece) == (split == "validation"), piece.lengths)
        numbers = np.arange(first, first + len(piece.lengths))
        domains = [number_of[record["domain"]] for record in piece.records]
        first += len(piece.lengths)
        added = _stream(
            *(
                a[keep]
                for a in (piece.tokens, *(np.repeat(x, piece.lengths) for x in (numbers, domains)))
            )
        )
        stream = {name: np.concatenate([rest[name], added[name]]) for name in rest}
        whole = len(stream["tokens"]) // sequence_length * sequence_length
        for at in range(0, whole, sequence_length):
            yield {name: values[at : at + sequence_length] for name, values in stream.items()}
        rest = {name: values[whole:].copy() for name, values in stream.items()}
    if len(rest["tokens"]):
        missing = sequence_length - len(rest["tokens"])
        padding = _stream([0] * missing, [layout.PADDING_DOCUMENT] * missing, [0] * missing)
        yield {name: np.concatenate([rest[name], padding[name]]) for name in rest}


def _stream(tokens, documents, domains):
    return {
        "tokens": np.asarray(tokens, np.int32),
        "documents": np.asarray(documents, np.int32),
        "domains": np.asarray(domains, np.uint8),
    }
