"""The page of routing analyses, read as its readers do: in a browser, from disk."""

import numpy as np
import pytest

from olmoe_jax import files, reporting
from olmoe_jax.analysis import analyses, page, prompt
from tests.analysis import synthetic
from tests.browser import chromium

pytestmark = pytest.mark.skipif(bool(chromium.missing()), reason=chromium.missing() or "-")

PIECES = ("The", " sum", "\n", " is")


def decode(token):
    return f" word{token}"


@pytest.fixture(scope="module")
def recordings():
    return synthetic.recordings()


@pytest.fixture(scope="module")
def routed(recordings):
    """A text of four tokens, with the choices of the first four of a trace."""
    source = recordings[-1].traces["books"]
    tokens = source.tokens
    return prompt.Routed(
        text="".join(PIECES), info=source.info, input_ids=tokens.input_ids[:4],
        predicted_ids=tokens.predicted_ids[:4], pieces=PIECES, predicted=("a", "b", "c", "d"),
        expert_ids=tokens.expert_ids[:4], weights=tokens.weights[:4],
    )  # fmt: skip


@pytest.fixture(scope="module")
def driver(recordings, routed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    found = {"model": analyses.find(recordings, decode=decode)}
    blocks = page.build(found, prompts={"model": (routed,)})
    points = reporting.Series(name="a", x=("0", "1", "all"), y=(0.1, 0.2, 0.3), points=True)
    blocks.append(reporting.Chart(title="in words", series=(points,), x_title="x", y_title="y"))
    blocks.append(reporting.Prose(title="white space", paragraphs=("a token '   '",)))
    files.write_text(folder / "report.html", reporting.page("Inside", "model", blocks))
    with chromium.start(tmp_path_factory.mktemp("profile")) as driver:
        chromium.show(driver)
        driver.get((folder / "report.html").as_uri())
        yield driver


# What a reader sees of a figure: the numbers that plotly was given, or the text.
SEEN = """
const plot = arguments[0].querySelector(".plot");
if (!plot) return arguments[0].querySelector(".wide, .pieces").innerHTML;
return JSON.stringify([plot.data.map(t => [t.name, t.x, t.y, t.z, t.text]),
  plot.layout.xaxis.title.text, plot.layout.yaxis.title.text]);
"""
CHOOSE = """
const select = arguments[0];
select.selectedIndex = arguments[1];
select.dispatchEvent(new Event("input", {bubbles: true}));
"""
FIGURES = ".explorer, .passage, .search"


def figure(driver, words):
    """The figure whose title holds the words."""
    (found,) = [
        one for one in driver.find_elements("css selector", FIGURES)
        if words in one.find_element("tag name", "h2").text
    ]  # fmt: skip
    return found


def choose(driver, of, **labels):
    for name, label in labels.items():
        select = of.find_element("css selector", f'select[name="{name.replace("_", " ")}"]')
        options = [o.text for o in select.find_elements("tag name", "option")]
        driver.execute_script(CHOOSE, select, options.index(label))


def trace_of(driver, of, number=0):
    script = "const t = arguments[0].querySelector('.plot').data[arguments[1]];"
    return driver.execute_script(script + "return {x: t.x, y: t.y, z: t.z}", of, number)


def test_the_page_opens_without_errors_and_without_a_network(driver):
    assert chromium.problems(driver) == []
    plots = driver.find_elements("css selector", ".plot")
    drawn = driver.execute_script(
        "return [...document.querySelectorAll('.plot')].filter(p => p.querySelector('svg')).length"
    )
    assert drawn == len(plots) >= 10


def test_words_on_an_axis_and_white_space_are_seen(driver):
    script = "return document.querySelector('#chart-0 .plot')._fullLayout.xaxis"
    assert driver.execute_script(f"{script}._categories") == ["0", "1", "all"]
    last = "return [...document.querySelectorAll('section p')].at(-1).innerText"
    assert driver.execute_script(last) == "a token '   '"


def test_every_control_changes_what_is_drawn(driver):
    tried, dull = 0, []
    for one in driver.find_elements("css selector", FIGURES):
        title = one.find_element("tag name", "h2").text
        for select in one.find_elements("tag name", "select"):
            before, at = driver.execute_script(SEEN, one), select.get_property("selectedIndex")
            options = len(select.find_elements("tag name", "option"))
            seen = set()
            for other in set(range(options)) - {at}:
                driver.execute_script(CHOOSE, select, other)
                seen.add(driver.execute_script(SEEN, one))
            driver.execute_script(CHOOSE, select, at)
            assert driver.execute_script(SEEN, one) == before, title
            if options < 2 or before in seen:
                dull.append((title, select.get_attribute("name")))
            tried += 1
    assert not dull and tried > 25
    assert chromium.problems(driver) == []


def test_bars_are_the_shares_of_tokens(driver, recordings):
    one = figure(driver, "tokens that each expert is active for")
    for rank, places in (("top-3", slice(None)), ("top-1", slice(1))):
        for row, layer in enumerate((1, 4)):
            for domain in ("books", "code"):
                choose(driver, one, rank=rank, layer=str(layer), domain=domain)
                ids = recordings[-1].traces[domain].tokens.expert_ids[:, row, places]
                want = [100 * (ids == expert).any(-1).mean() for expert in range(7)]
                got = trace_of(driver, one)
                np.testing.assert_allclose(got["y"], want, rtol=1e-3)
                assert got["x"] == [str(expert) for expert in range(7)]
    choose(driver, one, order="largest first")
    got = trace_of(driver, one)
    assert got["y"] == sorted(got["y"], reverse=True)
    assert got["x"] == [str(expert) for expert in np.argsort(-np.array(want), kind="stable")]
    choose(driver, one, order="as numbered")
    assert trace_of(driver, one, 1)["y"] == [pytest.approx(100 / 7, rel=1e-3)] * 7


def test_heat_maps_have_their_rows_and_columns(driver, recordings):
    one = figure(driver, "experts and domains")
    choose(driver, one, layer="1")
    tokens = [t.tokens.expert_ids[:, 0] for t in recordings[-1].traces.values()]
    want = [[100 * (ids == expert).any(-1).mean() for expert in range(7)] for ids in tokens]
    np.testing.assert_allclose(trace_of(driver, one)["z"], want, rtol=1e-3)
    together = figure(driver, "experts that are chosen together")
    choose(driver, together, layer="4")
    ids = np.concatenate([t.tokens.expert_ids[:, 1] for t in recordings[-1].traces.values()])
    with_2 = (ids == 2).any(-1)
    share = 100 * (with_2 & (ids == 5).any(-1)).sum() / with_2.sum()
    assert trace_of(driver, together)["z"][2][5] == pytest.approx(share, abs=0.06)


def test_training_can_be_measured_in_steps_tokens_and_share(driver):
    one = figure(driver, "router saturation over training")
    for scale, want in (("steps", [10, 20]), ("tokens", [640, 1280]),
                        ("share of training, %", [25, 50])):  # fmt: skip
        choose(driver, one, horizontal_axis=scale)
        assert trace_of(driver, one)["x"] == want


def test_a_typed_token_is_found_with_its_experts(driver, recordings):
    one = figure(driver, "search for a token")
    choose(driver, one, layer="4", rank="top-1")
    field = one.find_element("css selector", "input")
    field.clear()
    field.send_keys("WORD1")
    rows = [
        [cell.text for cell in row.find_elements("css selector", "th, td")]
        for row in one.find_elements("css selector", "tbody tr")
    ]
    words = np.concatenate([t.tokens.input_ids for t in recordings[-1].traces.values()])
    firsts = np.concatenate([t.tokens.expert_ids[:, 1, 0] for t in recordings[-1].traces.values()])
    went = np.bincount(firsts[words == 1], minlength=7)
    assert rows[0][0] == '" word1"' and int(rows[0][1]) == went.sum()
    expert, share = rows[0][2].removeprefix("expert ").removesuffix(" %").split(": ")
    assert went[int(expert)] == went.max()
    assert float(share) == pytest.approx(100 * went.max() / went.sum(), abs=0.3)
    names = [row[0] for row in rows]
    assert all("word1" in name for name in names) and '" word10"' in names
    field.clear()
    field.send_keys("nowhere")
    assert "nothing here" in one.text and "0 of" in one.text


def test_text_stands_to_the_left_and_numbers_to_the_right(driver):
    one = figure(driver, "tokens of each expert")
    align = "return getComputedStyle(arguments[0]).textAlign"
    cells = one.find_elements("css selector", "tbody tr:first-child > *")
    assert [driver.execute_script(align, cell) for cell in cells] == ["left", "right", "right"]
    groups = driver.find_element("xpath", "//section[h2[contains(., 'groups of experts')]]")
    cells = groups.find_elements("css selector", "tbody tr:first-child > *")
    assert [driver.execute_script(align, cell) for cell in cells] == ["left", "left"]


def test_a_text_is_coloured_by_the_first_expert_and_says_all(driver, routed):
    from selenium.webdriver.common.keys import Keys

    one = figure(driver, "what the router sees")
    choose(driver, one, layer="4")
    spans = one.find_elements("css selector", ".pieces span")
    assert [span.get_property("textContent") for span in spans] == ["The", " sum", "⏎\n", " is"]
    paint = "return arguments[0].style.background"
    colours = [driver.execute_script(paint, span) for span in spans]
    firsts = routed.expert_ids[:, 1, 0].tolist()
    for i in range(4):
        for j in range(4):
            assert (colours[i] == colours[j]) == (firsts[i] == firsts[j])
    spans[0].click()
    spans[0].send_keys(Keys.ARROW_RIGHT)
    detail = one.find_element("css selector", ".detail").text
    want = [
        f"expert {expert} {float(f'{100 * weight:.4g}'):g}"[:11]
        for expert, weight in zip(routed.expert_ids[1, 1], routed.weights[1, 1], strict=True)
    ]
    assert detail.startswith('" sum": ') and "“b” next" in detail
    assert all(part in detail for part in want), (want, detail)


def test_controls_can_be_used_with_the_keyboard(driver):
    from selenium.webdriver.common.keys import Keys

    one = figure(driver, "tokens that each expert is active for")
    select = one.find_element("css selector", 'select[name="domain"]')
    choose(driver, one, domain="books")
    before = driver.execute_script(SEEN, one)
    select.send_keys(Keys.ARROW_DOWN)
    assert select.get_property("value") == "code"
    assert driver.execute_script(SEEN, one) != before
    labelled = "return [...document.querySelectorAll('select, input')].every(c => c.labels.length)"
    assert driver.execute_script(labelled)


def test_a_narrow_screen_does_not_scroll_sideways(driver):
    from selenium.webdriver.support import ui

    chromium.show(driver, width=360)
    try:
        script = "return [document.scrollingElement.scrollWidth, innerWidth]"
        assert driver.execute_script(script) == [360, 360]
        fits = "return [...document.querySelectorAll('.plot svg')].every(s => s.clientWidth <= 360)"
        ui.WebDriverWait(driver, 10).until(lambda d: d.execute_script(fits))  # charts redraw late
        wide = """return [...document.querySelectorAll('select, input, .plot, h2, p')]
          .filter(e => e.getBoundingClientRect().right > 361).map(e => e.outerHTML)"""
        assert driver.execute_script(wide) == []
    finally:
        chromium.show(driver)


def test_dark_mode_changes_page_and_charts(driver):
    from selenium.webdriver.support import ui

    script = """const plot = document.querySelector(".explorer .plot");
      return [getComputedStyle(document.body).backgroundColor, plot.layout.font.color,
        plot.data[0].marker.color, document.querySelector(".pieces span").style.background]"""
    light = driver.execute_script(script)

    def changed(driver):
        found = driver.execute_script(script)
        return all(one != other for one, other in zip(light, found, strict=True))

    try:
        chromium.show(driver, scheme="dark")
        ui.WebDriverWait(driver, 10).until(changed)  # without loading the page again
    finally:
        chromium.show(driver)
    ui.WebDriverWait(driver, 10).until(lambda d: d.execute_script(script) == light)
