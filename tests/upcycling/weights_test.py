"""Every array of an upcycled model, held against the dense arrays by plain indexing."""

import numpy as np
import pytest

from olmoe_jax.porting import sources
from olmoe_jax.upcycling import recipe as recipe_lib
from olmoe_jax.upcycling import weights
from tests.upcycling import dense

WIDTH = dense.MODEL.d_ff


class Arrays:
    """Random arrays of a dense model, as a source."""

    def __init__(self, model=dense.MODEL, dtype="float32"):
        rng = np.random.default_rng(3)
        self.arrays = {
            name: rng.normal(0.1, 0.5, leaf.shape).astype(np.dtype(dtype))
            for name, leaf in sources.stored_leaves(model).items()
        }
        self.leaves = {name: (x.shape, dtype) for name, x in self.arrays.items()}

    def read(self, name, window=()):
        return self.arrays[name][tuple(window)]


def make(arrays=None, *, moments=False, **settings):
    """(dense arrays, Upcycled) of 6 experts top-2 but for `settings`."""
    arrays = arrays or Arrays()
    recipe = recipe_lib.Recipe(**{"num_experts": 6, "num_experts_per_token": 2} | settings)
    config = recipe_lib.moe_config(dense.MODEL, recipe)
    return arrays.arrays, weights.Upcycled(arrays, config, recipe, moments=moments)


def test_what_is_not_of_the_ffn_is_copied_bit_by_bit():
    old, new = make(moe_every=2)
    assert "layers/00/ffn/w_up" in new.leaves and "layers/01/moe/w_up" in new.leaves
    kept = [name for name in new.leaves if "/moe/" not in name]
    assert len(kept) == 3 + 4 * 8 + 2 * 3
    for name in kept:
        np.testing.assert_array_equal(new.read(name), old[name])
        np.testing.assert_array_equal(new.read(name, (slice(1, 3),)), old[name][1:3])


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1),
        ({"method": "normalized"}, 1),
        ({"method": "scaled"}, 3),
        ({"granularity": 3, "num_experts_per_token": 3}, 3),
        ({"granularity": 2, "method": "normalized"}, 2),
        ({"granularity": 3, "num_experts_per_token": 3, "method": "scaled"}, 6),
    ],
)
def test_experts_are_parts_of_the_ffn_and_only_w_down_is_scaled(settings, scale):
    old, new = make(**settings)
    parts = settings.get("granularity", 1)
    width = WIDTH // parts
    for layer in range(4):
        for expert in range(6):
            part = slice(expert % parts * width, (expert % parts + 1) * width)
            ffn = {m: old[f"layers/{layer:02d}/ffn/{m}"] for m in ("w_gate", "w_up", "w_down")}
            one = {m: new.read(f"layers/{layer:02d}/moe/{m}")[expert] for m in ffn}
            np.testing.assert_array_equal(one["w_gate"], ffn["w_gate"][:, part])
            np.testing.assert_array_equal(one["w_up"], ffn["w_up"][:, part])
            np.testing.assert_array_equal(one["w_down"], ffn["w_down"][part] * np.float32(scale))


