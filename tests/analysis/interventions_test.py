"""Interventions: against a model whose weights were changed, and where the answer is planted."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import olmoe_jax
from olmoe_jax import checkpoints, config
from olmoe_jax.analysis import (
    counting,
    domains,
    intervening,
    interventions,
    recording,
    results,
    texts,
    words,
)
from olmoe_jax.analysis.interventions import EXCLUDED, MUTED, UNIFORM, Intervention
from tests.analysis import models
from tests.porting import tiny

FP32 = 2e-5  # order of summation over a few layers
LENGTH = 8


def _specialisation(trace_shares, names=("a", "b")):
    """domains.Domains with these shares [layers, domains, experts]."""
    one = domains.Specialisation(
        domains=names, share=domains.resampling.Estimate(np.asarray(trace_shares)), tv=None,
        random=None, specific=None, specific_chance=None, specific_high=None, specific_p=None,
        specific_mean_p=None, baseline="", information=None,
    )  # fmt: skip
    return domains.Domains(
        model="m", checkpoint="", layers=(1, 3), domains=names, topk=one, top1=None, uniform={}
    )


def test_the_experts_that_stand_out_are_tried_with_others_of_their_layers():
    shares = np.full((2, 2, 5), 0.4)
    shares[0, 0, 3] += 0.3  # a's
    shares[1, 0, 2], shares[1, 1, 2] = 0.9, 0.85  # busy in both: stands out in neither
    shares[1, 1, 4] += 0.2  # b's
    chosen = interventions.plan(_specialisation(shares), 1)
    assert chosen.own == (((0, 3),), ((1, 4),))
    for own, control in zip(chosen.own, chosen.control, strict=True):
        assert own[0][0] == control[0][0] and own[0][1] != control[0][1]
    kinds = [one.kind for one in chosen.interventions]
    assert kinds == [MUTED] * 4 + [EXCLUDED] * 4 + [UNIFORM] * 3
    assert chosen.interventions[-1] == Intervention(UNIFORM, None)
    alone = interventions.plan(_specialisation(shares[:, :1], ("a",)), 2)
    assert alone.own == (((1, 2), (0, 3)),)
    everything = interventions.plan(_specialisation(shares[:1, :1], ("a",)), 5)
    assert everything.control == ((None,) * 5,)
    with pytest.raises(ValueError, match="interventions is 0"):
        interventions.plan(_specialisation(shares), 0)


def _texts(vocab, *, tokens=64, names=("a", "b")):
    """Each domain has its own half of the vocabulary."""
    out = []
    for number, name in enumerate(names):
        low = number * (vocab // 2)
        ids = np.random.default_rng(number).integers(low, low + vocab // 2, tokens)
        numbers = np.arange(tokens, dtype=np.int32) // (tokens // 6)
        out.append(texts.Text(name, ids.astype(np.int32), numbers, LENGTH))
    return out


def _saved(folder, params, model):
    run = config.Config(model=model, data=config.DataConfig(sequence_length=16))
    with checkpoints.Checkpoints(folder, run) as kept:
        kept.save_params(2, params)
    return folder


def _plan(folder, found, number):
    recorded = recording.record(folder, found, accumulate=counting.Counter, announce=tiny.quiet)
    parts = [one.accumulated.result() for one in recorded]
    return interventions.plan(domains.specialisation(parts), number), parts


def _loss(model, params, text, override=None):
    """float64 [tokens], NaN where no token follows, by `model.apply` window by window."""
    out = []
    apply = jax.jit(lambda p, t: model.apply({"params": p}, t, routing_override=override).logits)
    for start in range(0, len(text.tokens), LENGTH):
        window = text.tokens[start : start + LENGTH]
        logits = np.asarray(apply(params, window[None]), np.float64)[0]
        following = text.next_ids(start // LENGTH, start // LENGTH + 1)
        each = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(
            logits, np.maximum(following, 0)[:, None], -1
        )[:, 0]  # fmt: skip
        out.append(np.where(following < 0, np.nan, each))
    return np.concatenate(out)


@pytest.mark.parametrize(
    "changes",
    [{}, {"normalize_expert_weights": True}, {"num_layers": 4, "moe_every": 2}],
    ids=["raw", "normalized", "every second layer"],
)
def test_changes_are_those_of_models_with_other_weights(changes, tmp_path):
    run = dataclasses.replace(tiny.MODEL, **changes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0.1, 0.5, x.shape), jnp.float32),
        checkpoints.abstract_params(run),
    )
    folder, found = _saved(tmp_path / "run", params, run), _texts(run.vocab_size)
    chosen, parts = _plan(folder, found, 1)
    said = []
    result = intervening.run(
        folder, found, chosen, max_tokens=48, tokens_per_batch=2 * LENGTH, announce=said.append
    )
    assert said[0].startswith(f"interventions: {len(chosen.interventions)} runs of 96 tokens, abo")
    cut = [intervening._beginning(text, 48) for text in found]
    model, params = olmoe_jax.load(folder, dtype="float32")
    block = f"block_{run.moe_every - 1}"

    def mean(changed_model, changed):
        return np.array([np.nanmean(_loss(changed_model, changed, text)) for text in cut])

    plain = mean(model, params)
    np.testing.assert_allclose(result.baseline.value, plain, atol=FP32)
    tried = 0
    for row, one in enumerate(chosen.interventions):
        changed = jax.tree.map(np.array, params)
        moe = changed["layers"][block]["moe"]
        if one.kind == MUTED:
            moe["w_down"][one.layer, one.expert] = 0
        elif one.kind == EXCLUDED:
            continue
        else:
            assert (np.abs(result.change.value[row]) > 1e-3).all()
            continue
        tried += 1
        want = mean(model, changed) - plain
        np.testing.assert_allclose(result.change.value[row], want, atol=FP32)
    assert tried >= 2 and result.renormalised == run.normalize_expert_weights
    # routed around: the model without that expert
    row = next(i for i, one in enumerate(chosen.interventions) if one.kind == EXCLUDED)
    one = chosen.interventions[row]
    if run.num_layers // run.moe_every == 1:
        fewer = jax.tree.map(np.array, params)
        moe = fewer["layers"][block]["moe"]
        for name, axis in (("router", 2), ("w_gate", 1), ("w_up", 1), ("w_down", 1)):
            moe[name] = np.delete(moe[name], one.expert, axis)
        without = olmoe_jax.Transformer(dataclasses.replace(model.config, num_experts=4))
        np.testing.assert_allclose(
            result.change.value[row], mean(without, fewer) - plain, atol=FP32
        )
    else:
        empty = olmoe_jax.RoutingOverride.none(run.num_moe_layers, run.num_experts)
        override = empty.replace(excluded=empty.excluded.at[one.layer, one.expert].set(True))
        want = [np.nanmean(_loss(model, params, text, override)) for text in cut] - plain
        np.testing.assert_allclose(result.change.value[row], want, atol=FP32)


def test_more_interventions_compile_nothing(tmp_path, compilations):
    folder, found = models.folder(tmp_path / "m"), _texts(models.VOCAB)
    few, many = (_plan(folder, found, number)[0] for number in (1, 3))
    intervening.run(folder, found, few, announce=tiny.quiet)
    before = compilations()
    intervening.run(folder, found, many, announce=tiny.quiet)
    assert compilations() == before


def _planted(tmp_path):
    """One layer, three experts, top-1: expert 2 alone serves the tokens of domain b.

    Embeddings of b point along one axis, which the router sends to expert 2; that expert writes an
    axis on which the head knows the tokens of b, the others write one of the tokens of a.
    """
    run = config.ModelConfig(
        vocab_size=12, num_layers=1, d_model=8, num_heads=2, num_kv_heads=2, d_ff=4, num_experts=4,
        num_experts_per_token=1, max_length=29, qk_norm=False,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.01, x.shape).astype(np.float32), checkpoints.abstract_params(run)
    )
    flat = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(params)}
    for name, array in flat.items():
        if "scale" in name:
            array[:] = 1
    params["embedding"][:6, 0], params["embedding"][6:, 1] = 1, 1
    params["embedding"][0:6:2, 4] = 0.5  # words of a differ, so that its experts differ
    params["lm_head"][:6, 2], params["lm_head"][6:, 3] = 2, 2
    moe = params["layers"]["block_0"]["moe"]
    moe["router"][0, 1, 2], moe["router"][0, 0, :2] = 9, 5
    moe["router"][0, 4, 0] = 5
    moe["w_gate"][0, :, :2], moe["w_up"][0, :, :2] = 1, 1
    moe["w_down"][0, :2, :, 2], moe["w_down"][0, 2, :, 3] = 0.2, 0.5
    return _saved(tmp_path / "planted", jax.tree.map(jnp.asarray, params), run), run


def test_an_expert_that_alone_serves_a_domain_is_found(tmp_path):
    folder, run = _planted(tmp_path)
    found = _texts(run.vocab_size, tokens=120)
    chosen, _ = _plan(folder, found, 1)
    assert chosen.own[1] == ((0, 2),) and chosen.share[0, 1, 2] == 1
    result = intervening.run(folder, found, chosen, announce=tiny.quiet)
    row = chosen.interventions.index(Intervention(MUTED, 0, 2))
    assert result.change[row, 1].low > 0.2
    assert abs(result.change.value[row, 0]) < 1e-6  # no token of a goes there
    written = results.plain(interventions.to_json(result))
    entry = next(x for x in written["interventions"] if (x["kind"], x["expert"]) == (MUTED, 2))
    assert {"domain": "b", "as": "own"} in entry["chosen"]
    assert entry["domains"]["b"]["share"] == 1 and json.dumps(written)
    titles = [block.title for block in interventions.blocks("planted", result)]
    assert titles[0] == "planted: loss with one expert muted" and len(titles) == 3


def _losses(rng, plan, planted):
    """Losses of random differences, with a cost of a domain's own experts planted."""
    out = []
    for d in range(len(plan.domains)):
        change = rng.normal(0, 0.05, (40, len(plan.interventions)))
        for i, one in enumerate(plan.interventions):
            if one.kind != UNIFORM and (one.layer, one.expert) in plan.own[d]:
                change[:, i] += planted
        start = rng.normal(3, 0.5, (40, 1))
        sums = np.concatenate([start, start + change], 1) * 50
        out.append(interventions.Losses(tokens=np.full(40, 50.0), sums=sums, documents=40))
    return out


