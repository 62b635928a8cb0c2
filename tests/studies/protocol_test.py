import dataclasses
import json

import pytest

from olmoe_jax import studies
from olmoe_jax.studies import plans, protocol, statistics
from olmoe_jax.training import runs
from tests.studies import synthetic


def _plan(workdir, **fields):
    return plans.make_plan(synthetic.study(**fields), workdir, scale="smoke")


def _finals(old, new):
    """Final losses of both arms at three rates; rows are rates, columns pilot seeds."""
    rates = (0.002, 0.004, 0.008)
    return {"old": dict(zip(rates, old, strict=True)), "new": dict(zip(rates, new, strict=True))}


OLD = [[5.0, 5.1, 5.0], [4.0, 4.1, 4.0], [4.5, 4.6, 4.4]]
NEW = [[4.9, 5.1, 5.1], [4.3, 4.1, 4.2], [3.9, 3.8, 3.9]]


def test_each_arm_gets_its_own_best_rate(tmp_path):
    found = protocol.decide(_plan(tmp_path), _finals(OLD, NEW))
    assert found.learning_rates == {"old": 0.004, "new": 0.008}
    assert any(note.startswith("new: the best rate, 0.008, is at the edge") for note in found.notes)


def test_seeds_follow_from_the_spread_and_not_from_the_effect(tmp_path):
    plan = _plan(tmp_path, outcomes=(synthetic.outcome(smallest_effect=0.2),))
    found = protocol.decide(plan, _finals(OLD, NEW))
    shifted = [[loss - 3 for loss in row] for row in NEW]
    assert protocol.decide(plan, _finals(OLD, shifted)).seeds == found.seeds
    groups = [[n - o for n, o in zip(*rows, strict=True)] for rows in zip(NEW, OLD, strict=True)]
    sd, freedom = statistics.pooled_sd(groups)
    assert (found.sd, found.degrees_of_freedom) == (pytest.approx(sd), freedom)
    bound = statistics.sd_bound(sd, freedom)
    assert found.sd_bound == bound > sd
    assert len(found.seeds) == statistics.seeds_to_decide(0.2, bound, least=3)
    assert found.power == pytest.approx(statistics.power(0.2, sd, len(found.seeds)))


def test_more_seeds_than_declared_are_new_ones_and_none_of_the_pilots(tmp_path):
    plan = _plan(tmp_path, seeds=(99, 100), max_seeds=4,
                 outcomes=(synthetic.outcome(smallest_effect=0.001),))  # fmt: skip
    found = protocol.decide(plan, _finals(OLD, NEW))
    assert found.seeds == (99, 100, 103, 104)
    assert any("the study stops at 4" in note for note in found.notes)


def test_a_rate_at_which_a_run_diverged_is_not_chosen(tmp_path):
    new = [NEW[0], NEW[1], [3.9, None, 3.9]]
    found = protocol.decide(_plan(tmp_path), _finals(OLD, new))
    assert found.learning_rates["new"] == 0.004 and found.degrees_of_freedom == 5
    broken = [[None] * 3] * 3
    with pytest.raises(ValueError, match="arm new diverged at every rate"):
        protocol.decide(_plan(tmp_path), _finals(OLD, broken))


@pytest.fixture
def written(tmp_path):
    """(path of a protocol, its study)."""
    plan = _plan(tmp_path / "study")
    protocol.write(tmp_path / "protocol.json", protocol.decide(plan, _finals(OLD, NEW)))
    return tmp_path / "protocol.json", plan.study


def test_a_protocol_is_read_as_it_was_written(written):
    path, study = written
    found, notes = protocol.read(path, study, "smoke")
    want = protocol.decide(_plan(path.parent / "study"), _finals(OLD, NEW))
    without = {"configs": {}}  # JSON has lists where they have tuples
    assert dataclasses.replace(found, **without) == dataclasses.replace(want, **without)
    assert notes == [] and json.loads(path.read_text())["pilot"]["old"]["0.004"] == OLD[1]


def test_a_protocol_of_another_declaration_is_refused(written):
    path, study = written
    with pytest.raises(ValueError, match="of study made_up at scale smoke, not of made_up at lap"):
        protocol.read(path, study, "laptop")
    changed = dataclasses.replace(study, common={"model.num_layers": 4})
    with pytest.raises(ValueError, match="old: config.model.num_layers: 2 != 4.*Run --pilot again"):
        protocol.read(path, changed, "smoke")
    more = dataclasses.replace(study, arms=(*study.arms, studies.Arm(name="third")))
    with pytest.raises(ValueError, match="arm third is new"):
        protocol.read(path, more, "smoke")
    scaled = dataclasses.replace(study, variant="scaled")
    with pytest.raises(ValueError, match="of variant '' of study made_up, not of 'scaled'. Run --"):
        protocol.read(path, scaled, "smoke")
    content = json.loads(path.read_text())
    del content["variant"], content["outcomes"]  # as earlier versions wrote it
    path.write_text(json.dumps(content))
    assert protocol.read(path, scaled, "smoke")[0].variant == "scaled"
    strange = [content | {"seeds": None}, content | {"outcomes": [{"arm": "new"}]}]
    for text in ("{}", "[]", '{"study": ', *map(json.dumps, strange)):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path}: not a protocol.*un --pilot again"):
            protocol.read(path, study, "smoke")


