"""Which documents are held out, and documents packed into windows: streams over tokenised pieces."""

import collections
import dataclasses
import heapq
import json

import numpy as np

from olmoe_jax.data import layout, pieces

MAX_DOMAINS = 255
LEAST_WINDOWS, LEAST_SHARE = 8, 0.1  # of a domain that are held out where the fraction gives less


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which documents are held out, and how many windows that makes."""

    paths: list[str]
    domains: tuple[str, ...]
    thresholds: dict[str, float]  # documents of a domain with a smaller key are validation
    tokens: dict[str, int]

    def is_validation(self, piece):
        return np.array([k < self.thresholds[r["domain"]] for k, r in zip(piece.keys, piece.records)], bool)


def plan(paths, fraction, sequence_length):
    """Chooses the split: one pass over the pieces, remembering per domain no more than the smallest keys."""
    smallest = collections.defaultdict(list)  # heap of (-key, tokens): the documents that would be held out first
    held = collections.Counter()
    totals, below, documents = collections.Counter(), collections.Counter(), collections.Counter()
    for path in paths:
        piece = pieces.load(path)
        for key, tokens, record in zip(piece.keys.tolist(), piece.lengths.tolist(), piece.records):
            domain = record["domain"]
            totals[domain] += tokens
            documents[domain] += 1
            below[domain] += tokens if key < fraction else 0
            heapq.heappush(smallest[domain], (-key, tokens))
            held[domain] += tokens
            while held[domain] - smallest[domain][0][1] >= sequence_length:
                held[domain] -= heapq.heappop(smallest[domain])[1]
    if not totals:
        raise ValueError("the corpus is empty: no record holds any text")
    if len(totals) > MAX_DOMAINS:
        raise ValueError(
            f"{len(totals)} domains (values of the field \"source\"), at most {MAX_DOMAINS}: "
            'give the records a field "domain" with fewer values'
        )
    thresholds = {}
    for domain, total in totals.items():
        thresholds[domain] = fraction
        if 0 < fraction and below[domain] < sequence_length and documents[domain] > 1:
            taken = 0
            for negative_key, tokens in sorted(smallest[domain], reverse=True):
                if taken and taken + tokens > total / 2:
                    break
                taken += tokens
                thresholds[domain] = max(thresholds[domain], np.nextafter(-negative_key, 2))
            if taken > total / 2:  # one document that is most of the domain: it trains
                thresholds[domain] = fraction
    return Plan(paths, tuple(sorted(totals)), thresholds, dict(totals))


def write_documents(directory, plan, sequence_length):
    """Writes the document table; returns ({split: layout.SplitInfo}, number of documents)."""
    tokens = {s: collections.Counter() for s in layout.SPLITS}
    text_bytes = {s: collections.Counter() for s in layout.SPLITS}
    documents, offsets, offset = collections.Counter(), [], 0
    with open(directory / "documents.jsonl", "wb") as file:
        for path in plan.paths:
            piece = pieces.load(path)
            for record, length, size, held in zip(
                piece.records, piece.lengths.tolist(), piece.text_bytes.tolist(), plan.is_validation(piece)
            ):
                split = layout.SPLITS[int(held)]
                tokens[split][record["domain"]] += length
                text_bytes[split][record["domain"]] += size
                documents[split] += 1
                line = json.dumps({**record, "split": split, "tokens": length, "text_bytes": size}) + "\n"
                offsets.append(offset)
                offset += file.write(line.encode())
    np.save(directory / "documents.offsets.npy", np.array([*offsets, offset], np.int64))
    splits = {}
    for split in layout.SPLITS:
        total = sum(tokens[split].values())
        splits[split] = layout.SplitInfo(
            windows=-(-total // sequence_length),
            documents=documents[split],
            tokens=total,
            text_bytes=sum(text_bytes[split].values()),
            domain_tokens=dict(sorted(tokens[split].items())),
            domain_text_bytes=dict(sorted(text_bytes[split].items())),
        )
    return splits, sum(documents.values())


def windows(plan, split, sequence_length):
    """Yields the split's windows: documents one after the other, cut every sequence_length tokens."""
    index_of = {d: i for i, d in enumerate(plan.domains)}
    rest = _packed(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.uint8))
    first = 0
    for path in plan.paths:
        piece = pieces.load(path)
        numbers = np.arange(first, first + len(piece.lengths), dtype=np.int32)
        first += len(numbers)
        chosen = plan.is_validation(piece) == (split == "validation")
        keep = np.repeat(chosen, piece.lengths)
        domains = np.array([index_of[r["domain"]] for r in piece.records], np.uint8)
        added = _packed(
            piece.tokens[keep].astype(np.int32),
            np.repeat(numbers, piece.lengths)[keep],
            np.repeat(domains, piece.lengths)[keep],
        )
        stream = {k: np.concatenate([rest[k], added[k]]) for k in rest}
        whole = len(stream["tokens"]) // sequence_length * sequence_length
        for at in range(0, whole, sequence_length):
            yield {k: v[at : at + sequence_length] for k, v in stream.items()}
        rest = {k: v[whole:].copy() for k, v in stream.items()}
    if missing := len(rest["tokens"]) and sequence_length - len(rest["tokens"]):
        padding = _packed(
            np.zeros(missing, np.int32), np.full(missing, layout.PADDING_DOCUMENT, np.int32), np.zeros(missing, np.uint8)
        )
        yield {k: np.concatenate([rest[k], padding[k]]) for k in rest}


def _packed(tokens, documents, domains):
    return {"tokens": tokens, "documents": documents, "domains": domains}


