"""The suite `train_step` on a tiny work: alone, against a made-up peer, against transformers."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from experiments import app
from olmoe_jax import accounting
from olmoe_jax.benchmarking import matmul_peak, train_step, tuning, work
from olmoe_jax.benchmarking import options as options_lib
from olmoe_jax.benchmarking import rounds as rounds_lib
from olmoe_jax.porting import folders

# Sizes are those of grouped_mm: rows of 16 bytes.
TINY = {"vocab_size": 101, "max_length": 16, "num_layers": 2, "d_model": 32, "num_heads": 4,
        "num_kv_heads": 4, "d_ff": 24, "num_experts": 7, "num_experts_per_token": 3,
        "expert_backend": "dense"}  # fmt: skip

# Answers with the losses in a file beside it, in 0.01 s a step; notes what it was asked.
FAKE = """
import json, pathlib, sys, os
sys.path.insert(0, {peers!r})
import serving
here = pathlib.Path(__file__).parent
state = {{"step": 0}}

def note(**what):
    with open(here / "asked.jsonl", "a") as file:
        file.write(json.dumps(what) + chr(10))
    return {{}}

def describe():
    return {{"experts": ["grouped_mm"], "threads": 2, "peak_bytes": 5, "python": "3.0",
            "torch": "1.0", "transformers": "2.0"}}

def start(**variant):
    state["step"] = 0
    return note(start=variant, tunables=os.environ.get("GLIBC_TUNABLES"))

def steps(count):
    losses = json.loads((here / "losses.json").read_text())
    found = [losses[(state["step"] + n) % len(losses)] for n in range(count)]
    state["step"] += count
    return {{"seconds": 0.01 * count, "losses": found}}

