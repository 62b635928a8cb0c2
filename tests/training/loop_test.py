"""The loop as it is used: trained straight, stopped and resumed, started from others'
checkpoints."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from olmoe_jax import checkpoints, config, loading
from olmoe_jax.data import pipeline
from olmoe_jax.porting import port
from olmoe_jax.training import loop, metrics, runs, step

FP32_SUM = 2e-5  # order of summation over a few hundred tokens


def train(run, workdir, announce=lambda line: None, **options):
    """loop.train on one device, saying nothing."""
    return loop.train(run, workdir, announce=announce, devices=jax.devices()[:1], **options)


def records(workdir):
    """metrics.jsonl without what depends on the clock."""
    return [
        {name: value for name, value in record.items() if not name.startswith("perf/")}
        for record in metrics.read(workdir)
    ]


def assert_same_run(one, other):
    """Bit-identical checkpoints at the same steps, and the same metrics, each step once."""
    kept, again = checkpoints.list_checkpoints(one), checkpoints.list_checkpoints(other)
    assert [step for step, _ in kept] == [step for step, _ in again]
    for (_, a), (_, b) in zip(kept, again, strict=True):
        params = checkpoints.read_params(a), checkpoints.read_params(b)
        jax.tree.map(np.testing.assert_array_equal, *params)
    assert records(one) == records(other)
    steps = [record["step"] for record in records(one)]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize(
    "sections",
    [
        {},
        dict(
            training=dict(batch_size=16, micro_batches=2, num_steps=12),
            losses=dict(load_balancing_group=1),
        ),
    ],
    ids=["whole_batch", "micro_batches"],
)
def test_resuming_is_bit_identical_across_an_epoch(tmp_path, make_run, prepared, sections):
    """Stopped twice: by the number of steps, and by SIGTERM between two checkpoints."""
    whole = make_run(**sections)
    windows = pipeline.open(prepared).num_windows("train")
    late = windows // whole.training.batch_size - 5  # the epoch ends inside the run
    whole = dataclasses.replace(whole, data=dataclasses.replace(whole.data, start_step=late))
    assert train(whole, tmp_path / "straight").finished

    part = dataclasses.replace(whole, training=dataclasses.replace(whole.training, num_steps=5))
    assert train(part, tmp_path / "parts").finished
    patched = pytest.MonkeyPatch()
    write = metrics.MetricsWriter.write

    def write_then_signal(self, at, record):
        write(self, at, record)
        if at == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    patched.setattr(metrics.MetricsWriter, "write", write_then_signal)
    stopped = train(whole, tmp_path / "parts")
    patched.undo()
    assert (stopped.finished, stopped.signal) == (False, signal.SIGTERM)
    assert 6 < stopped.step < 12
    assert train(whole, tmp_path / "parts").finished
    # num_steps=5 kept one checkpoint more than the straight run: its last.
    extra = [path for at, path in checkpoints.list_checkpoints(tmp_path / "parts") if at == 5]
    assert len(extra) == 1
    shutil.rmtree(extra[0])
    kept = [r for r in records(tmp_path / "parts")]
    straight = {r["step"]: r for r in records(tmp_path / "straight")}
    for record in kept:  # and validated there
        if record["step"] == 5:
            for name in [n for n in record if n not in straight[5]]:
                del record[name]
    assert kept == list(straight.values())
    for (a, one), (b, other) in zip(
        checkpoints.list_checkpoints(tmp_path / "straight"),
        checkpoints.list_checkpoints(tmp_path / "parts"),
        strict=True,
    ):
        assert a == b
        jax.tree.map(
            np.testing.assert_array_equal,
            checkpoints.read_params(one),
            checkpoints.read_params(other),
        )


def test_every_step_is_kept_with_interval_1(tmp_path, make_run):
    run = make_run(training=dict(num_steps=4), checkpoint=dict(interval=1, full_state_at=(1,)))
    train(run, tmp_path)
    assert [at for at, _ in checkpoints.list_checkpoints(tmp_path)] == [0, 1, 2, 3, 4]
    names = sorted(path.name for path in (tmp_path / "resume").iterdir())
    assert names == ["step1-tokens0K", "step3-tokens0K", "step4-tokens0K"]
    assert checkpoints.checkpoint_name(10, 20_480) == "step10-tokens20K"


def test_a_finished_run_is_not_redone(tmp_path, make_run):
    run = make_run(training=dict(num_steps=2))
    first = train(run, tmp_path)
    before = (tmp_path / "metrics.jsonl").stat().st_mtime_ns
    lines = []
    again = train(run, tmp_path, announce=lines.append)
    assert again == first
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == before
    assert lines[-1].startswith("finished: ")


def test_dry_run_says_what_it_takes_and_leaves_nothing(tmp_path, make_run):
    lines = []
    result = train(make_run(), tmp_path / "run", dry_run=True, announce=lines.append)
    assert not result.finished
    assert not (tmp_path / "run").exists()
    assert "parameters" in lines[0] and "disk" in lines[0]


@pytest.mark.parametrize("group", [0, 1])
def test_logged_values_are_those_of_the_formulas(tmp_path, make_run, prepared, group):
    """Validation loss, load-balancing loss and z-loss of every checkpoint, recomputed in NumPy."""
    run = make_run(losses=dict(load_balancing_group=group), training=dict(num_steps=6))
    train(run, tmp_path)
    data = pipeline.open(prepared)
    (batch,) = pipeline.validation_batches(data, num_windows=11, batch_size=11)
    logged = {record["step"]: record for record in records(tmp_path)}
    for at, path in checkpoints.list_checkpoints(tmp_path):
        model, params = loading.load(path)
        out = model.apply(
            {"params": params}, batch["tokens"], token_mask=batch["token_mask"], return_routing=True
        )
        logits = np.asarray(out.logits, np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats = -np.take_along_axis(log_probs[:, :-1], batch["tokens"][:, 1:, None], 2)[..., 0]
        keep = batch["loss_mask"][:, 1:]
        record = logged[at]
        assert record["validation/loss"] == pytest.approx(nats[keep].mean(), rel=FP32_SUM)
        for number, domain in enumerate(data.info.domains):
            of_domain = keep & (batch["domains"][:, 1:] == number)
            expected = nats[of_domain].mean()
            assert record[f"validation/{domain}/loss"] == pytest.approx(expected, rel=FP32_SUM)
            num_bytes = data.token_bytes[batch["tokens"][:, 1:][of_domain]].sum()
            bits = nats[of_domain].sum() / np.log(2) / num_bytes
            assert record[f"validation/{domain}/bits_per_byte"] == pytest.approx(bits, rel=FP32_SUM)
        router_logits = np.asarray(out.routing.logits, np.float64)
        mask = batch["token_mask"]
        normaliser = np.log(np.exp(router_logits).sum(-1))
        z = (normaliser**2)[:, mask].mean()
        assert record["validation/router_z_loss"] == pytest.approx(z, rel=FP32_SUM)
        groups = np.array_split(np.arange(11), 11 // group) if group else [np.arange(11)]
        balance = [
            oracle_balance(
                router_logits[:, rows], np.asarray(out.routing.expert_ids)[:, rows], mask[rows]
            )
            for rows in groups
        ]
        expected = np.mean(balance)
        assert record["validation/load_balancing_loss"] == pytest.approx(expected, rel=FP32_SUM)


def oracle_balance(router_logits, expert_ids, mask):
    """Mean over layers of E · Σ f P (convention olmoe), by loops."""
    per_layer, num_experts = [], router_logits.shape[-1]
    for logits, ids in zip(router_logits, expert_ids, strict=True):
        probs = np.exp(logits[mask])
        probs = (probs / probs.sum(-1, keepdims=True)).mean(0)
        share = np.bincount(ids[mask].ravel(), minlength=num_experts) / ids[mask].size
        per_layer.append(num_experts * (share * probs).sum())
    return np.mean(per_layer)


def test_training_lowers_the_loss_and_records_what_a_user_looks_for(tmp_path, make_run):
    run = make_run(training=dict(num_steps=40), checkpoint=dict(interval=20))
    train(run, tmp_path)
    first, last = records(tmp_path)[0], records(tmp_path)[-1]
    assert last["validation/loss"] < 0.9 * first["validation/loss"]
    names = set(first) | {n for n in next(iter(metrics.read(tmp_path)))}
    assert names >= {
        "train/loss", "train/load_balancing_loss", "train/router_z_loss", "train/learning_rate",
        "train/gradient_norm", "router/layer_01/max_load", "router/layer_00/dead_experts",
        "router/layer_01/max_violation", "router/layer_01/entropy", "gradient_norm/router",
        "perf/tokens_per_second", "perf/mfu", "perf/checkpoint_seconds", "validation/bits_per_byte",
        "router/expert_backend",
    }  # fmt: skip
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["peak_flops_per_device"] > 0 and "matmul" in saved["peak_flops_source"]
    assert runs.read_config(tmp_path)[0] == run


def poisoned(monkeypatch, layer):
    """Makes every run start with an infinite weight in one layer's experts."""
    init = step.init_state

    def init_state(key, **kwargs):
        state = init(key, **kwargs)
        moe = state["params"]["layers"]["block_0"]["moe"]
        moe["w_down"] = moe["w_down"].at[layer].set(np.inf)
        return state

    monkeypatch.setattr(step, "init_state", init_state)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_layer(
    tmp_path, make_run, monkeypatch
):
    poisoned(monkeypatch, layer=1)
    with pytest.raises(FloatingPointError, match="step 0: .*from layer 1 on.*stop_on_nan"):
        train(make_run(), tmp_path)


