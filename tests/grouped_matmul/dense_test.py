import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax.grouped_matmul import cpu_kernel, dense

FP32, BF16 = 1e-5, 1e-2
KERNEL = [
    pytest.param(
        True,
        marks=pytest.mark.skipif(
            cpu_kernel.missing() is not None, reason=str(cpu_kernel.missing())
        ),
        id="kernel",
    ),
    pytest.param(False, id="xla"),
]


@pytest.fixture(params=KERNEL)
def kernel(request, monkeypatch):
    """Whether bfloat16 goes through the compiled kernel."""
    jax.clear_caches()
    if not request.param:
        monkeypatch.setattr(cpu_kernel, "missing", lambda: "switched off")
    yield request.param
    jax.clear_caches()


def _arrays(dtype, *shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def _close(got, want, tolerance):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


def _calls_kernel(f, *arguments):
    return "olmoe_jax_" in jax.jit(f).lower(*arguments).as_text()


@pytest.mark.parametrize("dtype, tolerance", [("float32", FP32), ("bfloat16", BF16)])
def test_product_and_its_gradients_match_float64(kernel, dtype, tolerance):
    x, w, d_y = _arrays(dtype, (2, 11, 17), (17, 13), (2, 11, 13))
    y, pull = jax.vjp(jax.jit(dense.product), x, w)
    d_x, d_w = pull(d_y)
    assert {y.dtype, d_x.dtype, d_w.dtype} == {jnp.dtype(dtype)}
    x, w, d_y = (np.asarray(a, np.float64) for a in (x, w, d_y))
    _close(y, x @ w, tolerance)
    _close(d_x, d_y @ w.T, tolerance)
    _close(d_w, np.einsum("bld,blf->df", x, d_y), tolerance)


def test_the_gradient_of_wider_weights_is_not_rounded(kernel):
    (w,) = _arrays("float32", (17, 13))
    x, d_y = _arrays("bfloat16", (2, 11, 17), (2, 11, 13))
    y, pull = jax.vjp(dense.product, x, w)
    d_w = pull(d_y)[1]
    assert y.dtype == jnp.bfloat16 and d_w.dtype == jnp.float32
    _close(y, np.asarray(x, np.float64) @ np.asarray(w.astype(x.dtype), np.float64), BF16)
    wide = (np.asarray(a, np.float64) for a in (x, d_y))
    _close(d_w, np.einsum("bld,blf->df", *wide), FP32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_add_outer_adds_over_all_rows(kernel, dtype):
    left, right = _arrays(dtype, (2, 3, 7), (2, 3, 5))
    (total,) = _arrays("float32", (1, 7, 5))
    got = jax.jit(dense.add_outer)(total, left, right)
    wide = (np.asarray(a, np.float64) for a in (left, right))
    _close(got, np.asarray(total, np.float64) + np.einsum("bld,blf->df", *wide), FP32)


def test_only_bfloat16_on_one_device_takes_the_kernel(kernel):
    x, w = _arrays("bfloat16", (4, 17), (17, 13))
    assert _calls_kernel(dense.product, x, w) == kernel
    assert not _calls_kernel(dense.product, x.astype("float32"), w.astype("float32"))
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        assert not _calls_kernel(dense.product, x, w)


def test_a_layer_that_keeps_the_product_does_not_compute_it_again():
    x, w = _arrays("float32", (4, 17), (17, 13))
    policy = jax.checkpoint_policies.save_only_these_names(*dense.SAVED_NAMES)

    def products(policy):
        f = jax.checkpoint(lambda x, w: jnp.sum(jnp.sin(dense.product(x, w))), policy=policy)
        return str(jax.make_jaxpr(jax.grad(f, argnums=(0, 1)))(x, w)).count("dot_general")

    assert products(policy) == 3
    assert products(jax.checkpoint_policies.nothing_saveable) == 4
