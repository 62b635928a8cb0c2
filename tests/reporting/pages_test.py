import html.parser
import json
import re

import numpy as np
import pytest

from olmoe_jax import reporting

CHART = reporting.Chart(
    title="A <b>chart</b>", x_title="tokens", y_title="nats", log_x=True,
    series=(
        reporting.Series(name="one", x=(0.0, 1.0, 2.0), y=(5.0, 4.0, float("nan")),
                         low=(5.0, 3.0, 2.0), high=(5.0, 5.0, 4.0)),
        reporting.Series(name="</script>", x=(3.0,), y=(1.0,), points=True),
    ),
)  # fmt: skip
WORDS = reporting.Chart(
    title="Words", x_title="", y_title="difference", zero_line=True,
    series=(reporting.Series(name="one", x=("a", "b"), y=(1.0, 2.0), points=True),),
)  # fmt: skip
TABLE = reporting.Table(title="Table", columns=("arm", "loss"), rows=(("a & b", "1.0"),))
PROSE = reporting.Prose(title="Verdict", paragraphs=("lower < higher",), emphasis=True)


class _Elements(html.parser.HTMLParser):
    """Collects (tag, attributes), and the text of tags by id."""

    def __init__(self):
        super().__init__()
        self.tags, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page():
    return reporting.page("Title <1>", "subtitle", [PROSE, TABLE, CHART, PROSE, WORDS])


def test_nothing_is_loaded_from_elsewhere(page):
    elements = _Elements()
    elements.feed(page)
    assert not elements.open
    loads = [a for _, a in elements.tags if {"src", "href", "srcset"} & set(a)]
    assert loads == []
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style
    assert "Plotly" in page and len(page) > 1_000_000  # the library is inside


def test_text_is_escaped_and_data_survive(page):
    assert "Title &lt;1&gt;" in page and "A &lt;b&gt;chart" in page and "a &amp; b" in page
    text = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    data = json.loads(text)
    assert data["names"] == ["one", "</script>"]
    one, other = data["charts"][0]["series"]
    assert one["x"] == [1, 2] and one["y"] == [4, None] and one["low"] == [3, 2]
    assert other["low"] is None
    assert data["charts"][1]["series"][0]["x"] == ["a", "b"]


def test_light_and_dark_have_the_same_colours_defined(page):
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    names = [re.findall(r"--[\w]+", block) for block in (light, dark)]
    assert names[0] == names[1] and "--s6" in names[0]


def _luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_curve_can_be_told_from_both_grounds(page):
    """Contrast of at least 3 : 1, as WCAG asks of graphics; of text 4.5 : 1."""
    for block in re.findall(r":root \{(.*?)\}", page, re.DOTALL)[:2]:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
        ground = _luminance(colours["ground"])
        for name, colour in colours.items():
            shades = sorted((_luminance(colour), ground))
            contrast = (shades[1] + 0.05) / (shades[0] + 0.05)
            if name in ("text", "soft"):
                assert contrast >= 4.5, name
            elif re.fullmatch(r"s\d", name):
                assert contrast >= 3, name


def test_columns_of_numbers_stand_to_the_right_and_text_to_the_left():
    table = reporting.Table(
        title="t", columns=("run", "a", "b", "c", "d", "e"),
        rows=(("x", "1.5 %", "–", "2 3 (60%)", "agrees", "+0.1 to +0.3"),
              ("y", "12", "3e-5", "4 5 (10%)", "1", "−2 ×")),
    )  # fmt: skip
    found = reporting.page("T", "s", [table])
    cells = re.findall(r"<td( class=\"text\")?>", found)
    assert [bool(cell) for cell in cells] == [False, False, True, True, False] * 2


def test_choices_are_written_with_labels():
    cube = reporting.Cube(
        axes={"layer": ("0", "4"), "one": ("x",), "expert": ("0", "1")}, values=np.ones((2, 1, 2))
    )
    block = reporting.Explorer(title="t", cube=cube, kind="bars", x="expert", start={"layer": "4"})
    found = reporting.page("T", "s", [block])
    selects = re.findall(r'<label>([^<]+) <select name="([^"]+)">(.*?)</select></label>', found)
    assert [(label, name) for label, name, _ in selects] == [("layer",) * 2, ("order",) * 2]
    assert selects[0][2] == "<option>0</option><option selected>4</option>"


def test_a_page_without_charts_has_no_scripts():
    assert "<script" not in reporting.page("T", "s", [TABLE])
