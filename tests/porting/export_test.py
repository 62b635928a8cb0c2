"""A model trained here, exported: transformers opens it and computes the same."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax import checkpoints, config, loading
from olmoe_jax.data import tokenizer as tokenizer_lib
from olmoe_jax.model import transformer
from olmoe_jax.porting import folders, port, safetensors, verification
from tests.porting import peers

MODEL = config.ModelConfig(
    vocab_size=281, vocab_multiple=16, num_layers=3, d_model=24, num_heads=3, num_kv_heads=3,
    d_ff=12, num_experts=7, num_experts_per_token=2, max_length=40, init_std=0.4,
)  # fmt: skip


def make_run(directory, model=MODEL):
    """A workdir with one checkpoint and its data's tokenizer, as training leaves it."""
    tokenizer = tokenizer_lib.train([f"document {n * 7919}" for n in range(97)], vocab_size=281)
    (directory / "data").mkdir(parents=True)
    (directory / "data" / "tokenizer.json").write_bytes(tokenizer.json)
    run = config.Config(
        model=model,
        data=config.DataConfig(sequence_length=16),
        training=config.TrainingConfig(batch_size=4),
    )
    init = jax.jit(transformer.Transformer(run.model).init)
    with checkpoints.Checkpoints(directory / "run", run) as kept:
        kept.save_params(20, init(jax.random.key(2), jnp.zeros((1, 3), jnp.int32))["params"])
    content = {"config": dataclasses.asdict(run), "data_path": str(directory / "data")}
    (directory / "run" / "config.json").write_text(json.dumps(content))
    return directory / "run"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export")
    lines = []
    run = make_run(directory)
    port.port(run, directory / "hf", to="huggingface", announce=lines.append)
    return run, directory / "hf", lines


def test_the_folder_has_what_a_released_one_has(exported, monkeypatch):
    run, folder, _ = exported
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "generation_config.json", "manifest", "model.safetensors",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert safetensors.read_header(folder / "model.safetensors").metadata == {"format": "pt"}
    values = json.loads((folder / "config.json").read_text())
    assert values["architectures"] == ["OlmoeForCausalLM"] and values["vocab_size"] == 288
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 10000.0
    assert values["torch_dtype"] == values["dtype"] == "float32"
    assert (values["eos_token_id"], values["pad_token_id"]) == (1, 0)
    monkeypatch.setattr("olmoe_jax.porting.targets.SHARD_BYTES", 60_000)
    port.port(run, folder.parent / "shards", to="huggingface", announce=lambda line: None)
    index = json.loads((folder.parent / "shards" / folders.INDEX).read_text())
    files = sorted(p.name for p in (folder.parent / "shards").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    whole, parts = folders.open_folder(folder), folders.open_folder(folder.parent / "shards")
    assert set(index["weight_map"]) == set(whole.tensors)
    assert index["metadata"]["total_size"] == sum(whole.read(n).nbytes for n in whole.tensors)
    for name in whole.tensors:
        assert whole.read(name).tobytes() == parts.read(name).tobytes()


@pytest.mark.parametrize("to", ["orbax", "olmo"])
def test_the_tokenizer_of_a_run_travels_along(exported, tmp_path, to):
    run, folder, _ = exported
    port.port(run, tmp_path / "there", to=to, announce=lambda line: None)
    port.port(tmp_path / "there", tmp_path / "hf", to="huggingface", announce=lambda line: None)
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    for name in names:
        assert (tmp_path / "hf" / name).read_bytes() == (folder / name).read_bytes(), name


def test_warnings_name_the_reader(exported):
    lines = exported[2]
    assert any("llama.cpp" in line and "tokenizer" in line for line in lines)
    assert not any("renormalise" in line for line in lines)


def test_transformers_computes_the_same_logits_and_tokens(exported):
    _, transformers = peers.libraries()
    run, folder, _ = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    model, params = loading.load(run)
    tokens = np.random.default_rng(0).integers(0, 281, (2, 19)).astype(np.int32)
    logits, router_logits = peers.run(theirs, tokens)
    out = model.apply({"params": params}, tokens, return_routing=True)
    for got, want in ((out.logits, logits), (out.routing.logits, router_logits)):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = tokenizer_lib.load(run.parent / "data")
    text = "document 12 and\nmore"
    assert tokenizer(text).input_ids == list(ours.encode_batch([text])[0])
    assert tokenizer.eos_token_id == ours.end_of_document and tokenizer.pad_token_id == 0


@pytest.mark.parametrize(
    "change, lacking",
    [
        ({"num_shared_experts": 1}, "num_shared_experts"),
        ({"router": "expert_choice"}, "router"),
        ({"num_layers": 4, "moe_every": 2}, "moe_every"),
        ({"router_scores": "sigmoid"}, "router_scores"),
    ],
)
def test_a_model_that_no_class_computes_is_refused(tmp_path, change, lacking):
    run = make_run(tmp_path, dataclasses.replace(MODEL, **change))
    with pytest.raises(ValueError, match=lacking):
        port.port(run, tmp_path / "hf", to="huggingface", announce=lambda line: None)
    assert not list(tmp_path.glob("hf*"))


@pytest.mark.parametrize("to", ["huggingface", "olmo"])
def test_router_biases_can_be_left_out_only_where_they_are_zero(tmp_path, to):
    run = make_run(tmp_path, dataclasses.replace(MODEL, router_bias=True))
    announced = {"announce": lambda line: None}
    port.port(run, tmp_path / "zero", to=to, **announced)
    _, plain = loading.load(tmp_path / "zero", dtype="float32")
    model, params = loading.load(run)
    assert not np.any(params["layers"]["block_0"]["moe"].pop("router_bias"))
    jax.tree.map(np.testing.assert_array_equal, plain, params)
    verification.verify(run, tmp_path / "zero", **announced)
    params["layers"]["block_0"]["moe"]["router_bias"] = jnp.zeros((3, 7)).at[1, 4].set(1e-3)
    with checkpoints.Checkpoints(run, checkpoints.read_config(checkpoints.find(run))) as kept:
        kept.save_params(30, params)
    with pytest.raises(ValueError, match="1 of its 3 router biases are not zero .layers/01/moe"):
        port.port(run, tmp_path / "moved", to=to, **announced)
    assert not list(tmp_path.glob("moved*"))
    port.port(run, tmp_path / "orbax", to="orbax", **announced)
    _, kept = loading.load(tmp_path / "orbax")
    assert float(kept["layers"]["block_0"]["moe"]["router_bias"][1, 4]) == np.float32(1e-3)
