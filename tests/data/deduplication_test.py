import dataclasses
import random

import numpy as np
import pytest

from olmoe_jax.data import corpora, deduplication

RNG = random.Random(5)
WORDS = ["".join(RNG.choices("abcdefghij", k=RNG.randint(2, 8))) for _ in range(997)]


def _paragraph(words, rng=RNG):
    return " ".join(rng.choices(WORDS, k=words))


def _documents(texts):
    return [corpora.Document(f"d{i}", text, "s", "d") for i, text in enumerate(texts)]


def _texts(documents):
    return [d.text for d in documents]


def test_distinct_documents_are_kept_to_the_byte():
    texts = [f"{_paragraph(60)}\n\n\n  {_paragraph(53)}\n" for _ in range(7)]
    documents = _documents(texts)
    assert deduplication.deduplicate(documents) == documents


def test_an_exact_and_a_near_copy_are_dropped_and_the_first_is_kept():
    text = _paragraph(100)
    near = text.split()
    near[50] = "other"
    texts = [_paragraph(71), text, " ".join(near), _paragraph(67), text.replace(" ", "\n")]
    kept = deduplication.deduplicate(_documents(texts))
    assert _texts(kept) == [texts[0], texts[1], texts[3]]
    assert [d.id for d in kept] == ["d0", "d1", "d3"]


def test_a_repeated_paragraph_is_cut_out_of_an_otherwise_new_document():
    shared = _paragraph(41)
    first, second = f"{_paragraph(60)}\n\n{shared}", f"{shared}\n\n{_paragraph(90)}\n"
    kept = deduplication.deduplicate(_documents([first, second]))
    assert _texts(kept) == [first, second.removeprefix(f"{shared}\n\n")]


def test_repetition_within_one_document_is_no_duplicate():
    text = "\n\n".join([_paragraph(43)] * 3)
    assert _texts(deduplication.deduplicate(_documents([text]))) == [text]


def test_marked_words_are_those_of_runs_that_an_earlier_document_holds(monkeypatch):
    monkeypatch.setattr(deduplication, "SPAN", 3)
    rng = np.random.default_rng(13)
    sizes = [7, 2, 11, 0, 1, 13, 5, 17]
    ids = rng.integers(0, 4, sum(sizes))
    documents, seen, expected = np.split(ids, np.cumsum(sizes)[:-1]), set(), []
    for document in documents:
        runs = [tuple(document[i : i + 3].tolist()) for i in range(len(document) - 2)]
        marked = [False] * len(document)
        for start, run in enumerate(runs):
            if run in seen:
                marked[start : start + 3] = [True] * 3
        seen.update(runs)
        expected += marked
    assert deduplication._repeated(ids, sizes).tolist() == expected
    assert 10 < sum(expected) < 50


def test_documents_of_a_few_words_are_dropped():
    assert deduplication.deduplicate(_documents(["just a few words", _paragraph(60)]))[0].id == "d1"
    assert deduplication.deduplicate([]) == []


@pytest.mark.parametrize("span", [1, 3, 13])
def test_the_share_of_shared_spans_is_what_sets_give(span):
    rng = np.random.default_rng(7)
    train = [rng.integers(0, 3, n) for n in (5, 101, 13)]
    validation = [rng.integers(0, 3, n) for n in (61, 2, 17, 83)]

    def runs(rows):
        return [
            tuple(row[i : i + span].tolist()) for row in rows for i in range(len(row) - span + 1)
        ]

    seen = set(runs(train))
    expected = np.mean([run in seen for run in runs(validation)])
    assert deduplication.shared_span_share(train, validation, span) == pytest.approx(expected)


def test_nothing_is_shared_with_nothing():
    assert deduplication.shared_span_share([], [np.arange(20)]) == 0
    assert deduplication.shared_span_share([np.arange(20)], []) == 0


def test_words_are_numbered_alike_in_all_texts():
    first, second, third = deduplication.word_ids(["A b, c", "", "c B!"])
    assert first.tolist() == [0, 1, 2, 3]
    assert second.tolist() == []
    assert third.tolist() == [3, 1, 4]


def test_other_fields_of_a_document_are_kept():
    document = dataclasses.replace(_documents([_paragraph(60)])[0], source="x", domain="y")
    assert deduplication.deduplicate([document]) == [document]