@pytest.mark.parametrize(("method", "own", "routed"), [("reference", 1, 2), ("normalized", 0.5, 1)])
def test_the_shared_expert_is_the_whole_ffn(method, own, routed):
    old, new = make(method=method, granularity=2, shared_expert=True)
    for matrix, scale in (("w_gate", 1), ("w_up", 1), ("w_down", own)):
        np.testing.assert_array_equal(
            new.read(f"layers/02/moe/shared/{matrix}"),
            old[f"layers/02/ffn/{matrix}"] * np.float32(scale),
        )
    np.testing.assert_array_equal(
        new.read("layers/02/moe/w_down")[0],
        old["layers/02/ffn/w_down"][: WIDTH // 2] * np.float32(routed),
    )


def test_the_router_is_normal_and_tied_within_a_group():
    _, new = make(num_experts=600, granularity=2)
    router = new.read("layers/01/moe/router")
    assert router.shape == (10, 600) and router.dtype == np.float32
    np.testing.assert_array_equal(router[:, 0::2], router[:, 1::2])
    free = router[:, ::2]
    assert len(np.unique(free)) == free.size
    assert abs(free.std() / 0.02 - 1) < 0.05 and abs(free.mean()) < 0.001  # 3,000 draws
    assert not np.array_equal(router, new.read("layers/02/moe/router"))
    _, other = make(num_experts=600, granularity=2, seed=1)
    assert not np.array_equal(router, other.read("layers/01/moe/router"))
    _, small = make(num_experts=600, method="scaled")
    std = small.read("layers/01/moe/router").std()
    assert abs(std * dense.MODEL.d_model**0.5 / recipe_lib.SMALL_LOGITS - 1) < 0.05


def test_noise_replaces_half_of_all_entries_by_small_ones():
    old, new = make(diversify="noise", granularity=2, num_experts_per_token=2)
    changed, values = [], []
    for matrix, scale in (("w_gate", 1), ("w_up", 1), ("w_down", 2)):
        ffn = old[f"layers/00/ffn/{matrix}"]
        for expert, one in enumerate(new.read(f"layers/00/moe/{matrix}")):
            part = slice(expert % 2 * 6, expert % 2 * 6 + 6)
            want = ffn[part] if matrix == "w_down" else ffn[:, part]
            changed.append(one != want * np.float32(scale))
            values.append(one[changed[-1]] / scale)
    assert abs(np.concatenate([c.ravel() for c in changed]).mean() - 0.5) < 0.05  # 1,080 entries
    values = np.concatenate(values)
    assert abs(values.std() / 0.02 - 1) < 0.1 and abs(values.mean()) < 0.004
    masks = {mask.tobytes() for mask in changed}
    assert len(masks) == 18  # another choice in every matrix of every expert


def test_drop_redraws_the_same_hidden_units_of_all_three_matrices():
    old, new = make(diversify="drop", fraction=0.25)
    chosen = set()
    for expert in range(6):
        dropped = {}
        for matrix in ("w_gate", "w_up", "w_down"):
            ffn = old[f"layers/03/ffn/{matrix}"]
            one = new.read(f"layers/03/moe/{matrix}")[expert]
            if matrix != "w_down":
                ffn, one = ffn.T, one.T
            changed = (one != ffn).any(1)
            assert (one != ffn)[changed].all()
            dropped[matrix] = tuple(np.flatnonzero(changed))
        assert len(set(dropped.values())) == 1 and len(dropped["w_up"]) == 3
        chosen.add(dropped["w_up"])
    assert len(chosen) > 1  # another choice for every expert


def test_drop_keeps_mean_and_deviation_of_what_it_drops():
    arrays = Arrays()
    for name, array in arrays.arrays.items():
        if "/ffn/" in name:
            units = np.arange(WIDTH, dtype=np.float32)
            # every unit has a level of its own: only statistics of the dropped ones fit
            arrays.arrays[name] = array + 10 * (units[:, None] if "w_down" in name else units)
    old, new = make(arrays, diversify="drop", num_experts=200, num_experts_per_token=1)
    before = np.broadcast_to(old["layers/00/ffn/w_down"], (200, WIDTH, 10))
    after = new.read("layers/00/moe/w_down")
    dropped = (before != after).any(2)
    assert (dropped.sum(1) == WIDTH // 2).all()
    want = [before[e][dropped[e]] for e in range(200)]
    got = [after[e][dropped[e]] for e in range(200)]
    means, stds = (np.array([[f(w), f(g)] for w, g in zip(want, got, strict=True)]) for f in
                   (np.mean, np.std))  # fmt: skip
    assert np.corrcoef(means.T)[0, 1] > 0.75  # 60 draws each
    assert abs((stds[:, 1] / stds[:, 0]).mean() - 1) < 0.03


@pytest.mark.parametrize("diversify", ["noise", "drop"])
def test_slabs_are_the_same_in_any_order(diversify):
    _, new = make(diversify=diversify, granularity=2)
    _, again = make(diversify=diversify, granularity=2)
    for name, (shape, _) in reversed(new.leaves.items()):
        whole = new.read(name)
        for start in reversed(range(0, shape[0], 2)):
            part = again.read(name, (slice(start, start + 2),))
            np.testing.assert_array_equal(part, whole[start : start + 2])


def test_moments_follow_their_weights_and_new_weights_have_none():
    settings = {"diversify": "drop", "granularity": 2, "method": "scaled", "shared_expert": True}
    old, new = make(moments=True, **settings)
    _, params = make(**settings | {"method": "reference", "shared_expert": False})
    assert not new.read("layers/00/moe/router").any()
    for matrix in ("w_gate", "w_up", "w_down"):
        ffn = old[f"layers/00/ffn/{matrix}"]
        np.testing.assert_array_equal(new.read(f"layers/00/moe/shared/{matrix}"), ffn)
        scale = np.float32(2 if matrix == "w_down" else 1)
        for expert in range(6):
            part = slice(expert % 2 * 6, expert % 2 * 6 + 6)
            want = ffn[part] if matrix == "w_down" else ffn[:, part]
            kept = params.read(f"layers/00/moe/{matrix}")[expert] == want * scale
            moment = new.read(f"layers/00/moe/{matrix}")[expert]
            np.testing.assert_array_equal(moment, np.where(kept, want, 0))
            assert kept.any() and not kept.all()


def test_dtypes_are_those_of_the_dense_model():
    for dtype, router in (("bfloat16", "bfloat16"), ("float16", "float32")):
        _, new = make(Arrays(dtype=dtype), diversify="drop", method="scaled")
        for name, (shape, kind) in new.leaves.items():
            assert kind == (router if "router" in name else dtype)
            array = new.read(name)
            assert (array.shape, array.dtype.name) == (shape, kind)
            assert (array != 0).any()
