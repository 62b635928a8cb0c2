"""What is refused before any work: configs, data and workdirs that do not fit together."""

import json

import jax
import pytest

from olmoe_jax.data import pipeline
from olmoe_jax.training import loop


def train(run, workdir, announce=lambda line: None, **options):
    """loop.train on one device, saying nothing."""
    return loop.train(run, workdir, announce=announce, devices=jax.devices()[:1], **options)


def refused(make_run, workdir, match, **sections):
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        loop.train(
            make_run(**sections), workdir, announce=lambda line: None
        )  # on all eight devices


def test_what_does_not_fit_together_is_refused_before_any_work(tmp_path, make_run):
    refused(
        make_run,
        tmp_path,
        "batch_size is 4.*mesh data × fsdp × expert .8.",
        training=dict(batch_size=4),
    )
    group = dict(load_balancing_group=2)
    refused(make_run, tmp_path, "load_balancing_group is 2.*share on each device", losses=group)
    refused(make_run, tmp_path, "config.mesh is .*number of devices .8.", mesh=dict(data=3))
    refused(
        make_run, tmp_path, "config.mesh.expert is 4: must divide.*num_experts.*which is 5",
        mesh=dict(data=2, expert=4),
    )  # fmt: skip
    refused(
        make_run,
        tmp_path,
        "vocab_size is 64: the tokenizer of .* has 280",
        model=dict(vocab_size=64),
    )
    refused(make_run, tmp_path, "sequence_length", data=dict(sequence_length=8))
    refused(make_run, tmp_path, "nowhere", data=dict(path=str(tmp_path / "nowhere")))
    refused(
        make_run,
        tmp_path,
        "router is 'token_chioce'.*nearest: token_choice",
        model=dict(router="token_chioce"),
    )
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_than_the_datas_is_refused_with_both_hashes(tmp_path, make_run, prepared):
    other = tmp_path / "tokenizer.json"
    content = json.loads((prepared / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    other.write_text(json.dumps(content))
    found = pipeline.open(prepared).info.tokenizer_sha256
    refused(
        make_run, tmp_path / "run", f"{found[:8]}.*tokenizer.json", data=dict(tokenizer=str(other))
    )


def test_a_workdir_of_another_configuration_is_refused_and_named(tmp_path, make_run):
    train(make_run(training=dict(num_steps=1)), tmp_path)
    refused(
        make_run, tmp_path,
        "config.model.d_ff: 8 != 4; config.optimizer.learning_rate: 0.003 != 0.01",
        training=dict(num_steps=1), model=dict(d_ff=4), optimizer=dict(learning_rate=1e-2),
    )  # fmt: skip
    # A resumed run may change what leaves the arithmetic alone.
    train(make_run(training=dict(num_steps=2, log_interval=2)), tmp_path)


def test_a_full_disk_is_refused_before_the_first_step(tmp_path, make_run, monkeypatch):
    monkeypatch.setattr("olmoe_jax.machine.free_disk", lambda path: 1000)
    with pytest.raises(ValueError, match="--allow_full_disk"):
        train(make_run(), tmp_path / "run")
    run = make_run(training=dict(num_steps=1))
    assert train(run, tmp_path / "run", allow_full_disk=True).finished


def test_a_mistyped_initial_checkpoint_is_refused_by_a_dry_run(tmp_path, make_run):
    run = make_run(training=dict(initial_checkpoint=str(tmp_path / "nowhere")))
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        train(run, tmp_path / "run", dry_run=True)