def test_words_tell_a_cost_from_chance():
    rng, names = np.random.default_rng(0), ("a", "b", "c")
    chosen = interventions.plan(_specialisation(rng.random((2, 3, 16)), names), 2)
    planted = interventions.effects(chosen, _losses(rng, chosen, 0.3), renormalised=True)
    contrast = planted.contrasts[MUTED]
    assert contrast.beyond_control.low < 0.3 < contrast.beyond_control.high
    assert interventions.is_beyond(contrast.beyond_elsewhere, contrast.elsewhere_p)
    said = " ".join(words.caused(planted))
    assert said.count(", less") == 4 and "no better than chance" not in said


@pytest.mark.parametrize("number, told", [(1, False), (2, True)])
def test_few_experts_cannot_be_told_from_chance(number, told):
    rng, names = np.random.default_rng(0), ("a", "b", "c")
    chosen = interventions.plan(_specialisation(rng.random((2, 3, 16)), names), number)
    result = interventions.effects(chosen, _losses(rng, chosen, 0.3), renormalised=True)
    for one in result.contrasts.values():
        assert one.control_pairs == one.elsewhere_pairs == 3 * number
        assert min(one.control_p, one.elsewhere_p) >= 0.5 ** (3 * number)
    said = " ".join(words.caused(result))
    assert "no better than chance" not in said and said.count(", less") == (4 if told else 0)
    few = "not to be told from chance with 3 experts (at least 6 are needed)"
    assert said.count(few) == (0 if told else 4)
    assert told == (number >= interventions.enough(3))


