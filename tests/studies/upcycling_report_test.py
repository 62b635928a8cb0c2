"""compare.json against what other code reads off the metrics files."""

import json
import re

import numpy as np
import pytest
from scipy import stats

from experiments.studies import upcycling
from olmoe_jax import files
from olmoe_jax.studies import declaration, plans, upcycling_page, upcycling_report, verdict
from tests.studies import synthetic

STEPS, DENSE_STEPS = 100, 20  # as declared; the runs made here end at step 40
FLAT = [5.0] + [4.0] * 10


@pytest.fixture
def comparison(tiny_base, tmp_path):
    """Function of {arm: [losses of seed 1, of seed 2, …]} → upcycling_report.Comparison."""

    def make(losses, *, bigram=9.0, batch=4, name="w", **options):
        changes = {"model.num_experts": 0, "training.num_steps": STEPS}
        base = declaration.changed(tiny_base, changes | {"training.batch_size": batch})
        declared = {"num_experts": 4, "base": {"smoke": base}}
        if "dense" not in losses:
            declared |= {"dense": "somewhere"}
        study = upcycling.declare(**declared)
        seeds = tuple(range(1, len(losses["scratch"]) + 1))
        plan = plans.make_plan(study, tmp_path / name, scale="smoke", seeds=seeds)
        for arm, each in losses.items():
            for seed, curve in zip(seeds, each, strict=True):
                synthetic.write_run(
                    plan.path(arm, seed), seed, curve, config=plan.configs[arm],
                    tokens_per_second=100.0 * seed,
                )  # fmt: skip
        files.write_json(plan.workdir / "bigram.json", {
            "validation/bigram_loss": bigram, "validation/bigram_bits_per_byte": 1.0,
        })  # fmt: skip
        return upcycling_report.make(plan, announce=lambda line: None, **options)

    return make


def _falling(*starts, end=3.0):
    return [[7.0, *np.linspace(start, end, 10)] for start in starts]


DENSE = [[7.0, 6.5, 6.2, 6.0, 5.8, 5.5]]


def _records(plan, arm, seed):
    path = plan.workdir / arm / f"seed_{seed}" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def _outside(plan, seed, tokens_per_step):
    """The catch-up in tokens of one seed by a plain loop, from metrics.jsonl alone."""
    up, scratch = (
        {r["step"]: r["validation/loss"] for r in _records(plan, arm, seed)
         if "validation/loss" in r}
        for arm in ("upcycled", "scratch")
    )  # fmt: skip
    before = None
    for step in sorted(up):
        gap = scratch[step] - up[step] - 0.02
        if step and gap <= 0:
            if before is None:
                return step * tokens_per_step
            part = before[1] / (before[1] - gap)
            log = np.log(before[0]) + part * (np.log(step) - np.log(before[0]))
            return float(np.exp(log)) * tokens_per_step
        before = (step, gap) if step else None
    return None


def test_crossings_are_recomputed_from_the_metrics_files(comparison):
    made = comparison(
        {"dense": DENSE * 3, "upcycled": [FLAT] * 3, "scratch": _falling(5.0, 5.5, 6.0)}
    )
    found = made.content["crossings"]["tokens"]["catch_up"]
    per_step = 4 * 16
    places = [_outside(made.plan, seed, per_step) for seed in (1, 2, 3)]
    assert [found["each"][str(s)]["place"] for s in (1, 2, 3)] == pytest.approx(places)
    want = stats.ttest_1samp(np.log(places), 0).confidence_interval(0.95)
    got = (found["mean"], found["low"], found["high"])
    assert got == pytest.approx((stats.gmean(places), np.exp(want.low), np.exp(want.high)))
    budget = DENSE_STEPS * per_step
    assert found["share"]["mean"] == pytest.approx(stats.gmean(places) / budget)
    assert made.content["dense"]["2"]["tokens"] == budget
    assert made.content["dense"]["2"]["seconds"] == pytest.approx(budget / 200)
    curve = made.content["curves"]["scratch"]["3"]
    assert curve["validation/loss"] == [
        r["validation/loss"] for r in _records(made.plan, "scratch", 3) if "validation/loss" in r
    ]
    assert curve["step"] == list(range(0, 44, 4))
    np.testing.assert_allclose(curve["seconds"], np.array(curve["tokens"]) / 300)
    json.dumps(made.content, allow_nan=False)


