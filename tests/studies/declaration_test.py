import dataclasses

import pytest

from olmoe_jax import config as config_lib
from olmoe_jax import studies
from olmoe_jax.studies import declaration, scales
from tests.studies import synthetic


def _arms(**changes):
    return (studies.Arm(name="old"), studies.Arm(name="new", changes=changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.d_fff": 8}, r"arm new: config.model.d_fff does not exist.* config.model.d_ff"),
        ({"modell.d_ff": 8}, r"arm new: config.modell does not exist.* config.model"),
        ({"model": 8}, "arm new: config.model. does not exist"),
        ({"model.num_experts_per_token": 17}, "arm new: .*must lie in 1..model.num_experts"),
    ],
)
def test_a_change_that_no_config_takes_is_one_line(changes, message):
    with pytest.raises(ValueError, match=f"study made_up: {message}"):
        synthetic.study(arms=_arms(**changes))


def test_a_value_of_the_wrong_type_is_one_line():
    with pytest.raises(TypeError, match="study made_up: arm new: config.model.qk_norm is 1"):
        synthetic.study(arms=_arms(**{"model.qk_norm": 1}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(metric="validation/los"), "metric is 'validation/los'.*nearest is 'validation/loss'"),
        (dict(measure="steps"), "measure is 'steps': must be one of final, tokens"),
        (dict(expected="better"), "expected is 'better': must be one of None, lower"),
        (dict(smallest_effect=0.0), "smallest_effect is 0.0: must be a positive"),
        (dict(against="new"), "against is 'new': is the arm itself"),
    ],
)
def test_an_outcome_about_nothing_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        synthetic.outcome(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(outcomes=(synthetic.outcome(arm="newer"),)),
            "outcomes is 'newer': no such arm.*'new'",
        ),
        (dict(outcomes=()), "outcomes is .*at least one"),
        (dict(outcomes=(synthetic.outcome(measure="tokens"),)), 'one must have measure="final"'),
        (dict(equal=("total",)), "equal is 'total': cannot be held equal.*total_parameters"),
        (dict(seeds=(1, 1)), "seeds is .1, 1.: must be different"),
        (dict(seeds=()), "seeds is "),
        (dict(seeds=(101,)), "pilot_seeds is .*must not be among the seeds"),
        (dict(arms=_arms() + _arms()), "a name occurs twice"),
        (dict(arms=(studies.Arm(name="data"), *_arms())), "name is 'data'"),
        (dict(name="Made up"), "name is 'Made up'"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused(fields, message):
    with pytest.raises(ValueError, match=f"study .*: {message}"):
        synthetic.study(**fields)


def test_a_lost_comma_is_named():
    with pytest.raises(TypeError, match="made_up: arms is of type Arm: must be a tuple of Arm, of"):
        synthetic.study(arms=studies.Arm(name="old"))
    with pytest.raises(TypeError, match="equal is of type str: must be a tuple of str"):
        synthetic.study(equal="tokens")
    with pytest.raises(TypeError, match="learning_rate_factors is of type list: .* of int . float"):
        synthetic.study(learning_rate_factors=[1.0])


@pytest.mark.parametrize("field", ["base", "seeds", "pilot_seeds", "learning_rate_factors"])
def test_what_would_fail_behind_all_runs_is_refused_before_them(field):
    with pytest.raises(ValueError, match=f"study made_up: {field} is "):
        synthetic.study(**{field: {} if field == "base" else ()})
    for seeds in ((101,), (101, 101), (-1, 101)):
        with pytest.raises(ValueError, match="pilot_seeds is .*two at least"):
            synthetic.study(pilot_seeds=seeds)
    with pytest.raises(ValueError, match="max_seeds is 0: must be at least 2"):
        synthetic.study(max_seeds=0)
    with pytest.raises(ValueError, match="smallest_effect is '0.01': must be a positive number"):
        synthetic.outcome(smallest_effect="0.01")


def test_arms_are_compared_directly_or_through_a_third():
    arms = tuple(studies.Arm(name=name) for name in "abcde")
    pairs = (("d", "c"), ("b", "a"), ("b", "d"))
    outcomes = tuple(synthetic.outcome(arm=arm, against=against) for arm, against in pairs)
    assert synthetic.study(arms=arms, outcomes=outcomes).compared == [("a", "b", "c", "d")]
    assert synthetic.study(arms=arms, outcomes=outcomes[:2]).compared == [("c", "d"), ("a", "b")]


def test_an_arm_starts_from_an_earlier_one():
    start = studies.Arm(name="new", starts_from="old")
    with pytest.raises(ValueError, match="starts_from is 'old': arm new must come after"):
        synthetic.study(arms=(start, studies.Arm(name="old")))


def test_values_may_follow_from_the_base_of_each_scale():
    study = synthetic.study(
        arms=_arms(**{"model.num_layers": lambda base: 2 * base.model.num_layers}), equal=()
    )
    for scale, base in scales.BASES.items():
        configs = study.configs(scale)
        assert configs["old"] == base
        assert configs["new"].model.num_layers == 2 * base.model.num_layers


def test_other_data_change_the_base_of_every_arm():
    study = synthetic.study(common={"model.d_model": 32, "model.vocab_size": 99})
    configs = study.configs("smoke", data={"data.path": "somewhere", "model.vocab_size": 77})
    for config in configs.values():
        assert (config.data.path, config.model.d_model) == ("somewhere", 32)
        assert config.model.vocab_size == 99  # what the study says of all arms comes last


def test_an_unknown_scale_or_arm_names_what_there_is():
    study = synthetic.study()
    with pytest.raises(ValueError, match="no scale 'huge': smoke, laptop, paper"):
        study.configs("huge")
    with pytest.raises(ValueError, match="no arm 'nwe'.*'new'.*old, new"):
        study.arm("nwe")


def test_changed_leaves_the_rest_alone():
    config = scales.BASES["smoke"]
    other = declaration.changed(config, {"training.seed": 9})
    assert config_lib.differences(config, other) == ["config.training.seed: 0 != 9"]


def test_metrics_have_units_and_domains():
    assert declaration.unit_of("validation/c4/bits_per_byte") == "bits per byte"
    assert declaration.domain_of("validation/c4/loss") == "c4"
    assert declaration.domain_of("validation/loss") is None


def test_paper_scale_is_the_papers_controlled_run():
    config = scales.BASES["paper"]
    assert round(config.training.num_steps * config.tokens_per_step / 1e9) == 130
    assert (config.model.num_experts, config.model.d_ff, config.model.qk_norm) == (64, 1024, False)


def test_public_names_have_docstrings():
    for name in studies.__all__:
        assert getattr(studies, name).__doc__
    assert dataclasses.is_dataclass(studies.Study)
