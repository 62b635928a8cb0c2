"""Round trips, interruptions and refusals of a port, on tiny folders that need no other library."""

import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest

import olmoe_jax
from olmoe_jax import checkpoints, machine
from olmoe_jax.porting import folders, port, safetensors, sources, targets
from tests.porting import foreign


def quiet(*_):
    """In the place of `announce`."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_there_and_back_every_file_is_the_same(tmp_path, dtype, shards):
    source = foreign.write_folder(tmp_path / "in", dtype=dtype, shards=shards)
    port.port(source, tmp_path / "orbax", to="orbax", announce=quiet)
    result = port.port(tmp_path / "orbax", tmp_path / "out", to="huggingface", announce=quiet)
    assert foreign.contents(tmp_path / "out") == foreign.contents(source)
    assert any("NaN" in line for line in result.warnings)
    assert result.tensors == 3 + 3 * (2 + 4 + 2 + 1 + 3 * 5)


def test_training_format_there_and_back_every_file_is_the_same(tmp_path):
    source = foreign.write_folder(tmp_path / "in", shards=1)
    port.port(source, tmp_path / "olmo", to="olmo", announce=quiet)
    port.port(tmp_path / "olmo", tmp_path / "orbax", to="orbax", announce=quiet)
    port.port(tmp_path / "orbax", tmp_path / "olmo2", to="olmo", announce=quiet)
    assert foreign.contents(tmp_path / "olmo2") == foreign.contents(tmp_path / "olmo")
    port.port(tmp_path / "olmo2", tmp_path / "back", to="huggingface", announce=quiet)
    before, after = folders.open_folder(source), folders.open_folder(tmp_path / "back")
    assert set(before.tensors) == set(after.tensors)
    for name in before.tensors:
        assert before.read(name).tobytes() == after.read(name).tobytes(), name


def test_ported_weights_load_onto_a_mesh_as_from_the_folder(tmp_path):
    model = olmoe_jax.ModelConfig(
        vocab_size=64, max_length=19, num_layers=2, d_model=16, num_heads=4, num_kv_heads=4,
        d_ff=8, num_experts=4, num_experts_per_token=2,
    )  # fmt: skip
    source = foreign.write_folder(tmp_path / "in", model=model, dtype="float32")
    port.port(source, tmp_path / "orbax", to="orbax", announce=quiet)
    devices = np.array(jax.devices()).reshape(1, 2, 2, 2)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "expert", "tensor"))
    _, plain = olmoe_jax.load(source)
    for path in (source, tmp_path / "orbax"):
        _, params = olmoe_jax.load(path, sharding=mesh)
        for (place, a), b in zip(
            jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(params), strict=True
        ):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), place
        gate = params["layers"]["block_0"]["moe"]["w_gate"]
        assert {s.data.shape for s in gate.addressable_shards} == {(2, 2, 8, 4)}


def test_dtype_casts_and_says_so(tmp_path):
    source = foreign.write_folder(tmp_path / "in", dtype="float32", shards=1)
    lines = []
    port.port(source, tmp_path / "hf", to="huggingface", dtype="bfloat16", announce=lines.append)
    assert any("float32 to bfloat16" in line and "rounds" in line for line in lines)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    before, after = folders.open_folder(source), folders.open_folder(tmp_path / "hf")
    for name in before.tensors:
        with np.errstate(invalid="ignore", over="ignore"):
            want = np.asarray(before.read(name)).astype(ml_dtypes.bfloat16)
        got = np.asarray(after.read(name))
        same = got.view(np.uint16) == want.view(np.uint16)
        assert (same | np.isnan(want)).all() and (np.isnan(got) == np.isnan(want)).all(), name


def test_a_cast_on_the_way_in_is_in_the_config_on_the_way_out(tmp_path):
    source = foreign.write_folder(tmp_path / "in", dtype="float32", shards=1, numbers=True)
    port.port(source, tmp_path / "half", to="orbax", dtype="bfloat16", announce=quiet)
    port.port(tmp_path / "half", tmp_path / "copy", to="orbax", announce=quiet)
    port.port(tmp_path / "copy", tmp_path / "out", to="huggingface", announce=quiet)
    folder = folders.open_folder(tmp_path / "out")
    assert {located.dtype for located in folder.tensors.values()} == {"bfloat16"}
    assert folder.config["torch_dtype"] == folder.config["dtype"] == "bfloat16"


def test_revisions_become_the_checkpoints_of_a_run(tmp_path):
    names = ["step5000-tokens20B", "step10000-tokens41B"]
    for seed, name in enumerate(names):
        foreign.write_folder(tmp_path / "suite" / name, seed=seed)
    found = port.pairs(tmp_path / "suite", tmp_path / "run", to="orbax")
    assert [pathlib.Path(target).name for _, target in found] == names
    for source, target in found:
        port.port(source, target, to="orbax", announce=quiet)
    assert [s for s, _ in checkpoints.list_checkpoints(tmp_path / "run")] == [5000, 10000]
    _, params = olmoe_jax.load(tmp_path / "run")
    _, last = olmoe_jax.load(tmp_path / "suite" / names[1])
    assert np.asarray(params["embedding"]).tobytes() == np.asarray(last["embedding"]).tobytes()


@pytest.mark.parametrize("to", port.TO)
def test_an_interrupted_port_goes_on_and_looks_unfinished(tmp_path, monkeypatch, to):
    source = foreign.write_folder(tmp_path / "in")
    port.port(source, tmp_path / "whole", to=to, announce=quiet)
    target = targets.Orbax if to == "orbax" else targets.Foreign
    write, written = target.write, []

    def die_at_the_tenth(self, name, start, array):
        if len(written) == 10:
            raise KeyboardInterrupt
        write(self, name, start, array)
        written.append(name)

    with monkeypatch.context() as patch:
        patch.setattr(target, "write", die_at_the_tenth)
        patch.setattr(port, "WORKERS", 1)
        with pytest.raises(KeyboardInterrupt):
            port.port(source, tmp_path / "out", to=to, announce=quiet)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError, match="did not finish"):
        olmoe_jax.load(tmp_path / "out.partial")
    result = port.port(source, tmp_path / "out", to=to, announce=quiet)
    assert result.bytes_kept > 0
    assert not (tmp_path / "out.partial").exists()
    got, want = foreign.contents(tmp_path / "out"), foreign.contents(tmp_path / "whole")
    assert got == want


@pytest.mark.parametrize("to", port.TO)
def test_verify_on_loading_finds_a_flipped_bit(tmp_path, to):
    source = foreign.write_folder(tmp_path / "in")
    with pytest.raises(ValueError, match="nothing to verify against"):
        olmoe_jax.load(source, verify=True)
    port.port(source, tmp_path / "out", to=to, announce=quiet)
    olmoe_jax.load(tmp_path / "out", verify=True)
    weights = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    weights = [p for p in weights if ".json" not in p.name and p.name[0] not in "._"]
    big = max(weights, key=lambda p: p.stat().st_size)
    data = bytearray(big.read_bytes())
    data[-5] ^= 4
    big.write_bytes(data)
    with pytest.raises(checkpoints.DamagedError, match="damaged"):
        olmoe_jax.load(tmp_path / "out", verify=True)


def test_nan_is_named_and_strict_refuses_it_before_anything_is_written(tmp_path):
    source = foreign.write_folder(tmp_path / "in")
    with pytest.raises(
        ValueError, match=r"model\.embed_tokens\.weight in model-0000. holds NaN|in"
    ):
        port.port(source, tmp_path / "out", to="orbax", strict=True, announce=quiet)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_refuses_before_the_output_is_touched(tmp_path, monkeypatch):
    source = foreign.write_folder(tmp_path / "in")
    cases = {
        "is there already": (source, source, {}),
        "must be one of float32": (source, tmp_path / "out", {"dtype": "int8"}),
        "no such directory": (tmp_path / "none", tmp_path / "out", {}),
        "lies in the input": (source, source / "out", {}),
    }
    for message, (given, output, options) in cases.items():
        with pytest.raises((ValueError, OSError), match=message):
            port.port(given, output, to="orbax", announce=quiet, **options)
    monkeypatch.setattr(machine, "free_disk", lambda path: 1000)
    with pytest.raises(OSError, match="GB are needed for the output but"):
        port.port(source, tmp_path / "out", to="orbax", announce=quiet)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize(
    "name, dtype, to, message",
    [
        ("mlp.experts.3.up_proj", "float16", "orbax", "float16.*dtypes must be the same"),
        ("self_attn.q_proj", "float64", "orbax", "q_proj.weight is float64: expected one of"),
        ("self_attn.q_proj", "int8", "orbax", "q_proj.weight is int8: expected one of"),
        ("self_attn.q_proj", "float32", "olmo", "att_proj.weight holds arrays of float32 and of"),
    ],
)
def test_dtypes_that_cannot_be_kept_are_refused(tmp_path, name, dtype, to, message):
    source = foreign.write_folder(tmp_path / "in", shards=1)
    file = source / "model.safetensors"
    header = safetensors.read_header(file)
    kinds = {n: (t.dtype, t.shape) for n, t in header.tensors.items()}
    name = f"model.layers.1.{name}.weight"
    kinds[name] = (dtype, kinds[name][1])
    file.unlink()
    safetensors.Writer(file, safetensors.build_header(kinds)).close()
    with pytest.raises(ValueError, match=message):
        port.port(source, tmp_path / "out", to=to, announce=quiet)
    assert not list(tmp_path.glob("out*"))


def test_a_plan_cannot_write_elsewhere(tmp_path):
    source = foreign.write_folder(tmp_path / "in", shards=1)
    port.port(source, tmp_path / "orbax", to="orbax", announce=quiet)
    plan = tmp_path / "orbax" / "source" / "plan.json"
    plan.write_text(plan.read_text().replace("model.safetensors", "../../model.safetensors"))
    with pytest.raises(checkpoints.DamagedError, match="plan.json"):
        port.port(tmp_path / "orbax", tmp_path / "out", to="huggingface", announce=quiet)
    with pytest.raises(ValueError, match="no port writes"):
        sources.Plan("huggingface", {"../model.safetensors": ""}, None)


def test_a_lost_chunk_is_an_error(tmp_path):
    source = foreign.write_folder(tmp_path / "in", shards=1)
    port.port(source, tmp_path / "orbax", to="orbax", announce=quiet)
    (tmp_path / "orbax" / "params" / "layers.01.moe.w_up" / "0.0.0").unlink()
    with pytest.raises(checkpoints.DamagedError, match="layers/01/moe/w_up"):
        port.port(tmp_path / "orbax", tmp_path / "out", to="huggingface", announce=quiet)
    with pytest.raises(checkpoints.DamagedError, match="layers/01/moe/w_up"):
        olmoe_jax.load(tmp_path / "orbax")


def test_a_suite_is_checked_before_it_starts(tmp_path, monkeypatch):
    names = ["step5-tokens1K", "step10-tokens2K"]
    for name in names:
        foreign.write_folder(tmp_path / "suite" / name)
    pairs = port.pairs(tmp_path / "suite", tmp_path / "run", to="orbax")
    port.check_all(pairs)
    with monkeypatch.context() as patch:
        patch.setattr(machine, "free_disk", lambda path: 30_000)
        with pytest.raises(OSError, match="GB are needed"):
            port.check_all(pairs)
    pathlib.Path(pairs[0][1]).mkdir(parents=True)
    with pytest.raises(FileExistsError, match="was not ported"):
        port.check_all(pairs)
    (tmp_path / "suite" / names[1] / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00003"):
        port.check_all(pairs[1:])


def test_a_checkpoint_says_what_it_was_ported_from(tmp_path):
    source = foreign.write_folder(tmp_path / "in")
    port.port(source, tmp_path / "orbax", to="orbax", announce=quiet)
    again = sources.open_source(tmp_path / "orbax")
    assert again.files == {n: (source / n).read_bytes() for n in (*foreign.FILES, "config.json")}
    assert again.format == "huggingface" and again.config.model.dtype == "float32"
    (tmp_path / "orbax" / "source" / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(checkpoints.DamagedError, match="source/tokenizer.json"):
        olmoe_jax.load(tmp_path / "orbax", verify=True)
