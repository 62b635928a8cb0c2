"""A port that went wrong is caught and named: each test wrongs one thing as a converter might."""

import hashlib
import json
import pathlib
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from olmoe_jax import checkpoints
from olmoe_jax.checkpoints import manifest
from olmoe_jax.porting import agreement, folders, port, safetensors, verification
from tests.porting import tiny

LAYER = "model.layers.1."
QUERY, KEY = f"{LAYER}self_attn.q_proj.weight", f"{LAYER}self_attn.k_proj.weight"
EXPERT = LAYER + "mlp.experts.{}.{}_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What `tiny.make` writes."""
    return tiny.make(tmp_path_factory.mktemp("ported"))


@pytest.fixture
def ported(made, tmp_path):
    """A copy of it that a test may wrong."""
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


@pytest.fixture
def no_logits(monkeypatch):
    """Leaves the logits out: they take seconds."""
    monkeypatch.setattr(agreement, "check", lambda source, target, announce: ())


def tensor(folder, name):
    """A writable view of a tensor's file."""
    file = folders.open_folder(folder).tensors[name].file
    path = pathlib.Path(folder) / file
    found = safetensors.read_header(path).tensors[name]
    kind = jnp.dtype(found.dtype)
    return np.memmap(path, kind, "r+", found.start, tuple(found.shape))


def hash_again(folder):
    """Makes the manifest that of the bytes at hand: the writer hashed the wrong thing it wrote."""
    path, opened = pathlib.Path(folder) / "manifest" / "process_0.json", folders.open_folder(folder)
    record = json.loads(path.read_text())
    for name, leaf in record["leaves"].items():
        for piece in leaf["pieces"]:
            window = tuple(map(slice, piece["start"], np.add(piece["start"], piece["shape"])))
            piece["sha256"] = manifest.digest(opened.read(name)[window])
    digests = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in pathlib.Path(folder).iterdir() if p.is_file()
    }  # fmt: skip
    record["files"] = {name: digests[name] for name in record.get("files", {})}
    if "config_sha256" in record and "config.json" in digests:
        record["config_sha256"] = digests["config.json"]
    path.write_text(json.dumps(record))


def verify(folder, source, target):
    return verification.verify(folder / source, folder / target, announce=tiny.quiet)


def test_a_sound_port_is_told_claim_by_claim(made, no_logits):
    for source, target, count in (("run", "hf", 27), ("hf", "orbax", 51), ("run", "olmo", 27)):
        its, hashes, architecture, tensors = verify(made, source, target)
        assert its.startswith(f"all bytes of the input {made / source}")
        assert f"all bytes of {made / target} have the hashes noted when they were" in hashes
        assert "describe the same architecture" in architecture
        assert tensors == (
            f"each of the {count} float32 tensors of the input equals its counterpart in the "
            "output bit for bit"
        )


def flip(x):
    x.view(np.uint32)[3, 5] ^= 1 << 20


def one_value(x):
    x[3, 5] = 7.0


def transpose(x):
    x.reshape(x.shape[::-1])[...] = np.array(x).T


def zero(x):
    x[...] = 0


def reverse_rows(x):
    x[...] = np.array(x)[::-1]


def swap_columns(x):
    x[:, [1, 4]] = np.array(x)[:, [4, 1]]


def interleave(x):
    x[...] = np.array(x).reshape(2, 2, 2, -1).swapaxes(1, 2).reshape(x.shape)


def round_on_the_way(x):
    x[...] = np.array(x).astype(ml_dtypes.bfloat16)


def nudge(x):
    x.view(np.uint32)[...] ^= 1


