import csv

import numpy as np

from olmoe_jax import reporting
from olmoe_jax.reporting import figures

VALUES = np.arange(30.0).reshape(2, 3, 5)
CUBE = reporting.Cube(
    axes={"layer": ("0", "4"), "domain": ("a", "b", "c"), "expert": tuple("01234")},
    values=VALUES, low=VALUES - 1, high=VALUES + 2,
)  # fmt: skip
LEVEL = reporting.Cube(axes={"layer": ("0", "4")}, values=np.array([7.0, 8.0]))


def _rows(path):
    return list(csv.reader(path.open()))


def test_every_picture_has_its_numbers_beside_it(tmp_path):
    blocks = [
        reporting.Prose(title="words", paragraphs=()),
        reporting.Explorer(
            title="M: bars, %", cube=CUBE, kind="bars", x="expert", level=LEVEL, level_name="even",
            start={"layer": "4", "domain": "b"},
        ),
        reporting.Explorer(
            title="heat", cube=CUBE, kind="heat", x="expert", series="domain", middle=3.0,
            figures=({"layer": "0"}, {"layer": "4"}),
        ),
        reporting.Explorer(
            title="lines", cube=CUBE, kind="lines", x="layer", series="domain",
            scales={"steps": (10, 20)},
        ),
        reporting.Chart(
            title="heat", x_title="tokens", y_title="nats", zero_line=True,
            series=(reporting.Series(name="s", x=(1.0, 2.0), y=(3.0, float("nan"))),),
        ),
    ]  # fmt: skip
    names = figures.write(blocks, tmp_path / "figures")
    assert names == ["m_bars", "heat_layer_0", "heat_layer_4", "lines", "heat"]
    written = sorted(path.name for path in (tmp_path / "figures").iterdir())
    endings = ("csv", "png", "svg")
    assert written == sorted(f"{name}.{ending}" for name in names for ending in endings)
    for name in names:
        assert (tmp_path / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "<svg" in (tmp_path / "figures" / f"{name}.svg").read_text()
    head, *rows = _rows(tmp_path / "figures" / "m_bars.csv")
    assert head == ["layer", "domain", "expert", "value", "low", "high", "even"]
    assert rows == [
        ["4", "b", str(e), f"{20 + e}", f"{19 + e}", f"{22 + e}", "8"] for e in range(5)
    ]
    head, *rows = _rows(tmp_path / "figures" / "heat_layer_4.csv")
    assert head == ["layer", "domain", "expert", "value", "low", "high"] and len(rows) == 15
    assert rows[7] == ["4", "b", "2", "22", "21", "24"]
    head, *rows = _rows(tmp_path / "figures" / "lines.csv")
    assert head == ["expert", "domain", "layer", "steps", "value", "low", "high"]
    assert rows[3] == ["0", "b", "4", "20", "20", "19", "22"]
    assert _rows(tmp_path / "figures" / "heat.csv")[1:] == [["s", "1.0", "3", "", ""],
                                                            ["s", "2.0", "", "", ""]]  # fmt: skip


def test_the_same_numbers_make_the_same_files(tmp_path):
    block = reporting.Explorer(title="t", cube=CUBE, kind="bars", x="expert")
    for name in ("one", "two"):
        figures.write([block], tmp_path / name)
    for ending in ("svg", "csv", "png"):
        one, two = ((tmp_path / name / f"t.{ending}").read_bytes() for name in ("one", "two"))
        assert one == two
