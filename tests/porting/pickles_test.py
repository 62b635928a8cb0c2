"""Pickled weights in folders: read bit for bit, and nothing in them runs."""

import json
import os
import pickle
import shlex
import sys
import unittest.mock

import pytest

from olmoe_jax.porting import folders
from tests.porting import handmade

TORCH = "needs torch"


def test_pickled_weights_are_read_through_torch(tmp_path):
    torch = pytest.importorskip("torch", reason=TORCH)
    path, tensors = handmade.begin(tmp_path / "a"), handmade.tensors()
    content = {name: handmade.to_torch(array) for name, array in tensors.items()}
    content["model.norm.weight"] = torch.nn.Parameter(content["model.norm.weight"])
    content["turned"] = handmade.to_torch(handmade.array("bfloat16", (5, 3))).T
    torch.save(content, path / "pytorch_model.bin")
    folder = folders.open_folder(path)
    assert folder.format == folders.is_folder(path) == "huggingface"
    assert folder.files == ("pytorch_model.bin",)
    assert folder.headers == {} and folder.index is None
    handmade.check(folder, tensors | {"turned": handmade.array("bfloat16", (5, 3)).T})


def test_pickled_shards_are_held_against_their_index(tmp_path):
    torch = pytest.importorskip("torch", reason=TORCH)
    path, places = handmade.begin(tmp_path / "a"), {}
    for i, (name, array) in enumerate(handmade.tensors().items()):
        places[name] = f"pytorch_model-0000{i + 1}-of-00006.bin"
        torch.save({name: handmade.to_torch(array)}, path / places[name])
    index = {"metadata": {}, "weight_map": places}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    folder = folders.open_folder(path)
    assert folder.index is None and len(folder.files) == 6
    handmade.check(folder, handmade.tensors())
    os.remove(path / "pytorch_model-00003-of-00006.bin")
    with pytest.raises(FileNotFoundError, match="1 of the 6 parts that it names are missing"):
        folders.open_folder(path)


def test_safetensors_are_preferred_to_pickles(tmp_path):
    path = handmade.begin(tmp_path / "a")
    handmade.write(path / "model.safetensors", handmade.tensors())
    (path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    handmade.check(folders.open_folder(path), handmade.tensors())


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt"])
def test_hostile_pickles_run_nothing(file, tmp_path):
    torch = pytest.importorskip("torch", reason=TORCH)
    path, trace = tmp_path / "a", str(tmp_path / "trace")
    if file == "model.pt":
        path.mkdir()
        (path / "config.yaml").write_text("model: {}\n")
    else:
        handmade.begin(path)
    hostile = {"a": handmade.Hostile(trace)}
    torch.save(hostile, path / file)
    with pytest.raises(ValueError, match=f"{file}: torch does not read it as weights") as caught:
        folders.open_folder(path)
    (path / file).write_bytes(pickle.dumps(hostile))
    with pytest.raises(ValueError, match=f"{file}: no zip archive"):
        folders.open_folder(path)
    assert "\n" not in str(caught.value)
    assert not os.path.exists(trace)
    pickle.loads(pickle.dumps(hostile))  # it would have left a trace
    assert os.path.exists(trace)


def test_pickles_of_an_old_torch_come_with_the_line_that_renews_them(tmp_path):
    torch = pytest.importorskip("torch", reason=TORCH)
    file = handmade.begin(tmp_path / "it's a") / "pytorch_model.bin"
    array = handmade.array("float32", (5, 3))
    torch.save({"a": handmade.to_torch(array)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="pytorch_model.bin: no zip archive") as error:
        folders.open_folder(file.parent)
    _, program, *words = shlex.split(str(error.value).partition("save it again: python ")[2])
    with unittest.mock.patch.object(sys, "argv", ["-c", *words]):
        exec(program, {})
    handmade.check(folders.open_folder(file.parent), {"a": array})


def test_pickles_of_something_else_are_refused(tmp_path):
    torch = pytest.importorskip("torch", reason=TORCH)
    file = handmade.begin(tmp_path / "a") / "pytorch_model.bin"
    for content, match in (
        ([torch.zeros(3)], "a list, expected a dict of tensors"),
        ({"model": {"a": torch.zeros(3)}}, "'model' is a dict, expected a tensor"),
        ({1: torch.zeros(3)}, "1 is a Tensor, expected a tensor"),
        ({"a": torch.zeros(3, device="meta")}, "'a' is a Tensor, expected a tensor"),
        ({"a": torch.eye(3).to_sparse()}, "'a' is a Tensor, expected a tensor"),
        ({"a": torch.zeros(3, dtype=torch.complex128)}, "'a' has dtype torch.complex128"),
    ):
        torch.save(content, file)
        with pytest.raises(ValueError, match=f"pytorch_model.bin: {match}"):
            folders.open_folder(tmp_path / "a")


def test_without_torch_pickled_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (handmade.begin(tmp_path / "a") / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pytorch_model.bin: pickled weights.*install torch"):
        folders.open_folder(tmp_path / "a")


def test_a_torch_with_the_hole_in_weights_only_is_refused(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason=TORCH)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    (handmade.begin(tmp_path / "a") / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="torch 2.5.1.cpu can be made to run code"):
        folders.open_folder(tmp_path / "a")


def test_the_training_formats_pickle_is_read_through_torch(tmp_path):
    torch = pytest.importorskip("torch", reason=TORCH)
    path = tmp_path / "a"
    path.mkdir()
    (path / "config.yaml").write_text("model: {}\n")
    array = handmade.array("float32", (5, 3))
    torch.save({"transformer.wte.weight": handmade.to_torch(array)}, path / "model.pt")
    folder = folders.open_folder(path)
    assert folder.format == "olmo" == folders.is_folder(path)
    handmade.check(folder, {"transformer.wte.weight": array})