def test_a_question_that_was_changed_after_the_pilot_is_refused_or_noted(written):
    path, study = written
    for change, words in (
        ({"smallest_effect": 1.0}, "smallest_effect 0.01 != 1.0"),
        ({"expected": "equal"}, "expected 'lower' != 'equal'"),
        ({"metric": "train/loss"}, "metric 'validation/loss' != 'train/loss'"),
    ):
        changed = dataclasses.replace(study, outcomes=(synthetic.outcome(**change),))
        with pytest.raises(ValueError, match=f"for another question .*{words}.*Ask what was fixed"):
            protocol.read(path, changed, "smoke")
    said = dataclasses.replace(study, outcomes=(synthetic.outcome(paper="in other words"),))
    assert protocol.read(path, said, "smoke")[1] == []
    outcomes = (*study.outcomes, synthetic.outcome(measure="tokens"))
    more = dataclasses.replace(study, outcomes=outcomes)
    (note,) = protocol.read(path, more, "smoke")[1]
    assert note == f"not fixed by the protocol, so explored: {outcomes[1].title}"
    protocol.write(path, protocol.decide(_plan(path.parent, outcomes=outcomes), _finals(OLD, NEW)))
    (note,) = protocol.read(path, study, "smoke")[1]
    assert note == f"fixed by the protocol, but not asked any more: {outcomes[1].title}"
    content = json.loads(path.read_text())
    del content["outcomes"]  # as earlier versions wrote it: these two were kept
    path.write_text(json.dumps(content))
    assert protocol.read(path, more, "smoke")[1] == []
    with pytest.raises(ValueError, match="for another question"):
        protocol.read(path, changed, "smoke")


def test_seeds_of_the_pilot_are_none_of_a_verdict(written, tmp_path):
    path, study = written
    with pytest.raises(ValueError, match="none of a verdict: choose others than 101"):
        plans.make_plan(study, tmp_path / "run", scale="smoke", seeds=(7, 101))
    other = dataclasses.replace(study, pilot_seeds=(901, 902))  # declared after the pilot
    with pytest.raises(ValueError, match="none of a verdict: choose others than 102"):
        protocol.plan(other, tmp_path / "run", scale="smoke", seeds=(7, 102), path=path)


def test_a_plan_follows_the_protocol_and_says_where_it_does_not(written, tmp_path):
    path, study = written
    options = {"scale": "smoke"}
    plain, followed, notes = protocol.plan(study, tmp_path / "none", **options)
    assert (plain.seeds, followed, notes) == (study.seeds, None, [])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / protocol.FILE).write_text(path.read_text())
    plan, followed, notes = protocol.plan(study, tmp_path / "run", **options)
    assert plan.seeds == followed.seeds == protocol.read(path, study, "smoke")[0].seeds
    assert plan.config("new", 1).optimizer.learning_rate == 0.008 and notes == []
    plan, _, notes = protocol.plan(study, tmp_path / "none", path=path, seeds=(8, 9), **options)
    assert plan.seeds == (8, 9) and plan.config("new", 8).optimizer.learning_rate == 0.008
    assert notes == [f"the seeds are not the protocol's, {list(followed.seeds)}"]


def test_rates_and_seeds_carry_over_to_other_data_and_that_is_said(written, prepared):
    path, study = written
    data = plans.data_changes(prepared)
    found, notes = protocol.read(path, study, "smoke", data=data)
    assert notes == ["the pilot ran on other data; its rates and seeds are kept"]
    plan = plans.make_plan(study, path.parent / "else", scale="smoke", data=prepared,
                            seeds=found.seeds, learning_rates=found.learning_rates)  # fmt: skip
    assert plan.config("new", 3).optimizer.learning_rate == 0.008


def test_a_pilot_on_data_that_were_prepared_anew_is_noted(tiny_base, tmp_path):
    study = synthetic.study(base={"smoke": tiny_base})
    plan = plans.make_plan(study, tmp_path, scale="smoke")
    (data,) = plan.prepared.values()
    now = runs.identity(data)
    for identity, notes in ((now, 0), (now | {"data_sha256": "0" * 64}, 1)):
        found = protocol.decide(plan, _finals(OLD, NEW), data_identity=identity)
        protocol.write(tmp_path / protocol.FILE, found)
        assert len(protocol.plan(study, tmp_path, scale="smoke")[2]) == notes
