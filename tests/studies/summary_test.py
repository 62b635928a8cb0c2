import json

import pytest

from olmoe_jax.studies import summary

KNOWN = {
    "first": {"question": "Is a | b?", "command": "python -m run --study=first"},
    "second": {"question": "Is it faster?", "command": "python -m run --study=second"},
}


def _report(name, *outcomes, scale="laptop", protocol=None):
    return {"study": name, "question": f"About {name}?", "scale": scale, "data": "embedded",
            "protocol": protocol, "outcomes": list(outcomes)}  # fmt: skip


def _outcome(**fields):
    return {
        "title": "new against old: final validation/loss", "measure": "final",
        "metric": "validation/loss", "unit": "nats per token", "paper": "2.6 against 2.7",
        "interval": {"mean": -0.0312, "low": -0.05, "high": -0.0124, "n": 3},
        "agreement": "agrees with the paper", "words": "It is lower.", "seeds_needed": None,
    } | fields  # fmt: skip


def test_a_study_that_was_not_run_stands_with_its_command():
    rows = summary.rows([_report("second", _outcome())], KNOWN)
    assert [row["study"] for row in rows] == ["first", "second"]
    assert (rows[0]["verdict"], rows[0]["effect"]) == (summary.NOT_RUN, None)
    assert rows[0].keys() == rows[1].keys()
    text = summary.markdown(rows)
    assert text.splitlines()[2].startswith("| first | – |")
    assert text.splitlines()[2].endswith(r"| Is a \| b? |")
    assert "| not run: `python -m run --study=first` |" in text
    assert "Add --dry_run to see how long it takes" in text
    assert all(line.count(" |") == 10 for line in text.splitlines()[:-2])
    assert "not run" not in summary.markdown(summary.rows([_report("x", _outcome())], {}))


def test_effects_ratios_and_seeds_are_those_of_the_report():
    ratio = _outcome(
        measure="tokens", title="new against old: tokens to the same", unit="ratio", paper="",
        interval={"mean": 0.345, "low": None, "high": None, "n": 1}, seeds_needed=17,
        agreement="not decidable at this scale",
    )  # fmt: skip
    rows = summary.rows([_report("second", _outcome(), ratio, protocol={"seeds": [1]})], KNOWN)
    assert rows[1]["pilot"] and rows[2]["paper"] is None
    line, other = summary.markdown(rows).splitlines()[3:5]
    assert "| -0.0312 | -0.0500 to -0.0124 | 3 | agrees with the paper | 2.6 against 2.7 |" in line
    assert other.startswith("|  | new against old: tokens to the same | 0.345 × | – | 1 | not deci")
    assert other.endswith("(about 17 seeds would) | – | laptop | embedded |  |")  # stands above


def test_every_scale_and_unknown_studies_have_rows_of_their_own():
    none = _outcome(interval=None)
    reports = [
        _report("strange", none), _report("first", _outcome(), scale="smoke"),
        _report("first", _outcome()),
    ]  # fmt: skip
    rows = summary.rows(reports, KNOWN)
    found = [(row["study"], row["scale"]) for row in rows]
    assert found == [("first", "smoke"), ("first", "laptop"), ("second", None),
                     ("strange", "laptop")]  # fmt: skip
    assert (rows[-1]["effect"], rows[-1]["n"]) == (None, 0)
    assert summary.markdown(rows).count("About first?") == 2
    other = _report("first", _outcome()) | {"data": "my|data"}  # at the same scale
    text = summary.markdown(summary.rows([_report("first", _outcome()), other], KNOWN))
    assert text.count("About first?") == 2 and r"| laptop | my\|data |" in text


def test_files_are_read_and_written(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    (tmp_path / "first/report.json").write_text(json.dumps(_report("first", _outcome())))
    paths = [tmp_path / name / "report.json" for name in ("first", "second")]
    rows = summary.rows(summary.read(paths), KNOWN)
    summary.write(tmp_path, rows)
    assert json.loads((tmp_path / summary.DATA).read_text()) == rows
    assert (tmp_path / summary.TEXT).read_text() == summary.markdown(rows)
    page = (tmp_path / summary.PAGE).read_text()
    assert "1 of 2 studies run" in page and "It is lower." in page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not the report.json of a study"),
        ("{", r"not the report.json of a study \(Expecting"),
        (json.dumps({"study": "a", "outcomes": []}), "not the report.json of a study"),
        (json.dumps(_report("a") | {"outcomes": {}}), "not the report.json of a study"),
        (json.dumps(_report("a", _outcome(), {})), "outcome 1 is not as this version"),
        (json.dumps(_report("a", _outcome(interval={"mean": 1}))), "outcome 0 is not as this"),
    ],
)
def test_a_file_of_another_shape_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/report.json: {message}"):
        summary.read([tmp_path / "report.json"])
