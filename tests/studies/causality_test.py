"""Expert choice depends on the text behind a token, token choice does not."""

import dataclasses

import jax
import numpy as np
import pytest

from olmoe_jax.studies import causality, results, runner
from olmoe_jax.studies import declaration as studies
from olmoe_jax.training import runs


def _quiet(line):
    del line


def test_second_halves_come_from_the_other_batch():
    names = ("tokens", "loss_mask")
    batch, other = ({name: np.full((2, 5), value) for name in names} for value in (1, 2))
    found = causality.with_other_future(batch | {"rows": [4]}, other, names)
    np.testing.assert_array_equal(found["tokens"], [[1, 1, 2, 2, 2]] * 2)
    assert found.keys() == batch.keys()


def test_dependence_is_measured_and_read_as_a_metric(tiny_base, tmp_path):
    base = dataclasses.replace(
        tiny_base, training=dataclasses.replace(tiny_base.training, num_steps=2)
    )
    expert_choice = {"model.router": "expert_choice"}
    study = studies.Study(
        name="causal", question="Is it causal?", base={"smoke": base}, seeds=(1,),
        arms=(studies.Arm(name="token"), studies.Arm(name="expert", changes=expert_choice)),
        outcomes=(
            studies.Outcome(arm="expert", against="token", metric=causality.DEPENDENCE,
                            expected="higher"),
        ),
    )  # fmt: skip
    plan = runner.make_plan(study, tmp_path, scale="smoke")
    runner.make_runs(plan, devices=jax.devices()[:1], announce=_quiet)
    assert not plan.remaining
    found = {arm: results.read_run(plan.path(arm, 1), arm, 1) for arm in plan.configs}
    assert found["token"].final(causality.DEPENDENCE) < 1e-6
    assert found["expert"].final(causality.DEPENDENCE) > 1e-5
    for run in found.values():
        advantage, dependence = run.final(causality.ADVANTAGE), run.final(causality.DEPENDENCE)
        assert abs(advantage) <= dependence
    (plan.path("expert", 1) / causality.FILE).unlink()
    assert plan.remaining == [("expert", 1)]
    config = plan.config("expert", 1)
    path = plan.path("expert", 1)
    data = runs.open_data(config, path, _quiet)
    causality.measure(path, config, data, devices=jax.devices()[:1])
    again = causality.read(path)[causality.DEPENDENCE]
    assert again == pytest.approx(found["expert"].final(causality.DEPENDENCE))
