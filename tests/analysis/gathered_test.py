"""Traces of other programs as input, and ours in their forms."""

import dataclasses

import numpy as np
import pytest

from olmoe_jax.analysis import analyses, exchange, gathered, trace_files
from tests.analysis import models, synthetic


def _files(folder, names=("code", "prose")):
    for seed, name in enumerate(names):
        source = synthetic.make_trace(seed=seed, domain=name)
        exchange.write(folder / f"{name}.npy", source)
    return folder


def test_arrays_of_ids_are_analysed_and_what_is_unknown_is_noted(tmp_path):
    found = gathered.read([f"{_files(tmp_path)}/*.npy"], num_experts=7)
    (recording,) = found["traces"]
    assert list(recording.parts) == ["code", "prose"]
    source = synthetic.make_trace(seed=1)
    np.testing.assert_array_equal(
        recording.parts["prose"].topk[0], np.bincount(source.tokens.expert_ids[:, 0].ravel())
    )
    result = analyses.find([recording])
    notes = " ".join(result.notes)
    assert "does not know tokens" in notes and "has no weights" in notes
    assert result.sentences and result.load.confidence is None
    analyses.write(result, tmp_path / "out")
    assert (tmp_path / "out" / "domain_specialisation.json").exists()


@pytest.mark.parametrize("form", ["npz", "csv", "jsonl"])
def test_what_was_exported_comes_back(form, tmp_path):
    source, _ = models.random_trace()
    trace_files.write(tmp_path / "traces" / "d", source)
    found = gathered.read([f"{tmp_path}/traces/*"])
    for _ in range(2):  # the second in place of the first
        gathered.export(found, tmp_path / "export", form)
    (file,) = (p for p in (tmp_path / "export").rglob("*") if p.is_file())
    assert file.name == f"d é.{form}" or file.name == f"d %C3%A9.{form}"
    options = {"num_experts": models.EXPERTS} if form == "csv" else {}
    (model,) = (again := gathered.read([str(file)], **options))
    (recording,) = again[model]
    (trace,) = recording.traces.values()
    want = models.whole(found["m"][0].traces["d é"])
    np.testing.assert_array_equal(models.whole(trace).expert_ids, want.expert_ids)
    np.testing.assert_allclose(models.whole(trace).weights, want.weights, rtol=1e-6)
    if form != "csv":  # which loses what is said of the whole
        assert (model, trace.info.step, trace.info.domain) == ("m", 5, "d é")


def test_checkpoints_are_in_order_of_their_steps(tmp_path):
    for step in (20, 3):
        source = synthetic.make_trace(seed=step, checkpoint=f"step{step}", step=step)
        exchange.write(tmp_path / f"{step}.npz", source)
    (recordings,) = gathered.read([f"{tmp_path}/*.npz"]).values()
    assert [one.traces["books"].info.step for one in recordings] == [3, 20]


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file matches"):
        gathered.read([f"{tmp_path}/*.npy"])
    _files(tmp_path)
    with pytest.raises(ValueError, match="num_experts is not known"):
        gathered.read([f"{tmp_path}/*.npy"])
    with pytest.raises(ValueError, match="a second trace of traces on code"):
        gathered.read([f"{tmp_path}/*.npy", f"{tmp_path}/code.npy"], num_experts=7)
    scores = np.random.default_rng(0).random((5, 2, 7))
    probabilities = scores / scores.sum(-1, keepdims=True)
    np.savez(tmp_path / "probs.npz", router_logits=probabilities)
    with pytest.raises(ValueError, match="router_logits are probabilities"):
        gathered.read([f"{tmp_path}/probs.npz"], k=2)
    (found,) = gathered.read([f"{tmp_path}/probs.npz"], k=2, scores="probabilities")["traces"]
    assert found.parts["probs"].group_weights is not None
    source = synthetic.make_trace()
    block = dataclasses.replace(
        source.tokens,
        weights=source.tokens.weights / source.tokens.weights.sum(-1, keepdims=True),
    )
    exchange.write(tmp_path / "sums.npz", dataclasses.replace(source, tokens=block))
    with pytest.raises(ValueError, match="they were renormalised"):
        gathered.read([f"{tmp_path}/sums.npz"])
    (found,) = gathered.read([f"{tmp_path}/sums.npz"], scores="renormalised")["m"]
    assert found.parts["books"].group_weights is None
