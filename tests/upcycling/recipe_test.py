import dataclasses

import pytest

from olmoe_jax import accounting, presets
from olmoe_jax.upcycling import recipe as recipe_lib
from tests.upcycling import dense


def make(**settings):
    return recipe_lib.Recipe(**{"num_experts": 8, "num_experts_per_token": 2} | settings)


def test_olmo_1b_becomes_the_papers_model():
    model = recipe_lib.moe_config(presets.get("olmo-1b-0724"), make())
    assert model == presets.get("olmoe-upcycled")
    count = accounting.num_params(model)
    assert (count.total, count.active) == (6_917_193_728, 2_085_355_520)


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({}, {"d_ff": 8192, "num_experts": 8, "num_experts_per_token": 2}),
        ({"method": "normalized"}, {"normalize_expert_weights": True}),
        ({"granularity": 2}, {"d_ff": 4096, "num_shared_experts": 0}),
        ({"granularity": 2, "shared_expert": True}, {"num_shared_experts": 2}),
        ({"moe_every": 2}, {"moe_every": 2, "d_ff": 8192}),
    ],
)
def test_architecture_of(settings, fields):
    model = recipe_lib.moe_config(presets.get("olmo-1b-0724"), make(**settings))
    assert {name: getattr(model, name) for name in fields} == fields
    assert model.router == "token_choice" and model.normalize_expert_weights == (
        settings.get("method") == "normalized"
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_active_parameters_grow_by_the_router_and_the_copies_alone(parts, shared):
    before = presets.get("olmo-1b-0724")
    recipe = make(granularity=parts, num_experts_per_token=2 * parts, shared_expert=shared)
    after = accounting.num_params(recipe_lib.moe_config(before, recipe))
    ffn = 3 * before.d_model * before.d_ff
    more = before.num_layers * ((1 + shared) * ffn + before.d_model * 8)
    assert after.active == accounting.num_params(before).active + more


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "normalised"}, "method is 'normalised': must be one of reference, .*nearest: "
         "normalized"),
        ({"diversify": "drops"}, "diversify is 'drops': must be one of none, noise, drop"),
        ({"num_experts": 1}, "num_experts is 1: must be at least 2"),
        ({"seed": -1}, "seed is -1: must be at least 0"),
        ({"num_experts_per_token": 9}, r"num_experts_per_token is 9: must lie in 1..num_experts "
         r"\(8\)"),
        ({"num_experts": 10, "granularity": 4, "num_experts_per_token": 4},
         r"num_experts is 10: must be a multiple of granularity \(4\).*nearest: 8 or 12"),
        ({"granularity": 4}, "num_experts_per_token is 2: must be a multiple.*the nearest: 4$"),
        ({"fraction": 0.0}, "fraction is 0.0: must lie above 0 and at most at 1"),
        ({"fraction": 1.01}, "fraction is 1.01"),
        ({"granularity": 2, "moe_every": 2}, "granularity is 2 and moe_every 2: .* one d_ff"),
    ],
)  # fmt: skip
def test_numbers_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({"num_experts": 4, "num_experts_per_token": 2}, {},
         r"runs/x: is a MoE already \(num_experts=4\)"),
        ({}, {"granularity": 8, "num_experts_per_token": 8},
         "d_ff=12, which cannot be cut into granularity=8 .*divide it: 6 or 12"),
        ({"d_ff": 7}, {"granularity": 8, "num_experts_per_token": 8}, "divide it: 7$"),
        ({}, {"moe_every": 3}, "moe_every is 3: must divide its 4 layers; the nearest: 2 or 4"),
        ({"norm_position": "post"}, {"method": "scaled"}, "norm_position is 'post'.*normalized"),
    ],
)  # fmt: skip
def test_a_dense_model_that_does_not_fit_is_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        recipe_lib.moe_config(dense.change(**model), make(**settings), "runs/x")


def test_what_a_person_is_told():
    model = dense.MODEL

    def told(dtype="float32", before=model, **settings):
        return " ".join(recipe_lib.remarks(make(**settings), before, dtype))

    assert "does not compute" in told() and "--method=normalized" in told()
    assert "computes what the dense one does, exactly" in told(method="normalized")
    assert "up to some 1e-6" in told(method="scaled")
    assert "every token passes all experts" in told(num_experts_per_token=8)
    assert "up to norm_eps" in told(before=dataclasses.replace(model, norm_position="post"))
    assert "50% of its experts' hidden units are new" in told(method="normalized", diversify="drop")
    assert "never teaches this router" in told(method="normalized", num_experts_per_token=1)
    six = {"num_experts": 6, "granularity": 3, "num_experts_per_token": 3}
    assert "w_down is multiplied by 3 in bfloat16, which rounds" in told("bfloat16", **six)
    assert "rounds" not in told("bfloat16", method="scaled") + told("float32", **six)
