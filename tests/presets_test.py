import pytest

from olmoe_jax import accounting, presets

# (total, active): arXiv 2409.02060, model cards, released files, and arithmetic from the shapes.
PUBLISHED = {
    "olmoe-1b-7b": (6_919_161_856, 1_282_017_280),
    "olmoe-8x8192-top1": (6_917_261_312, 1_280_116_736),
    "olmoe-32x2048-top4": (6_918_047_744, None),
    "olmoe-64x1024-top8": (6_919_096_320, None),
    "olmoe-128x512-top16": (6_921_193_472, None),
    "dense-1b": (1_279_854_592, 1_279_854_592),
    "olmoe-upcycled": (6_917_193_728, 2_085_355_520),
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248),
    "llama2-7b": (6_738_415_616, 6_738_415_616),
    "llama2-13b": (13_015_864_320, 13_015_864_320),
    "olmo2-1b": (1_484_916_736, 1_484_916_736),
    "qwen3-30b-a3b": (30_532_122_624, 3_353_032_704),
    "flexolmo-7x7b": (33_270_665_216, None),
    "llama2-70b": (68_976_648_192, 68_976_648_192),
    "olmo-1b": (1_176_764_416, 1_176_764_416),
    "olmo-1b-0724": (1_279_787_008, 1_279_787_008),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    total, active = PUBLISHED[name]
    counted = accounting.num_params(presets.get(name))
    assert counted.total == total
    assert active is None or counted.active == active


def test_granularity_leaves_the_cost_alone():
    names = [name for name in presets.NAMES if "-top" in name and "shared" not in name]
    assert len(names) == 4
    for name in names:
        model = presets.get(name)
        assert model.num_experts * model.d_ff == 64 * 1024
        assert model.num_experts_per_token * model.d_ff == 8 * 1024


def test_a_shared_expert_replaces_a_routed_one():
    routed, shared = (
        presets.get(f"olmoe-{name}") for name in ("32x2048-top4", "31x2048-top3-shared")
    )
    assert shared.num_experts + shared.num_shared_experts == routed.num_experts
    assert shared.num_experts_per_token + 1 == routed.num_experts_per_token


def test_sizes_of_sources_that_halve_the_width():
    assert presets.get("olmoe-8x2b").d_ff == 3072 // 2  # mlp_ratio 1
    assert presets.get("olmoe-final-double").d_ff == 3072 // 2
    assert presets.get("olmoe-8x7b-a7b").d_ff == 2816 // 2
    assert presets.get("olmoe-final-v2").padded_vocab_size == 100_352
    assert presets.get("olmoe-1b-7b").padded_vocab_size == 50_304


def test_changes_are_applied_and_checked():
    assert presets.get("mixtral-8x7b", num_layers=3).num_layers == 3
    with pytest.raises(ValueError, match="num_experts_per_token is 65"):
        presets.get("olmoe-1b-7b", num_experts_per_token=65)
    with pytest.raises(TypeError, match="widht"):
        presets.get("olmoe-1b-7b", widht=3)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match="no preset 'olmoe-1b-8b': did you mean 'olmoe-1b-7b'"):
        presets.get("olmoe-1b-8b")
