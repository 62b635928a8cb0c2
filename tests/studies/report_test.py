import dataclasses
import fcntl
import json
import re
import shutil

import numpy as np
import pytest
from scipy import stats

from olmoe_jax.data import pipeline
from olmoe_jax.studies import plans, report, results, verdict
from olmoe_jax.training import runs
from tests.browser import chromium


def _last_losses(plan, arm):
    """By hand from metrics.jsonl."""
    out = []
    for seed in plan.seeds:
        lines = (plan.workdir / arm / f"seed_{seed}" / "metrics.jsonl").read_text().splitlines()
        out.append(json.loads(lines[-1])["validation/loss"])
    return np.array(out)


def test_the_verdict_of_real_runs_is_recomputed_from_their_metrics(finished):
    plan, content = finished
    outcome = content["outcomes"][0]
    worse, good = _last_losses(plan, "worse"), _last_losses(plan, "good")
    want = stats.ttest_rel(worse, good).confidence_interval(0.95)
    got = outcome["interval"]
    np.testing.assert_allclose(
        (got["mean"], got["low"], got["high"]), ((worse - good).mean(), want.low, want.high)
    )
    assert outcome["agreement"] == verdict.AS_EXPECTED and want.low > 0
    for value in (f"{(worse - good).mean():+.4f}", f"{want.low:+.4f}", "n = 3 seeds"):
        assert value in outcome["words"]


def test_the_cost_to_the_same_loss_is_recomputed_from_the_metrics(finished):
    plan, content = finished
    targets, ratios = _last_losses(plan, "worse"), []
    for seed, target in zip(plan.seeds, targets, strict=True):
        lines = (plan.workdir / "good" / f"seed_{seed}" / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        points = [(r["step"], r["validation/loss"]) for r in records if "validation/loss" in r]
        steps, losses = np.array(points[1:]).T
        after = int(np.argmax(losses <= target))
        logs = np.log(steps)
        if after:
            logs = np.interp(-target, -losses[after - 1 : after + 1], logs[after - 1 : after + 1])
        else:
            logs = logs[0]
        ratios.append(logs - np.log(plan.configs["good"].training.num_steps))
    outcome = content["outcomes"][1]
    assert outcome["interval"]["mean"] == pytest.approx(np.exp(np.mean(ratios)), rel=1e-9)


def test_report_json_has_costs_routing_and_notes(finished):
    plan, content = finished
    assert json.loads((plan.workdir / report.DATA).read_text()) == content
    row = content["arms"]["good"]
    assert row["cost"]["tokens"] == 12 * 4 * 16 and row["cost"]["router"] == 8 * 4
    assert row["health"]["max_load"] >= 1 and 0 < row["health"]["normalized_entropy"] <= 1
    assert row["seconds"] == pytest.approx(768 / row["tokens_per_second"], rel=0.5)
    assert content["notes"] == ["a note"] and content["protocol"] is None
    assert content["data"] == plan.configs["good"].data.path
    assert content["environment"] and content["outcomes"][0]["documents"] is None  # too few
    assert content["data_identity"] == runs.identity(pipeline.open(content["data"]))
    rate = plan.configs["good"].optimizer.learning_rate
    assert [content["arms"][arm]["changes"] for arm in ("good", "worse")] == [
        {"optimizer.learning_rate": rate}, {"optimizer.learning_rate": rate / 100},
    ]  # fmt: skip
    every = list(plan.study.equal)
    assert content["held_equal"] == [{"arms": ["good", "worse"], "names": every}]


def test_the_bigram_model_is_that_of_the_runs_data(finished, tmp_path):
    plan, content = finished
    copy = dataclasses.replace(plan, workdir=tmp_path / "copy")
    shutil.copytree(plan.workdir, copy.workdir, symlinks=True)
    path = copy.workdir / report.BIGRAM
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"validation/bigram_loss": 9.0}))
    found = report.bigram_baseline(copy, lambda line: None)["validation/bigram_loss"]
    assert found == 9.0  # kept, of the same data
    path.write_text(json.dumps(kept | {"validation/bigram_loss": 9.0, "data": {}}))
    found = report.bigram_baseline(copy, lambda line: None)["validation/bigram_loss"]
    assert found == pytest.approx(content["bigram"]["loss"])


def test_runs_on_data_that_were_prepared_anew_are_not_judged_together(finished, tmp_path):
    plan, _ = finished
    copy = dataclasses.replace(plan, workdir=tmp_path / "copy")
    shutil.copytree(plan.workdir, copy.workdir, symlinks=True)
    config = copy.path("worse", 2) / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"data_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="worse/seed_2 was run on other data than .*good/seed_1"):
        report.write(copy)
    with pytest.raises(ValueError, match="worse/seed_2 was run on other data than .*Name another"):
        plans.make_plan(plan.study, copy.workdir, scale="smoke")


def test_the_page_has_verdict_curves_costs_and_routing(finished):
    plan, content = finished
    text = (plan.workdir / report.PAGE).read_text()
    body = text[: text.index("<script>")]
    words = re.sub(r"&#x27;|&quot;", "'", body)
    assert content["outcomes"][0]["words"].split(":")[0] in words
    for title in ("Verdicts", "validation/loss over tokens", "over training FLOPs",
                  "over seconds of training", "Final differences, paired by seed",
                  "What the arms change", "What each arm costs", "Quality and routing",
                  "How it was done"):  # fmt: skip
        assert title in body
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    curve = data["charts"][0]["series"][0]
    runs = [results.read_run(plan.path("good", s), "good", s) for s in plan.seeds]
    values = np.stack([run.curve("validation/loss").values[1:] for run in runs])
    np.testing.assert_allclose(curve["y"], values.mean(0))
    np.testing.assert_allclose(curve["low"], values.min(0))


@pytest.mark.skipif(bool(chromium.missing()), reason=chromium.missing() or "-")
def test_the_page_opens_in_a_browser(finished, tmp_path):
    plan, _ = finished
    with chromium.start(tmp_path) as driver:
        driver.get((plan.workdir / report.PAGE).as_uri())
        assert chromium.problems(driver) == []
        plots = driver.find_elements("css selector", ".plot")
        points = [
            driver.execute_script("return arguments[0].data.map(t => t.y.length)", plot)
            for plot in plots
        ]
        assert len(plots) >= 4 and all(sum(each) for each in points)


def test_the_terminal_says_the_same_and_names_arms_below_the_bigram_model(finished):
    _, content = finished
    text = report.text(content)
    assert content["outcomes"][0]["words"] in text and "note: a note" in text
    weak = {**content, "bigram": {"loss": 0.1, "bits_per_byte": 0.1}}
    weak["arms"] = {a: {**row, "beats_bigram": False} for a, row in content["arms"].items()}
    assert "note: good, worse not below the bigram model (0.1000 nats)" in report.text(weak)


def test_a_process_waits_while_another_writes_the_report(finished):
    plan, content = finished
    with open(plan.workdir / report.LOCK, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def announce(line):
            if line.endswith("another process writes the report; waiting for it"):
                fcntl.flock(other, fcntl.LOCK_UN)
                said.append(line)

        said = []
        assert report.write(plan, notes=["a note"], announce=announce) == content
    assert len(said) == 1
