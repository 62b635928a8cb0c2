"""Logits and a continuation against transformers, and what is said where they differ."""

import dataclasses
import functools

import numpy as np
import pytest

from olmoe_jax import machine
from olmoe_jax.model import transformer
from olmoe_jax.porting import agreement, causes, port, sources, verification
from tests.porting import peers, tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What `tiny.make` writes."""
    return tiny.make(tmp_path_factory.mktemp("ported"))


def test_without_transformers_or_memory_the_claim_says_so(made, monkeypatch):
    source, target = (sources.open_source(made / name) for name in ("run", "hf"))
    monkeypatch.setattr(agreement.importlib.util, "find_spec", lambda name: None)
    (claim,) = agreement.check(source, target, tiny.quiet)
    assert "not checked: logits against transformers, as torch and transformers cannot" in claim
    monkeypatch.setattr(machine, "free_memory", lambda: 10_000)
    (claim,) = agreement.check(source, target, tiny.quiet)
    assert claim.startswith("not checked: logits, as a model in float32 takes 0.0 GB and")


def test_the_training_format_is_held_against_our_own_logits(made):
    source, target = (sources.open_source(made / name) for name in ("run", "olmo"))
    (claim,) = agreement.check(source, target, tiny.quiet)
    assert "computed by olmoe_jax, agree within" in claim and "2 x 29 random tokens" in claim


@pytest.fixture(scope="module")
def theirs(made):
    """What transformers says to `hf`, computed once."""
    pytest.importorskip("torch", reason="needs torch")
    pytest.importorskip("transformers", reason="needs transformers")
    tokens = agreement._tokens(tiny.MODEL)
    return agreement._their_results(made / "hf", tokens, tokens[0, :8], 8, None)


@pytest.fixture
def sides(made, theirs, monkeypatch):
    """(ours, theirs): `run` and `hf`."""
    monkeypatch.setattr(agreement, "_their_results", lambda *_: theirs)
    return sources.open_source(made / "run"), sources.open_source(made / "hf")


def test_logits_and_continuation_equal_those_of_transformers(sides):
    logits, continuation = agreement.check(*sides, tiny.quiet)
    assert "float32 logits of transformers" in logits and "2 x 29 random tokens" in logits
    assert "the greedy continuation of 8 tokens is the same" in continuation


@pytest.mark.slow
@pytest.mark.parametrize("family", peers.FAMILIES)
def test_every_family_agrees_there_and_back(family, tmp_path):
    peers.save(f"{family}, {peers.TOGETHER}", tmp_path / "given", max_shard_size="20KB")
    given, orbax, half, short = (tmp_path / name for name in ("given", "orbax", "half", "short"))
    port.port(given, orbax, to="orbax", announce=tiny.quiet)
    port.port(given, half, to="orbax", dtype="bfloat16", announce=tiny.quiet)
    port.port(orbax, short, to="huggingface", dtype="bfloat16", announce=tiny.quiet)
    for source, target, remark in (
        (given, orbax, ""), (given, half, "bfloat16, "), (orbax, short, "bfloat16, "),
    ):  # fmt: skip
        *_, logits, continuation = verification.verify(source, target, announce=tiny.quiet)
        assert f"{remark}agree within" in logits and "2 x 37 random tokens" in logits
        assert "the greedy continuation of 8 tokens is the same" in continuation


def _wronged(monkeypatch, change):
    """Makes our model another one than the folder's."""
    load = agreement._load_ours

    def wrong(side, rounding=None):
        return change(*load(side, rounding))

    monkeypatch.setattr(agreement, "_load_ours", wrong)


def _with(**changes):
    return lambda c, params: (dataclasses.replace(c, **changes), params)


