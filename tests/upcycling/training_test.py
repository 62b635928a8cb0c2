"""An upcycled model keeps training: its copies part, its data goes on, its moments are there."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax import checkpoints, config
from olmoe_jax.checkpoints import layout, naming, streamed
from olmoe_jax.data import preparation, provenance
from olmoe_jax.model import transformer
from olmoe_jax.porting import port
from olmoe_jax.training import loop, runs, step
from olmoe_jax.upcycling import recipe as recipe_lib
from olmoe_jax.upcycling import upcycle
from tests.upcycling import dense

FP32_SUM = 1e-5  # order of summation, relative to the largest gradient
LENGTH = dense.MODEL.max_length
BATCH = {
    "tokens": np.random.default_rng(1).integers(0, dense.MODEL.vocab_size, (16, LENGTH)),
    "token_mask": np.ones((16, LENGTH), bool),
    "loss_mask": np.ones((16, LENGTH), bool),
}


def make_run(model):
    return config.Config(
        model=model,
        losses=config.LossesConfig(load_balancing_weight=0.0, router_z_weight=0.0),
        data=config.DataConfig(sequence_length=LENGTH),
        training=config.TrainingConfig(batch_size=16),
    )


@functools.cache
def compiled(run):
    model = transformer.Transformer(run.model)
    return jax.jit(functools.partial(step.loss_and_gradient, model=model, config=run))


def gradient(model, params):
    """The cross entropy's gradient of the MoE layers, as NumPy arrays [layers, …]."""
    grads, _ = compiled(make_run(model))(params, BATCH)
    return jax.device_get(grads["layers"]["block_0"]["moe"])


def apart(arrays):
    """[pairs]: the difference of each pair of experts, relative to the larger one.

    Args:
      arrays: [layers, experts, …].
    """
    experts = np.moveaxis(arrays, 1, 0).reshape(arrays.shape[1], -1)
    size = np.linalg.norm(experts, axis=1)
    return np.array([
        np.linalg.norm(a - b) / max(size.max(), 1e-30)
        for i, a in enumerate(experts) for b in experts[:i]
    ])  # fmt: skip


@pytest.mark.parametrize("method", recipe_lib.METHODS)
def test_the_gradient_tells_copies_apart(method):
    _, model, params = dense.upcycled(dense.MODEL, method=method)
    for name in ("w_gate", "w_up", "w_down"):
        assert apart(np.asarray(params["layers"]["block_0"]["moe"][name])).max() == 0
        assert apart(gradient(model, params)[name]).min() > 0.1


def test_equal_routers_never_tell_copies_apart():
    """A router of ones, which the reference tried: the k first experts get all tokens, and one
    gradient."""
    _, model, params = dense.upcycled(dense.MODEL)
    moe = params["layers"]["block_0"]["moe"]
    moe["router"] = jnp.ones_like(moe["router"])
    grads = gradient(model, params)
    for name in ("w_gate", "w_up", "w_down"):
        assert apart(grads[name][:, :2]).max() < FP32_SUM
        assert not grads[name][:, 2:].any() and grads[name][:, :2].any()


def test_normalized_weights_of_equal_copies_teach_the_router_nothing():
    _, model, params = dense.upcycled(dense.MODEL, method="normalized")
    grads = gradient(model, params)
    assert np.abs(grads["router"]).max() < FP32_SUM * np.abs(grads["w_up"]).max()
    for method in ("reference", "scaled"):
        _, raw, params = dense.upcycled(dense.MODEL, method=method)
        grads = gradient(raw, params)
        assert np.abs(grads["router"]).max() > 1e-2 * np.abs(grads["w_up"]).max()


