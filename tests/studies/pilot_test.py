"""The runs of a pilot: which there are, from where they start, resumed."""

import contextlib

import jax
import pytest

from olmoe_jax import studies
from olmoe_jax.studies import declaration, pilot, plans, protocol, runner
from tests.studies import synthetic


def _plan(workdir, **fields):
    return plans.make_plan(synthetic.study(**fields), workdir, scale="smoke")


def test_every_arm_is_tried_at_the_same_multiples_on_the_pilots_seeds(tmp_path):
    slow = studies.Arm(name="new", changes={"optimizer.learning_rate": 1e-4})
    plan = _plan(tmp_path, arms=(studies.Arm(name="old"), slow))
    runs = pilot.wanted_runs(plan)
    assert {seed for _, _, seed, _, _ in runs} == set(plan.study.pilot_seeds)
    assert {rate for arm, rate, *_ in runs if arm == "old"} == {0.002, 0.004, 0.008}
    assert {rate for arm, rate, *_ in runs if arm == "new"} == {1e-4}  # the rate is its question
    for arm, rate, seed, config, path in runs:
        assert (config.optimizer.learning_rate, config.training.seed) == (rate, seed)
        assert path == tmp_path / "pilot" / arm / f"rate_{rate:g}" / f"seed_{seed}"


def test_a_pilot_says_beforehand_what_it_takes(tmp_path):
    text = pilot.describe(_plan(tmp_path))
    assert "pilot of made_up (smoke): 12 runs, seeds 101, 102, 0 done" in text
    assert "new: learning rate 0.002, 0.004, 0.008" in text and "(an estimate)" in text


def test_an_arm_that_starts_from_another_is_piloted_from_its_best_rate(tmp_path, monkeypatch):
    """Arm by arm, whatever the order of seeds: "new" starts where "old" did best over all seeds."""
    losses, starts = {0.002: 4.0, 0.004: 3.5, 0.008: 3.9}, {}
    arms = (studies.Arm(name="old"), studies.Arm(name="new", starts_from="old"))
    plan = _plan(tmp_path, arms=arms)

    def make_run(workdir, path, config, **options):
        end = losses[config.optimizer.learning_rate] - config.training.seed / 1000
        synthetic.write_run(path, config.training.seed, synthetic.falling(end), config=config)

    def make_start(arm, source, path, config):
        starts[arm.name, config.optimizer.learning_rate, config.training.seed] = source

    monkeypatch.setattr(runner, "make_run", make_run)
    monkeypatch.setattr(runner, "make_start", make_start)
    monkeypatch.setattr(
        protocol.runs,
        "finished_record",
        lambda path, config: (path / "config.json").is_file() or None,
    )
    monkeypatch.setattr(runner, "check_data", lambda plan, announce: {})
    monkeypatch.setattr(runner, "claim", lambda path: contextlib.nullcontext(True))
    found = pilot.run(plan, announce=lambda line: None)
    assert found.learning_rates == {"old": 0.004, "new": 0.004}
    for rate in losses:
        for seed in plan.study.pilot_seeds:
            assert starts["old", rate, seed] is None
            wanted = tmp_path / "pilot" / "old" / "rate_0.004" / f"seed_{seed}"
            assert starts["new", rate, seed] == wanted
    for arm, _, _, config, path in pilot.wanted_runs(plan):
        start = str(path / "start") if arm == "new" else None
        assert config.training.initial_checkpoint == start


def test_a_pilot_waits_for_what_its_arms_start_from(tmp_path, monkeypatch):
    """Another process has the runs of "old": "new" cannot know yet where to start."""
    arms = (studies.Arm(name="old"), studies.Arm(name="new", starts_from="old"))
    monkeypatch.setattr(runner, "check_data", lambda plan, announce: {})
    monkeypatch.setattr(
        runner, "claim", lambda path: contextlib.nullcontext("old" not in path.parts)
    )
    with pytest.raises(ValueError, match="arm new starts from old, whose runs are not all finish"):
        pilot.run(_plan(tmp_path, arms=arms), announce=lambda line: None)


@pytest.mark.slow
def test_a_pilot_is_run_resumed_and_followed(tiny_base, tmp_path):
    base = declaration.changed(tiny_base, {"training.num_steps": 4})
    study = synthetic.study(
        base={"smoke": base}, pilot_seeds=(7, 8), learning_rate_factors=(0.5, 1.0), max_seeds=3
    )
    plan = plans.make_plan(study, tmp_path, scale="smoke")
    options = {"devices": jax.devices()[:1], "announce": lambda line: None}
    found = pilot.run(plan, **options)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("metrics.jsonl")}
    assert len(times) == 8
    assert pilot.run(plan, **options) == found
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("metrics.jsonl")} == times
    assert found.sd == 0 and len(found.seeds) == 3  # the arms are the same
