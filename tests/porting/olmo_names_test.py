"""Names of the training format are walked, never unpickled."""

import base64
import os
import pickle
import string

import hypothesis
import pytest
from hypothesis import strategies

from olmoe_jax.porting import olmo_names

NAME = "transformer.blocks.0.att_proj.weight"
ENCODED = "gASVLQAAAAAAAACMJHRyYW5zZm9ybWVyLmJsb2Nrcy4wLmF0dF9wcm9qLndlaWdodJSFlImGlC4="
WORDS = strategies.text(string.printable, max_size=300)


def wrap(value, protocol=4):
    return base64.urlsafe_b64encode(pickle.dumps(value, protocol=protocol)).decode()


def test_a_name_of_the_released_files_both_ways():
    assert olmo_names.decode(ENCODED) == NAME
    assert olmo_names.encode(NAME) == ENCODED


@hypothesis.given(WORDS)
def test_encode_writes_what_pickle_writes_and_decode_undoes_it(name):
    assert olmo_names.encode(name) == wrap(((name,), False))
    assert olmo_names.decode(olmo_names.encode(name)) == name


@hypothesis.given(strategies.lists(WORDS, min_size=1, max_size=7), strategies.sampled_from([4, 5]))
def test_paths_are_joined_by_dots(path, protocol):
    path = path + path[:1]  # repeated: a memo lookup
    assert olmo_names.decode(wrap((tuple(path), False), protocol)) == ".".join(path)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("place", ["whole", "path", "flag"])
def test_a_malicious_name_runs_nothing(tmp_path, place, protocol):
    evil = Malicious(str(tmp_path / "ran"))
    value = {"whole": evil, "path": ((evil,), False), "flag": ((NAME,), evil)}[place]
    name = wrap(value, protocol)
    with pytest.raises(ValueError, match="has the opcode [A-Z_0-9]*, which no name needs"):
        olmo_names.decode(name)
    assert not (tmp_path / "ran").exists()
    pickle.loads(base64.urlsafe_b64decode(name))
    assert (tmp_path / "ran").exists()  # the name was malicious


def test_a_pickled_value_is_refused_by_its_name():
    with pytest.raises(ValueError, match="a.b is a pickled value"):
        olmo_names.decode(wrap((("a", "b"), True)))


BAD = {
    "not base64": "model.layers.0.weight",
    "not base64 ": f"{ENCODED[:8]}*{ENCODED[8:]}",
    "not base64  ": "é",
    "damaged": base64.urlsafe_b64encode(b"\x80\x04\x86.").decode(),
    "damaged ": ENCODED[:-12],
    "damaged  ": base64.urlsafe_b64encode(b"\x80\x04h\x05.").decode(),
    "damaged   ": "",
    "something follows": base64.urlsafe_b64encode(base64.b64decode(ENCODED) + b"N.").decode(),
    "a path and a flag": wrap((NAME, "False")),
    "a path and a flag ": wrap(((NAME,), False, False)),
    "a tuple of strings": wrap((((NAME,),), False)),
    "a tuple of strings ": wrap(((), False)),
    "a tuple of strings  ": wrap((NAME, False)),
    "opcode BININT1": wrap(((7,), False)),
}


@pytest.mark.parametrize("why", BAD)
def test_anything_else_is_refused(why):
    with pytest.raises(ValueError, match=f"tensor name .*{why.strip()}"):
        olmo_names.decode(BAD[why])


@hypothesis.given(strategies.binary(max_size=60), strategies.integers(0, 60))
def test_damaged_bytes_give_a_name_or_a_clear_error(noise, position):
    data = bytearray(base64.b64decode(ENCODED))
    data[position : position + len(noise)] = noise
    try:
        assert isinstance(olmo_names.decode(base64.urlsafe_b64encode(data).decode()), str)
    except ValueError as error:
        assert str(error).startswith("tensor name ")
