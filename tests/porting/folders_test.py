import base64
import json
import os
import pickle

import numpy as np
import pytest

from olmoe_jax.porting import folders, olmo_names
from tests.porting import handmade

TORCH = "needs torch"
LIBRARY = "needs the safetensors library"
INDEX = "model.safetensors.index.json"
EXPERT = handmade.EXPERT


def _shards(path, parts=3):
    """A folder whose tensors are dealt round to shards: one expert's neighbours are elsewhere."""
    handmade.begin(path)
    files = [f"model-{i + 1:05d}-of-{parts:05d}.safetensors" for i in range(parts)]
    tensors = handmade.tensors()
    places = {name: files[i % parts] for i, name in enumerate(tensors)}
    for file in files:
        handmade.write(path / file, {n: a for n, a in tensors.items() if places[n] == file})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return path


def _change_index(path, change, file=INDEX):
    index = json.loads((path / file).read_text())
    change(index)
    (path / file).write_text(json.dumps(index))


def test_one_file(tmp_path):
    handmade.write(handmade.begin(tmp_path / "a") / "model.safetensors", handmade.tensors())
    folder = folders.open_folder(str(tmp_path / "a"))
    assert folder.format == "huggingface" == folders.is_folder(tmp_path / "a")
    assert folder.config == {"model_type": "olmoe"}
    assert folder.files == ("model.safetensors",) and folder.index is None
    text = folder.headers["model.safetensors"]
    assert text.endswith(b" ")  # its padding belongs to it
    content = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert content.startswith(len(text).to_bytes(8, "little") + text)
    assert set(located.file for located in folder.tensors.values()) == {"model.safetensors"}
    handmade.check(folder, handmade.tensors())


