"""The suite `maxtext_step` on a tiny work against a made-up peer; against MaxText where it is."""

import dataclasses
import json
import os
import pathlib
import sys

import numpy as np
import pytest

from olmoe_jax.benchmarking import maxtext_step, train_step, work
from olmoe_jax.benchmarking import options as options_lib
from olmoe_jax.benchmarking import rounds as rounds_lib
from olmoe_jax.checkpoints import layout

# Widths that MaxText takes: a whole number of heads of 8 and more.
TINY = {"vocab_size": 101, "max_length": 16, "num_layers": 2, "d_model": 32, "num_heads": 4,
        "num_kv_heads": 4, "d_ff": 24, "num_experts": 7, "num_experts_per_token": 3,
        "expert_backend": "dense"}  # fmt: skip

# Answers with the losses in a file beside it, "dense" ten times as fast as "ragged".
FAKE = """
import json, pathlib, sys
sys.path.insert(0, {peers!r})
import serving
here = pathlib.Path(__file__).parent
state = {{}}

def describe():
    return {{"variants": ["dense", "ragged"], "python": "3", "maxtext": "1", "jax": "2"}}

def note(**what):
    names = sorted(path.stem for path in (pathlib.Path(what["folder"]) / "weights").iterdir())
    (here / "opened.json").write_text(json.dumps(what | {{"names": names}}))
    return {{}}

def start(variant):
    state.update(step=0, variant=variant)
    return {{"seconds": 1.0}}

def steps(count):
    losses = json.loads((here / "losses.json").read_text())
    found = losses[state["step"] : state["step"] + count]
    state["step"] += count
    return {{"seconds": count * (0.5 if state["variant"] == "dense" else 5.0), "losses": found}}

serving.serve({{"describe": describe, "open": note, "start": start, "steps": steps}})
"""


@pytest.fixture
def options(monkeypatch, tmp_path):
    monkeypatch.setattr(rounds_lib, "FOREIGN_LIMIT", 1.0)
    return options_lib.Options(
        rounds=2, scratch=str(tmp_path / "scratch"), peer_python=sys.executable
    )


def _fake(monkeypatch, folder, wrong=0.0):
    """A made-up peer whose third loss is `wrong` away from ours."""
    config = maxtext_step.config(**TINY)
    ours = train_step.Ours(config)
    ours.steps(3)
    losses = np.array(ours.losses) + [0, 0, wrong]
    (folder / "losses.json").write_text(json.dumps(losses.tolist()))
    script = folder / "fake.py"
    script.write_text(FAKE.format(peers=str(maxtext_step.PEER.parent)))
    monkeypatch.setattr(maxtext_step, "PEER", script)
    return config


def test_the_faster_of_its_ways_meets_us_and_gets_our_weights(
    monkeypatch, tmp_path, options, capsys
):
    config = _fake(monkeypatch, tmp_path)
    result = maxtext_step.measure(config, options)
    assert result["losses_agree"] and result["variant"] == "dense"
    rows = result["contestants"]
    assert result["ratio_maxtext"] == pytest.approx(0.5 / rows["ours"]["seconds"].median, rel=0.5)
    assert result["ratio_ragged_first_step"] == 5.0 / rows["ours"]["seconds"].median
    opened = json.loads((tmp_path / "opened.json").read_text())
    params = work.Trainer(config).state["params"]
    stored = layout.flatten(layout.to_stored(params, config.model))
    assert opened["names"] == sorted(name.replace("/", ".") for name in stored)
    assert opened["model"]["num_experts_per_token"] == 3
    assert not list((tmp_path / "scratch").iterdir())
    maxtext_step._show(result)
    assert "losses agree" in capsys.readouterr().out


def test_losses_that_differ_are_no_ratio(monkeypatch, tmp_path, options, capsys):
    config = _fake(monkeypatch, tmp_path, wrong=0.002)
    result = maxtext_step.measure(config, options)
    assert not result["losses_agree"] and "ratio_maxtext" not in result
    maxtext_step._show(result)
    assert "there is no ratio" in capsys.readouterr().out


def test_without_an_environment_it_says_what_it_needs(options):
    with pytest.raises(ValueError, match="--peer_python"):
        maxtext_step.run(dataclasses.replace(options, peer_python=None))


@pytest.mark.slow
def test_maxtext_computes_the_same_losses(options):
    python = os.environ.get("OLMOE_JAX_MAXTEXT_PYTHON")
    if not python:
        pytest.skip("OLMOE_JAX_MAXTEXT_PYTHON names no environment with MaxText")
    options = dataclasses.replace(options, peer_python=str(pathlib.Path(python)))
    assert maxtext_step.measure(maxtext_step.config(**TINY), options)["losses_agree"]
