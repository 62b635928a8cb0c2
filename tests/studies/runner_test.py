import contextlib
import dataclasses
import fcntl
import json
import pathlib

import jax
import pytest

from olmoe_jax import checkpoints, studies
from olmoe_jax.data import preparation
from olmoe_jax.studies import declaration, pilot, plans, results, runner
from olmoe_jax.training import loop, runs
from tests.studies import synthetic


def _plan(study, workdir, **options):
    return plans.make_plan(study, workdir, scale="smoke", **options)


def _quiet(line):
    del line


def _forbidden(*arguments, **options):
    raise AssertionError("a finished run was touched")


def test_every_run_is_an_ordinary_one_and_is_not_made_twice(finished, monkeypatch):
    plan, _ = finished
    for arm in ("good", "worse"):
        for seed in (1, 2, 3):
            path = plan.workdir / arm / f"seed_{seed}"
            assert [step for step, _ in checkpoints.list_checkpoints(path)] == [0, 4, 8, 12]
            assert runs.read_config(path)[0] == plan.config(arm, seed)
    monkeypatch.setattr(loop, "train", _forbidden)
    assert plan.remaining == [] and runner.make_runs(plan, announce=_quiet) is None


def test_arms_of_one_seed_start_alike_and_see_the_same_batches(finished):
    plan, _ = finished
    for seed in plan.seeds:
        one, two = (results.read_run(plan.path(arm, seed), arm, seed) for arm in plan.configs)
        assert one.curve("train/loss").values[0] == two.curve("train/loss").values[0]
    other = results.read_run(plan.path("good", 1), "good", 1)
    assert other.curve("train/loss").values[0] != one.curve("train/loss").values[0]


def test_only_one_arm_or_seed_is_made_where_that_is_asked(planted, tmp_path, monkeypatch):
    made = []

    def train(config, path, **options):
        made.append((path.parent.name, config.training.seed))
        return loop.Result(step=0, finished=False)

    monkeypatch.setattr(loop, "train", train)
    plan = _plan(planted, tmp_path)
    runner.make_runs(plan, arm="worse", announce=_quiet)
    runner.make_runs(plan, seed=2, announce=_quiet)
    runner.make_runs(plan, arm="good", seed=3, announce=_quiet)
    assert made == [("worse", 1), ("worse", 2), ("worse", 3), ("good", 2), ("worse", 2),
                    ("good", 3)]  # fmt: skip
    with pytest.raises(ValueError, match="no arm 'best'"):
        runner.make_runs(plan, arm="best", announce=_quiet)
    with pytest.raises(ValueError, match="--seed=9: the seeds are 1, 2, 3$"):
        runner.make_runs(plan, seed=9, announce=_quiet)