def test_shards(tmp_path):
    folder = folders.open_folder(_shards(tmp_path / "a"))
    assert folders.is_folder(tmp_path / "a") == "huggingface"
    assert folder.files == tuple(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    assert folder.index.encode() == (tmp_path / "a" / INDEX).read_bytes()
    assert list(folder.headers) == list(folder.files)
    assert folder.tensors[EXPERT.format(1)].file == folder.files[1]
    handmade.check(folder, handmade.tensors())


def test_a_folder_that_transformers_wrote(tmp_path):
    torch = pytest.importorskip("torch", reason=TORCH)
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.OlmoeConfig(
        vocab_size=19, hidden_size=8, intermediate_size=6, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_experts=3, num_experts_per_tok=2,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = transformers.OlmoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "a", max_shard_size="1KB")
    folder = folders.open_folder(tmp_path / "a")
    assert len(folder.files) > 1 and folder.config["vocab_size"] == 19
    located = folder.tensors["lm_head.weight"]
    assert (located.dtype, located.shape) == ("bfloat16", (19, 8))
    head = model.lm_head.weight.detach().view(torch.uint16).numpy()
    np.testing.assert_array_equal(folder.read("lm_head.weight").view("uint16"), head)


def test_small_files_travel_and_others_do_not(tmp_path):
    handmade.write(handmade.begin(tmp_path / "a") / "model.safetensors", handmade.tensors())
    carried = (
        "added_tokens.json chat_template.jinja generation_config.json merges.txt "
        "special_tokens_map.json tokenizer.json tokenizer.model tokenizer_config.json vocab.json "
        "chat_template.json qwen.tiktoken sentencepiece.bpe.model spiece.model spm.model "
        "tekken.json tokenizer.model.v3 vocab.txt"
    ).split()
    for name in (*carried, "README.md", "modeling.py", "training_args.bin", "model.json", "vocab"):
        (tmp_path / "a" / name).write_text(name)
    (tmp_path / "a" / "x.jinja").mkdir()
    folder = folders.open_folder(tmp_path / "a")
    assert folder.carried == tuple(sorted(["config.json", *carried]))


def _drop(*names):
    return lambda path: [os.remove(path / name) for name in names]


def _rename(file):
    def change(path):
        _change_index(path, lambda index: index["weight_map"].update({EXPERT.format(1): file}))

    return change


def _truncate(path):
    file = path / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


SECOND = "model-00002-of-00003.safetensors"
DAMAGES = {
    "no config": (_drop("config.json"), FileNotFoundError, "a: no config.json; it holds model-00"),
    "a broken config": (
        lambda path: (path / "config.json").write_text('{"model_type": '),
        ValueError,
        "config.json: broken JSON",
    ),
    "a config that is a list": (
        lambda path: (path / "config.json").write_text("[]"),
        ValueError,
        "config.json: a JSON list, expected an object",
    ),
    "a field twice": (
        lambda path: (path / "config.json").write_text('{"a": 1, "a": 2}'),
        ValueError,
        "config.json: .*'a' occurs twice",
    ),
    "a missing shard": (
        _drop(SECOND),
        FileNotFoundError,
        f"{INDEX}: 1 of the 3 parts that it names are missing .{SECOND}",
    ),
    "no index": (
        _drop(INDEX),
        FileNotFoundError,
        f"a: no weights; expected one of {INDEX}, model.safetensors, .*it holds .*{SECOND}",
    ),
    "an index without metadata": (
        lambda path: _change_index(path, lambda index: index.pop("metadata")),
        ValueError,
        f'{INDEX}: no "metadata"',
    ),
    "an index without a map": (
        lambda path: _change_index(path, lambda index: index.update(weight_map=[])),
        ValueError,
        f'{INDEX}: no "weight_map"',
    ),
    "a broken index": (
        lambda path: (path / INDEX).write_text("{"),
        ValueError,
        f"{INDEX}: broken JSON",
    ),
    "a tensor that no part has": (
        lambda path: _change_index(
            path, lambda index: index["weight_map"].update(extra="model-00001-of-00003.safetensors")
        ),
        ValueError,
        f"{INDEX}: 'extra' should be in model-00001.*, it is in no part",
    ),
    "a tensor in another part": (
        _rename("model-00001-of-00003.safetensors"),
        ValueError,
        f"{INDEX}: '{EXPERT.format(1)}' should be in model-00001.*, it is in {SECOND}",
    ),
    "a tensor that the index lacks": (
        lambda path: _change_index(
            path, lambda index: index["weight_map"].pop("model.norm.weight")
        ),
        ValueError,
        f"{INDEX}: does not name 1 tensors of its parts .'model.norm.weight' in {SECOND}",
    ),
    "a tensor twice": (
        lambda path: (
            os.remove(path / SECOND)
            or handmade.write(path / SECOND, {EXPERT.format(0): handmade.array("bfloat16", (5, 3))})
        ),
        ValueError,
        f"a: '{EXPERT.format(0)}' is there twice, in model-00001.* and in {SECOND}; remove one",
    ),
    "a part elsewhere": (_rename("../x.safetensors"), ValueError, "'../x.safetensors': must be"),
    "a part at the root": (_rename("/x.safetensors"), ValueError, "'/x.safetensors': must be"),
    "a part that is a number": (_rename(3), ValueError, "is in 3: must be"),
    "a pickled part": (_rename("x.bin"), ValueError, "'x.bin': must end in .safetensors"),
    "a part from before": (
        lambda path: (path / "model-00004-of-00004.safetensors").write_bytes(b""),
        ValueError,
        f"{INDEX}: does not name model-00004-of-00004.safetensors, .*remove what is old",
    ),
    "another whole model": (
        lambda path: handmade.write(path / "model.safetensors", handmade.tensors()),
        ValueError,
        f"{INDEX}: does not name model.safetensors",
    ),
    "a truncated part": (_truncate, ValueError, f"{SECOND}: truncated"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_refused(case, tmp_path):
    change, error, match = DAMAGES[case]
    change(_shards(tmp_path / "a"))
    with pytest.raises(error, match=match) as caught:
        folders.open_folder(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_unrelated_weights_beside_the_index_are_left_alone(tmp_path):
    path = _shards(tmp_path / "a")
    handmade.write(path / "consolidated.safetensors", {"other": handmade.array("float32", (3,))})
    handmade.check(folders.open_folder(path), handmade.tensors())


def test_a_path_that_is_no_folder_is_none(tmp_path):
    handmade.write(tmp_path / "model.safetensors", handmade.tensors())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.yaml").write_text("model: {}")
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "typo", tmp_path / "b"):
        assert folders.is_folder(path) is None
    (tmp_path / "config.json").write_text('{"config": {}}')
    assert folders.is_folder(tmp_path) is None
    (tmp_path / "b" / "config.json").write_text("{")  # broken, and no weights that it could be of
    assert folders.is_folder(tmp_path / "b") is None
    (tmp_path / "b" / "config.json").unlink()
    for path in (tmp_path / "typo", tmp_path / "model.safetensors"):
        with pytest.raises(FileNotFoundError, match=f"{path.name}: no such directory"):
            folders.open_folder(path)
    with pytest.raises(FileNotFoundError, match="b: no weights; expected one of model.safetensors"):
        folders.open_folder(tmp_path / "b")


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "a", "model_type": "b"}', "\xff"])
def test_a_broken_config_beside_weights_is_left_to_open_folder(text, tmp_path):
    handmade.write(handmade.begin(tmp_path / "a") / "model.safetensors", handmade.tensors())
    (tmp_path / "a" / "config.json").write_bytes(text.encode("latin-1"))
    assert folders.is_folder(tmp_path / "a") == "huggingface"
    with pytest.raises(ValueError, match="a/config.json: "):
        folders.open_folder(tmp_path / "a")


def _packed(up=12):
    """Packed experts and others; experts 3, f 6, d 5."""
    name = "model.layers.11.mlp.experts."
    packed = {
        name + "gate_up_proj": handmade.array("bfloat16", (3, up, 5)),
        name + "down_proj": handmade.array("bfloat16", (3, 5, 6)),
    }
    return packed | handmade.tensors(), name


@pytest.mark.parametrize("shards", [False, True])
def test_packed_experts_are_there_one_by_one(shards, tmp_path):
    (tensors, name), path = _packed(), handmade.begin(tmp_path / "a")
    if shards:
        files = {n: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, n in enumerate(tensors)}
        for file in sorted(set(files.values())):
            handmade.write(path / file, {n: a for n, a in tensors.items() if files[n] == file})
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    else:
        handmade.write(path / "model.safetensors", tensors)
    both, down = tensors.pop(name + "gate_up_proj"), tensors.pop(name + "down_proj")
    for e in range(3):
        tensors[f"{name}{e}.gate_proj.weight"] = both[e, :6]
        tensors[f"{name}{e}.up_proj.weight"] = both[e, 6:]
        tensors[f"{name}{e}.down_proj.weight"] = down[e]
    folder = folders.open_folder(path)
    handmade.check(folder, tensors)
    assert folder.headers == {}  # there is no way back to the packed files


def test_packed_experts_that_are_not_understood_stay(tmp_path):
    tensors, name = _packed(up=13)
    handmade.write(handmade.begin(tmp_path / "a") / "model.safetensors", tensors)
    found = folders.open_folder(tmp_path / "a").tensors
    assert name + "gate_up_proj" in found and name + "2.down_proj.weight" in found
    (tmp_path / "a" / "config.json").write_text('{"model_type": "llama"}')
    handmade.check(folders.open_folder(tmp_path / "a"), tensors)
    (tmp_path / "a" / "config.json").write_text('{"model_type": ["olmoe"]}')
    handmade.check(folders.open_folder(tmp_path / "a"), tensors)


def test_experts_both_packed_and_not_are_refused(tmp_path):
    tensors, name = _packed()
    tensors[name + "1.up_proj.weight"] = tensors[name + "gate_up_proj"][1, 6:]
    handmade.write(handmade.begin(tmp_path / "a") / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=f"a: '{name}1.up_proj.weight' is there twice"):
        folders.open_folder(tmp_path / "a")


@pytest.mark.parametrize("name", ["Olmoe", "FlexOlmo", "Qwen3Moe", "Mixtral"])
def test_transformers_packs_experts_in_this_order(name, tmp_path):
    pytest.importorskip("torch", reason=TORCH)
    transformers = pytest.importorskip("transformers", "5", reason="needs transformers 5")
    config = getattr(transformers, name + "Config")(
        vocab_size=19, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4,
        num_key_value_heads=1, num_local_experts=3, num_experts=3, num_experts_per_tok=2,
        eos_token_id=1, pad_token_id=0,
        **{"moe_intermediate_size" if name[0] == "Q" else "intermediate_size": 6},
    )  # fmt: skip
    model = getattr(transformers, name + "ForCausalLM")(config)
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", save_original_format=False)
    one_by_one, packed = (folders.open_folder(tmp_path / n) for n in "ab")
    assert one_by_one.headers and not packed.headers
    handmade.check(packed, {n: one_by_one.read(n) for n in one_by_one.tensors})


def _training(path, tensors, config="model:\n  d_model: 8\n"):
    path.mkdir()
    (path / "config.yaml").write_text(config)
    handmade.write(path / "model.safetensors", tensors)
    return path


def test_the_training_formats_names_are_decoded(tmp_path):
    tensors = {
        f"transformer.blocks.{i}.att_proj.weight": handmade.array("float32", (6, 2), i)
        for i in (0, 1)
    }
    path = _training(tmp_path / "a", {olmo_names.encode(n): a for n, a in tensors.items()})
    (path / "tokenizer.json").write_text("{}")
    folder = folders.open_folder(path)
    assert folder.format == "olmo" == folders.is_folder(path)
    assert folder.config == {"model": {"d_model": 8}}
    assert folder.carried == ("config.yaml", "tokenizer.json")
    assert folder.files == ("model.safetensors",)
    assert folder.headers["model.safetensors"].startswith(b'{"__metadata__":{"format":"pt"},"gASV')
    handmade.check(folder, tensors)


def test_two_spellings_of_one_name_are_refused(tmp_path):
    name = "transformer.wte.weight"
    nested = pickle.dumps((("transformer", "wte.weight"), False), protocol=4)
    other = base64.urlsafe_b64encode(nested).decode()
    array = handmade.array("float32", (3,))
    path = _training(tmp_path / "a", {olmo_names.encode(name): array, other: array})
    with pytest.raises(ValueError, match=f"a: '{name}' is there twice"):
        folders.open_folder(path)


def test_a_name_that_would_run_code_is_refused(tmp_path):
    trace = str(tmp_path / "trace")
    hostile = pickle.dumps(((handmade.Hostile(trace),), False))
    path = _training(
        tmp_path / "a",
        {base64.urlsafe_b64encode(hostile).decode(): handmade.array("float32", (3,))},
    )
    with pytest.raises(ValueError, match="a/model.safetensors: "):
        folders.open_folder(path)
    assert not os.path.exists(trace)


@pytest.mark.parametrize(
    "text, match",
    [
        ("model: [", "broken YAML"),
        ("- model", "a list, expected a mapping"),
        ("", "a NoneType, expected a mapping"),
        ("model: !!python/object/apply:os.mkdir ['TRACE']", "broken YAML: could not determine"),
    ],
)
def test_a_bad_config_of_the_training_format_is_refused(text, match, tmp_path):
    trace = tmp_path / "trace"
    path = _training(tmp_path / "a", {}, text.replace("TRACE", str(trace)))
    with pytest.raises(ValueError, match=f"config.yaml: {match}") as caught:
        folders.open_folder(path)
    assert "\n" not in str(caught.value) and not trace.exists()
