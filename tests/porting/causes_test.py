import dataclasses
import functools

import jax
import numpy as np
import pytest

from olmoe_jax import checkpoints
from olmoe_jax.porting import causes
from tests.porting.tiny import MODEL


def test_a_transpose_is_recognised_from_either_side():
    want = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    for got in (want.T.reshape(want.shape), want.reshape(7, 5).T):
        assert causes.of_tensor(want, got, head_dim=4) == "transposed"
    assert causes.of_tensor(want, want + 1, head_dim=4).startswith("none of: transposed,")


def test_the_known_rope_bases_are_tried_first():
    found = causes.alternatives(dataclasses.replace(MODEL, rope_theta=5e5), _shapes(MODEL))
    assert [text for text, *_ in found][:2] == [
        "rope_theta=10000 instead of 500000", "rope_theta=1e+06 instead of 500000",
    ]  # fmt: skip


def _shapes(model_config):
    return jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), checkpoints.abstract_params(model_config)
    )


def _expected(model_config):
    """Shapes of its parameters; of what alternatives may change only these three matter."""
    names = ("tie_embeddings", "qk_norm", "qk_norm_per_head")
    return _shapes_of(model_config.num_layers, model_config.num_experts, model_config.moe_every,
                      model_config.norm, *(getattr(model_config, n) for n in names))  # fmt: skip


@functools.cache
def _shapes_of(num_layers, num_experts, moe_every, norm, tie, qk_norm, per_head):
    model_config = dataclasses.replace(
        MODEL, num_layers=num_layers, num_experts=num_experts, moe_every=moe_every, norm=norm,
        tie_embeddings=tie, qk_norm=qk_norm, qk_norm_per_head=per_head,
    )  # fmt: skip
    return jax.tree.map(lambda x: x.shape, checkpoints.abstract_params(model_config))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_qkv": 1.0, "sliding_window": 3, "num_experts": 12, "num_layers": 11},
        {"clip_qkv": 1.0, "clip_before_qk_norm": True, "normalize_expert_weights": True},
        {"qk_norm_per_head": True, "norm_position": "post"},
        {"num_experts": 0, "qk_norm": False, "tie_embeddings": True, "clip_qkv": 2.0},
        {"num_experts": 4, "moe_every": 2, "norm": "layernorm_nonparametric"},
    ],
)
def test_alternatives_have_the_parameters_of_their_config(changes):
    model_config = dataclasses.replace(MODEL, **changes)
    found = {}
    for text, other, params in causes.alternatives(model_config, _shapes(model_config)):
        assert text not in found or "as text" in text
        found[text] = other
        if other.qk_norm == model_config.qk_norm:  # norms that are not used are left in the tree
            assert jax.tree.map(lambda x: x.shape, params) == _expected(other), text
    if "clip_qkv" in changes and model_config.qk_norm:
        order = "after" if model_config.clip_before_qk_norm else "before"
        assert f"q, k, v clipped {order} QK-norm" in found
    if "sliding_window" in changes:
        assert found["the sliding window left out"].sliding_window is None
        assert "experts in the order of their numbers as text (0, 1, 10, …)" in found
        assert "layers in the order of their numbers as text (0, 1, 10, …)" in found
    if "qk_norm_per_head" in changes:
        assert "QK-norm over the full width instead of per head" in found
