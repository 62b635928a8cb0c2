"""Tests of what is said before a run starts, and of when it is refused."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from olmoe_jax import accounting, sharding
from olmoe_jax.checkpoints import naming
from olmoe_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    TrainingConfig,
)
from olmoe_jax.training import machine, preflight

PEAK = (1e9, "a test")
MODEL = ModelConfig(
    vocab_size=94, max_length=64, num_layers=2, d_model=20, num_heads=2, num_kv_heads=2, d_ff=14,
    num_experts=5, num_experts_per_token=3,
)  # fmt: skip
CONFIG = Config(
    model=MODEL,
    data=DataConfig(sequence_length=11),
    training=TrainingConfig(num_steps=23, batch_size=3),
    checkpoint=CheckpointConfig(interval=5, full_state_at=(10,), dtype="bfloat16"),
)
PARAMS = accounting.num_params(MODEL).total


@pytest.fixture
def mesh():
    return sharding.make_mesh(MeshConfig(), devices=jax.devices()[:1])


def planned(workdir, mesh, config=CONFIG, **changes):
    return dataclasses.replace(preflight.plan(config, workdir, mesh=mesh, peak=PEAK), **changes)


def finish(workdir, folder, *steps):
    for step in steps:
        (workdir / folder / naming.checkpoint_name(step, step * 33)).mkdir(parents=True)


def test_a_fresh_run_counts_every_checkpoint_and_state(tmp_path, mesh):
    plan = planned(tmp_path / "not" / "there", mesh)
    assert (plan.first_step, plan.num_steps, plan.tokens_per_step) == (0, 23, 33)
    assert (plan.num_checkpoints, plan.checkpoint_bytes) == (6, 2 * PARAMS)  # 0, 5, 10, 15, 20, 23
    assert (plan.num_states, plan.state_bytes) == (
        4,
        12 * PARAMS,
    )  # newest two, step 10, one being written
    assert plan.disk == 6 * 2 * PARAMS + 4 * 12 * PARAMS
    flops = 33 * accounting.flops_per_token(MODEL, 11).training
    assert plan.flops_per_step == flops
    assert plan.seconds == pytest.approx(23 * flops / 1e9 / preflight.ASSUMED_UTILISATION)
    assert plan.free_disk > 0
    assert not (tmp_path / "not").exists()


def test_a_resumed_run_counts_what_remains(tmp_path, mesh):
    finish(tmp_path, naming.CHECKPOINTS, 0, 5, 10, 15)
    finish(tmp_path, naming.RESUME, 10, 15)
    (tmp_path / naming.CHECKPOINTS / f"step20-tokens0K{naming.TEMPORARY}").mkdir()  # a killed save
    plan = planned(tmp_path, mesh)
    assert (plan.first_step, plan.num_checkpoints, plan.num_states) == (15, 2, 2)
    assert plan.seconds == pytest.approx(
        8 * plan.flops_per_step / 1e9 / preflight.ASSUMED_UTILISATION
    )
    assert "8 steps (from step 15)" in preflight.report(plan)


def test_a_finished_run_needs_nothing_more(tmp_path, mesh):
    finish(tmp_path, naming.RESUME, 20, 23)
    plan = planned(tmp_path, mesh)
    assert (plan.disk, plan.seconds) == (0, 0)
    preflight.check(dataclasses.replace(plan, free_disk=0))


def test_the_report_has_the_numbers(tmp_path, mesh):
    text = preflight.report(planned(tmp_path, mesh, free_disk=12_300_000))
    active = accounting.num_params(MODEL).active
    parts = (f"{PARAMS:,}", f"{active:,}", "23 steps of 33 tokens", "an estimate", "a test")
    for part in (*parts, "12.3 MB free", "6 checkpoints", "4 train states"):
        assert part in text


def test_a_disk_too_small_is_refused_unless_allowed(tmp_path, mesh):
    plan = planned(tmp_path, mesh)
    plan = dataclasses.replace(plan, free_disk=plan.disk)
    preflight.check(plan)
    plan = dataclasses.replace(plan, free_disk=plan.disk - 1)
    with pytest.raises(
        ValueError,
        match=r"6 checkpoints .* 4 train states .*config\.checkpoint\.interval.*--allow_full",
    ):
        preflight.check(plan)
    preflight.check(plan, allow_full_disk=True)


def test_devices_too_small_for_the_parameters_are_refused_in_any_case(tmp_path, mesh):
    plan = planned(tmp_path, mesh)
    fixed = plan.memory.state + plan.memory.gradients + plan.memory.weights
    plan = dataclasses.replace(plan, device_memory=fixed)  # too little for activations: only marked
    preflight.check(plan)
    assert "LIKELY TOO LITTLE" in preflight.report(plan)
    assert "LIKELY" not in preflight.report(
        dataclasses.replace(plan, device_memory=plan.memory.total)
    )
    with pytest.raises(
        ValueError, match=r"parameters, moments and gradients take .*config\.mesh\.fsdp"
    ):
        preflight.check(dataclasses.replace(plan, device_memory=fixed - 1), allow_full_disk=True)
    preflight.check(dataclasses.replace(plan, device_memory=None))


def test_the_peak_is_measured_if_not_given(tmp_path, mesh, monkeypatch):
    monkeypatch.setattr(machine, "measure_peak_flops", lambda dtype: (7.0, f"measured in {dtype}"))
    plan = preflight.plan(CONFIG, tmp_path, mesh=mesh)
    assert (plan.peak, plan.peak_source) == (7.0, "measured in float32")


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 4, 1, 1), (1, 1, 5, 1), (1, 2, 5, 2)]
)
def test_a_device_counts_its_share_of_the_parameters(sizes):
    mesh = jax.sharding.AbstractMesh(sizes, sharding.MESH_AXES)
    share = preflight._param_shards(CONFIG.model, mesh)
    _, fsdp, expert, tensor = sizes
    norms = accounting.num_params(MODEL).norms
    router = MODEL.num_layers * MODEL.d_model * MODEL.num_experts
    experts = MODEL.num_layers * MODEL.num_experts * 3 * MODEL.d_model * MODEL.d_ff
    rest = PARAMS - norms - router - experts
    mine = norms + router / fsdp + experts / (fsdp * expert * tensor) + rest / (fsdp * tensor)
    assert share == pytest.approx(PARAMS / mine)


def test_sizes_are_readable():
    assert [preflight.size(x) for x in (7, 1234, 12_345, 999_600, 99.96e9)] == [
        "7 B", "1.23 kB", "12.3 kB", "1,000 kB", "100 GB",
    ]  # fmt: skip
    assert preflight.si(math.prod([10.0] * 25)) + "FLOP" == "10 YFLOP"
    assert preflight.si(np.int64(7)) == "7 "