WRONGS = {
    "flipped": (QUERY, flip, "one flipped bit"),
    "changed": (QUERY, one_value, "a single value changed"),
    "transposed, square": (QUERY, transpose, "transposed"),
    "transposed, not square": (EXPERT.format(3, "down"), transpose, "transposed"),
    "never written": (EXPERT.format(3, "up"), zero, "never written: only zeros"),
    "rows": ("model.embed_tokens.weight", reverse_rows, "rows permuted: number 0 is number 23 of"),
    "columns": (
        "model.embed_tokens.weight", swap_columns, "columns permuted: number 1 is number 4 of",
    ),
    "rotary": (QUERY, interleave, "columns in the order of rotary pairs that are neighbours"),
    "rounded": (KEY, round_on_the_way, "rounded to bfloat16 on the way"),
    "rounded otherwise": (KEY, nudge, "rounded otherwise"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONGS)
def test_what_was_done_to_a_tensor_is_named(wrong, ported, no_logits):
    name, change, cause = WRONGS[wrong]
    change(tensor(ported / "hf", name))
    hash_again(ported / "hf")
    with pytest.raises(ValueError, match=f"hf: {name}.*likely cause: {cause}.*first at") as error:
        verify(ported, "run", "hf")
    if wrong == "flipped":
        assert f"{QUERY} (layer 1) is not what" in str(error.value)
        assert f"first at {QUERY}[3, 5], " in str(error.value)
        assert ", layers/01/attention/query[5, 3]; 1 of 64 values differ" in str(error.value)
    if wrong == "never written":
        assert "(layer 1, expert 3)" in str(error.value)
        assert ", layers/01/moe/w_up[3, 0, 0]; " in str(error.value)


@pytest.mark.parametrize(
    ("other", "place"),
    [
        (EXPERT.format(4, "gate"), "layers/01/moe/w_gate[4]"),
        (EXPERT.format(1, "up"), "layers/01/moe/w_up[1]"),
        ("model.layers.0.mlp.experts.1.gate_proj.weight", "layers/00/moe/w_gate[1]"),
    ],
    ids=["experts", "projections", "layers"],
)
def test_swapped_tensors_are_named(other, place, ported, no_logits):
    one, another = tensor(ported / "hf", EXPERT.format(1, "gate")), tensor(ported / "hf", other)
    one[...], another[...] = np.array(another), np.array(one)
    hash_again(ported / "hf")
    with pytest.raises(ValueError, match="likely cause: permuted: it holds") as error:
        verify(ported, "run", "hf")
    if "layers.0" not in other:  # else layer 0 is met first
        message = str(error.value)
        assert f"it holds {place}; " in message
        assert EXPERT.format(1, "gate") in message and "(layer 1, expert 1)" in message


def test_the_place_within_a_fused_tensor_is_that_of_the_file(ported, no_logits):
    name = "transformer.blocks.1.att_proj.weight"
    stored = next(n for n in folders.open_folder(ported / "olmo").tensors if n.endswith(name))
    flip(tensor_of_olmo(ported / "olmo", stored)[8:])  # rows 8… are the key's
    hash_again(ported / "olmo")
    with pytest.raises(
        ValueError, match=rf"first at {name}\[11, 5\].*layers/01/attention/key\[5, 3\]"
    ):
        verify(ported, "run", "olmo")


def tensor_of_olmo(folder, name):
    """As `tensor`; in the file the names are encoded."""
    opened = folders.open_folder(folder)
    path = pathlib.Path(folder) / opened.tensors[name].file
    start = opened.read(name)
    offset = next(
        t.start for t in safetensors.read_header(path).tensors.values()
        if tuple(t.shape) == start.shape and np.array_equal(
            np.memmap(path, np.float32, "r", t.start, tuple(t.shape)), start)
    )  # fmt: skip
    return np.memmap(path, np.float32, "r+", offset, start.shape)


def test_an_input_that_changed_is_seen_from_an_orbax_output_too(ported, no_logits):
    flip(tensor(ported / "hf", QUERY))
    with pytest.raises(checkpoints.DamagedError, match=f"hf: 1 tensors .* damaged .{QUERY}"):
        verify(ported, "hf", "orbax")
    shutil.rmtree(ported / "hf" / "manifest")  # as a folder from elsewhere
    with pytest.raises(
        ValueError,
        match=r"orbax: layers/01/attention/query \(layer 1\) is not what .*hf has; .* one flipped",
    ):
        verify(ported, "hf", "orbax")


def test_bytes_that_are_not_those_written_are_damage(ported, no_logits):
    flip(tensor(ported / "hf", QUERY))
    with pytest.raises(checkpoints.DamagedError, match=f"1 tensors or files damaged .{QUERY}"):
        verify(ported, "run", "hf")
    flip(tensor(ported / "hf", QUERY))  # and back
    array = ported / "orbax" / "params" / "layers.01.moe.w_gate"
    file = max(array.iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(checkpoints.DamagedError, match="arrays damaged"):
        verify(ported, "hf", "orbax")


@pytest.mark.parametrize("side", ["hf", "orbax"])
def test_a_damaged_record_is_named_on_either_side(side, ported, no_logits):
    file = ported / side / "manifest" / "process_0.json"
    file.write_text(file.read_text()[:-200])
    for source, target in (("hf", "orbax"), ("run", side)):
        with pytest.raises(checkpoints.DamagedError, match="manifest/process_0.json is damaged"):
            verify(ported, source, target)


def test_an_input_without_a_record_is_no_failure(ported, no_logits):
    shutil.rmtree(ported / "hf" / "manifest")
    claims = verify(ported, "hf", "orbax")
    assert len(claims) == 3 and claims[0].startswith(f"all bytes of {ported / 'orbax'} have")


def test_a_config_of_another_model_is_named(ported, no_logits):
    file = ported / "hf" / "config.json"
    content = json.loads(file.read_text())
    content["rope_theta"] = content["rope_parameters"]["rope_theta"] = 5e5
    file.write_text(json.dumps(content))
    with pytest.raises(checkpoints.DamagedError, match="config.json"):
        verify(ported, "run", "hf")
    hash_again(ported / "hf")
    with pytest.raises(
        ValueError, match="hf: its config describes .*rope_theta=500000.0, not 700.0"
    ):
        verify(ported, "run", "hf")


def test_casts_are_checked_and_named_and_nan_stays(ported, no_logits):
    tensor(ported / "hf", QUERY)[2, 3] = np.nan
    hash_again(ported / "hf")
    port.port(ported / "hf", ported / "short", to="orbax", dtype="bfloat16", announce=tiny.quiet)
    claims = verify(ported, "hf", "short")
    assert claims[3] == (
        "each of the 51 float32 tensors of the input cast to bfloat16 (rounded to nearest even) "
        "equals its counterpart in the output"
    )
    port.port(
        ported / "short", ported / "long", to="huggingface", dtype="float32", announce=tiny.quiet
    )
    assert "cast to float32 (exact)" in verify(ported, "short", "long")[3]
    tensor(ported / "long", KEY)[0, 1] *= 1.001
    hash_again(ported / "long")
    with pytest.raises(
        ValueError, match=r"a single value changed; .*key\[1, 0\] cast to float32; 1 of"
    ):
        verify(ported, "short", "long")


def test_large_arrays_are_compared_across_blocks():
    rng = np.random.default_rng(0)
    want = rng.standard_normal((701, 523)).astype(np.float32)
    turned = np.ascontiguousarray(want.T)
    short = want.astype(ml_dtypes.bfloat16)
    for other in (want, turned.T, short, np.ascontiguousarray(short.T).T):
        assert verification._same(want, other)
        for place in ((0, 0), (256, 255), (700, 522), (511, 512)):
            wrong = other.copy(order="A")
            assert wrong.flags.c_contiguous == other.flags.c_contiguous
            wrong[place] += 1
            assert not verification._same(want, wrong)
    assert not verification._same(want, want[:-1])


def test_only_a_cast_may_change_the_payload_of_nan():
    bits = np.array([0x7FC00000, 0x7FC00001, 0x3F800000], np.uint32)
    want, other = bits.view(np.float32), bits[[1, 0, 2]].view(np.float32)
    assert verification._unequal(want, other).tolist() == [True, True, False]
    short = np.array([0x7FC1, 0xFFC0, 0x3F81], np.uint16).view(ml_dtypes.bfloat16)
    assert verification._unequal(want, short).tolist() == [False, False, True]
