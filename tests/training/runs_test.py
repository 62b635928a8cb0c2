"""What is refused before any work: configs, data and workdirs that do not fit together."""

import dataclasses
import json
import re
import shutil

import jax
import pytest

from olmoe_jax.data import pipeline
from olmoe_jax.training import loop, runs


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


def begun(workdir, run):
    """A workdir as it is when its run has begun."""
    runs.write_config(workdir, run, data=pipeline.open(run.data.path), peak=(1.0, "a test"))


def change(file, **values):
    """Sets values of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | values
    kept = {name: value for name, value in content.items() if value is not None}
    file.write_text(json.dumps(kept))


def test_a_run_resumes_with_its_data_wherever_they_lie_and_with_no_other(
    tmp_path, make_run, prepared
):
    workdir, moved = tmp_path / "run", tmp_path / "moved"
    begun(workdir, make_run())
    shutil.copytree(prepared, moved)
    run = make_run(data=dict(path=str(moved), tokenizer=str(moved / "tokenizer.json")))
    train(run, workdir, dry_run=True)
    run = make_run(data=dict(path=str(moved)))
    change(moved / "info.json", skipped_records=7)
    with pytest.raises(ValueError, match=r"moved: other data than the run in .*run began with"):
        train(run, workdir, dry_run=True)
    change(moved / "info.json", tokenizer_sha256="0" * 64)
    with pytest.raises(ValueError, match="moved: made with another tokenizer than the run in"):
        train(run, workdir, dry_run=True)
    # Of an older version only the path, and the tokenizer, tell data apart.
    change(workdir / "config.json", data_sha256=None)
    with pytest.raises(ValueError, match="another configuration.*config.data.path"):
        train(run, workdir, dry_run=True)
    train(make_run(), workdir, dry_run=True)


def test_two_processes_do_not_train_in_one_workdir(tmp_path, make_run):
    with runs.alone(tmp_path / "run"):
        with pytest.raises(ValueError, match="run: another process is training in it"):
            train(make_run(), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    with runs.alone(tmp_path / "run"):
        pass


def test_a_run_with_a_state_no_longer_needs_what_it_began_from(tmp_path, make_run):
    workdir, source = tmp_path / "run", str(tmp_path / "gone")
    run = make_run(training=dict(initial_checkpoint=source))
    begun(workdir, run)
    with pytest.raises(FileNotFoundError, match="gone: no such directory"):
        train(run, workdir, dry_run=True)
    (workdir / "resume" / "step3-tokens0K").mkdir(parents=True)
    lines = []
    for named in (source, None, "elsewhere"):
        run = make_run(training=dict(initial_checkpoint=named))
        train(run, workdir, dry_run=True)
        resumed = runs.check_workdir(workdir, run, lines.append)
        assert resumed.training.initial_checkpoint == source
    (line,) = lines
    assert line.startswith("note: the run resumes; config.training.initial_checkpoint, which was")


@pytest.fixture
def finished(tmp_path, make_run):
    """The workdir of a run, with nothing in its checkpoint but the config."""
    workdir, run = tmp_path / "finished", make_run()
    begun(workdir, run)
    kept = workdir / "checkpoints" / "step12-tokens1K"
    (kept / "params").mkdir(parents=True)
    record = {"config": dataclasses.asdict(run), "step": 12}
    (kept / "config.json").write_text(json.dumps(record))
    return workdir


def test_a_start_from_a_run_with_another_tokenizer_is_refused(tmp_path, make_run, finished):
    for source in (finished, finished / "checkpoints" / "step12-tokens1K"):
        run = make_run(training=dict(initial_checkpoint=str(source)))
        change(finished / "config.json", tokenizer_sha256="0" * 64)
        with pytest.raises(ValueError, match="finished had another tokenizer .sha256 000000000000"):
            train(run, tmp_path / "run", dry_run=True)
        change(finished / "config.json", tokenizer_sha256=None)
        train(run, tmp_path / "run", dry_run=True)


def test_moments_from_what_is_no_train_state_are_refused_by_a_dry_run(tmp_path, make_run, finished):
    for source in (finished, finished / "checkpoints" / "step12-tokens1K"):
        start = dict(initial_checkpoint=str(source), initial_optimizer_state=True)
        with pytest.raises(FileNotFoundError, match="no train state; expected a step directory"):
            train(make_run(training=start), tmp_path / "run", dry_run=True)


@pytest.mark.parametrize("content", [{"config": 3}, {"config": {"model": 3}}, [1], {}])
def test_a_config_json_of_another_shape_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="config.json: not a config.json of this version"):
        runs.read_config(tmp_path)


@pytest.mark.parametrize("sign", ["*", "?", "[", "\\"])
def test_a_workdir_whose_name_is_a_pattern_is_refused(tmp_path, make_run, sign):
    match = re.escape(f"a{sign}b: no checkpoints can be kept where a path has a {sign}")
    refused(make_run, tmp_path / f"a{sign}b", match)
    assert list(tmp_path.iterdir()) == []