def test_a_loss_that_is_not_finite_is_reported_where_the_run_goes_on(
    tmp_path, make_run, monkeypatch
):
    poisoned(monkeypatch, layer=0)
    lines = []
    run = make_run(training=dict(num_steps=2, stop_on_nan=False))
    assert train(run, tmp_path, announce=lines.append).finished
    assert any("step 0" in line and "layer 0" in line for line in lines)
    assert "layer 0" in records(tmp_path)[0]["train/problem"]


def test_a_run_starts_from_a_checkpoint_with_or_without_its_optimizer_state(tmp_path, make_run):
    train(make_run(training=dict(num_steps=3)), tmp_path / "first")
    newest = checkpoints.list_checkpoints(tmp_path / "first")[-1][1]
    params = checkpoints.read_params(newest)
    state_dir = next((tmp_path / "first" / "resume").glob("step3-*"))
    port.port(newest, tmp_path / "hf", to="huggingface", announce=lambda line: None)
    starts = {}
    for name, source, with_state in (
        ("fresh", newest, False),
        ("carried", state_dir, True),
        ("ported", tmp_path / "hf", False),
    ):
        fields = dict(
            num_steps=2, initial_checkpoint=str(source), initial_optimizer_state=with_state
        )
        run = make_run(training=fields, data=dict(start_step=3), checkpoint=dict(interval=1))
        train(run, tmp_path / name)
        kept = dict(checkpoints.list_checkpoints(tmp_path / name))
        jax.tree.map(np.testing.assert_array_equal, checkpoints.read_params(kept[0]), params)
        starts[name] = checkpoints.read_params(kept[1])
        assert (
            records(tmp_path / name)[0]["train/loss"]
            == records(tmp_path / "fresh")[0]["train/loss"]
        )
    jax.tree.map(np.testing.assert_array_equal, starts["fresh"], starts["ported"])
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), starts["fresh"], starts["carried"])
    assert not all(jax.tree.leaves(same))  # Adam's moments make another first update


