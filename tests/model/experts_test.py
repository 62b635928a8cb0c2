import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding, PartitionSpec

from olmoe_jax import grouped_matmul
from olmoe_jax.model import experts, routing
from olmoe_jax.model.experts import capacity
from tests import oracles

FP32_SUM = 2e-5  # order of summation
BF16 = 0.03  # a few roundings of 2⁻⁸ each

B, LENGTH, D, E, F, K = 2, 7, 5, 11, 3, 3

# Every backend that runs here, but one that is interpreted on CPU and slow (it is tested in
# tests/grouped_matmul); with this capacity factor none drops anything.
BACKENDS = tuple(
    name
    for name in experts.BACKENDS
    if name not in grouped_matmul.BACKENDS
    or (name != "megablox" and grouped_matmul.missing(name) is None)
)
DROPLESS = float(E)


def _weights(seed, num_experts=E):
    rng = np.random.default_rng(seed)
    shapes = {
        "w_gate": (num_experts, D, F),
        "w_up": (num_experts, D, F),
        "w_down": (num_experts, F, D),
    }
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def _choices(case, seed=0):
    """expert_ids [b, l, k] of a named pattern of load."""
    rng = np.random.default_rng(seed)
    b, length = (1, 1) if case == "one token" else (B, LENGTH)
    ids = rng.permuted(np.tile(np.arange(E), (b, length, 1)), axis=-1)[..., :K]
    if case == "an empty expert":
        ids = np.where(ids == 4, -1, ids)
    elif case == "all tokens to one expert":
        ids = np.stack([np.full((b, length), 6), *[np.full((b, length), -1)] * (K - 1)], -1)
    elif case == "padding":
        ids[1, 2:] = -1
    elif case == "only padding":
        ids[:] = -1
    return ids


CASES = (
    "balanced",
    "one token",
    "an empty expert",
    "all tokens to one expert",
    "padding",
    "only padding",
)


def _inputs(ids, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*ids.shape[:2], D))
    factors = np.where(ids >= 0, rng.uniform(0.1, 1, ids.shape), 0)
    return x, factors, _weights(seed), rng.normal(size=x.shape)


@functools.partial(jax.jit, static_argnames=("backend", "factor", "group", "dtype"))
def _jitted(x, ids, factors, weights, *, backend, factor, group, dtype):
    routed = routing.Routing(jnp.zeros((*ids.shape[:2], E)), ids, factors, ids.size)
    weights = {name: w.astype(dtype) for name, w in weights.items()}
    return experts.compute(
        x.astype(dtype), routed, weights, backend=backend, capacity_factor=factor, group=group
    )


def _compute(x, ids, factors, weights, backend, *, factor=None, group=0, dtype="float32"):
    as32 = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
    return _jitted(
        as32(x), jnp.asarray(ids, jnp.int32), as32(factors), jax.tree.map(as32, weights),
        backend=backend, factor=factor or DROPLESS, group=group, dtype=dtype,
    )  # fmt: skip


def _flat(*arrays):
    return [a.reshape(-1, a.shape[-1]) for a in arrays]


def _close(got, want, tolerance):
    scale = max(np.abs(want).max(), 1e-3)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=tolerance * scale)


def test_the_backends_that_need_nothing_are_tested():
    assert {"dense", "capacity", "loop", "ragged"} <= set(BACKENDS)