def test_a_loss_that_falls_is_said_to():
    rng = np.random.default_rng(0)
    chosen = interventions.plan(_specialisation(rng.random((2, 2, 16))), 1)
    losses = _losses(rng, chosen, 0.0)
    uniform = [i for i, one in enumerate(chosen.interventions) if one.kind == UNIFORM]
    for one in losses:
        for by, i in enumerate(uniform, 1):
            one.sums[:, 1 + i] = one.sums[:, 0] - 0.1 * by * one.tokens
    said = words.caused(interventions.effects(chosen, losses, renormalised=True))[-1]
    assert "all layers the loss changes by -0.3 nats per token" in said
    assert "in one layer by -0.1 (layer 1) to -0.2 (layer 3)" in said


def test_documents_are_counted_one_by_one():
    documents = np.repeat(np.arange(2500, dtype=np.int32), 2)
    losses = np.tile([1.0, np.nan], (3, 2500))
    losses[:, :2] = np.nan  # the first document has no token with a next one
    one = interventions.Losses.of(documents, losses)
    assert (one.documents, len(one.tokens), one.tokens.sum()) == (2499, 1000, 2499)


def test_chance_is_seldom_called_a_cost():
    rng, wrong = np.random.default_rng(1), 0
    for _ in range(25):
        chosen = interventions.plan(_specialisation(rng.random((2, 3, 16)), ("a", "b", "c")), 2)
        found = interventions.effects(chosen, _losses(rng, chosen, 0.0), renormalised=False)
        said = " ".join(words.caused(found))
        wrong += 4 - said.count("no better than chance")
    assert wrong <= 6  # of 100, at a level of 0.025 each
    assert "With experts drawn at random" in said