def start(workdir, experiment):
    command = [
        sys.executable, "-m", "experiments.train", f"--config={experiment}", f"--workdir={workdir}",
    ]  # fmt: skip
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(tmp_path, make_run):
    """SIGKILL five times, whatever the process was doing: the last run equals one that was left
    alone."""
    run = make_run(training=dict(num_steps=60), checkpoint=dict(interval=1))
    experiment = tmp_path / "experiment.py"
    experiment.write_text(
        "import json\nfrom olmoe_jax import config\n"
        f"values = json.loads({json.dumps(dataclasses.asdict(run))!r})\n"
        "def get_config():\n    return config.to_flags(config.from_flags(config.Config, values))\n"
    )
    straight = start(tmp_path / "straight", experiment)
    output, _ = straight.communicate(timeout=300)
    assert straight.returncode == 0, output
    rng = np.random.default_rng(0)
    for _ in range(5):
        process, begun = (
            start(tmp_path / "killed", experiment),
            len(list_names(tmp_path / "killed")),
        )
        deadline = time.monotonic() + 120
        while len(list_names(tmp_path / "killed")) < begun + 5 and time.monotonic() < deadline:
            if process.poll() is not None:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
    last = start(tmp_path / "killed", experiment)
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0, output
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def list_names(workdir):
    folder = workdir / "checkpoints"
    return (
        sorted(p.name for p in folder.iterdir() if "tmp" not in p.name) if folder.is_dir() else []
    )