@pytest.mark.parametrize("method", recipe_lib.METHODS)
def test_it_keeps_training_and_the_copies_part(method):
    _, model, params = dense.upcycled(dense.MODEL, method=method)
    losses = []
    for _ in range(9):
        grads, parts = compiled(make_run(model))(params, BATCH)
        losses.append(float(parts.cross_entropy))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert losses[-1] < losses[0] - 0.1
    after = params["layers"]["block_0"]["moe"]
    for name in ("w_gate", "w_up", "w_down"):
        assert apart(np.asarray(after[name])).min() > 1e-3


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    """Config of a dense run on a small corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"id": str(i), "text": f"{i * 7919} " * 30}) for i in range(90)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    preparation.prepare(
        [str(folder / "corpus.jsonl")], folder / "data", sequence_length=LENGTH, vocab_size=280,
        validation_fraction=0.1, announce=dense.quiet,
    )  # fmt: skip
    return config.Config(
        model=dense.change(vocab_size=280, num_layers=2),
        data=config.DataConfig(
            path=str(folder / "data"), sequence_length=LENGTH, validation_windows=4
        ),
        optimizer=config.OptimizerConfig(learning_rate=3e-3, decay_tokens=10**5),
        training=config.TrainingConfig(num_steps=6, batch_size=4, seed=5),
        checkpoint=config.CheckpointConfig(interval=3),
    )


def write_config(workdir, run):
    """config.json of a run, as the loop writes it."""
    data = runs.open_data(run, workdir, dense.quiet)
    runs.write_config(workdir, run, data=data, peak=(1.0, "none"))


@pytest.fixture(scope="module")
def trained(dense_run, tmp_path_factory):
    """Workdir of that run with the checkpoints and states of steps 3 and 6, of random numbers."""
    workdir, rng = tmp_path_factory.mktemp("trained") / "run", np.random.default_rng(0)
    abstract = jax.eval_shape(
        functools.partial(step.init_state, config=dense_run), jax.random.key(0)
    )
    with checkpoints.Checkpoints(workdir, dense_run, report=dense.quiet) as saver:
        for number in (3, 6):
            state = jax.tree.map(
                lambda x, number=number: jnp.asarray(rng.random(x.shape) + number, x.dtype),
                abstract,
            )
            saver.save_params(number, state["params"])
            saver.save_state(number, state)
    write_config(workdir, dense_run)
    return workdir


def carry(source, output, **settings):
    """Upcycles with the optimizer's state."""
    numbers = {"num_experts": 4, "num_experts_per_token": 2} | settings
    recipe = recipe_lib.Recipe(**numbers)
    return upcycle.upcycle(
        source, output, recipe, optimizer_state="carry", announce=dense.quiet
    )  # fmt: skip


def windows(workdir, steps):
    return [provenance.step_contents(workdir, s).windows for s in steps]


def test_the_data_goes_on_where_the_dense_run_stopped(trained, tmp_path):
    dense.make(trained, tmp_path / "moe")
    write_config(tmp_path / "run", upcycle.read_config(tmp_path / "moe"))
    old, new = windows(trained, range(6)), windows(tmp_path / "run", range(3))
    assert new == windows(trained, range(6, 9))
    seen = [window for one in old + new for window in one]
    assert len(set(seen)) == len(seen) == 9 * 4
    contents = provenance.step_contents(tmp_path / "run", 0), provenance.step_contents(trained, 6)
    np.testing.assert_array_equal(*(c.batch["tokens"] for c in contents))
    assert contents[0].rows == contents[1].rows


@pytest.mark.slow  # trains twice
@pytest.mark.parametrize("optimizer_state", ["reset", "carry"])
def test_the_new_run_begins_with_the_loss_of_the_old_one(optimizer_state, dense_run, tmp_path):
    devices, settings = jax.devices()[:1], {"method": "normalized", "granularity": 2}
    loop.train(dense_run, tmp_path / "dense", devices=devices, announce=dense.quiet)
    upcycler = carry if optimizer_state == "carry" else dense.make
    upcycler(tmp_path / "dense", tmp_path / "moe", **settings)
    run = upcycle.read_config(tmp_path / "moe")
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, num_steps=3))
    lines = []
    result = loop.train(run, tmp_path / "run", devices=devices, announce=lines.append)
    assert result.finished and any("started from" in line for line in lines)
    before, after = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("dense", "run")
    )
    assert abs(after[0]["validation/loss"] - before[-1]["validation/loss"]) < 1e-5
    assert windows(tmp_path / "run", range(3)) == windows(tmp_path / "dense", range(6, 9))


def read_state(path, model):
    """A state's leaves by name, as the trainer reads them."""
    run = make_run(model)
    abstract = jax.eval_shape(
        functools.partial(step.init_state, config=run), jax.random.key(0)
    )  # fmt: skip
    return layout.flatten(jax.device_get(checkpoints.read_state(path, abstract, model)))