def test_words_have_the_numbers_and_the_share_of_the_dense_budget(comparison):
    made = comparison(
        {"dense": DENSE * 3, "upcycled": [FLAT] * 3, "scratch": _falling(5.0, 5.5, 6.0)}
    )
    found = made.content["crossings"]["tokens"]["catch_up"]
    text = " ".join(made.content["words"])
    for part in (f"catches up with upcycled after {found['mean']:,.0f} tokens",
                 f"{found['share']['mean']:.0%} of the dense model's", "n = 3 seeds",
                 "the dense model's training included"):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(
    ("scratch", "judged"),
    [
        ([4.2, 4.25, 4.15], verdict.AGREES),  # caught up early
        ([8.0, 8.1, 8.2], verdict.DISAGREES),  # behind the dense budget, all of the interval
        ([4.2, 5.0, 8.0], verdict.UNDECIDED),
    ],
)
def test_the_verdict_is_by_the_interval_of_the_share(comparison, scratch, judged):
    made = comparison({"dense": DENSE * 3, "upcycled": [FLAT] * 3, "scratch": _falling(*scratch)})
    share = made.content["crossings"]["tokens"]["catch_up"]["share"]
    sides = {verdict.AGREES: share["high"] < 1, verdict.DISAGREES: share["low"] > 1,
             verdict.UNDECIDED: share["low"] < 1 < share["high"]}  # fmt: skip
    assert sides[judged] and made.content["verdict"] == judged
    assert judged[1:] in made.content["words"][0]


def test_what_is_not_reached_is_said_and_nothing_is_extrapolated(comparison):
    losses = {"dense": DENSE * 3, "upcycled": [FLAT] * 3, "scratch": _falling(6, 6.1, 6.2, end=4.5)}
    made = comparison(losses)
    text = " ".join(made.content["words"])
    wanted = "has not caught up with upcycled within 2,560 tokens, 200% of the dense model's with"
    assert f"{wanted} seed 1, 2, 3: no interval, and nothing is extrapolated" in text
    found = made.content["crossings"]["tokens"]["catch_up"]
    assert found["mean"] is None and found["each"]["1"]["place"] is None
    assert made.content["verdict"] == verdict.DISAGREES  # runs twice as long as the dense model's
    assert made.content["lead"]["end"]["low"] == pytest.approx(0.5)
    # validations every 4 steps; the dense model's 20 steps are 5 of them: 6 − 4/9 · 1.5 − 4
    assert made.content["lead"]["budget"]["each"]["1"] == pytest.approx(2 - 4 / 9 * 1.5)
    assert "after as many tokens as the dense model's +1.3" in text


def test_some_that_catch_up_behind_the_budget_and_some_never_are_all_too_late(comparison):
    scratch = _falling(8.0, 8.1) + _falling(8.2, end=4.5)
    made = comparison({"dense": DENSE * 3, "upcycled": [FLAT] * 3, "scratch": scratch})
    found = made.content["crossings"]["tokens"]["catch_up"]
    assert found["each"]["3"]["place"] is None and min(found["shares"].values()) > 1
    assert made.content["lead"]["budget"]["low"] > 0.02
    assert made.content["verdict"] == verdict.DISAGREES


def test_seeds_that_reach_it_are_named_beside_those_that_do_not(comparison):
    scratch = _falling(5.0, 5.5) + _falling(6.0, end=4.5)
    made = comparison({"dense": DENSE * 3, "upcycled": [FLAT] * 3, "scratch": scratch})
    sentence = next(w for w in made.content["words"] if "has not caught up" in w)
    assert "(seed 1)" in sentence and "(seed 2)" in sentence and "with seed 3: no int" in sentence
    assert made.content["verdict"] == verdict.UNDECIDED


def test_one_seed_decides_nothing_and_has_no_interval(comparison):
    made = comparison({"dense": DENSE, "upcycled": [FLAT], "scratch": _falling(4.2)})
    found = made.content["crossings"]["tokens"]["catch_up"]
    assert found["mean"] is not None and found["low"] is None
    assert made.content["verdict"] == verdict.UNDECIDED
    assert "One seed gives no interval" in made.content["words"][1]