def test_a_random_model_shows_nothing_beyond_its_control(tmp_path):
    folder, found = models.folder(tmp_path / "m"), _texts(models.VOCAB, tokens=240)
    chosen, _ = _plan(folder, found, 3)
    result = intervening.run(folder, found, chosen, announce=tiny.quiet)
    for one in result.contrasts.values():
        assert not interventions.is_beyond(one.beyond_control, one.control_p)


def test_intervals_are_of_documents_and_need_two():
    chosen = interventions.plan(_specialisation(np.random.default_rng(0).random((2, 2, 4))), 1)
    count = len(chosen.interventions)
    documents = np.array([0, 0, 1, 1, 1], np.int32)
    losses = np.tile(np.array([1.0, 2, 3, np.nan, 5]), (1 + count, 1))
    losses[1:] += np.arange(count)[:, None]
    one = interventions.Losses.of(documents, losses)
    np.testing.assert_array_equal(one.tokens, [2, 2])
    np.testing.assert_array_equal(one.sums[:, 0], [3, 8])
    result = interventions.effects(chosen, [one, one], renormalised=False)
    np.testing.assert_allclose(result.change.value[:, 0], np.arange(count))
    np.testing.assert_allclose(result.change.low, result.change.value)  # the same in each document
    single = interventions.Losses.of(documents * 0, losses)
    result = interventions.effects(chosen, [one, single], renormalised=False)
    assert result.change.low is None
    assert "as a domain has one document" in words.caused(result)[0]


def test_a_model_that_does_not_fit_in_memory_is_refused(tmp_path, monkeypatch):
    folder, found = models.folder(tmp_path / "m"), _texts(models.VOCAB)
    chosen, _ = _plan(folder, found, 1)
    monkeypatch.setattr(recording.machine, "free_memory", lambda: 1000)
    with pytest.raises(ValueError, match="interventions need all weights in memory"):
        intervening.run(folder, found, chosen, announce=tiny.quiet)