def test_a_metric_of_a_domain_that_the_data_lack_costs_no_run(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train", _forbidden)
    about = dataclasses.replace(planted.outcomes[0], metric="validation/d/loss")
    study = dataclasses.replace(planted, outcomes=(about,))
    with pytest.raises(ValueError, match="planted: metric is 'validation/d/loss': .*: a, b, c"):
        runner.make_runs(_plan(study, tmp_path), announce=_quiet)


def test_a_domain_without_text_to_evaluate_costs_no_run(planted, tmp_path, monkeypatch):
    """One document of "b", which is too few to hold one out; the pilot asks as well."""
    lines = [{"id": str(i), "text": f"{i} and {i + 1} " * 20, "source": "ab"[i == 3]}
             for i in range(40)]  # fmt: skip
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    preparation.prepare([str(tmp_path / "corpus.jsonl")], tmp_path / "data", sequence_length=16,
                        vocab_size=270, validation_fraction=0.1, announce=_quiet)  # fmt: skip
    monkeypatch.setattr(loop, "train", _forbidden)
    about = dataclasses.replace(planted.outcomes[0], metric="validation/b/loss")
    plan = _plan(
        dataclasses.replace(planted, outcomes=(about,)), tmp_path / "run", data=tmp_path / "data"
    )
    for make in (runner.make_runs, pilot.run):
        with pytest.raises(ValueError, match="the validation windows hold no text of 'b'; prepare"):
            make(plan, announce=_quiet)


def test_a_signal_ends_it_before_the_next_run(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(
        loop, "train", lambda *a, **k: loop.Result(step=3, finished=False, signal=15)
    )
    assert runner.make_runs(_plan(planted, tmp_path), announce=_quiet) == 15
    assert len(list(tmp_path.glob("*/seed_*"))) == 1


def test_a_run_that_another_process_has_is_left_to_it(planted, tmp_path, monkeypatch):
    made, said = [], []
    monkeypatch.setattr(
        loop, "train",
        lambda config, path, **o: made.append(path) or loop.Result(step=0, finished=False),
    )  # fmt: skip
    plan = _plan(planted, tmp_path)
    taken = plan.path("good", 1)
    with contextlib.ExitStack() as stack:
        assert stack.enter_context(runner.claim(taken))
        runner.make_runs(plan, seed=1, announce=said.append)
    assert made == [plan.path("worse", 1)]
    assert any("another process is at it" in line for line in said)
    with open(taken / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back


def test_a_diverged_run_is_marked_counts_as_done_and_is_not_repeated(
    planted, tmp_path, monkeypatch
):
    def train(config, path, **options):
        raise FloatingPointError("step 7: loss nan")

    monkeypatch.setattr(loop, "train", train)
    plan = _plan(planted, tmp_path)
    runner.make_runs(plan, announce=_quiet)
    assert plan.remaining == []
    marker = json.loads((plan.path("good", 2) / results.DIVERGED).read_text())
    assert marker == {"problem": "step 7: loss nan"}
    monkeypatch.setattr(loop, "train", _forbidden)
    runner.make_runs(plan, announce=_quiet)


def test_the_embedded_corpus_is_made_once_for_all_runs(planted, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(runs, "open_data", lambda config, path, announce: opened.append(path))
    config = declaration.changed(planted.base["smoke"], {"data.path": "embedded"})
    for path in (tmp_path / "good" / "seed_1", tmp_path / "pilot" / "good" / "rate_1" / "seed_1"):
        for _ in range(2):
            runner.share_data(tmp_path, path, config, _quiet)
        assert (path / "data").resolve() == tmp_path / "data"
        assert not (path / "data").readlink().is_absolute()  # the study can be moved


def test_links_to_data_that_another_process_makes_at_the_same_time(planted, tmp_path, monkeypatch):
    config = declaration.changed(planted.base["smoke"], {"data.path": "embedded"})
    monkeypatch.setattr(runs, "open_data", lambda config, path, announce: None)
    run = tmp_path / "good" / "seed_1"

    def flock(file, operation):  # the other has made its link while we waited for the lock
        (run / "data").symlink_to("../../data")

    monkeypatch.setattr(fcntl, "flock", flock)
    runner.share_data(tmp_path, run, config, _quiet)
    assert (run / "data").resolve() == tmp_path / "data"
    runner.link_data(tmp_path / "study", tmp_path / "data")
    monkeypatch.setattr(pathlib.Path, "exists", lambda path: False)  # nor had it one a moment ago
    monkeypatch.setattr(pathlib.Path, "is_symlink", lambda path: False)
    runner.link_data(tmp_path / "study", tmp_path / "data")
    assert (tmp_path / "study" / "data").resolve() == tmp_path / "data"


def _continuing(tiny_base, convert=None):
    """A study of two arms that start from where a third ended."""
    arms = (
        studies.Arm(name="start"),
        studies.Arm(name="new", starts_from="start", convert=convert),
        studies.Arm(name="old", changes={"optimizer.eps": 1e-6}),
    )
    return synthetic.study(base={"smoke": tiny_base}, arms=arms, seeds=(1,))


def test_an_arm_whose_start_another_process_makes_is_left_for_later(
    tiny_base, tmp_path, monkeypatch
):
    made, said = [], []
    monkeypatch.setattr(
        loop, "train",
        lambda config, path, **o: made.append(path) or loop.Result(step=0, finished=False),
    )  # fmt: skip
    plan = _plan(_continuing(tiny_base), tmp_path)
    with runner.claim(plan.path("start", 1)):
        runner.make_runs(plan, announce=said.append)
    assert made == [plan.path("old", 1)]
    assert any("which another process is at" in line for line in said)


def test_an_arm_waits_for_the_one_it_starts_from(tiny_base, tmp_path):
    plan = _plan(_continuing(tiny_base), tmp_path)
    with pytest.raises(ValueError, match="start/seed_1, which is not finished: run --arm=start"):
        runner.make_runs(plan, arm="new", announce=_quiet)


@pytest.mark.slow
@pytest.mark.parametrize("converted", [False, True])
def test_an_arm_starts_from_the_end_of_another(tiny_base, tmp_path, converted):
    calls = []

    def convert(source, target, config):
        calls.append(config.training.seed)
        target.symlink_to(source)

    plan = _plan(_continuing(tiny_base, convert if converted else None), tmp_path)
    runner.make_runs(plan, devices=jax.devices()[:1], announce=_quiet)
    assert plan.remaining == [] and calls == ([1] if converted else [])
    source = results.read_run(plan.path("start", 1), "start", 1)
    run = results.read_run(plan.path("new", 1), "new", 1)
    first = run.curve("validation/loss").values[0]
    assert first == pytest.approx(source.final("validation/loss"), rel=1e-5)
    plans.make_plan(plan.study, plan.workdir, scale="smoke")  # and is not refused afterwards