def test_models_no_better_than_bigrams_decide_nothing(comparison):
    losses = {"dense": DENSE * 3, "upcycled": [FLAT] * 3, "scratch": _falling(4.2, 4.25, 4.15)}
    made = comparison(losses, bigram=4.5)  # above upcycled and scratch, below dense
    assert made.content["verdict"] == verdict.UNDECIDED
    assert made.content["bigram"]["not_below"] == ["dense"]
    assert "(dense not below a bigram model)" in made.content["words"][0]


def test_a_dense_model_of_unknown_cost_gives_no_share(comparison):
    losses = {"upcycled": [FLAT] * 3, "scratch": _falling(4.2, 4.25, 4.15)}
    made = comparison(losses)
    text = " ".join(made.content["words"])
    assert "flops_with_dense, seconds_with_dense are left out" in text
    assert "tokens are not known, so no share" in text
    assert made.content["verdict"] == verdict.UNDECIDED
    assert set(made.content["crossings"]) == {"tokens", "flops", "seconds"}


def test_a_dense_model_of_known_tokens_gives_shares_and_flops(comparison):
    losses = {"upcycled": [FLAT] * 3, "scratch": _falling(4.2, 4.25, 4.15)}
    made = comparison(losses, dense_tokens=1_280)
    assert set(made.content["crossings"]) == {"tokens", "flops", "flops_with_dense", "seconds"}
    assert made.content["verdict"] == verdict.AGREES
    dense = made.content["dense"]["1"]
    assert dense["tokens"] == 1_280 and dense["seconds"] is None
    one_expert = dense["flops"] / 1_280
    moe = made.plan.configs["scratch"]
    assert one_expert < upcycling_report.equality.cost(moe).flops_per_token


def test_a_diverged_run_takes_its_seed_out_and_is_named(comparison, monkeypatch):
    losses = {"dense": DENSE * 3, "upcycled": [FLAT] * 3, "scratch": _falling(4.2, 4.25, 4.15)}
    write = files.write_json

    def with_marker(path, content):
        write(path, content)
        if path.name == "bigram.json":
            write(path.parent / "scratch/seed_2/diverged.json", {"problem": "step 7: loss nan"})

    monkeypatch.setattr(files, "write_json", with_marker)
    made = comparison(losses)
    assert made.content["missing"] == {"2": "scratch diverged (step 7: loss nan)"}
    assert sorted(made.content["curves"]["upcycled"]) == ["1", "3"]
    assert made.content["verdict"] == verdict.UNDECIDED


def test_windows_read_again_are_noted(comparison, prepared):
    losses = {"dense": DENSE, "upcycled": [FLAT], "scratch": _falling(4.2)}
    windows = json.loads((prepared / "info.json").read_text())["splits"]["train"]["windows"]
    assert 120 * 4 < windows < 120 * 32
    assert comparison(losses).content["notes"] == []
    (note,) = comparison(losses, batch=32, name="large").content["notes"]
    assert f"hold {windows:,} windows" in note and "those from 640 to 3,840 of" in note


def test_page_and_picture_show_every_axis(comparison):
    made = comparison({"dense": DENSE * 2, "upcycled": [FLAT] * 2, "scratch": _falling(4.2, 5.0)})
    upcycling_page.write(made)
    text = (made.plan.workdir / upcycling_report.PAGE).read_text()
    body = text[: text.index("<script>")]
    for title in upcycling_page.X_TITLES.values():
        assert f"Validation loss over {title}".replace("'", "&#x27;") in body
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    charts = {chart["x_title"]: chart for chart in reversed(data["charts"])}
    series = {s["name"]: s for s in charts[upcycling_page.X_TITLES["flops_with_dense"]]["series"]}
    assert set(series) == {"dense", "upcycled", "scratch"}
    assert (
        series["upcycled"]["x"][0]
        == series["dense"]["x"][-1]
        == pytest.approx(made.content["dense"]["1"]["flops"])
    )
    assert json.loads((made.plan.workdir / "compare.json").read_text()) == made.content
    assert (made.plan.workdir / "compare.png").read_bytes()[:4] == b"\x89PNG"
