import functools
import json

import pytest

from experiments import app
from olmoe_jax import accounting
from olmoe_jax.benchmarking import experts, matmul_peak, moe_work
from olmoe_jax.benchmarking import options as options_lib


def test_all_cuts_have_equal_total_and_active_parameters():
    counts = set()
    for e, (k, f) in experts.CUTS.items():
        config = moe_work.make_config(
            dtype="float32", d_model=experts.D_MODEL, d_ff=f, num_experts=e,
            num_experts_per_token=k,
        )  # fmt: skip
        router = config.d_model * e
        params = accounting.num_params(config)
        counts.add((params.total - router, params.active - router))
    assert len(counts) == 1


@pytest.mark.slow
def test_the_suite(monkeypatch, capsys):
    monkeypatch.setattr(experts, "TOKENS", 67)
    monkeypatch.setattr(experts, "D_MODEL", 18)
    monkeypatch.setattr(experts, "CUTS", {2: (1, 12), 4: (2, 6), 12: (6, 2)})
    quick = functools.partial(matmul_peak.measure, size=31, seconds=0.0)
    monkeypatch.setattr(matmul_peak, "measure", quick)
    monkeypatch.setattr(moe_work, "measure", functools.partial(once, moe_work.measure))
    is_right = moe_work.is_right
    monkeypatch.setattr(moe_work, "is_right", lambda *a: is_right(*a) and "12" not in a[1])
    result, all_right = experts.run(options_lib.Options(rounds=1, expert_backend="loop"))
    assert not all_right and result["wrong"] == ["loop, 12 experts"]
    seconds = {e: result["contestants"][f"loop, {e} experts"]["seconds"].median for e in (2, 4, 12)}
    assert result["ratio_12_to_2"] == pytest.approx(seconds[12] / seconds[2])
    assert result["ratio_4_to_2_loop"] == pytest.approx(seconds[4] / seconds[2])
    rows = result["contestants"]
    alone, peak = rows["products alone, 12 experts"], rows["peak"]["flops_per_second"].median
    flops = 67 * 6 * 9 * 2 * 18 * 2  # rows, products, 2 · d_model · width
    assert alone["share_of_peak"].median == pytest.approx(flops / alone["seconds"].median / peak)
    assert json.dumps(result, default=app._plain, allow_nan=False)
    assert "WRONG: not as `dense` computes it: loop, 12 experts" in capsys.readouterr().out


def once(measure, call, *, seconds):
    del seconds
    return measure(call, seconds=0)