def _exchange_projections(c, params):
    block = params["layers"]["block_0"]
    moe = dict(block["moe"], w_gate=block["moe"]["w_up"], w_up=block["moe"]["w_gate"])
    return c, dict(params, layers={"block_0": dict(block, moe=moe)})


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        # Our reading is the wrong one here: what makes it agree is what transformers does.
        (_with(norm_eps=0.1), "norm_eps=1e-05 instead of 0.1"),
        pytest.param(
            _with(norm_position="post"), "norms in pre-norm order", marks=pytest.mark.slow
        ),
        pytest.param(
            _with(normalize_expert_weights=True), "expert weights not renormalised",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            _exchange_projections, "gate and up projections exchanged", marks=pytest.mark.slow
        ),
        pytest.param(_with(rope_theta=3e4), "none of rope_theta=10000", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_what_makes_the_logits_agree_is_named(change, cause, sides, monkeypatch):
    _wronged(monkeypatch, change)
    if "norm_eps" in cause:  # one alternative is enough here, each is compiled
        alternatives = causes.alternatives
        monkeypatch.setattr(
            agreement.causes, "alternatives",
            lambda *a: [x for x in alternatives(*a) if "norm_eps" in x[0] or "clip" in x[0]],
        )  # fmt: skip
    with pytest.raises(ValueError, match="run.*: float32 logits differ") as error:
        agreement.check(*sides, tiny.quiet)
    message = str(error.value).replace(str(sides[0].path), "run").replace(str(sides[1].path), "hf")
    begin = message[:600]  # as much as a command shows
    assert "although all tensors are equal" in begin and "first in sequence 0 at position " in begin
    if cause.startswith("none"):
        assert "likely cause: none of the " in begin and "; tried: rope_theta=10000" in message
    else:
        assert f"likely cause: they agree with {cause}; do not use the port before" in begin
    assert "from float64: " in message


def _with_logits(monkeypatch, theirs, change, exact=None):
    """Replaces what transformers says."""
    logits, *rest = theirs
    logits = np.array(logits)
    change(logits)
    monkeypatch.setattr(agreement, "_their_results", lambda *_: (logits, *rest))
    if exact is not None:
        monkeypatch.setattr(agreement, "_their_exact_logits", lambda *_: exact)


def test_noise_of_float32_is_told_from_a_wrong_model_by_float64(sides, theirs, monkeypatch):
    exact, noise = theirs[0].astype(np.float64), 1e-4 * np.abs(theirs[0]).max()
    ours, _ = agreement._logits(*agreement._load_ours(sides[0]), agreement._tokens(tiny.MODEL))
    monkeypatch.setattr(agreement, "_cause", lambda *_: ("a", "b"))

    def add(logits):
        logits[1, 3, 5] += noise

    for factor, fits in ((3, True), (5, False)):  # our distance, in units of theirs
        truth = ours.astype(np.float64)
        truth[0, 2, 7] += factor * noise
        exact = truth.copy()
        _with_logits(monkeypatch, (truth, *theirs[1:]), add, exact)
        if fits:
            claim, _ = agreement.check(*sides, tiny.quiet)
            assert "in float64 ours are 3.0e-04 away and its own float32 ones 1.0e-04" in claim
            continue
        with pytest.raises(ValueError, match=r"float32 logits differ .*5.0e-04 .*float32: 1.0e-04"):
            agreement.check(*sides, tiny.quiet)


def test_float64_is_float64_throughout(made, theirs, monkeypatch):
    torch = pytest.importorskip("torch", reason="needs torch")
    rsqrt, seen = torch.rsqrt, set()  # of the norms, which ask for float32 by name

    def record(x):
        seen.add(x.dtype)
        return rsqrt(x)

    monkeypatch.setattr(torch, "rsqrt", record)
    exact = agreement._their_exact_logits(made / "hf", agreement._tokens(tiny.MODEL), None)
    assert exact.dtype == np.float64 and seen == {torch.float64}
    assert 0 < agreement._error(theirs[0], exact) < 2e-6


def test_logits_that_are_not_finite_are_not_compared(sides, theirs, monkeypatch):
    load = agreement._load_ours

    def change(logits):
        logits[1, 3:] = np.nan

    _with_logits(monkeypatch, theirs, change)
    with pytest.raises(ValueError, match="624 of 1,392 are finite on one side only; first in .* 3"):
        agreement.check(*sides, tiny.quiet)
    real = agreement._logits

    def logits(*arguments):
        out, tied = real(*arguments)
        change(out := np.array(out))
        return out, tied

    monkeypatch.setattr(agreement, "_logits", logits)
    claim, continuation = agreement.check(*sides, tiny.quiet)
    assert claim.endswith("; 624 of 1,392 logits not compared: not finite on either side")
    assert "agree within" in claim and continuation.startswith("not checked: the greedy")
    monkeypatch.setattr(agreement, "_logits", real)

    def with_nan(side, rounding=None):
        model_config, params = load(side, rounding)
        return model_config, dict(params, lm_head=params["lm_head"].at[3, 0].set(np.nan))

    monkeypatch.setattr(agreement, "_load_ours", with_nan)  # how far it spreads is not the weights'
    claim, _ = agreement.check(*sides, tiny.quiet)
    assert "not finite on both sides, as the weights hold NaN or infinity" in claim
    (claim,) = agreement.check(sides[0], sides[0], tiny.quiet)
    assert claim.count("58 of 1,392 logits not compared: not finite on either side") == 1


@pytest.mark.slow
def test_a_deep_model_with_large_weights_is_not_refused_for_its_noise(tmp_path):
    torch, transformers = peers.libraries()
    torch.manual_seed(0)
    model_config = transformers.OlmoeConfig(
        vocab_size=997, hidden_size=384, intermediate_size=256, num_experts=8,
        num_experts_per_tok=2, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
        max_position_embeddings=64, initializer_range=0.3, pad_token_id=None,
    )  # fmt: skip
    transformers.OlmoeForCausalLM(model_config).save_pretrained(tmp_path / "given")
    port.port(tmp_path / "given", tmp_path / "orbax", to="orbax", announce=tiny.quiet)
    *_, claim, _ = verification.verify(tmp_path / "given", tmp_path / "orbax", announce=tiny.quiet)
    assert "order of summation, as from transformers in float64 ours are" in claim


def test_ties_of_the_continuation_are_tolerated_and_said(made):
    side = sources.open_source(made / "run")
    model_config, params = agreement._load_ours(side)
    prompt = np.array([3, 1, 4], np.int32)
    (first,) = agreement.generation.greedy(
        transformer.Transformer(model_config), params, prompt, num_tokens=1
    )
    check = functools.partial(agreement._check_continuation, side, side, model_config)
    other = (first + 1) % tiny.MODEL.vocab_size
    with pytest.raises(ValueError, match=f"at token 0: {first} instead of {other}"):
        check(params, prompt, [other])
    twin = params["lm_head"].at[other].set(params["lm_head"][first])
    claim = check(dict(params, lm_head=twin), prompt, [max(first, other)])
    assert claim.startswith("the greedy continuation is the same for 0 of 1 tokens; then two are")


def test_a_tie_between_experts_excuses_what_follows_it_only():
    tokens, params = agreement._tokens(tiny.MODEL), tiny.random_params()
    moe = params["layers"]["block_0"]["moe"]
    assert not agreement._logits(tiny.MODEL, params, tokens)[1].any()
    moe["router"] = moe["router"].at[1, :, 2].set(moe["router"][1, :, 4])
    expert_ids = agreement._apply(
        transformer.Transformer(tiny.MODEL), params, tokens
    ).routing.expert_ids
    one_of_both = ((expert_ids[1] == 2) | (expert_ids[1] == 4)).sum(-1) == 1
    tied = agreement._logits(tiny.MODEL, params, tokens)[1]
    np.testing.assert_array_equal(tied, np.maximum.accumulate(one_of_both, axis=1))
    assert tied.any() and not tied.all()
