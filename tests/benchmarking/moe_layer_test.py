import functools
import json
import sys

import pytest

from experiments import app
from olmoe_jax import machine
from olmoe_jax.benchmarking import matmul_peak, moe_layer, moe_work
from olmoe_jax.benchmarking import options as options_lib

SHAPE = {"d_model": 16, "d_ff": 10, "num_experts": 7, "num_experts_per_token": 3}
COUNT = 67


@pytest.fixture
def options(monkeypatch, tmp_path):
    """Options of one round of a tiny shape."""
    monkeypatch.setitem(moe_layer.SHAPES, "tiny", (COUNT, SHAPE))
    monkeypatch.setattr(moe_layer, "SECONDS", 0.0)
    quick = functools.partial(matmul_peak.measure, size=31, seconds=0.0)
    monkeypatch.setattr(matmul_peak, "measure", quick)
    return options_lib.Options(
        rounds=1, shape="tiny", expert_backend="loop,dense", scratch=str(tmp_path / "scratch")
    )


def test_the_suite_without_a_peer(options, capsys):
    result, is_right = moe_layer.run(options)
    assert is_right and not result["wrong"]
    assert result["flops"] == COUNT * 6 * (16 * 7 + 3 * 3 * 16 * 10)
    names = {f"{b}, {r}" for b in ("loop", "dense") for r in (moe_work.BALANCED, moe_work.TO_FEW)}
    assert set(result["contestants"]) == {"peak", *names}
    for backend in ("loop", "dense"):
        balanced = result["contestants"][f"{backend}, balanced"]
        assert result[f"ratio_share_of_peak_{backend}"] == balanced["share_of_peak"].median
        to_few = result["contestants"][f"{backend}, {moe_work.TO_FEW}"]["seconds"].median
        ratio = to_few / balanced["seconds"].median
        assert result[f"ratio_all_to_eight_{backend}"] == pytest.approx(ratio)
    assert result["ratio_all_to_eight"] == result["ratio_all_to_eight_loop"]
    assert "ratio_same_allocator" not in result
    assert json.dumps(result, default=app._plain, allow_nan=False)
    shown = capsys.readouterr().out
    assert "no peer" in shown and "all values agree" in shown and "float32" in shown


def test_wrong_values_are_reported(options, monkeypatch, capsys):
    monkeypatch.setitem(moe_work.TOLERANCE, "float32", -1.0)
    result, is_right = moe_layer.run(options)
    assert not is_right
    assert "loop, balanced" in result["wrong"]
    assert "WRONG" in capsys.readouterr().out


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="--shape=c: must be one of a, b2048, b8192"):
        moe_layer.run(options_lib.Options(shape="c"))


class Peer:
    """Answers `run` with the seconds of a table, and remembers what it was asked."""

    def __init__(self, seconds):
        self.seconds, self.asked = seconds, []

    def ask(self, **request):
        self.asked.append(request)
        settings = (request["experts_implementation"], request["threads"], request["compiled"])
        found = self.seconds[settings]
        return {"error": found} if isinstance(found, str) else {"seconds": found}


def tuned(peer, monkeypatch, *, cores, free):
    monkeypatch.setattr(machine, "cores", lambda: cores)
    monkeypatch.setattr(machine, "free_memory", lambda: free)
    config = moe_work.make_config(dtype="float32", **SHAPE)
    params = moe_work.make_params(config)
    tokens = moe_work.make_tokens(config, params["router"], count=COUNT, routing=moe_work.BALANCED)
    work = moe_layer._Work(config, params, {moe_work.BALANCED: tokens}, {})
    return moe_layer._tune(peer, work, options_lib.Options())


def test_the_peers_fastest_settings_are_taken(monkeypatch):
    peer = Peer({
        ("eager", 5, False): 3.0, ("batched_mm", 5, False): 4.0, ("grouped_mm", 5, False): 2.0,
        ("grouped_mm", 5, True): 1.5, ("grouped_mm", 1, True): 1.7,
    })  # fmt: skip
    found = tuned(peer, monkeypatch, cores=5, free=10**9)
    best = {"experts_implementation": "grouped_mm", "threads": 5, "compiled": True}
    assert found["settings"] == best
    assert len(found["tried"]) == 5
    assert {request["tokens"] for request in peer.asked} == {COUNT}
    # What takes far longer than the best so far is not run twice.
    assert [request["limit"] for request in peer.asked] == [None, 6.0, 6.0, 6.0, 4.5]


def test_an_implementation_that_cannot_fit_is_left_out_and_said(monkeypatch, capsys):
    peer = Peer({
        ("eager", 1, False): 1.0, ("grouped_mm", 1, False): 2.0, ("eager", 1, True): 3.0,
    })  # fmt: skip
    copies_and_gradients = 2 * COUNT * 3 * 3 * 16 * 10 * 4
    found = tuned(peer, monkeypatch, cores=1, free=copies_and_gradients - 1)
    assert found["settings"]["experts_implementation"] == "eager"
    assert not found["settings"]["compiled"]
    assert "batched_mm" not in {request["experts_implementation"] for request in peer.asked}
    assert "left_out" in found["tried"][2]
    assert "batched_mm" in capsys.readouterr().out


def test_settings_that_fail_are_left_out_and_some_must_run(monkeypatch):
    seconds = dict.fromkeys((("eager", 1, False), ("eager", 1, True)), 1.0)
    for name in ("batched_mm", "grouped_mm"):
        seconds[name, 1, False] = "RuntimeError: strides"
    found = tuned(Peer(seconds), monkeypatch, cores=1, free=None)
    assert found["settings"]["experts_implementation"] == "eager"
    assert found["tried"][0]["left_out"] == "RuntimeError: strides"
    for key in seconds:
        seconds[key] = "RuntimeError: strides"
    with pytest.raises(ValueError, match="transformers runs in no way: RuntimeError: strides"):
        tuned(Peer(seconds), monkeypatch, cores=1, free=None)


@pytest.mark.slow  # starts torch twice and compiles the peer
@pytest.mark.parametrize("dtype", moe_work.TOLERANCE)
def test_transformers_computes_the_same(options, monkeypatch, dtype):
    pytest.importorskip("torch", reason="needs torch in this environment")
    pytest.importorskip("transformers", reason="needs transformers in this environment")
    # grouped_mm wants rows of a multiple of 16 bytes.
    monkeypatch.setitem(moe_layer.SHAPES, "tiny", (COUNT, SHAPE | {"d_model": 24, "d_ff": 16}))
    options = options_lib.Options(**vars(options) | {
        "peer_python": sys.executable, "dtype": dtype, "allocator_tuned": True,
        "expert_backend": "loop",
    })  # fmt: skip
    result, is_right = moe_layer.run(options)
    assert is_right
    for name in (moe_layer.PEER, moe_layer.PEER_AS_SHIPPED):
        assert 0 < result["contestants"][name]["error"] <= moe_work.TOLERANCE[dtype]
    assert result["ratio_same_allocator"] > 0 and result["ratio_as_shipped"] > 0
    assert len(result["foreign_loads"]) == 2  # a round of each
