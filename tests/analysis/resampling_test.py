import math

import numpy as np
import pytest

from olmoe_jax.analysis import resampling


def test_intervals_over_documents_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held, inside = 0, 0
    for trial in range(300):
        # documents differ: each has its own share; tokens alone would give far too narrow ends
        own = rng.beta(6, 14, 40)
        sizes = rng.integers(50, 150, 40)
        hits = rng.binomial(sizes, own).astype(float)
        found = resampling.bootstrap(
            lambda h, n: h / n, [hits, sizes.astype(float)], draws=200, seed=trial
        )
        held += found.low <= 0.3 <= found.high
        error = 1.96 * math.sqrt(0.3 * 0.7 / sizes.sum())
        inside += abs(found.value - 0.3) < error
    assert 0.88 < held / 300 < 0.98
    assert inside / 300 < 0.6


def test_jackknife_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    folds = rng.poisson(50, (500, 10, 2)).astype(float)
    found = [resampling.jackknife(lambda x: x[0] / x[1], one) for one in folds]
    held = np.mean([one.low <= 1 <= one.high for one in found])
    assert 0.92 < held < 0.98
    assert resampling.jackknife(lambda x: x[0], folds[0, :1]).low is None


@pytest.mark.parametrize("tokens", [60, 200_000])
def test_random_router_has_the_mean_and_covariance_of_random_sets(tokens):
    experts, k = 6, 2
    loads = resampling.random_router(tokens, experts, k, draws=4000)
    share, few = k / experts, 0.06  # a standard deviation's standard error is 1.1 %
    np.testing.assert_allclose(loads.sum(-1), tokens * k, rtol=1e-9)
    np.testing.assert_allclose(loads.mean(0) / tokens, share, rtol=0.02)
    sd = math.sqrt(tokens * share * (1 - share))
    np.testing.assert_allclose(loads.std(0), sd, rtol=few)
    # an expert in, others out: probability of both is k (k − 1) / (E (E − 1))
    covariance = tokens * (share * (k - 1) / (experts - 1) - share**2)
    off = np.cov(loads.T)[~np.eye(experts, dtype=bool)]
    np.testing.assert_allclose(off, covariance, atol=few * sd**2)


def test_mutual_information_of_known_tables():
    one = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert resampling.mutual_information(one) == pytest.approx(1)
    assert resampling.mutual_information(np.full((3, 4), 0.25)) == pytest.approx(0)
    joint = np.array([[0.3, 0.2], [0.1, 0.4]])  # each row half of the probability
    want = sum(
        joint[d, e] * math.log2(joint[d, e] / (0.5 * joint[:, e].sum()))
        for d in range(2)
        for e in range(2)
    )
    assert resampling.mutual_information(joint / 0.5) == pytest.approx(want)


def test_bias_of_independent_tokens_is_millers():
    rng, experts = np.random.default_rng(2), 16
    tokens = np.array([300, 500, 400])
    drawn = [rng.multinomial(n, np.full(experts, 1 / experts), 2000) / n for n in tokens]
    plug_in = resampling.mutual_information(np.stack(drawn)).mean()
    assert plug_in == pytest.approx(resampling.miller_madow_bias(tokens, experts), rel=0.05)


def documents_of(rng, probs, groups, clump):
    """[groups, 1, experts]: documents whose own routing scatters around probs."""
    own = rng.dirichlet(probs * clump, groups)
    return np.stack([rng.multinomial(rng.integers(50, 150), p) for p in own])[:, None].astype(float)


@pytest.mark.parametrize("apart", [0.0, 0.08])
def test_corrected_information_is_right_on_average_and_miller_is_not(apart):
    rng, experts = np.random.default_rng(3), 8
    one = np.full(experts, 1 / experts)
    two = one + apart * np.array([1, -1] * (experts // 2))
    truth = resampling.mutual_information(np.stack([one, two]))
    corrected, plug_in, miller = [], [], []
    for trial in range(60):
        documents = [documents_of(rng, p, 25, 20) for p in (one, two)]
        loads = np.stack([groups.sum(0) for groups in documents])
        found = resampling.information(loads, documents, seed=trial)
        corrected.append(found.corrected.value[0])
        plug_in.append(found.plug_in[0])
        miller.append(resampling.information(loads, None).corrected.value[0])
    error = 4 * np.std(corrected) / math.sqrt(60)
    assert abs(np.mean(corrected) - truth) < error
    # Miller's formula takes the tokens of a document for independent
    assert np.mean(plug_in) > np.mean(miller) > np.mean(corrected) + 0.004


def test_permuted_labels_give_uniform_p_values():
    rng = np.random.default_rng(4)
    values = []
    for trial in range(150):
        documents = [documents_of(rng, np.full(5, 0.2), 12, 30) for _ in range(3)]
        loads = np.stack([groups.sum(0) for groups in documents])
        values.append(resampling.information(loads, documents, seed=trial).p_value[0])
    assert 0.4 < np.mean(values) < 0.6 and np.mean(np.array(values) <= 0.1) < 0.18


def test_permutation_moves_whole_documents():
    documents = [np.array([[[1.0, 0.0]], [[0.0, 2.0]]]), np.array([[[4.0, 0.0]]])]
    drawn = resampling.permute(documents)
    assert drawn.shape == (resampling.PERMUTATIONS, 2, 1, 2)
    np.testing.assert_array_equal(drawn.sum(1), np.broadcast_to([[5.0, 2.0]], (200, 1, 2)))
    assert {tuple(d[1, 0]) for d in drawn} == {(1.0, 0.0), (0.0, 2.0), (4.0, 0.0)}
