"""Which runs a study has, what is refused, what they cost."""

import dataclasses
import json
import shutil

import pytest

from olmoe_jax import studies
from olmoe_jax.data import preparation
from olmoe_jax.studies import declaration, plans, scales
from tests.studies import synthetic


def _plan(study, workdir, **options):
    return plans.make_plan(study, workdir, scale="smoke", **options)


def test_a_run_whose_configuration_has_changed_is_refused_and_the_field_named(finished, planted):
    plan, _ = finished
    arms = (planted.arms[0], dataclasses.replace(planted.arms[1], changes={"optimizer.eps": 1e-5}))
    with pytest.raises(ValueError, match=r"worse/seed_1 was run .*config.optimizer.eps: 1e-08 != "):
        _plan(dataclasses.replace(planted, arms=arms), plan.workdir)
    longer = declaration.changed(planted.base["smoke"], {"training.num_steps": 99})
    with pytest.raises(ValueError, match="good/seed_1 .*num_steps: 12 != 99.*Name another"):
        _plan(dataclasses.replace(planted, base={"smoke": longer}), plan.workdir)
    with pytest.raises(ValueError, match="good/seed_1 .*learning_rate: 0.02 != 0.5"):
        _plan(planted, plan.workdir, learning_rates={"good": 0.5})


def test_what_does_not_change_the_numbers_may_change(finished, planted):
    plan, _ = finished
    base = declaration.changed(
        planted.base["smoke"], {"data.workers": 3, "training.log_interval": 5}
    )
    _plan(dataclasses.replace(planted, base={"smoke": base}), plan.workdir)
    _plan(planted, plan.workdir, seeds=(3, 4))


def test_a_workdir_of_something_else_is_refused(finished, planted):
    plan, _ = finished
    other = dataclasses.replace(planted, name="other")
    with pytest.raises(ValueError, match="holds another study: study 'planted', not 'other'"):
        _plan(other, plan.workdir)
    with pytest.raises(ValueError, match="seed_1 is the workdir of a training run"):
        _plan(planted, plan.path("good", 1))


def test_runs_of_an_arm_that_the_study_lacks_are_refused(planted, tmp_path):
    synthetic.write_run(tmp_path / "best" / "seed_1", 1, [4.0, 3.0])
    with pytest.raises(ValueError, match="runs of an arm 'best', which study planted does not"):
        _plan(planted, tmp_path)


@pytest.mark.parametrize("seeds", [(), (1, 1), (-1,)])
def test_seeds_that_are_no_list_are_refused(planted, tmp_path, seeds):
    with pytest.raises(ValueError, match="seeds is .*must be different numbers"):
        _plan(planted, tmp_path, seeds=seeds)


def test_other_data_bring_their_path_and_sizes(prepared, tmp_path):
    plan = _plan(synthetic.study(), tmp_path, data=prepared)
    config = plan.config("new", 2)
    assert (config.data.path, config.data.sequence_length) == (str(prepared), 16)
    assert (config.model.vocab_size, config.model.max_length) == (270, 16)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        _plan(synthetic.study(), tmp_path, data="nowhere")


def test_what_it_takes_is_said_before(finished, planted, tmp_path):
    text = plans.describe(_plan(planted, tmp_path))
    assert "2 arms × 3 seeds [1, 2, 3] = 6 runs, 0 done" in text and "an estimate" in text
    assert "one seed gives no interval" in plans.describe(_plan(planted, tmp_path, seeds=(1,)))
    assert "6 runs, 6 done" in plans.describe(finished[0])


def test_rates_that_differ_are_the_protocols_affair(finished, planted):
    plan, _ = finished
    with pytest.raises(ValueError, match="0.02 != 0.5. Rates are the protocol's .*--protocol"):
        _plan(planted, plan.workdir, learning_rates={"good": 0.5})


def test_a_path_may_be_written_differently(prepared, tmp_path):
    plans.write_marker(_plan(synthetic.study(), tmp_path, data=prepared))
    _plan(synthetic.study(), tmp_path, data=f"{prepared.parent}/./{prepared.name}/")
    with pytest.raises(ValueError, match="holds another study: data '.*data', not none"):
        _plan(synthetic.study(), tmp_path)


def test_data_prepared_anew_at_the_same_path_are_refused(planted, prepared, tmp_path):
    """A run is there; then other text, windows of the same length, as many words."""
    data, run = tmp_path / "data", tmp_path / "study"
    shutil.copytree(prepared, data)
    base = declaration.changed(planted.base["smoke"], {"data.path": str(data)})
    study = dataclasses.replace(planted, base={"smoke": base})
    config = _plan(study, run).config("good", 2)
    synthetic.write_run(run / "good/seed_2", 2, [5.0, 4.0, 3.9, 3.8], config=config, data=prepared)
    _plan(study, run)
    shutil.rmtree(data)
    lines = [{"id": str(i), "text": f"not {i} but {i + 2} " * 20, "source": "a"} for i in range(99)]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, lines)))
    preparation.prepare([str(tmp_path / "other.jsonl")], data, sequence_length=16, vocab_size=270,
                        validation_fraction=0.1, announce=lambda line: None)  # fmt: skip
    with pytest.raises(
        ValueError, match="good/seed_2 was run on other data than .*/data .*_sha256"
    ):
        _plan(study, run)
    _plan(study, run, seeds=(1, 3))  # no run of these is there


def test_what_is_held_equal_is_said_of_those_for_which_it_holds(tmp_path):
    """As the study `upcycling`: a dense model, and two arms that are compared."""
    arms = (
        studies.Arm(name="start", changes={"model.d_ff": 16, "training.num_steps": 4}),
        studies.Arm(name="old"), studies.Arm(name="new"),
    )  # fmt: skip
    text = plans.describe(_plan(synthetic.study(arms=arms), tmp_path))
    assert "held equal: data_order; of old, new: total_parameters, active_parameters, " in text
    shifted = (dataclasses.replace(arms[0], changes={"data.start_step": 9}), *arms[1:])
    text = plans.describe(_plan(synthetic.study(arms=shifted, equal=("data_order",)), tmp_path))
    assert "held equal: of old, new: data_order\n" in text
    text = plans.describe(_plan(synthetic.study(), tmp_path))
    assert "held equal: total_parameters, active_parameters, flops_per_token, tokens, data_" in text


def test_equal_cost_is_checked_at_the_sizes_of_the_data_too(prepared, tmp_path):
    """Of 960 words, a wider FFN makes up for tied embeddings; of 270 it does not."""
    base = declaration.changed(scales.BASES["smoke"], {"model.vocab_size": 960})
    tied = {"model.tie_embeddings": True, "model.d_ff": base.model.d_ff + 10}
    study = synthetic.study(
        base={"smoke": base}, equal=("total_parameters",),
        arms=(studies.Arm(name="old"), studies.Arm(name="new", changes=tied)),
    )  # fmt: skip
    _plan(study, tmp_path)
    with pytest.raises(ValueError, match="arms new and old are not equal in total_parameters"):
        _plan(study, tmp_path, data=prepared)


def test_other_sizes_of_data_are_said_with_what_they_cost(prepared, tmp_path):
    text = plans.describe(_plan(synthetic.study(), tmp_path, data=prepared))
    assert (
        "note: " in text and "data has 270 words and windows of 16 tokens, so a run costs " in text
    )
    assert "data prepared with --vocab_size=1024 --sequence_length=32 keep its size" in text
    assert "note" not in plans.describe(_plan(synthetic.study(), tmp_path))
