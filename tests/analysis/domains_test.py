import collections

import numpy as np
import pytest

from olmoe_jax.analysis import counting, domains, results, words
from tests.analysis import synthetic

NAMES = ("books", "code", "news")


def random_parts(*, layers=(1, 4), experts=16, documents=40, tokens=2000, planted=None, **info):
    parts = []
    for seed, name in enumerate(NAMES):
        rng = np.random.default_rng(seed)
        ids = synthetic.random_ids(rng, tokens, len(layers), experts, 4)
        if planted and name == planted[0]:
            ids = synthetic.plant(ids, *planted[1:])
        source = synthetic.make_trace(
            seed=seed, layers=layers, experts=experts, ids=ids, domain=name, documents=documents,
            **info,
        )  # fmt: skip
        parts.append(source)
    return parts


def counted(sources):
    return [counting.count(source, vocabulary=False) for source in sources]


def test_shares_and_distances_are_those_of_a_loop():
    sources = random_parts(planted=("code", 1, 5, 0.5))
    result = domains.specialisation(counted(sources))
    assert result.uniform == {"topk": 0.25, "top1": 1 / 16}
    written = results.plain(domains.to_json(result))
    for source in sources:
        ids = source.tokens.expert_ids
        for row, layer in enumerate((1, 4)):
            cell = written[str(layer)][source.info.domain]
            for rank, chosen in (("topk", ids[:, row]), ("top1", ids[:, row, :1])):
                found = collections.Counter(chosen.ravel().tolist())
                want = [found[e] / len(ids) for e in range(16)]
                np.testing.assert_allclose(cell[rank], want, rtol=1e-5)
                slots = chosen.size
                far = 0.5 * sum(abs(found[e] / slots - 1 / 16) for e in range(16))
                assert cell[f"tv_{rank}"]["value"] == pytest.approx(far, rel=1e-5)
                assert cell[f"tv_{rank}"]["low"] < far < cell[f"tv_{rank}"]["high"]
                assert all(
                    low <= value <= high
                    for low, value, high in zip(
                        cell[f"{rank}_low"], cell[rank], cell[f"{rank}_high"], strict=True
                    )
                )


def test_a_random_router_shows_what_the_random_baseline_says_and_no_specialist():
    result = domains.specialisation(counted(random_parts(layers=tuple(range(8)))))
    below = result.topk.tv.value <= result.topk.random[:, 1]
    assert 0.8 < below.mean() <= 1
    np.testing.assert_allclose(
        result.topk.tv.value.mean(), result.topk.random[:, 0].mean(), rtol=0.1
    )
    assert result.topk.information.mean_p_value > 0.01
    assert abs(result.topk.information.corrected.value.mean()) < 1e-3
    said = " ".join(words.specialised(result))
    assert "no better than chance" in said and "specialist" not in said


@pytest.mark.parametrize("documents", [40, 1])
def test_a_planted_specialist_is_named(documents):
    parts = counted(random_parts(planted=("code", 1, 5, 0.4), documents=documents))
    result = domains.specialisation(parts)
    said = " ".join(words.specialised(result))
    assert "expert 5 of layer 4" in said and "of the tokens of code" in said
    assert "no better" not in said
    column = result.domains.index("code")
    assert result.topk.specific_p[1, column] <= 0.01
    assert (result.topk.specific_p[0] > 0.01).all()


def test_shuffled_documents_are_no_better_than_chance():
    """Documents that differ a lot, dealt to domains at random: only permutation sees through it."""
    rng = np.random.default_rng(5)
    parts = []
    for seed, name in enumerate(NAMES):
        ids = synthetic.random_ids(rng, 1500, 2, 16, 4)
        source = synthetic.make_trace(seed=seed, ids=ids, experts=16, domain=name, documents=30)
        for document in range(30):
            here = source.tokens.documents == document
            favourite = int(rng.integers(16))
            source.tokens.expert_ids[here] = synthetic.plant(ids[here], 0, favourite, 0.8)
        parts.append(counting.count(source))
    result = domains.specialisation(parts)
    assert result.topk.baseline == "permuted documents"
    assert (result.topk.tv.value[0] > result.topk.random[:, 1]).all()
    assert "no better than chance" in words.specialised(result)[0]


def test_paths_are_those_of_a_loop():
    source = synthetic.make_trace(layers=(0, 3, 9), tokens=900, experts=5, k=2, missing=0.1)
    counts = counting.count(source)
    found = domains.expert_paths(counts, threshold=0, most=25)
    first = source.tokens.expert_ids[:, :, 0].astype(int)
    for path in found:
        one, two = (
            first[:, (0, 3, 9).index(path.from_layer)],
            first[:, (0, 3, 9).index(path.to_layer)],
        )
        real = (one >= 0) & (two >= 0)
        there = real & (one == path.from_expert)
        both = there & (two == path.to_expert)
        assert path.tokens == both.sum()
        assert path.share.value == pytest.approx(both.sum() / there.sum())
        arrived = (real & (two == path.to_expert)).sum()
        assert path.expected == pytest.approx(arrived / real.sum())
        assert path.share.low < path.share.value < path.share.high
    assert len(found) == 2 * 25
    few = domains.expert_paths(counts, threshold=1.0)
    assert 0 < len(few) < len(found)
    written = results.plain(domains.paths_to_json(counts, few, threshold=1.0))
    assert written["paths"][0]["tokens"] == few[0].tokens


def test_one_domain_and_bad_domains():
    parts = counted(random_parts())
    alone = domains.specialisation(parts[:1])
    assert alone.topk.information is None and "one domain" in alone.notes[0]
    assert "One domain, books" in words.specialised(alone)[0]
    assert domains.information_to_json(alone)["layers"] == {1: {}, 4: {}}
    with pytest.raises(ValueError, match="at least one domain"):
        domains.specialisation([])
    with pytest.raises(ValueError, match="twice"):
        domains.specialisation([parts[0], parts[0]])
    other = counting.count(synthetic.make_trace(experts=8, domain="mail"))
    with pytest.raises(ValueError, match="num_experts"):
        domains.specialisation([parts[0], other])
