import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax import checkpoints, config, sharding
from olmoe_jax.checkpoints import layout, manifest, writing

_overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 3, tree), donate_argnums=0)


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _silent(_):
    pass


def test_a_state_comes_back_bit_for_bit(tmp_path, make_config, make_state, to_host, same_bits):
    run = make_config(moe_every=2)
    state = make_state(run.model)
    with checkpoints.Checkpoints(tmp_path, run) as kept:
        assert kept.restore_state(_abstract(state)) is None
        assert kept.save_state(7, state)
    with checkpoints.Checkpoints(tmp_path, run) as kept:
        assert kept.state_steps() == [7] and kept.params_steps() == []
        restored = kept.restore_state(_abstract(state))
    assert same_bits(to_host(restored), to_host(state))
    assert [p.name for p in (tmp_path / "resume").iterdir()] == ["step7-tokens0K"]


@pytest.mark.parametrize("devices", [1, 4])
def test_donation_right_after_a_save_changes_nothing(
    devices, tmp_path, make_config, make_state, to_host, same_bits, monkeypatch
):
    run = make_config()
    mesh = sharding.make_mesh(config.MeshConfig(data=1, fsdp=devices), jax.devices()[:devices])
    state = make_state(run.model)
    state = jax.device_put(state, sharding.state_shardings(state, mesh))
    before = to_host(state)
    abstract, overwritten = _abstract(state), threading.Event()
    write = manifest._write

    def slow_write(path, args):  # hashes only when the arrays are overwritten
        assert overwritten.wait(60)
        write(path, args)

    monkeypatch.setattr(manifest, "_write", slow_write)
    with checkpoints.Checkpoints(tmp_path, run) as kept:
        kept.save_params(5, state["params"])
        kept.save_state(5, state)
        assert kept.params_steps() == []  # not complete yet
        for _ in range(3):
            state = _overwrite(state)
        jax.block_until_ready(state)
        overwritten.set()
        kept.wait()
        assert same_bits(to_host(kept.restore_state(abstract)), before)
    assert same_bits(to_host(checkpoints.read_params(tmp_path, verify=True)), before["params"])


def test_kept_parameters_lie_apart_per_layer(tmp_path, make_config, random_params):
    run = make_config(num_layers=12, moe_every=2)
    params = random_params(run.model)
    with checkpoints.Checkpoints(tmp_path, run) as kept:
        kept.save_params(10, params)
    ((step, path),) = checkpoints.list_checkpoints(tmp_path)
    assert (step, path.name) == (10, "step10-tokens0K")
    leaves = manifest.read(path)
    assert leaves["layers/11/moe/router"].shape == (8, 4)
    assert "layers/10/moe/router" not in leaves
    expected = layout.flatten(params)["layers/block_1/moe/router"][5]
    (piece,) = leaves["layers/11/moe/router"].pieces
    assert piece.sha256 == manifest.digest(np.asarray(expected))
    record = json.loads((path / "config.json").read_text())
    assert record["step"] == 10
    assert checkpoints.read_config(path) == run


def test_kept_parameters_are_cast_and_states_are_not(tmp_path, make_config, make_state, same_bits):
    run = make_config(checkpoint={"dtype": "bfloat16"})
    state = make_state(run.model)
    with checkpoints.Checkpoints(tmp_path, run) as kept:
        kept.save_params(1, state["params"])
        kept.save_state(1, state)
        assert same_bits(kept.restore_state(_abstract(state)), state)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state["params"])
    assert same_bits(checkpoints.read_params(tmp_path, verify=True), half)


def test_nan_payloads_and_infinities_survive(tmp_path, make_config, random_params, same_bits):
    run = make_config()
    bits = np.array([0x7FC00001, 0x7F800001, 0xFFC12345, 0x7F800000, 0x80000000, 1], np.uint32)
    params = random_params(run.model)
    scale = np.array(params["final_norm"]["scale"])
    scale[:6] = bits.view(np.float32)
    params["final_norm"]["scale"] = scale
    params = jax.device_put(params)
    assert (np.asarray(params["final_norm"]["scale"]).view(np.uint32)[:6] == bits).all()
    with checkpoints.Checkpoints(tmp_path, run) as kept:
        kept.save_params(1, params)
    assert same_bits(checkpoints.read_params(tmp_path, verify=True), params)


def test_newest_two_states_stay_and_those_asked_for(tmp_path, make_config, make_state):
    run = make_config(checkpoint={"full_state_at": (2,)})
    with checkpoints.Checkpoints(tmp_path, run) as kept:
        for step in (1, 2, 3, 4, 11):
            kept.save_state(step, make_state(run.model, step))
        kept.wait()
        assert kept.state_steps() == [2, 4, 11]
        assert int(kept.restore_state(_abstract(make_state(run.model)))["step"]) == 11
    assert len(list((tmp_path / "resume").iterdir())) == 3


