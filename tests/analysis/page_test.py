import numpy as np
import pytest

from olmoe_jax import reporting
from olmoe_jax.analysis import analyses, counting, page, results
from olmoe_jax.analysis.page import tokens, training
from tests.analysis import synthetic


def decode(token):
    return f" word{token}"


@pytest.fixture(scope="module")
def found():
    return analyses.find(synthetic.recordings(), decode=decode)


def _block(blocks, words):
    (one,) = [block for block in blocks if words in block.title]
    return one


def test_sentences_come_first_and_then_what_can_be_chosen(found):
    blocks = page.build({"m": found}, ("they are alike",))
    assert blocks[0].paragraphs == found.sentences and blocks[1].paragraphs == ("they are alike",)
    assert isinstance(blocks[2], reporting.Explorer)
    assert blocks[2].choices == {
        "rank": ("top-3", "top-1"), "layer": ("1", "4"), "domain": ("books", "code")
    }  # fmt: skip


def test_the_tokens_of_an_expert_are_those_that_go_there(found):
    blocks = page.build({"m": found})
    (rows, *_) = _block(blocks, "tokens of each expert").cube.at(
        {"token": "the token itself", "rank": "top-1", "layer": "4", "expert": "3"}, []
    )
    traces = synthetic.recordings()[-1].traces.values()
    words = np.concatenate([t.tokens.input_ids for t in traces])
    firsts = np.concatenate([t.tokens.expert_ids[:, 1, 0] for t in traces])
    best = {}
    for word in range(29):
        times, went = (words == word).sum(), ((words == word) & (firsts == 3)).sum()
        if times >= 10 and went:
            best[f'" word{word}"'] = went / times, f"{went:,}"
    assert [row[0] for row in rows] == sorted(best, key=lambda w: (-best[w][0], -int(best[w][1])))[
        : len(rows)
    ]
    for name, share, times in rows:
        assert (share, times) == (f"{best[name][0]:.0%}", best[name][1])


def test_a_page_that_is_too_large_leaves_out_and_says_so(found):
    whole = page.build({"m": found})
    held = _block(whole, "search")
    assert len(held.names) == 29 and "All 29 tokens" in held.note
    without = reporting.num_bytes([block for block in whole if block is not held])
    less = page.build({"m": found}, limit=without + 1000)
    search = _block(less, "search")
    assert 0 < len(search.names) < 29
    assert f"The {len(search.names)} most frequent" in search.note
    assert f"{29 - len(search.names)} rarer" in search.note
    assert reporting.num_bytes(less) < without + 3000
    smaller = page.build({"m": found}, limit=without - 500)
    assert _block(smaller, "tokens of each expert").choices["token"] == ("the token itself",)
    assert "tokens of each expert, of all but one kind" in _block(smaller, "Notes").paragraphs[-1]
    assert not any("Left out" in note for note in getattr(whole[-1], "paragraphs", ()))


def test_whatever_is_left_out_is_said_once(found, monkeypatch):
    monkeypatch.setattr(training, "MOST_WITH_INTERVALS", 10)
    blocks = page.build({"m": found, "n": found}, limit=1)
    assert not any("search" in block.title for block in blocks)
    said = [note for note in _block(blocks, "Notes").paragraphs if "Left out" in note]
    assert len(said) == 1
    for words in ("but three layers", "search for a token of m, n", "intervals of load and health"):
        assert words in said[0]
    assert (
        "search for a token;" in _block(page.build({"m": found}, limit=1), "Notes").paragraphs[-1]
    )


def test_a_search_holds_the_favourite_experts(found):
    block = tokens.search("m", found, 10**6)
    traces = synthetic.recordings()[-1].traces.values()
    words = np.concatenate([t.tokens.predicted_ids for t in traces])
    ids = np.concatenate([t.tokens.expert_ids[:, 0] for t in traces])
    kind, rank = block.axes["token is"].index("predicted next"), block.axes["rank"].index("top-3")
    for entry in (0, 5, 28):
        mine = words == int(block.names[entry].removeprefix(" word"))
        share = np.array([(ids[mine] == expert).any(-1).mean() for expert in range(7)])
        assert block.counts[kind, 0, 0, entry] == mine.sum()
        np.testing.assert_allclose(
            block.shares[kind, rank, 0, entry], np.sort(share)[::-1][:6], rtol=1e-5
        )
        experts = block.experts[kind, rank, 0, entry]
        np.testing.assert_allclose(share[experts], np.sort(share)[::-1][:6])


def test_one_checkpoint_without_tokens_and_pairs_has_a_page_too(found):
    import dataclasses

    bare = dataclasses.replace(
        found, saturation=None, vocabulary={}, known=None, coactivation=None,
        health=found.health[-2:], pooled=dataclasses.replace(found.pooled, paths=None),
    )  # fmt: skip
    titles = [block.title for block in page.build({"m": bare})]
    assert not any("saturation" in t or "token of" in t or "search" in t for t in titles)
    assert not any("over training" in t for t in titles)


def test_what_a_model_or_text_does_not_have_is_a_note():
    one_expert = analyses.find(synthetic.recordings(k=1))
    assert "co-activation: each token goes to one expert" in one_expert.notes
    assert any("tokens are given by their numbers" in note for note in one_expert.notes)
    traces = {"books": synthetic.make_trace(tokens=9, documents=2, checkpoint="step1", step=1)}
    parts = {name: counting.count(one) for name, one in traces.items()}
    few = analyses.find([analyses.Recording(parts, traces)])
    assert not few.vocabulary and any("no token occurs 10 times" in n for n in few.notes)
    for found in (one_expert, few):
        titles = [block.title for block in page.build({"m": found})]
        assert titles[0] == "m" and titles[-1] == "Notes"


def test_training_is_measured_in_what_is_known():
    assert training.scales([(10, None, 0.5), (20, 640, 1.0)]) == {
        "steps": (10, 20), "share of training, %": (50, 100)
    }  # fmt: skip
    assert training.scales([(None, None, None)]) == {}


def test_pictures_are_written_beside_the_page(found, tmp_path):
    results.write(tmp_path / "figures" / "mine.json", [])
    (tmp_path / "figures" / "old.svg").touch()
    page.clear(tmp_path)
    page.write(tmp_path, {"m": found})
    assert (tmp_path / "report.html").stat().st_size < 10e6
    written = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {
        f"m_experts_and_domains_layer_{n}.{e}" for n in (1, 4) for e in ("png", "svg", "csv")
    } <= (written)
    assert "old.svg" not in written and "mine.json" in written
    page.clear(tmp_path)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["mine.json"]