def test_a_run_resumes_on_another_mesh(tmp_path, make_run):
    """One device, then fsdp 2 × data 4: the same losses as on one device throughout."""
    run = make_run(training=dict(num_steps=6))
    train(run, tmp_path / "one")
    train(
        dataclasses.replace(run, training=dataclasses.replace(run.training, num_steps=3)),
        tmp_path / "two",
    )
    moved = dataclasses.replace(run, mesh=config.MeshConfig(data=4, fsdp=2))
    loop.train(moved, tmp_path / "two", announce=lambda line: None)
    losses = [
        [r["train/loss"] for r in records(w)[:6]] for w in (tmp_path / "one", tmp_path / "two")
    ]
    np.testing.assert_allclose(*losses, rtol=FP32_SUM)


@pytest.mark.parametrize(
    "model, group",
    [
        (dict(router="expert_choice"), 4),
        (dict(router="expert_choice"), 0),
        (dict(expert_backend="capacity"), 2),
        (dict(num_experts=0, moe_every=2), 0),
        (dict(moe_every=2, num_shared_experts=1, dtype="bfloat16", remat=True), 2),
    ],
    ids=["expert_choice_4", "expert_choice_all", "capacity", "dense", "every_second_bf16"],
)
def test_every_kind_of_model_trains_and_loads(tmp_path, make_run, model, group):
    run = make_run(
        model=model, losses=dict(load_balancing_group=group), training=dict(num_steps=2),
        checkpoint=dict(interval=2, dtype="bfloat16"), data=dict(validation_windows=8),
    )  # fmt: skip
    record = train(run, tmp_path).record
    assert np.isfinite(record["validation/loss"])
    loaded, params = loading.load(tmp_path)
    tokens = np.arange(8 * 5).reshape(8, 5)
    logits = loaded.apply({"params": params}, tokens).logits
    assert np.isfinite(np.asarray(logits, np.float32)).all()


def test_a_run_that_starts_from_bfloat16_trains_and_resumes_in_float32(tmp_path, make_run):
    half = make_run(training=dict(num_steps=1), checkpoint=dict(dtype="bfloat16"))
    train(half, tmp_path / "half")
    source = dict(initial_checkpoint=str(tmp_path / "half"))
    train(make_run(training=dict(num_steps=1, **source)), tmp_path / "next")
    train(make_run(training=dict(num_steps=3, **source)), tmp_path / "next")
    state = next((tmp_path / "next" / "resume").glob("step3-*"))
    assert {x.dtype for x in jax.tree.leaves(checkpoints.read_params(state))} == {
        np.dtype("float32")
    }
