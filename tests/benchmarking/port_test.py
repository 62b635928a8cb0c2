"""The suite `port`: random folders, what came back, rounds, refusals."""

import json
import os
import pathlib
import shutil
import subprocess

import numpy as np
import pytest

from experiments import app
from olmoe_jax import config, machine, presets
from olmoe_jax.benchmarking import options as options_lib
from olmoe_jax.benchmarking import port
from olmoe_jax.benchmarking import rounds as rounds_lib
from olmoe_jax.porting import configs, folders, safetensors

TINY = config.ModelConfig(
    vocab_size=53, max_length=13, num_layers=3, d_model=20, num_heads=2, num_kv_heads=2, d_ff=11,
    num_experts=7, num_experts_per_token=2,
)  # fmt: skip
TENSORS = 3 + 3 * (4 + 2 + 2 + 1 + 7 * 3)


@pytest.fixture
def folder(tmp_path):
    """(source, an equal copy, hashes): three files."""
    hashes = port.write_random_folder(tmp_path / "source", TINY, shards=3)
    subprocess.run(["cp", "-R", tmp_path / "source", tmp_path / "copy"], check=True)
    return tmp_path / "source", tmp_path / "copy", hashes


def test_the_released_model_has_its_true_shapes():
    shapes = port.tensor_shapes(presets.get("olmoe-1b-7b"))
    assert len(shapes) == 3219  # counted in the released model
    assert shapes["model.layers.15.mlp.experts.63.down_proj.weight"] == (2048, 1024)
    assert shapes["lm_head.weight"] == (50304, 2048)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 6_919_161_856


@pytest.mark.parametrize("shards", [1, 3])
def test_the_random_folder_opens_and_is_what_it_claims(tmp_path, shards):
    hashes = port.write_random_folder(tmp_path / "source", TINY, shards=shards)
    found = folders.open_folder(tmp_path / "source")
    sizes = [os.path.getsize(tmp_path / "source" / file) for file in found.files]
    assert len(sizes) == shards and max(sizes) < 2 * min(sizes)
    assert len(found.tensors) == TENSORS == len(set(hashes.values()))
    index = tmp_path / "source" / "model.safetensors.index.json"
    assert index.exists() == (shards > 1)
    if shards > 1:
        total = sum(found.read(name).nbytes for name in hashes)
        metadata = {"total_parameters": total // 2, "total_size": total}
        assert json.loads(index.read_text())["metadata"] == metadata
    for name, digest in hashes.items():
        values = found.read(name)
        assert values.dtype == "bfloat16" and port._sha256(values) == digest
        sizes = np.abs(values.astype(np.float32))
        assert sizes.min() >= 2**-7 and sizes.max() < 2**-5
        assert len(np.unique(values.view(np.uint16))) > 8
    family, read = configs.read(found.config, "config.json")
    assert (family.name, read.num_layers, read.num_experts) == ("olmoe", 3, 7)
    assert port.tensor_shapes(read) == {n: t.shape for n, t in found.tensors.items()}


def test_a_folder_that_came_back_whole_is_accepted(folder):
    assert port.compare_folders(*folder) == ([], [])


def test_a_flipped_bit_is_noticed_where_it_is(folder):
    source, copy, hashes = folder
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    located = folders.open_folder(copy).tensors[name]
    tensor = safetensors.read_header(copy / located.file).tensors[name]
    with open(copy / located.file, "r+b") as file:
        file.seek(tensor.stop - 1)
        last = file.read(1)[0]
        file.seek(tensor.stop - 1)
        file.write(bytes([last ^ 1]))
    assert port.compare_folders(source, copy, hashes) == ([name], [])


def test_what_is_missing_or_new_is_noticed(folder):
    source, copy, hashes = folder
    last = copy / "model-00003-of-00003.safetensors"
    gone = set(safetensors.read_header(last).tensors)
    last.unlink()
    header = safetensors.build_header({"new": ("float32", (2,))})
    with safetensors.Writer(copy / "model-00004-of-00004.safetensors", header):
        pass
    (copy / "config.json").write_text("{}")
    tensors, files = port.compare_folders(source, copy, hashes)
    assert tensors == sorted(gone | {"new"})
    assert files == ["config.json", last.name]


def test_another_header_is_noticed_though_the_tensors_are_equal(folder):
    source, copy, hashes = folder
    file = copy / "model-00001-of-00003.safetensors"
    data = file.read_bytes()
    assert data.count(b'"format":"pt"') == 1
    file.write_bytes(data.replace(b'"format":"pt"', b'"format":"np"'))
    assert port.compare_folders(source, copy, hashes) == ([], [file.name])


def test_both_ports_are_measured_and_all_comes_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rounds_lib, "FOREIGN_LIMIT", 1.0)
    result = port.measure_port(TINY, shards=2, rounds=1, scratch=tmp_path / "scratch")
    assert os.listdir(tmp_path / "scratch") == []
    assert (result["tensors"], result["files"]) == (TENSORS, 2)
    assert result["tensors_that_differ"] == result["files_that_differ"] == []
    rows = result["contestants"]
    assert list(rows) == ["copy", "port_to_orbax", "port_to_huggingface"]
    for name in ("port_to_orbax", "port_to_huggingface"):
        seconds = rows["copy"]["seconds"].median / rows[name]["seconds"].median
        assert result[f"ratio_{name}"] == pytest.approx(seconds)
        if pathlib.Path("/proc/stat").exists():
            assert 20 < result[f"peak_anonymous_mb_{name}"] < 2000
        phases = {n: s.median for n, s in rows[name]["phases"].items()}
        assert {"start-up and exit", "sync afterwards"} < phases.keys()
        assert 0 < phases["start-up and exit"] < rows[name]["seconds"].median
    written = json.loads(json.dumps(result, default=app._plain))
    assert written["contestants"]["copy"]["seconds"].keys() == {"median", "low", "high"}
    result |= {"preset": "tiny"}
    port.show_port(result)
    shown = capsys.readouterr().out
    assert f"all {TENSORS} tensors came back bit for bit" in shown and "port --to=orbax" in shown


