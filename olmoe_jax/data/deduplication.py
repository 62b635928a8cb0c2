"""Removes what a corpus says twice, and measures what train and validation share.

For corpora that fit in memory. A near-duplicate is found by what it repeats: runs of SPAN words or
marks (13-grams) that an earlier document holds. Sorting the hashes of all runs finds every one of
them, so no sketch (MinHash) is needed at this size: two seconds for 12 MB. Exact duplicates are the
case in which everything is repeated.
"""

import dataclasses
import itertools
import re

import numpy as np

SPAN = 13
MAX_REPEATED = 0.3  # of a paragraph's words may lie in repeated runs, or the paragraph goes
MIN_KEPT = 0.5  # of a document's words must remain, or it goes
MIN_WORDS = 40
_WORD = re.compile(r"\w+|[^\w\s]")
_BLANK = re.compile(r"\n(?:[ \t]*\n)+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def deduplicate(documents) -> list:
    """Documents without what an earlier one says already.

    Paragraphs (blocks between blank lines) that are mostly made of repeated runs of SPAN words are
    cut out; a document of which less than MIN_KEPT remains goes altogether, and so does one of
    fewer than MIN_WORDS words.
    """
    documents = list(documents)
    paragraphs = [_paragraphs(d.text) for d in documents]
    counts, words = [], _Words()
    for document in paragraphs:
        counts.append([words.add(text) for text in document])
    repeated = _repeated(words.ids(), [sum(c) for c in counts])
    kept, position = [], 0
    for document, texts, sizes in zip(documents, paragraphs, counts, strict=True):
        remaining, remaining_words = [], 0
        for text, size in zip(texts, sizes, strict=True):
            share = repeated[position : position + size].mean() if size else 0.0
            position += size
            if share <= MAX_REPEATED:
                remaining.append(text)
                remaining_words += size
        if remaining_words >= max(MIN_KEPT * sum(sizes), MIN_WORDS):
            kept.append(dataclasses.replace(document, text="".join(remaining)))
    return kept


def shared_span_share(train, validation, span=SPAN) -> float:
    """Share of validation's runs of `span` ids that occur in train; both lists of int arrays."""
    seen = np.unique(
        np.concatenate([_run_hashes(ids, span) for ids in train] or [np.zeros(0, np.uint64)])
    )
    runs = np.concatenate(
        [_run_hashes(ids, span) for ids in validation] or [np.zeros(0, np.uint64)]
    )
    if not len(runs) or not len(seen):
        return 0.0
    places = np.minimum(np.searchsorted(seen, runs), len(seen) - 1)
    return float((seen[places] == runs).mean())


def word_ids(texts) -> list[np.ndarray]:
    """Each text as the ids of its lower-cased words, one numbering for all."""
    words = _Words()
    sizes = [words.add(text) for text in texts]
    return np.split(words.ids(), np.cumsum(sizes)[:-1])


class _Words:
    """Numbers words in the order in which they turn up."""

    def __init__(self):
        self._numbers, self._ids = {}, []

    def add(self, text):
        """Appends a text's words; returns how many."""
        found, numbers = _WORD.findall(text.lower()), self._numbers
        self._ids += [numbers.setdefault(word, len(numbers)) for word in found]
        return len(found)

    def ids(self):
        return np.array(self._ids, np.int64)


def _paragraphs(text):
    """Blocks with the blank lines that follow them: joined, they are the text."""
    ends = [m.end() for m in _BLANK.finditer(text)]
    return [text[a:b] for a, b in itertools.pairwise([0, *ends, len(text)]) if b > a]


def _run_hashes(ids, span):
    """uint64 [max(len(ids) - span + 1, 0)]: hash of each run of `span` consecutive ids."""
    count = max(len(ids) - span + 1, 0)
    values = np.asarray(ids).astype(np.uint64) + np.uint64(1)
    values ^= values >> np.uint64(7)
    values *= _MULTIPLIER
    values ^= values >> np.uint64(29)
    hashes = np.zeros(count, np.uint64)
    for offset in range(span):
        hashes = hashes * np.uint64(0xD6E8FEB86659FD93) + values[offset : offset + count]
    return hashes


def _repeated(ids, sizes):
    """bool [words]: the word lies in a run of SPAN words that begins in an earlier document."""
    starts = np.cumsum([0, *sizes])
    document = np.repeat(np.arange(len(sizes)), sizes)
    hashes = _run_hashes(ids, SPAN)
    owner = document[: len(hashes)]
    inside = owner == document[SPAN - 1 :][: len(hashes)]  # runs do not cross documents
    hashes, owner, at = hashes[inside], owner[inside], np.flatnonzero(inside)
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    again = at[owner[first][inverse] < owner]
    edges = np.zeros(starts[-1] + 1, np.int64)  # +1 where a repeated run starts, -1 where it ends
    np.add.at(edges, again, 1)
    np.add.at(edges, again + SPAN, -1)
    return np.cumsum(edges[:-1]) > 0