def test_moments_are_carried_and_new_weights_have_none(trained, tmp_path):
    source = naming.list_complete(trained / "resume")[-1][1]
    result = carry(source, tmp_path / "moe", method="scaled", granularity=2, moe_every=1)
    old = read_state(source, checkpoints.read_config(source).model)
    new = read_state(result.state, result.config.model)
    assert (int(new["step"]), int(new["opt_state/0/count"])) == (0, 6)
    _, params = (None, checkpoints.read_params(tmp_path / "moe"))
    for name, array in layout.flatten(jax.device_get(params)).items():
        np.testing.assert_array_equal(new[f"params/{name}"], array)
    for moment in ("opt_state/0/mu", "opt_state/0/nu"):
        moe, ffn = f"{moment}/layers/block_0/moe", f"{moment}/layers/block_0/ffn"
        assert not new[f"{moe}/router"].any()
        np.testing.assert_array_equal(new[f"{moe}/w_up"][:, 3], old[f"{ffn}/w_up"][:, :, 6:])
        np.testing.assert_array_equal(new[f"{moe}/w_down"][:, 2], old[f"{ffn}/w_down"][:, :6])
        for same in ("embedding", "layers/block_0/attention/query"):
            np.testing.assert_array_equal(new[f"{moment}/{same}"], old[f"{moment}/{same}"])
            assert old[f"{moment}/{same}"].any()


def test_the_moments_carried_are_those_of_interleaved_layers(trained, tmp_path):
    result = carry(trained, tmp_path / "moe", moe_every=2)
    old = read_state(naming.list_complete(trained / "resume")[-1][1], dense.change(
        vocab_size=280, num_layers=2))  # fmt: skip
    new = read_state(result.state, result.config.model)
    for row, block in enumerate(("block_0/ffn/w_up", "block_1/moe/w_up")):
        got = new[f"opt_state/0/nu/layers/{block}"][0]
        want = old["opt_state/0/nu/layers/block_0/ffn/w_up"][row]
        np.testing.assert_array_equal(got if row == 0 else got[2], want)


def test_without_a_state_there_is_nothing_to_carry(trained, tmp_path):
    for path in (trained / "checkpoints" / "step3-tokens0K", tmp_path / "plain"):
        if not path.exists():
            port.port(trained, path, to="orbax", announce=dense.quiet)
        with pytest.raises(ValueError, match="holds no optimizer state: .*resume/"):
            carry(path, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_a_state_without_carrying_is_a_model_like_any_other(trained, tmp_path):
    source = naming.list_complete(trained / "resume")[0][1]
    result = dense.make(source, tmp_path / "moe")
    assert result.position.step == 3 and result.state is None
    assert not (tmp_path / "moe" / "resume").exists()
    assert (tmp_path / "moe" / "source" / "tokenizer.json").exists()


def test_a_carried_state_that_was_interrupted_goes_on(trained, tmp_path, monkeypatch):
    carry(trained, tmp_path / "whole")
    write, calls = streamed.StreamedWriter.write, []

    def fail(self, *slab):
        calls.append(slab)
        if len(calls) == 60:
            raise KeyboardInterrupt
        return write(self, *slab)

    monkeypatch.setattr(streamed.StreamedWriter, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        carry(trained, tmp_path / "moe")
    assert not (tmp_path / "moe").exists() and list(tmp_path.glob("moe.partial/resume/*.partial"))
    before = len(calls)
    result = carry(trained, tmp_path / "moe")
    assert len(calls) - before < before
    whole, again = (f"{tmp_path}/{name}/{upcycle.STATE}" for name in ("whole", "moe"))
    assert result.state == again
    got, want = (read_state(path, result.config.model) for path in (again, whole))
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_a_state_that_is_whole_is_kept_when_the_rest_is_not(trained, tmp_path, monkeypatch):
    finish = streamed.StreamedWriter.finish

    def fail(self):
        if self._item == "params":
            raise KeyboardInterrupt
        finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(streamed.StreamedWriter, "finish", fail)
        with pytest.raises(KeyboardInterrupt):
            carry(trained, tmp_path / "moe")
    monkeypatch.setattr(streamed.StreamedWriter, "write", None)  # nothing is written again
    result = carry(trained, tmp_path / "moe")
    assert "opt_state/0/count" in read_state(result.state, result.config.model)
