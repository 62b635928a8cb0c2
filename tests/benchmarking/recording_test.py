"""The suite `recording` on a tiny model: alone, against a made-up peer, against transformers."""

import json
import sys

import numpy as np
import pytest

from experiments import app
from olmoe_jax import accounting, config, machine
from olmoe_jax.analysis import recording as analysis_recording
from olmoe_jax.analysis import trace
from olmoe_jax.benchmarking import matmul_peak, page_cache, port, recording
from olmoe_jax.benchmarking import options as options_lib
from olmoe_jax.benchmarking import rounds as rounds_lib

# Sizes are those of grouped_mm: rows of 16 bytes.
TINY = config.ModelConfig(
    vocab_size=53, max_length=13, num_layers=2, d_model=32, num_heads=2, num_kv_heads=2, d_ff=16,
    num_experts=7, num_experts_per_token=2, qk_norm=True,
)  # fmt: skip
WINDOWS = 2
TOKENS = WINDOWS * 13

# Answers with the choices in a file beside it; notes what it was asked.
FAKE = """
import json, pathlib, shutil, sys
sys.path.insert(0, {peers!r})
import serving
here = pathlib.Path(__file__).parent

def note(**what):
    with open(here / "asked.jsonl", "a") as file:
        file.write(json.dumps(what) + chr(10))

def open_(**given):
    note(open=given)
    return {{"threads": 2, "python": "3.0", "torch": "1.0", "transformers": "2.0"}}

def tune(implementations, tokens):
    return {{"tried": [{{"experts": "grouped_mm", "error": "no kernel"}},
                      {{"experts": "eager", "seconds": 0.5}}]}}

def record(experts, output):
    note(record=experts)
    shutil.copy(here / "choices.npz", output)
    return {{"seconds": 10.0, "loading": 4.0}}

serving.serve({{"open": open_, "tune": tune, "record": record}})
"""


@pytest.fixture
def options(monkeypatch, tmp_path):
    monkeypatch.setattr(recording, "WINDOWS", WINDOWS)
    monkeypatch.setattr(matmul_peak, "SIZE", 31)
    monkeypatch.setattr(matmul_peak, "SECONDS", 0.0)
    monkeypatch.setattr(rounds_lib, "FOREIGN_LIMIT", 1.0)
    return options_lib.Options(rounds=2, scratch=str(tmp_path / "scratch"))


@pytest.fixture
def with_peer(monkeypatch, tmp_path, options):
    """Options with a made-up peer, whose choices are ours; its folder."""
    script = FAKE.format(peers=str(recording.PEER.parent))
    (tmp_path / "peer.py").write_text(script)
    monkeypatch.setattr(recording, "PEER", tmp_path / "peer.py")
    port.write_random_folder(tmp_path / "model", TINY, shards=1)
    (found,) = analysis_recording.record(
        tmp_path / "model", [recording._random_text(TINY)], tmp_path / "traces", streamed=True,
        announce=lambda line: None,
    )  # fmt: skip
    ids = trace.join(list(found.trace.blocks())).expert_ids
    np.savez(tmp_path / "choices.npz", expert_ids=ids, gaps=np.ones(ids.shape[:2], np.float32))
    return options_lib.Options(**vars(options) | {"peer_python": sys.executable}), tmp_path


def test_alone_we_are_held_against_the_limit(options, monkeypatch, capsys):
    forgotten, forget = [], page_cache.forget
    monkeypatch.setattr(page_cache, "forget", lambda path: forgotten.append(path) or forget(path))
    result = recording.measure(TINY, options)
    rows, speeds = result["contestants"], result["speeds"]
    assert list(rows) == [recording.OURS, recording.READ, recording.PEAK, recording.LIMIT]
    assert (result["tokens"], result["context_length"]) == (TOKENS, 13)
    assert result["flops"] == TOKENS * accounting.flops_per_token(TINY, 13).forward
    assert result["bytes"] == 2 * accounting.num_params(TINY).total
    assert len(forgotten) == 2 * 2  # ours and reading, in each round
    ours, limit = rows[recording.OURS]["seconds"], rows[recording.LIMIT]["seconds"]
    parts = [rows[name]["seconds"] for name in (recording.READ, recording.PEAK)]
    assert sum(p.low for p in parts) <= limit.low and limit.high <= sum(p.high for p in parts)
    assert limit.low / ours.high <= result["ratio_of_limit"] <= limit.high / ours.low
    assert result["ratio_of_limit"] == speeds["of_limit"].median < 1
    assert rows[recording.OURS]["tokens_per_second"] == pytest.approx(TOKENS / ours.median)
    assert {"weights", "layers", "traces"} < result["phases"].keys()
    assert rows[recording.OURS]["loading"] == result["phases"]["weights"]
    assert "ratio_peer" not in result and result["choices_agree"]
    json.dumps(result, default=app._plain, allow_nan=False)
    recording.show(result | {"preset": "tiny"})
    shown = capsys.readouterr().out
    assert "no peer: --peer_python" in shown and "layer by layer" in shown


