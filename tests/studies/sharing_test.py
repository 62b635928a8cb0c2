"""Runs that studies have in common, made once."""

import dataclasses
import json
import shutil

import jax
import pytest

from olmoe_jax import studies
from olmoe_jax.studies import pilot, plans, report, runner, sharing


@pytest.fixture
def other(finished, tmp_path):
    """A Plan of another study with an arm of `finished`, twice, and an arm of its own."""
    plan, _ = finished
    eps = {"optimizer.eps": 1e-3}
    study = studies.Study(
        name="other", question="Is it the same?", base=plan.study.base, seeds=(1, 2),
        arms=(studies.Arm(name="again"), studies.Arm(name="twin"),
              studies.Arm(name="mine", changes=eps)),
        outcomes=(studies.Outcome(arm="twin", against="again", expected="equal"),),
    )  # fmt: skip
    return plans.make_plan(study, tmp_path / "other", scale="smoke")


def test_a_run_with_every_setting_the_same_is_a_link_and_a_twin_is_none(finished, other):
    plan, _ = finished
    sharing.adopt(other, [other.workdir, plan.workdir])
    assert other.remaining == [("twin", 1), ("mine", 1), ("twin", 2), ("mine", 2)]
    assert other.path("again", 2).resolve() == plan.path("good", 2).resolve()
    (note,) = sharing.notes(other)
    assert note.endswith("again, seeds 1, 2: planted/good") and sharing.notes(plan) == []
    sharing.adopt(other, [plan.workdir])  # again: nothing is left that could be taken
    assert len(other.remaining) == 4
    plans.make_plan(other.study, other.workdir, scale="smoke")  # and it is not refused


def test_a_link_to_a_run_that_is_gone_is_made_anew(finished, other):
    plan, _ = finished
    path = other.path("again", 1)
    path.parent.mkdir(parents=True)
    path.symlink_to("nowhere")
    sharing.adopt(other, [])
    assert not path.is_symlink()
    sharing.adopt(other, [plan.workdir])
    assert other.is_done("again", 1)


def test_a_pilot_takes_over_the_same_run_of_another_pilot(finished, other, tmp_path):
    plan, _ = finished
    piloted = dataclasses.replace(plan, workdir=tmp_path / "piloted")
    ran = next(run for run in pilot.wanted_runs(piloted) if run[0] == "good")
    shutil.copytree(plan.path("good", 1), ran[4])
    content = json.loads((ran[4] / "config.json").read_text())
    content["config"] = dataclasses.asdict(ran[3])
    (ran[4] / "config.json").write_text(json.dumps(content))
    sharing.adopt_pilot(other, [other.workdir, piloted.workdir])
    links = {run[0:3]: run[4].resolve() for run in pilot.wanted_runs(other) if run[4].is_symlink()}
    assert links == {("again", *ran[1:3]): ran[4].resolve()}


def test_the_estimate_counts_runs_in_common_once(finished, other, monkeypatch):
    plan, _ = finished
    monkeypatch.setattr(plans, "estimate", lambda plan, arm, seed: 1.0)
    planned = {plan.config(arm, seed) for arm in plan.configs for seed in plan.seeds}
    assert sharing.seconds_left(other, set()) == 6
    assert sharing.seconds_left(other, planned) == 4
    assert other.config("mine", 1) in planned


def test_the_estimate_leaves_out_what_other_studies_have_finished(finished, other, monkeypatch):
    plan, _ = finished
    folders = [plan.workdir, other.workdir]
    monkeypatch.setattr(plans, "estimate", lambda plan, arm, seed: 1.0)
    assert sharing.seconds_left(other, set(), folders) == 4
    assert sharing.seconds_left(plan, set(), folders) == 0
    sharing.adopt(other, folders)  # as many are left once the runs in common are links
    assert sharing.seconds_left(other, set(), folders) == len(other.remaining) == 4


def test_a_run_on_data_that_were_prepared_anew_is_not_taken(finished, other, monkeypatch):
    plan, _ = finished
    anew = {"tokenizer_sha256": "0" * 64, "data_sha256": "1" * 64}
    monkeypatch.setattr(sharing.runs, "identity", lambda data: anew)
    sharing.adopt(other, [plan.workdir])
    assert len(other.remaining) == 6


@pytest.mark.slow
def test_a_study_with_links_is_judged(finished, other):
    plan, _ = finished
    quiet = {"announce": lambda line: None}
    sharing.adopt(other, [plan.workdir])
    runner.make_runs(other, devices=jax.devices()[:1], **quiet)
    content = report.write(other, notes=sharing.notes(other), **quiet)
    assert content["outcomes"][0]["interval"]["mean"] == pytest.approx(0, abs=1e-6)
    assert "planted/good" in content["notes"][0]
