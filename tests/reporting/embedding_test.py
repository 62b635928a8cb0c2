import base64
import json

import numpy as np

from olmoe_jax import reporting
from olmoe_jax.reporting import embedding

AXES = {"layer": ("0", "4"), "expert": ("0", "1", "2")}


def _object(rows):
    out = np.empty(len(rows), object)
    out[:] = rows
    return out


def test_a_cube_that_two_blocks_show_is_held_once():
    values = np.array([[1.0, 2.5, np.nan], [1 / 3, 1e-7, 12345678.0]])
    cube = reporting.Cube(axes=AXES, values=values)
    level = reporting.Cube(axes={"layer": ("0", "4")}, values=np.array([1.0, 2.0]))
    order = reporting.Cube(axes={"layer": ("0", "4")}, values=_object([(2, 0), (1,)]))
    bars = reporting.Explorer(
        title="a", cube=cube, kind="bars", x="expert", level=level, orders={"o": order}
    )
    heat = reporting.Explorer(title="b", cube=cube, kind="heat", x="expert", series="layer")
    found = json.loads(embedding.text([bars, heat]))
    assert [one["cube"] for one in found["explorers"]] == [0, 0] and len(found["cubes"]) == 3
    assert found["cubes"][0]["axes"] == [["layer", ["0", "4"]], ["expert", ["0", "1", "2"]]]
    assert found["cubes"][0]["values"] == [1, 2.5, None, 0.3333, 1e-7, 12350000]
    assert found["explorers"][0]["level"] == 1 and found["explorers"][0]["orders"] == {"o": 2}
    assert found["cubes"][2]["values"] == [[2, 0], [1]]
    assert found["explorers"][1]["start"] == {}


def test_text_of_a_table_cannot_end_the_script():
    rows = _object([(("</script><!-- ", "1"),)])
    cube = reporting.Cube(axes={"layer": ("0",)}, values=rows)
    table = reporting.Explorer(title="t", cube=cube, kind="table", columns=("token", "n"))
    text = embedding.text([table])
    assert "</" not in text and "<!--" not in text
    assert json.loads(text)["cubes"][0]["values"] == [[["</script><!-- ", "1"]]]


def test_a_search_is_packed_two_bytes_for_many_experts():
    for largest, kind in ((7, np.uint8), (300, np.dtype("<u2"))):
        experts = np.array([[[largest, -1], [1, 0], [3, 2]]])
        shares = np.array([[[1.0, 0.0], [0.5, 0.25], [0.75, 0.1]]])
        block = reporting.Search(
            title="t", label="token", names=("a", "b", "c"), axes={"layer": ("5",)},
            counts=np.array([[9, 4, 4]]), experts=experts, shares=shares,
        )  # fmt: skip
        (found,) = embedding.data([block])["searches"]
        got = np.frombuffer(base64.b64decode(found["experts"][0]), kind)
        none = np.iinfo(kind).max
        assert got.tolist() == [largest, none, 1, 0, 3, 2]
        got = np.frombuffer(base64.b64decode(found["shares"][0]), np.uint8) / found["share"]
        np.testing.assert_allclose(got, shares.ravel(), atol=1 / 400)
        assert found["bytes"] == np.dtype(kind).itemsize and found["counts"] == [[9, 4, 4]]
