"""Expert choice depends on the text behind a token, token choice does not."""

import dataclasses

import jax
import numpy as np
import pytest

from olmoe_jax.studies import causality, plans, results, runner
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


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([4, 4, 2], [[4, 5, 6, 7], [8, 9, 0, 1], [2, 3]]),
        ([3], [[1, 2, 0]]),
        ([4], [[1, 2, 3, 0]]),
        ([4, 1], [[4, 0, 1, 2], [3]]),
    ],
)
def test_the_other_text_is_of_another_real_window(rows, wanted):
    """Windows are numbered through; -1 is padding, which stays where it is."""
    batches, first = [], 0
    for real in rows:
        tokens = np.full((4, 2), -1)
        tokens[:real] = np.arange(first, first + real)[:, None]
        batches.append({"tokens": tokens, "token_mask": tokens >= 0, "domains": tokens})
        first += real
    found = causality.other_windows(batches, ("tokens", "token_mask"))
    for others, batch, numbers in zip(found, batches, wanted, strict=True):
        assert others["tokens"][:, 0].tolist() == numbers + [-1] * (4 - len(numbers))
        np.testing.assert_array_equal(others["token_mask"], batch["token_mask"])
        assert others.keys() == {"tokens", "token_mask"}


def test_a_single_window_is_refused_before_any_run(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "make_run", None)
    single = dataclasses.replace(tiny_base.data, validation_windows=1)
    study = studies.Study(
        name="causal", question="Is it causal?",
        base={"smoke": dataclasses.replace(tiny_base, data=single)},
        arms=(studies.Arm(name="one"), studies.Arm(name="two")),
        outcomes=(studies.Outcome(arm="two", against="one", metric=causality.DEPENDENCE),),
    )  # fmt: skip
    plan = plans.make_plan(study, tmp_path, scale="smoke")
    with pytest.raises(ValueError, match="future_dependence needs two .*_windows is 1 .0: all"):
        runner.make_runs(plan, announce=_quiet)
    config, path = plan.config("one", 1), plan.path("one", 1)
    with pytest.raises(ValueError, match="needs two validation windows"):
        causality.measure(path, config, runs.open_data(config, path, _quiet))


def test_dependence_is_measured_and_read_as_a_metric(tiny_base, tmp_path):
    base = dataclasses.replace(
        tiny_base,
        model=dataclasses.replace(tiny_base.model, init_std=0.3),  # experts that do something
        training=dataclasses.replace(tiny_base.training, num_steps=2),
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
    plan = plans.make_plan(study, tmp_path, scale="smoke")
    runner.make_runs(plan, devices=jax.devices()[:1], announce=_quiet)
    assert not plan.remaining
    found = {arm: results.read_run(plan.path(arm, 1), arm, 1) for arm in plan.configs}
    assert found["token"].final(causality.DEPENDENCE) < 1e-6
    assert found["expert"].final(causality.DEPENDENCE) > 1e-3
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
