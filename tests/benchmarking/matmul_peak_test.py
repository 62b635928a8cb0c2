"""The ceiling: what is measured, shares of it, the suite."""

import json
import sys
import types

import pytest

from experiments import app
from olmoe_jax.benchmarking import matmul_peak
from olmoe_jax.benchmarking import options as options_lib
from olmoe_jax.benchmarking import rounds as rounds_lib


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(matmul_peak, "SIZE", 67)
    monkeypatch.setattr(matmul_peak, "SECONDS", 0.01)
    monkeypatch.setattr(rounds_lib, "FOREIGN_LIMIT", 1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_is_in_the_dtype_with_float32_sums(dtype):
    multiply, x, y = matmul_peak._product(dtype, 37)
    assert x.dtype == y.dtype == dtype and (x != y).any()
    product = multiply(x, y)
    assert product.dtype == "float32" and product.shape == (37, 37)


def test_the_best_product_counts(monkeypatch, small):
    clock = iter([0.0, 0.0, 0.5, 0.5, 0.5, 0.7, 0.7, 0.7, 1.1, 1.2])
    fake = types.SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr(matmul_peak, "time", fake)
    assert matmul_peak.measure("float32", size=67, seconds=1.0) == pytest.approx(2 * 67**3 / 0.2)


def test_a_share_is_of_the_same_rounds_peak(small):
    def samples(*seconds):
        return tuple(rounds_lib.Sample(s) for s in seconds)

    rounds = rounds_lib.Rounds(
        samples={"step": samples(10.0, 20.0, 40.0), "peak": samples(2.0, 5.0, 1.0)},
        foreign_loads=(None,) * 3, discarded=0, disturbed=0,
    )  # fmt: skip
    share = matmul_peak.share(rounds, "step", work=3 * 2 * 67**3, against="peak")
    assert (share.low, share.median, share.high) == pytest.approx((3 / 40, 3 / 5, 3 / 4))


def test_the_suite_without_a_peer(small, capsys):
    result, is_right = matmul_peak.run(options_lib.Options(rounds=1))
    assert is_right and set(result["contestants"]) == {"ours float32", "ours bfloat16"}
    for row in result["contestants"].values():
        assert row["flops_per_second"].median == pytest.approx(2 * 67**3 / row["seconds"].median)
    assert not any(name.startswith("ratio_") for name in result)
    json.dumps(result, default=app._plain, allow_nan=False)
    shown = capsys.readouterr().out
    assert "no peer: --peer_python" in shown and "best 67 × 67" in shown


def test_the_suite_with_torch(small):
    pytest.importorskip("torch", reason="the peer is torch")
    result, _ = matmul_peak.run(options_lib.Options(rounds=1, peer_python=sys.executable))
    for dtype in ("float32", "bfloat16"):
        ours, theirs = (result["contestants"][f"{name} {dtype}"] for name in ("ours", "torch"))
        ratio = theirs["seconds"].median / ours["seconds"].median
        assert result[f"ratio_{dtype}"] == pytest.approx(ratio)
    assert result["peer"]["threads"] >= 1
