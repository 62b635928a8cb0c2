import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax.config import sections
from olmoe_jax.model import routing
from tests import oracles

FP32 = 1e-6  # rounding of a softmax in float32

# To test another router: add its name here (the value: whether a token always gets k experts).
ROUTERS = {"token_choice": True, "expert_choice": False}


def _inputs(seed, b=2, length=7, experts=5, padding=True):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(b, length, experts)).astype(np.float32) * 2
    mask = np.ones((b, length), bool)
    if padding:
        mask = np.arange(length) < rng.integers(1, length + 1, (b, 1))
    return logits, mask


_jitted = jax.jit(routing.route, static_argnames=("router", "k", "normalize", "group", "scores"))


def _route(logits, mask, **options):
    return _jitted(jnp.asarray(logits), jnp.asarray(mask), **options)


def test_every_router_is_in_the_contract_and_every_score_in_the_config():
    assert ROUTERS.keys() == routing.ROUTERS.keys()
    assert tuple(routing.SCORES) == sections.ROUTER_SCORES


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scores", routing.SCORES)
@hypothesis.given(seed=st.integers(0, 999), k=st.integers(1, 5), group=st.sampled_from([0, 1, 2]))
def test_router_contract(router, normalize, scores, seed, k, group):
    logits, mask = _inputs(seed)
    routed = _route(
        logits, mask, router=router, k=k, normalize=normalize, group=group, scores=scores
    )
    ids, weights = np.asarray(routed.expert_ids), np.asarray(routed.weights)

    assert routed.logits.dtype == weights.dtype == np.float32 and ids.dtype == np.int32
    np.testing.assert_array_equal(routed.logits, logits)
    assert ids.shape == weights.shape and ids.shape[:2] == mask.shape
    assert ids.min() >= -1 and ids.max() < logits.shape[-1]
    assert (ids[~mask] == -1).all(), "padding has an expert"
    assert ((weights > 0) == (ids >= 0)).all(), "weight without an expert, or the reverse"
    assert (ids >= 0).sum() <= routed.num_slots
    all_scores = oracles.scores_of(logits, scores)
    chosen_probs = np.where(ids >= 0, np.take_along_axis(all_scores, ids, -1), 0)
    if normalize:
        chosen_probs /= np.maximum(chosen_probs.sum(-1, keepdims=True), 1e-30)
    np.testing.assert_allclose(weights, chosen_probs, rtol=1e-5, atol=FP32)
    for token_ids in ids.reshape(-1, ids.shape[-1]):
        real = token_ids[token_ids >= 0]
        assert len(set(real)) == len(real), "an expert twice for one token"
    if ROUTERS[router]:
        np.testing.assert_array_equal((ids >= 0).sum(-1), np.where(mask, k, 0))


@pytest.mark.parametrize("router", ROUTERS)
def test_every_weight_has_a_gradient_towards_the_logits(router):
    logits, mask = _inputs(3)

    def total(x):
        routed = routing.route(x, jnp.asarray(mask), router=router, k=2)
        return jnp.sum(
            routed.weights * jnp.cos(jnp.arange(routed.weights.size).reshape(routed.weights.shape))
        )

    gradient = np.asarray(jax.grad(total)(jnp.asarray(logits)))
    assert np.abs(gradient[mask]).max() > 1e-3 and (gradient[~mask] == 0).all()


BIAS = np.array([0.4, -0.3, 0.0, 0.25, -0.5], np.float32)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scores", routing.SCORES)
@pytest.mark.parametrize("bias", [None, BIAS])
def test_token_choice_equals_numpy(normalize, scores, bias):
    logits, mask = _inputs(0)
    options = {"normalize": normalize, "scores": scores, "bias": bias}
    routed = _route(logits, mask, router="token_choice", k=3, **options)
    options["bias"] = 0 if bias is None else bias
    ids, weights = oracles.token_choice(logits, mask, 3, **options)
    np.testing.assert_array_equal(routed.expert_ids, ids)
    np.testing.assert_allclose(routed.weights, weights, atol=FP32)


@pytest.mark.parametrize("normalize", [False, True])
def test_sigmoid_scores_and_bias_are_those_of_deepseek_v3(normalize):
    torch = pytest.importorskip("torch", reason="needs torch")
    theirs = pytest.importorskip(
        "transformers.models.deepseek_v3.modeling_deepseek_v3", reason="needs transformers"
    )
    configs = pytest.importorskip("transformers.models.deepseek_v3.configuration_deepseek_v3")
    rng = np.random.default_rng(8)
    x, weight = rng.normal(size=(2, 7, 3)), rng.normal(size=(5, 3))
    config = configs.DeepseekV3Config(
        hidden_size=3, n_routed_experts=5, num_local_experts=5, num_experts_per_tok=2, n_group=1,
        topk_group=1, routed_scaling_factor=1.0, norm_topk_prob=normalize,
    )  # fmt: skip
    router = theirs.DeepseekV3TopkRouter(config)
    with torch.no_grad():
        router.weight.copy_(torch.tensor(weight))
        router.e_score_correction_bias.copy_(torch.tensor(BIAS))
        logits, weights, ids = router(torch.tensor(x, dtype=torch.float32))
    routed = _route(
        logits.numpy().reshape(2, 7, 5), np.ones((2, 7), bool), router="token_choice", k=2,
        normalize=normalize, scores="sigmoid", bias=BIAS,
    )  # fmt: skip
    order = np.argsort(-weights.numpy(), axis=-1)
    ids, weights = (np.take_along_axis(a.numpy(), order, -1) for a in (ids, weights))
    np.testing.assert_array_equal(routed.expert_ids, ids.reshape(2, 7, 2))
    np.testing.assert_allclose(routed.weights, weights.reshape(2, 7, 2), rtol=1e-5)
    unbiased = _route(routed.logits, np.ones((2, 7), bool), router="token_choice", k=2)
    assert (np.sort(routed.expert_ids) != np.sort(unbiased.expert_ids)).any(), "shows no bias"