def test_a_peer_that_chooses_as_we_do_is_compared_with_and_without_loading(with_peer, capsys):
    options, folder = with_peer
    result = recording.measure(TINY, options)
    assert result["choices"] == {
        "choices": 2 * TOKENS, "clear": 2 * TOKENS, "different": 0, "agree": True
    }  # fmt: skip
    ours = result["contestants"][recording.OURS]
    assert 10 / ours["seconds"].high <= result["ratio_peer"] <= 10 / ours["seconds"].low
    # 10 s of which 4 s are loading
    assert result["ratio_peer_without_loading"] > 6 / ours["seconds"].high
    assert result["contestants"][recording.THEIRS]["loading"].median == 4
    asked = [json.loads(line) for line in (folder / "asked.jsonl").read_text().splitlines()]
    opened = asked[0]["open"]
    assert (opened["k"], opened["rows"], opened["dtype"]) == (2, WINDOWS, "float32")
    assert asked[1:] == [{"record": "eager"}] * 2  # the other one does not run
    assert list((folder / "scratch").iterdir()) == []
    recording.show(result | {"preset": "tiny"})
    shown = capsys.readouterr().out
    assert "experts agree: 0 of 52 clear choices differ" in shown and "no kernel" in shown


def test_other_choices_mean_no_ratio_and_failure(with_peer, monkeypatch, capsys):
    options, folder = with_peer
    with np.load(folder / "choices.npz") as arrays:
        found = dict(arrays)
    np.savez(folder / "choices.npz", **found | {"expert_ids": (found["expert_ids"] + 1) % 7})
    monkeypatch.setattr(recording.presets, "get", lambda name, **changes: TINY)
    result, is_right = recording.run(options)
    assert not is_right
    assert {name for name in result if name.startswith("ratio_")} == {"ratio_of_limit"}
    assert "WRONG: do not agree" in capsys.readouterr().out


def test_near_ties_and_what_follows_from_them_are_not_compared():
    rng = np.random.default_rng(0)
    ours = rng.random((500, 3, 7)).argsort(-1)[..., :2]
    gaps, theirs = np.ones((500, 3), np.float32), ours[..., ::-1].copy()
    compare = recording.compare_choices
    everything = {"choices": 1500, "clear": 1500, "different": 0, "agree": True}
    assert compare(ours, theirs, gaps, "float32") == everything  # whatever the order
    theirs[3, 1, 0] = next(e for e in range(7) if e not in ours[3, 1])
    theirs[3, 2] = [e for e in range(7) if e not in ours[3, 2]][:2]
    found = compare(ours, theirs, gaps, "float32")
    assert found == everything | {"clear": 1499, "different": 1}
    gaps[3, 1] = 1e-5
    assert compare(ours, theirs, gaps, "float32") == everything | {"clear": 1498}
    gaps[:260] = np.nan  # neither are logits that are no numbers
    assert not compare(ours, theirs, gaps, "float32")["agree"]


def test_without_layers_named_there_are_two(options, monkeypatch):
    asked = []
    monkeypatch.setattr(
        recording.presets, "get", lambda name, **changes: asked.append((name, changes)) or TINY
    )
    monkeypatch.setattr(recording, "measure", lambda config, options: {"choices_agree": True})
    monkeypatch.setattr(recording, "show", lambda result: None)
    recording.run(options)
    recording.run(options_lib.Options(num_layers=16))
    assert asked == [("olmoe-1b-7b", {"num_layers": n}) for n in (2, 16)]


def test_a_disk_too_small_is_said_before_anything_is_written(options, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "free_disk", lambda path: 100)
    with pytest.raises(OSError, match="GB are needed .* name another --scratch"):
        recording.measure(TINY, options)
    assert not (tmp_path / "scratch").exists()


@pytest.mark.slow  # starts torch
@pytest.mark.parametrize("dtype", recording.NEAR_TIE)
def test_transformers_chooses_the_same_experts(options, dtype):
    pytest.importorskip("torch", reason="the peer needs torch")
    pytest.importorskip("transformers", reason="the peer is transformers")
    changes = {"peer_python": sys.executable, "dtype": dtype, "rounds": 1}
    result = recording.measure(TINY, options_lib.Options(**vars(options) | changes))
    assert result["choices_agree"], result["choices"]
    assert result["ratio_peer"] > 0 and result["ratio_peer_without_loading"] > 0
