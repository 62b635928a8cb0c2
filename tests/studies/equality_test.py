import pytest

from olmoe_jax import accounting, studies
from olmoe_jax.studies import declaration, equality, scales
from tests.studies import synthetic

BASE = scales.BASES["laptop"]


def _granularity(base, experts, top_k):
    """The base's experts cut or merged to `experts`, `top_k` of them per token."""
    width = base.model.d_ff * base.model.num_experts // experts
    return {
        "model.num_experts": experts,
        "model.num_experts_per_token": top_k,
        "model.d_ff": width,
    }


def test_eight_experts_and_sixty_four_narrower_ones_are_equal_outside_the_router():
    coarse = declaration.changed(BASE, _granularity(BASE, 8, 1))
    equality.check({"coarse": coarse, "fine": BASE}, equality.HELD_EQUAL)
    one, two = equality.cost(coarse), equality.cost(BASE)
    assert two.router - one.router == 56 * BASE.model.d_model * BASE.model.num_layers
    assert two.total - two.router == one.total - one.router
    assert two.total - one.total == two.router - one.router != 0


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({"model.d_ff": 17}, "total_parameters", "config.model.d_ff: 32 != 17"),
        ({"model.num_experts_per_token": 7}, "active_parameters", "num_experts_per_token: 8 != 7"),
        ({"model.num_experts_per_token": 7}, "flops_per_token", "FLOPs per token outside"),
        ({"training.num_steps": 1401}, "tokens", "training.num_steps: 1400 != 1401"),
        ({"training.batch_size": 4, "training.num_steps": 1000}, "data_order",
         "training.batch_size 8 and 4"),
        ({"data.start_step": 3}, "data_order", "data.start_step 0 and 3"),
    ],
)  # fmt: skip
def test_what_is_off_by_a_little_is_refused(changes, name, message):
    other = declaration.changed(BASE, changes)
    with pytest.raises(ValueError, match=f"arms a and b are not equal in {name}: .*{message}"):
        equality.check({"a": BASE, "b": other}, [name])


def test_a_study_of_unequal_arms_cannot_be_declared():
    arms = (studies.Arm(name="old"), studies.Arm(name="new", changes={"model.d_ff": 9}))
    with pytest.raises(ValueError, match="study made_up: arms new and old are not equal in total"):
        synthetic.study(arms=arms)
    synthetic.study(arms=arms, equal=("tokens", "data_order"))


def test_an_arm_that_no_outcome_compares_may_cost_what_it_likes():
    arms = (
        studies.Arm(name="start", changes={"training.num_steps": 3}),
        studies.Arm(name="old", starts_from="start"),
        studies.Arm(name="new", starts_from="start"),
    )
    assert list(synthetic.study(arms=arms).configs("smoke")) == ["start", "old", "new"]


def test_shuffling_workers_are_no_difference():
    equality.check({"a": BASE, "b": declaration.changed(BASE, {"data.workers": 2})}, ["data_order"])


def test_masking_documents_reorders_nothing():
    masked = declaration.changed(BASE, {"data.mask_documents": True})
    equality.check({"a": BASE, "b": masked}, ["data_order", "flops_per_token"])


def test_the_table_shows_the_routers_part_apart():
    lines = equality.table({"fine": BASE}).splitlines()
    params = accounting.num_params(BASE.model)
    assert f"{params.total:,}" in lines[1] and f"{params.router:,}" in lines[1]
    assert len({len(line) for line in lines}) == 1


def test_router_parameters_and_flops_are_what_the_router_adds():
    """Against the counts of the same model with one expert fewer, and by hand."""
    model = BASE.model
    params = accounting.num_params(model)
    assert params.router == model.num_layers * model.d_model * model.num_experts
    assert accounting.flops_per_token(model, 256).router == 3 * 2 * params.router
    fewer = declaration.changed(BASE, {"model.num_experts": 63}).model
    expert = 3 * model.d_model * model.d_ff * model.num_layers
    assert params.total - accounting.num_params(fewer).total == (
        expert + model.num_layers * model.d_model
    )