def test_a_bias_has_no_gradient_and_an_excluded_expert_stays_out():
    logits, mask = _inputs(9, padding=False)

    def total(bias):
        routed = routing.route(
            jnp.asarray(logits), jnp.asarray(mask), router="token_choice", k=2, bias=bias
        )
        return jnp.sum(jnp.cos(routed.weights))

    np.testing.assert_array_equal(jax.grad(total)(jnp.asarray(BIAS)), np.zeros(5))
    one = routing.RoutingOverride.none(1, 5)
    one = jax.tree.map(lambda a: a[0], one.replace(excluded=one.excluded.at[0, 2].set(True)))
    loud = np.float32([0, 0, 9, 0, 0])
    routed = _route(logits, mask, router="token_choice", k=4, bias=loud, override=one)
    assert (np.asarray(routed.expert_ids) != 2).all()


def test_a_router_that_cannot_do_with_scores_or_bias_says_so(monkeypatch):
    def plain(router_logits, token_mask, *, k, normalize, group):
        raise AssertionError("must not be called")

    monkeypatch.setitem(routing.ROUTERS, "plain", plain)
    logits, mask = _inputs(0)
    with pytest.raises(ValueError, match="router is 'plain': it takes no scores"):
        routing.route(logits, mask, router="plain", k=2, scores="sigmoid")
    with pytest.raises(ValueError, match="router is 'expert_choice': it takes no bias"):
        routing.route(logits, mask, router="expert_choice", k=2, bias=BIAS)


def test_sigmoids_that_all_vanish_give_finite_weights():
    logits, mask = np.full((1, 2, 5), -200, np.float32), np.ones((1, 2), bool)
    routed = _route(logits, mask, router="token_choice", k=2, normalize=True, scores="sigmoid")
    assert np.isfinite(routed.weights).all()
    assert np.isfinite(routing.probabilities(jnp.asarray(logits), "sigmoid")).all()


def test_token_choice_gives_ties_to_the_lowest_expert():
    logits = np.zeros((1, 2, 7), np.float32)
    logits[0, 1, [6, 4, 2]] = 1
    routed = _route(logits, np.ones((1, 2), bool), router="token_choice", k=4)
    np.testing.assert_array_equal(routed.expert_ids[0], [[0, 1, 2, 3], [2, 4, 6, 0]])


def test_raw_weights_sum_to_less_than_one_and_normalised_ones_to_one():
    logits, mask = _inputs(1, padding=False)
    raw = _route(logits, mask, router="token_choice", k=2, normalize=False)
    normal = _route(logits, mask, router="token_choice", k=2, normalize=True)
    assert raw.weights.sum(-1).max() < 1
    np.testing.assert_allclose(normal.weights.sum(-1), 1, atol=FP32)
    np.testing.assert_array_equal(raw.expert_ids, normal.expert_ids)


@pytest.mark.parametrize("group", [1, 2, 0])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scores", routing.SCORES)
def test_expert_choice_equals_numpy(group, normalize, scores):
    logits, mask = _inputs(2, b=4, length=5, experts=7)
    options = {"normalize": normalize, "group": group, "scores": scores}
    routed = _route(logits, mask, router="expert_choice", k=3, **options)
    selected, weights = oracles.expert_choice(logits, mask, 3, **options)
    np.testing.assert_array_equal(np.asarray(routed.expert_ids) >= 0, selected)
    np.testing.assert_allclose(routed.weights, weights, atol=FP32)


def test_expert_choice_is_balanced_within_every_group():
    logits, mask = _inputs(4, b=4, length=5, experts=5, padding=False)
    logits[..., 3] += 9  # a favourite
    routed = _route(logits, mask, router="expert_choice", k=2, group=2)
    load = (np.asarray(routed.expert_ids).reshape(2, 10, 5) >= 0).sum(1)
    np.testing.assert_array_equal(load, np.full((2, 5), 2 * 10 // 5))


def test_expert_choice_does_not_look_beyond_its_group():
    logits, mask = _inputs(5, b=4)
    routed = _route(logits, mask, router="expert_choice", k=2, group=2)
    other = logits.copy()
    other[2:] = _inputs(6, b=4)[0][2:]
    changed = _route(other, mask, router="expert_choice", k=2, group=2)
    np.testing.assert_array_equal(routed.expert_ids[:2], changed.expert_ids[:2])
    assert (np.asarray(routed.expert_ids[2:]) != np.asarray(changed.expert_ids[2:])).any()


def test_expert_choice_takes_no_padding_even_when_real_tokens_run_out():
    logits, mask = _inputs(7, b=2, length=5, experts=3)
    mask[:], mask[0, 0] = False, True
    routed = _route(logits, mask, router="expert_choice", k=3, group=0)
    np.testing.assert_array_equal(np.asarray(routed.expert_ids[0, 0]), [0, 1, 2])
    assert (np.asarray(routed.expert_ids)[~mask] == -1).all()


def test_unknown_router_names_the_nearest():
    with pytest.raises(ValueError, match=r"config.model.router .*nearest: expert_choice"):
        routing.get("expert_choise")