@pytest.fixture
def fake_ports(monkeypatch):
    """Ports that copy; returns [(kind, input, output), …] as they happen."""
    ran = []

    def run_command(command, *, cwd=None):
        if command[0] != "sync":
            options = dict(x[2:].split("=", 1) for x in map(str, command) if x.startswith("--"))
            is_port = "to" in options
            places = (options["input"], options["output"]) if is_port else command[-2:]
            source, output = map(pathlib.Path, places)
            shutil.copytree(source, output)  # fails if `output` exists or `source` is gone
            ran.append((options.get("to", "cp"), source.name, sorted(os.listdir(source.parent))))
            if is_port:
                result = {"seconds": 0.3, "phases": {"read": len(ran)}}
                pathlib.Path(options["json"]).write_text(json.dumps({"results": [result]}))
        return rounds_lib.Sample(1.0, {"cpu_seconds": 0.1, "peak_anonymous_bytes": 7e6})

    monkeypatch.setattr(rounds_lib, "run_command", run_command)
    monkeypatch.setattr(rounds_lib, "FOREIGN_LIMIT", 1.0)  # tests may run beside anything
    return ran


def test_rounds_start_afresh_and_never_hold_more_than_three_models(tmp_path, fake_ports):
    result = port.measure_port(TINY, shards=1, rounds=2, scratch=tmp_path)
    assert [(kind, source) for kind, source, _ in fake_ports] == 2 * [
        ("cp", "source"), ("orbax", "source"), ("huggingface", "orbax"),
    ]  # fmt: skip
    models = [set(there) & {"source", "copy", "orbax", "returned"} for _, _, there in fake_ports]
    assert max(map(len, models)) == 3
    rows = result["contestants"]
    assert result["files"] == 1 and result["ratio_port_to_orbax"] == 1.0
    assert rows["copy"]["seconds"].median == 2.0  # with the sync
    assert rows["port_to_orbax"]["phases"]["start-up and exit"].median == pytest.approx(0.7)
    assert rows["port_to_orbax"]["phases"]["read"].low == 2
    assert rows["port_to_orbax"]["peak_anonymous_mb"] == 7


def test_a_port_that_changes_a_tensor_fails_the_run(tmp_path, fake_ports, monkeypatch, capsys):
    monkeypatch.setattr(port.presets, "get", lambda name, **changes: TINY)
    hashes = port.write_random_folder(tmp_path / "other", TINY, shards=1)
    wrong = dict(hashes, **{"model.norm.weight": "0"})
    options = options_lib.Options(shards=1, rounds=1, scratch=str(tmp_path / "scratch"))
    assert port.run(options)[1]
    write = port.write_random_folder
    monkeypatch.setattr(port, "write_random_folder", lambda *a, **k: write(*a, **k) and wrong)
    result, is_right = port.run(options)
    assert not is_right and result["tensors_that_differ"] == ["model.norm.weight"]
    assert "WRONG: 1 differ: model.norm.weight" in capsys.readouterr().out


def test_a_disk_too_small_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_disk", lambda path: 100)
    with pytest.raises(OSError, match="GB are needed .* name another --scratch"):
        port.measure_port(TINY, shards=1, rounds=1, scratch=tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rounds": 0}, "--rounds=0: must be at least 1"),
        ({"shards": 0}, "--shards=0: must be at least 1"),
        ({"preset": "olmoe"}, "no preset 'olmoe': did you mean"),
        ({"num_layers": 0}, "model.num_layers is 0"),
    ],
)
def test_wrong_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        port.run(options_lib.Options(**changes))