def test_a_backend_that_cannot_run_here_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(grouped_matmul, "missing", lambda name: "it needs a compiler")
    with pytest.raises(ValueError, match="config.model.expert_backend is 'kernel': it needs a co"):
        experts.resolve("kernel")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_equal_numpy(backend, case):
    ids = _choices(case)
    x, factors, weights, d_y = _inputs(ids)

    @jax.jit
    def value_and_gradients(x, factors, weights):
        y, pull = jax.vjp(lambda *a: _compute(a[0], ids, a[1], a[2], backend), x, factors, weights)
        return y, pull(jnp.asarray(d_y, jnp.float32))

    as32 = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x, factors, weights))
    y, gradients = value_and_gradients(*as32)
    _close(y, oracles.experts(*_flat(x, ids, factors), weights).reshape(x.shape), FP32_SUM)
    want = oracles.experts_gradients(*_flat(x, ids, factors), weights, *_flat(d_y))
    _close(gradients[0], want[0].reshape(x.shape), FP32_SUM)
    _close(np.where(ids >= 0, gradients[1], 0), want[1].reshape(ids.shape), FP32_SUM)
    for name in weights:
        _close(gradients[2][name], want[2][name], FP32_SUM)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_is_close_and_stays_bf16(backend):
    ids = _choices("padding")
    x, factors, weights, _ = _inputs(ids)
    y = _compute(x, ids, factors, weights, backend, dtype="bfloat16")
    assert y.dtype == jnp.bfloat16
    _close(y, oracles.experts(*_flat(x, ids, factors), weights).reshape(x.shape), BF16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_experts_and_ids_alike_changes_nothing(backend):
    ids = _choices("padding")
    x, factors, weights, _ = _inputs(ids)
    order = np.random.default_rng(2).permutation(E)  # new expert i is old expert order[i]
    new_ids = np.where(ids >= 0, np.argsort(order)[ids], -1)
    permuted = _compute(x, new_ids, factors, {n: w[order] for n, w in weights.items()}, backend)
    _close(permuted, np.asarray(_compute(x, ids, factors, weights, backend)), FP32_SUM)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_routing_compiles_nothing(backend, compilations):
    _jitted.clear_cache()
    seen = []
    for seed, case in enumerate(("balanced", "all tokens to one expert")):
        ids = _choices(case, seed)
        x, factors, weights, _ = _inputs(ids, seed)
        _compute(x, ids, factors, weights, backend).block_until_ready()
        seen.append(compilations())
    assert seen[0] > 0 and seen[1] == seen[0]


def _check_pattern(backend, load, seed):
    """Tokens drawn from experts with the given relative load."""
    rng = np.random.default_rng(seed)
    scores = rng.gumbel(size=(B, LENGTH, E)) + np.log(np.asarray(load) + 1e-9)
    ids = np.argsort(-scores, axis=-1)[..., :K]
    ids = np.where(rng.random(ids.shape) < 0.2, -1, ids)
    x, factors, weights, _ = _inputs(ids, seed)
    y = _compute(x, ids, factors, weights, backend)
    _close(y, oracles.experts(*_flat(x, ids, factors), weights).reshape(x.shape), FP32_SUM)


LOADS = st.lists(st.sampled_from([0.0, 0.01, 1.0, 100.0]), min_size=E, max_size=E)


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis.given(load=LOADS, seed=st.integers(0, 10**6))
def test_any_pattern_of_load(backend, load, seed):
    _check_pattern(backend, load, seed)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis.given(load=LOADS, seed=st.integers(0, 10**6))
@hypothesis.settings(max_examples=500)
def test_any_pattern_of_load_many_times(backend, load, seed):
    _check_pattern(backend, load, seed)


@pytest.mark.parametrize("group", [1, 2, 0])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_capacity_drops_the_choices_that_a_loop_drops(group, factor):
    rng = np.random.default_rng(3)
    b, num_experts = 4, E
    scores = rng.gumbel(size=(b, LENGTH, num_experts)) + np.linspace(0, 3, num_experts)
    ids = np.argsort(-scores, axis=-1)[..., :K]
    ids[3, 4:] = -1
    x, factors, weights, _ = _inputs(ids)
    y = _compute(x, ids, factors, weights, "capacity", factor=factor, group=group)
    groups = b // group if group else 1
    room = int(np.ceil(factor * K * (b // groups) * LENGTH / num_experts))
    kept = oracles.capacity_kept(ids.reshape(-1, K), num_experts, groups, room).reshape(ids.shape)
    assert 0 < (~kept & (ids >= 0)).sum() or factor == 2.0, (
        "nothing was dropped: the test shows nothing"
    )
    want = oracles.experts(*_flat(x, np.where(kept, ids, -1), factors), weights).reshape(x.shape)
    _close(y, want, FP32_SUM)


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (1, 1, 1, 8)], ids=["data 8", "tensor 8"])
@pytest.mark.parametrize("token_local", [True, False], ids=["token_choice", "expert_choice"])
def test_on_several_tpus_a_kernel_runs_on_each_devices_tokens_or_not_at_all(sizes, token_local):
    """Lowering refuses a kernel that would be left to the compiler to split."""
    b, slots = 8, 8 * LENGTH * E
    names = ("data", "fsdp", "expert", "tensor")
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()).reshape(sizes), names)

    def f(x, ids, factors, weights):
        routed = routing.Routing(None, ids, factors, slots if token_local else slots - 1)
        options = {"backend": "megablox", "capacity_factor": 1.0, "group": 0}
        return experts.compute(x, routed, weights, **options)

    def array(*shape, dtype=jnp.float32, split=True):
        spec = PartitionSpec(names[:3]) if split else PartitionSpec()
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    shape = (b, LENGTH, E)
    arguments = array(b, LENGTH, D), array(*shape, dtype=jnp.int32), array(*shape)
    weights = {name: array(*w.shape, split=False) for name, w in _weights(0).items()}
    grad = jax.grad(lambda *a: jnp.sum(f(*a)), argnums=3)
    with jax.set_mesh(mesh):
        exported = export.export(jax.jit(grad), platforms=["tpu"])(*arguments, weights)
    assert ("tpu_custom_call" in exported.mlir_module()) == token_local


def test_capacity_rows():
    assert capacity.rows_per_expert(8, 2, 4, 1.0) == 4
    assert capacity.rows_per_expert(8, 2, 4, 1.25) == 5
    assert capacity.rows_per_expert(1, 1, 64, 1.0) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_rows_per_expert(backend):
    """More rows than any backend computes at once, some of no expert; value and gradients."""
    rng = np.random.default_rng(8)
    load = np.linspace(1, 11, E) ** 2
    ids = rng.choice(E, size=(1, 1999, 2), p=load / load.sum())
    ids[ids == 3] = -1
    x, factors, weights, d_y = _inputs(ids)
    flat = _flat(x, ids, factors)
    _close(
        _compute(x, ids, factors, weights, backend).reshape(-1, D),
        oracles.experts(*flat, weights),
        FP32_SUM,
    )
    gradient = jax.grad(lambda w: jnp.sum(_compute(x, ids, factors, w, backend) * d_y.astype("f4")))
    got = gradient(jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), weights))
    want = oracles.experts_gradients(*flat, weights, *_flat(d_y))[2]
    for name in weights:
        _close(got[name], want[name], FP32_SUM)


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match=r"config.model.expert_backend .*nearest: ragged"):
        experts.resolve("raged")


def test_auto_is_what_grouped_matmul_resolves():
    for platform in ("cpu", "gpu", "tpu"):
        assert experts.resolve("auto", platform) == grouped_matmul.resolve(platform)
