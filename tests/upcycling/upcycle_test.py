"""From directory to directory: what is read, written and refused, and where the data goes on."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from olmoe_jax import checkpoints, config, loading, machine
from olmoe_jax.checkpoints import streamed
from olmoe_jax.porting import port, sources
from olmoe_jax.upcycling import recipe as recipe_lib
from olmoe_jax.upcycling import upcycle
from tests.porting import foreign
from tests.upcycling import dense

FP32 = 1e-5  # order of summation, and what "scaled" leaves: relative to the largest logit
PARTS = {"num_experts": 12, "granularity": 3, "num_experts_per_token": 6}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Workdir of a dense model."""
    workdir = tmp_path_factory.mktemp("dense") / "run"
    dense.write_run(workdir)
    return workdir


def test_every_kind_of_directory_is_an_input(run, tmp_path):
    llama = dense.change(qk_norm=False, init_cutoff=None)
    hf = foreign.write_folder(tmp_path / "hf", model=llama, dtype="float32", numbers=True)
    for to in ("orbax", "olmo"):
        port.port(hf, tmp_path / to, to=to, announce=dense.quiet)
    for path in (run, run / "checkpoints" / "step6-tokens0K", hf, tmp_path / "orbax",
                 tmp_path / "olmo"):  # fmt: skip
        out = tmp_path / f"moe of {path.name}"
        result = dense.make(path, out, method="normalized")
        assert sources.kind_of(out) == sources.ORBAX
        assert (result.position is None) == (path.parent == tmp_path)
        (_, old), (model, new) = loading.load(path), loading.load(out, verify=True)
        old, new = (tree["layers"]["block_0"] for tree in (old, new))
        assert model.config == result.config.model
        np.testing.assert_array_equal(new["moe"]["w_up"][:, 3], old["ffn"]["w_up"])
        np.testing.assert_array_equal(new["attention"]["key"], old["attention"]["key"])
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".partial")]


@pytest.mark.parametrize(
    ("fields", "settings", "family"),
    [
        ({"qk_norm": False}, {"method": "normalized"}, "mixtral"),
        ({"norm_position": "post"}, PARTS, "flex_olmo"),
    ],
)
def test_it_ports_where_a_class_computes_it(fields, settings, family, tmp_path):
    dense.write_run(tmp_path / "run", dense.change(**fields))
    dense.make(tmp_path / "run", tmp_path / "moe", **settings)
    port.port(tmp_path / "moe", tmp_path / "hf", to="huggingface", announce=dense.quiet)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == family
    (_, ours), (_, theirs) = (loading.load(tmp_path / name) for name in ("moe", "hf"))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), ours, theirs))


@pytest.mark.parametrize(
    ("fields", "settings", "lacking"),
    [
        ({"qk_norm": False}, {}, "qk_norm=False, not True"),
        ({"norm": "layernorm_nonparametric"}, {}, "norm='layernorm_nonparametric'"),
        ({}, {"shared_expert": True}, "num_shared_experts=1, not 0"),
    ],
)
def test_where_no_class_computes_it_porting_says_why(fields, settings, lacking, tmp_path):
    dense.write_run(tmp_path / "run", dense.change(**fields))
    dense.make(tmp_path / "run", tmp_path / "moe", **settings)
    with pytest.raises(ValueError, match=f"no class of transformers computes this .*{lacking}"):
        port.port(tmp_path / "moe", tmp_path / "hf", to="huggingface", announce=dense.quiet)


def test_a_hugging_face_folder_keeps_its_tokenizer_and_end_of_text(tmp_path):
    model = dense.change(qk_norm=False, init_cutoff=None)
    hf = foreign.write_folder(tmp_path / "hf", model=model, dtype="bfloat16", numbers=True)
    dense.make(hf, tmp_path / "moe", method="normalized")
    port.port(tmp_path / "moe", tmp_path / "back", to="huggingface", announce=dense.quiet)
    for name, content in foreign.FILES.items():
        assert (tmp_path / "back" / name).read_bytes() == content
    values = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (values["model_type"], values["eos_token_id"]) == ("mixtral", 3)
    assert values["torch_dtype"] == "bfloat16"


def test_transformers_computes_the_same_before_and_after(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = dense.change(qk_norm=False, init_cutoff=None, d_model=20)  # rows of 16 bytes for torch
    hf = foreign.write_folder(tmp_path / "hf", model=model, dtype="float32", numbers=True)
    dense.make(hf, tmp_path / "moe", method="normalized", **PARTS)
    port.port(tmp_path / "moe", tmp_path / "back", to="huggingface", announce=dense.quiet)
    with torch.no_grad():
        before, after = (
            transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32")(
                torch.tensor(dense.TOKENS)
            ).logits.numpy()
            for path in (hf, tmp_path / "back")
        )
    assert dense.difference(after, before) < FP32