serving.serve({{"describe": describe, "open": note, "start": start, "steps": steps}})
"""


@pytest.fixture
def options(monkeypatch, tmp_path):
    monkeypatch.setattr(matmul_peak, "SIZE", 31)
    monkeypatch.setattr(matmul_peak, "SECONDS", 0.0)
    monkeypatch.setattr(rounds_lib, "FOREIGN_LIMIT", 1.0)
    return options_lib.Options(rounds=2, scratch=str(tmp_path / "scratch"))


@pytest.fixture
def fake(monkeypatch, tmp_path, options):
    """(options with a made-up peer whose losses are ours, its folder)."""
    peers = str(train_step.PEER.parent)
    (tmp_path / "peer.py").write_text(FAKE.format(peers=peers))
    ours = train_step.Ours(work.config(**TINY))
    ours.steps(train_step.LOSSES)
    (tmp_path / "losses.json").write_text(json.dumps(ours.losses))
    monkeypatch.setattr(train_step, "PEER", tmp_path / "peer.py")
    with_peer = {"peer_python": sys.executable, "allocator_tuned": True}
    return options_lib.Options(**{**vars(options), **with_peer}), tmp_path


def test_alone_we_are_held_against_the_peak(options, capsys):
    config = work.config(**TINY)
    result = train_step.measure(config, options)
    assert result["losses_agree"] and not pathlib.Path(options.scratch).exists()
    flops = 64 * accounting.flops_per_token(config.model, 16).training
    assert result["flops_per_step"] == flops
    row = result["contestants"]["ours, without a peer"]
    peak = result["contestants"]["all at matmul peak, without a peer"]
    assert row["tokens_per_second"] == pytest.approx(64 / row["seconds"].median)
    assert peak["flops_per_second"] == pytest.approx(flops / peak["seconds"].median)
    reached = row["flops_per_second"] / peak["flops_per_second"]
    assert 0.2 * reached < result["ratio_share_of_peak"] < 5 * reached
    needed = accounting.step_bytes(config).total
    assert result["ratio_memory"] == result["memory_bytes"] / needed > 0.9
    train_step.show(result)
    assert "no peer: --peer_python" in capsys.readouterr().out


def test_a_peer_with_our_losses_is_compared_twice(fake, capsys):
    options, folder = fake
    result = train_step.measure(work.config(**TINY), options)
    assert result["losses_agree"]
    assert max(result["largest_loss_differences"].values()) < 1e-5
    for phase in ("same allocator", "as shipped"):
        ours, theirs = (result["contestants"][f"{n}, {phase}"] for n in ("ours", "transformers"))
        speed = result["speeds"][phase]
        assert speed.low <= theirs["seconds"].median / ours["seconds"].median <= speed.high
        assert result[f"ratio_{phase.replace(' ', '_')}"] == speed.median
        assert theirs["seconds"].median == pytest.approx(0.01)
    counts = {phase: len(found["ours"]) for phase, found in result["losses"].items()}
    assert counts == {"same allocator": 20, "as shipped": 2 + 2 * 2}
    asked = [json.loads(line) for line in (folder / "asked.jsonl").read_text().splitlines()]
    starts = [one for one in asked if "start" in one]
    assert starts[-2]["tunables"] and starts[-1]["tunables"] is None
    assert starts[-2]["start"] == starts[-1]["start"]
    assert len(result["foreign_loads"]) == 4
    json.dumps(result, default=app._plain, allow_nan=False)
    assert list((folder / "scratch").iterdir()) == []
    train_step.show(result)
    shown = capsys.readouterr().out
    assert "first 20 losses agree" in shown and "chosen" in shown and "as shipped" in shown


@pytest.mark.parametrize("wrong", [0.0015, float("nan")])
def test_one_different_loss_means_no_ratio_and_failure(fake, capsys, monkeypatch, wrong):
    options, folder = fake
    losses = json.loads((folder / "losses.json").read_text())
    losses[19] += wrong
    (folder / "losses.json").write_text(json.dumps(losses))
    config = work.config(**TINY)
    monkeypatch.setattr(train_step.work, "config", lambda **_: config)
    result, is_right = train_step.run(options)
    assert not is_right and not result["speeds"]
    assert {name for name in result if name.startswith("ratio_")} == {
        "ratio_memory", "ratio_share_of_peak"
    }  # fmt: skip
    assert "WRONG" in capsys.readouterr().out


def test_what_the_peer_opens_is_our_model(options, tmp_path):
    for dtype in ("float32", "bfloat16"):
        config = work.config(**TINY, dtype=dtype)
        params = jax.jit(work._starting_state(config))()["params"]
        opening = train_step._export(config, params, tmp_path / dtype)
        found = folders.open_folder(opening["folder"])
        embedding = found.read("model.embed_tokens.weight")
        np.testing.assert_array_equal(embedding, params["embedding"])
        assert str(embedding.dtype) == dtype == found.config["dtype"]
        np.testing.assert_array_equal(np.load(opening["batches"]), work.tokens(config, 20))
        assert opening["optimizer"] == {
            "lr": 4e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1
        }  # fmt: skip
        assert (opening["clip_norm"], opening["balance_weight"]) == (1.0, 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_has_the_same_losses(options, dtype, monkeypatch):
    pytest.importorskip("torch", reason="the peer needs torch")
    pytest.importorskip("transformers", reason="the peer is transformers")
    monkeypatch.setattr(tuning, "BOTH", (False,))  # compiling takes a minute
    with_peer = {"peer_python": sys.executable, "dtype": dtype, "allocator_tuned": True}
    options = options_lib.Options(**{**vars(options), **with_peer})
    result = train_step.measure(work.config(**TINY, dtype=dtype), options)
    assert result["losses_agree"], result["losses"]
    gap = max(result["largest_loss_differences"].values())
    assert gap < {"float32": 5e-5, "bfloat16": 2e-2}[dtype]
    losses = result["losses"]["same allocator"]["ours"]
    assert losses[-1] < losses[0] - 0.02  # something was learned
    assert {one["variant"].split(",")[0] for one in result["variants"]} >= {"eager", "grouped_mm"}