def test_saving_a_step_again_is_skipped(tmp_path, make_config, make_state, to_host, same_bits):
    run = make_config()
    first, second = make_state(run.model, 1), make_state(run.model, 2)
    with checkpoints.Checkpoints(tmp_path, run) as kept:
        assert kept.save_params(3, first["params"]) and kept.save_state(3, first)
        assert not kept.save_params(3, second["params"]) and not kept.save_state(3, second)
        assert same_bits(to_host(kept.restore_state(_abstract(first))), to_host(first))
    with checkpoints.Checkpoints(tmp_path, run) as kept:
        assert not kept.save_params(3, second["params"])
    assert same_bits(checkpoints.read_params(tmp_path), first["params"])


def test_saving_compiles_once(tmp_path, make_config, random_params):
    run = make_config()
    with checkpoints.Checkpoints(tmp_path, run) as kept:
        kept.save_params(1, random_params(run.model))
        compiled = kept._compiled[1]
        for step in (2, 3):
            kept.save_params(step, random_params(run.model))
        assert kept._compiled[1] is compiled and compiled._cache_size() == 1


def test_leftovers_are_removed_and_reported(tmp_path, make_config):
    names = ["checkpoints/step4-tokens0K.orbax-checkpoint-tmp", "resume/step2-tokens0K.deleted"]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "data").write_text("x")
    lines = []
    checkpoints.Checkpoints(tmp_path, make_config(), report=lines.append).close()
    assert len(lines) == 2
    for name, line in zip(names, lines, strict=True):
        assert not (tmp_path / name).exists()
        assert str(tmp_path / name) in line


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError(
            'RESOURCE_EXHAUSTED: Error writing "d/1": [OS error 28: ENOSPC No space left on device]'
        ),
    ],
    ids=["python", "tensorstore"],
)
@pytest.mark.parametrize("surfaces_at", ["save", "wait", "close"])
def test_a_full_disk_surfaces_as_one_clear_error(
    error, surfaces_at, tmp_path, make_config, make_state, monkeypatch, same_bits, capfd, caplog
):
    run = make_config()
    state = make_state(run.model)
    kept = checkpoints.Checkpoints(tmp_path, run)
    kept.save_params(1, state["params"])
    kept.save_state(1, state)
    kept.wait()

    def full(path, args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_write", full)
        kept.save_state(2, state)
        with pytest.raises(OSError, match="no space left") as caught:
            if surfaces_at == "save":
                kept.save_state(3, state)
            else:
                getattr(kept, surfaces_at)()
    message = str(caught.value)
    assert "step2-tokens0K" in message and str(tmp_path / "resume") in message
    assert "\n" not in message and caught.value.errno == errno.ENOSPC
    if surfaces_at != "close":
        kept.save_state(3, state)  # the disk has room again
        kept.close()
    with checkpoints.Checkpoints(tmp_path, run, report=_silent) as kept:
        assert kept.state_steps() == ([1] if surfaces_at == "close" else [1, 3])
        assert same_bits(kept.restore_state(_abstract(state)), state)
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_an_error_of_the_loop_is_not_hidden_by_one_of_a_save(
    tmp_path, make_config, random_params, monkeypatch
):
    run, lines = make_config(), []

    def full(path, args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(manifest, "_write", full)
    with pytest.raises(KeyboardInterrupt):
        with checkpoints.Checkpoints(tmp_path, run, report=lines.append) as kept:
            kept.save_params(1, random_params(run.model))
            raise KeyboardInterrupt
    assert len(lines) == 1 and "no space left" in lines[0]


def test_nothing_is_printed(tmp_path, make_config, make_state, capfd, caplog):
    run = make_config()
    state = make_state(run.model)
    with checkpoints.Checkpoints(tmp_path, run) as kept:
        kept.save_params(1, state["params"])
        kept.save_state(1, state)
        kept.restore_state(_abstract(state))
    checkpoints.read_params(tmp_path, verify=True)
    assert capfd.readouterr() == ("", "") and not caplog.records


KILLED = textwrap.dedent(
    """
    import os, pathlib, signal, sys, threading, time

    os.environ["JAX_PLATFORMS"] = "cpu"
    workdir, moment = pathlib.Path(sys.argv[1]), sys.argv[2]
    ARRAYS = "*/step2-*tmp*/*/ocdbt.process_0/d/*"
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    from olmoe_jax import checkpoints, config

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def watch():  # dies as soon as some array data is on disk
        while not any(f.stat().st_size for f in workdir.glob(ARRAYS)):
            time.sleep(0.0005)
        die()

    run = config.from_flags(config.Config, __import__("json").loads(sys.argv[3]))
    state = jax.tree.map(
        lambda x: jax.numpy.full(x.shape, 2, x.dtype), checkpoints.abstract_params(run.model)
    )
    kept = checkpoints.Checkpoints(workdir, run)
    kept.save_params(1, state)
    kept.save_state(1, {"params": state})
    kept.wait()
    if moment == "before the arrays":
        ocp.PyTreeCheckpointHandler.async_save = die
    elif moment == "inside the arrays":
        ocp.CompositeCheckpointHandler.finalize = lambda *_: time.sleep(60)
        threading.Thread(target=watch, daemon=True).start()
    elif moment == "before the rename":
        finalize = ocp.CompositeCheckpointHandler.finalize
        ocp.CompositeCheckpointHandler.finalize = lambda *a: (finalize(*a), die())
    if sys.argv[4] == "params":
        kept.save_params(2, state)
    else:
        kept.save_state(2, {"params": state})
    kept.wait()
    """
)


@pytest.mark.parametrize(
    "moment, what",
    [
        ("inside the arrays", "params"),
        pytest.param("before the arrays", "state", marks=pytest.mark.slow),
        pytest.param("inside the arrays", "state", marks=pytest.mark.slow),
        pytest.param("before the rename", "params", marks=pytest.mark.slow),
        pytest.param("before the rename", "state", marks=pytest.mark.slow),
    ],
)
def test_a_kill_inside_a_save_leaves_the_earlier_ones_and_a_new_run_completes_it(
    moment, what, tmp_path, make_config, same_bits
):
    # Large enough for the write to take a while: the kill lands in the middle.
    run = make_config(num_layers=4, d_model=128, d_ff=64, num_experts=16)
    command = [sys.executable, "-c", KILLED, tmp_path, moment, config.to_json(run), what]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    folder = tmp_path / ("checkpoints" if what == "params" else "resume")
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["step1-tokens0K", "step2-tokens0K.orbax-checkpoint-tmp"]
    item = folder / names[1]
    written = [p for p in item.rglob("*") if p.is_file()]
    if moment == "before the rename":
        assert item / what / "manifest.ocdbt" in written
        assert item / "manifest" / "process_0.json" in written
    else:
        assert item / what / "manifest.ocdbt" not in written
        assert any("ocdbt.process_0/d/" in str(p) for p in written) == (moment[:6] == "inside")

    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [1]
    params = jax.tree.map(
        lambda x: jnp.full(x.shape, 2, x.dtype), checkpoints.abstract_params(run.model)
    )
    lines = []
    with checkpoints.Checkpoints(tmp_path, run, report=lines.append) as kept:
        assert len(lines) == 1 and "step2-tokens0K" in lines[0]
        assert kept.params_steps() == [1] and kept.state_steps() == [1]
        assert same_bits(kept.restore_state({"params": _abstract(params)})["params"], params)
        assert kept.save_params(2, params) and kept.save_state(2, {"params": params})
        kept.wait()
        assert kept.params_steps() == [1, 2] and kept.state_steps() == [1, 2]
    assert same_bits(checkpoints.read_params(tmp_path, verify=True), params)


PROCESS = textwrap.dedent(
    """
    import os, sys

    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_num_cpu_devices", 2)
    workdir, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
    import numpy as np
    from olmoe_jax import checkpoints, config, sharding

    run = config.from_flags(config.Config, __import__("json").loads(sys.argv[4]))
    mesh = sharding.make_mesh(config.MeshConfig(data=1, fsdp=4))
    abstract = checkpoints.abstract_params(run.model)
    shardings = sharding.parameter_shardings(abstract, mesh)

    def place(x, where):
        whole = np.arange(x.size, dtype=x.dtype).reshape(x.shape)
        return jax.make_array_from_callback(x.shape, where, lambda index: whole[index])

    state = {"params": jax.tree.map(place, abstract, shardings)}
    with checkpoints.Checkpoints(workdir, run) as kept:
        for step in (1, 2, 3):
            kept.save_params(step, state["params"])
            kept.save_state(step, state)
        kept.wait()
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        restored = kept.restore_state(wanted)
        read = checkpoints.read_params(workdir, run.model, shardings, verify=True)
    for x, y, z in zip(*map(jax.tree.leaves, (state, restored, read)), strict=True):
        assert x.sharding == y.sharding == z.sharding
        for a, b, c in zip(x.addressable_shards, y.addressable_shards, z.addressable_shards):
            assert (np.asarray(a.data) == np.asarray(b.data)).all()
            assert (np.asarray(a.data) == np.asarray(c.data)).all()
    """
)


@pytest.mark.slow
def test_two_processes_write_one_checkpoint(tmp_path, make_config, unused_port, same_bits):
    run = make_config()
    commands = [
        [sys.executable, "-c", PROCESS, tmp_path, str(unused_port), str(i), config.to_json(run)]
        for i in range(2)
    ]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    running = [subprocess.Popen(c, env=env, stderr=subprocess.PIPE, text=True) for c in commands]
    ended = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(ended)
    path = checkpoints.find(tmp_path)
    assert path.name == "step3-tokens0K"
    assert sorted(p.name for p in (path / "manifest").glob("*.json")) == [
        "process_0.json",
        "process_1.json",
    ]
    params = jax.tree.map(
        lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape),
        checkpoints.abstract_params(run.model),
    )
    assert same_bits(checkpoints.read_params(tmp_path, verify=True), params)
    assert len(list((tmp_path / "resume").iterdir())) == writing.KEPT_STATES