@pytest.mark.parametrize("start_step", [0, 5])
def test_the_output_says_where_the_data_goes_on(start_step, tmp_path):
    run = dense.write_run(tmp_path / "run", step=6, start_step=start_step)
    content = {"config": dataclasses.asdict(run), "data_path": "data/prepared"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    result = dense.make(tmp_path / "run", tmp_path / "moe")
    at = result.position
    assert (at.step, at.start_step) == (6, 6 + start_step)
    assert (at.windows, at.tokens) == (4 * at.start_step, 4 * 13 * at.start_step)
    assert at.data_path == str((tmp_path / "run" / "data" / "prepared").resolve())
    new = upcycle.read_config(tmp_path / "moe")
    assert new.data == dataclasses.replace(run.data, path=at.data_path, start_step=at.start_step)
    assert new.model == result.config.model and new.optimizer == run.optimizer
    assert new.training == dataclasses.replace(
        run.training, initial_checkpoint=str(tmp_path / "moe")
    )
    assert f"--config.data.start_step={at.start_step}" in upcycle.train_flags(result)
    assert "--config.training.batch_size=4" in upcycle.train_flags(result)
    assert "--config.model.num_experts=4" in upcycle.train_flags(result)
    record = json.loads((tmp_path / "moe" / "config.json").read_text())["upcycled"]
    assert record["position"]["tokens"] == at.tokens and record["recipe"]["method"] == "reference"


def test_only_what_upcycling_wrote_is_continued(run, tmp_path):
    with pytest.raises(ValueError, match="was not written by experiments.upcycle"):
        upcycle.read_config(run)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        upcycle.read_config(tmp_path / "nothing")


def test_bad_input_is_one_line_and_leaves_nothing(run, tmp_path):
    moe, out = tmp_path / "moe", tmp_path / "out"
    dense.make(run, moe)
    olmo3 = foreign.write_folder(
        tmp_path / "olmo3", model=dense.change(qk_norm=False, init_cutoff=None)
    )
    (olmo3 / "config.json").write_text('{"model_type": "olmo3"}')
    biased = foreign.write_folder(
        tmp_path / "biased", model=dense.change(qk_norm=False, init_cutoff=None)
    )
    values = json.loads((biased / "config.json").read_text())
    (biased / "config.json").write_text(json.dumps(values | {"mlp_bias": True}))
    for source, settings, message in (
        (tmp_path / "nothing", {}, "no such directory"),
        (moe, {}, r"moe: is a MoE already \(num_experts=4\)"),
        (run, {"granularity": 5, "num_experts": 5, "num_experts_per_token": 5},
         "step6-tokens0K: its FFN has d_ff=12, .*granularity=5 .*divide it: 4 or 6"),
        (olmo3, {}, "olmo3 is not covered: sliding windows on three layers of four"),
        (biased, {}, "llama is not covered with mlp_bias=True"),
    ):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            dense.make(source, out, **settings)
        assert "\n" not in str(error.value)
    with pytest.raises(FileExistsError, match="moe: is there already; delete it or name another"):
        dense.make(run, moe)
    inside = run / "checkpoints" / "step6-tokens0K" / "out"
    with pytest.raises(ValueError, match="lies in the input"):
        dense.make(run, inside)
    with pytest.raises(ValueError, match="optimizer_state is 'keep': must be one of reset, carry"):
        recipe = recipe_lib.Recipe(num_experts=4, num_experts_per_token=2)
        upcycle.upcycle(run, out, recipe, optimizer_state="keep")
    assert not out.exists() and not (tmp_path / "out.partial").exists()


def test_a_full_disk_is_noticed_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_disk", lambda path: 10_000)
    with pytest.raises(OSError, match="GB are needed for the output but 0.0 GB are free"):
        dense.make(run, tmp_path / "moe")
    assert not list(tmp_path.iterdir())


def test_damage_of_the_input_is_not_copied(run, tmp_path):
    port.port(run, tmp_path / "plain", to="orbax", announce=dense.quiet)
    file = next((tmp_path / "plain" / "params").glob("layers.02.ffn.w_up/0.0"))
    data = bytearray(file.read_bytes())
    data[17] ^= 4
    file.write_bytes(bytes(data))
    with pytest.raises(checkpoints.DamagedError, match=r"1 of .* damaged \(layers/02/ffn/w_up\)"):
        dense.make(tmp_path / "plain", tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_interrupted_it_goes_on_with_what_it_has(run, tmp_path, monkeypatch):
    settings = {"diversify": "drop", "method": "normalized"}
    dense.make(run, tmp_path / "whole", **settings)
    write, calls = streamed.StreamedWriter.write, []

    def fail(self, *slab):
        calls.append(slab)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return write(self, *slab)

    monkeypatch.setattr(streamed.StreamedWriter, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        dense.make(run, tmp_path / "moe", **settings)
    assert not (tmp_path / "moe").exists()
    with pytest.raises(FileNotFoundError, match="port or upcycling that did not finish"):
        loading.load(tmp_path / "moe")
    with pytest.raises(ValueError, match="left by another job"):
        dense.make(run, tmp_path / "moe", seed=1, **settings)
    result = dense.make(run, tmp_path / "moe", **settings)
    assert result.bytes_kept > 0
    assert port.table(tmp_path / "moe") == port.table(tmp_path / "whole")


@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_a_dense_run_without_balancing_is_pointed_out(weight, tmp_path):
    losses = config.LossesConfig(load_balancing_weight=weight)
    dense.write_run(tmp_path / "run", losses=losses)
    result = dense.make(tmp_path / "run", tmp_path / "moe")
    noted = any("load_balancing_weight=0" in line for line in result.warnings)
    assert noted == (weight == 0)
