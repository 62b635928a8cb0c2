"""One table over studies, from their report.json files: what was asked, found, and in the paper.

    reports = summary.read(["results/granularity/report.json", …])
    rows = summary.rows(reports, known)
    print(summary.markdown(rows))

Nothing is judged anew: effects, intervals and verdicts are those of the reports.
"""

import json
import pathlib

from olmoe_jax import files, reporting

NOT_RUN = "not run"
DATA, TEXT, PAGE = "summary.json", "summary.md", "summary.html"
# what decides comes first: a page need not be as wide as all of them
_COLUMNS = ("study", "comparison", "effect", "95 % interval", "seeds", "verdict", "the paper",
            "scale", "data", "question")  # fmt: skip
_HOW = (
    "The command of a study that was not run goes on with one that was begun, makes no run twice, "
    "and brings this table up to date. Add --dry_run to see how long it takes; run it with --pilot "
    "first to choose learning rates and the number of seeds by a pilot."
)
# what is read here of a report.json, of its outcomes and of their intervals
_REPORT = {"study", "question", "scale", "data", "protocol", "outcomes"}
_OUTCOME = {"title", "measure", "metric", "unit", "paper", "interval", "agreement", "words",
            "seeds_needed"}  # fmt: skip
_INTERVAL = {"mean", "low", "high", "n"}


def read(paths) -> list[dict]:
    """The contents of report.json files; a file that is not there is left out.

    Raises:
      ValueError: a file is no report of a study, or lacks what the table needs.
    """
    found = []
    for path in map(pathlib.Path, paths):
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not the report.json of a study ({error})") from None
        if not _has(content, _REPORT) or not isinstance(content["outcomes"], list):
            raise ValueError(f"{path}: not the report.json of a study, as this version writes it")
        for number, outcome in enumerate(content["outcomes"]):
            interval = outcome["interval"] if (whole := _has(outcome, _OUTCOME)) else None
            if not whole or not (interval is None or _has(interval, _INTERVAL)):
                raise ValueError(f"{path}: outcome {number} is not as this version writes it")
        found.append(content)
    return found


def _has(value, keys):
    return isinstance(value, dict) and keys <= value.keys()


def rows(reports, known) -> list[dict]:
    """A row per outcome of each report, and one for each study without a report.

    Args:
      reports: contents of report.json files, in any order; of a study there may be several.
      known: study → {"question": …, "command": what runs it}, in the order of the table. A report
        of another study comes behind.
    Returns:
      dicts with `study`, `question`, `scale`, `data`, `comparison`, `measure`, `metric`, `unit`,
      `effect`, `low`, `high`, `n`, `paper`, `verdict`, `words`, `seeds_needed`, `pilot` (whether
      one fixed the learning rates), `command`; None where there is no such value. Ratios are
      ratios, not their logarithms.
    """
    order = [*known, *dict.fromkeys(r["study"] for r in reports if r["study"] not in known)]
    out = []
    for name in order:
        mine = [report for report in reports if report["study"] == name]
        command = known.get(name, {}).get("command")
        if not mine:
            empty = {"study": name, "question": known[name]["question"], "verdict": NOT_RUN}
            out.append(dict.fromkeys(_FIELDS) | empty | {"command": command})
        out += [_row(report, o, command) for report in mine for o in report["outcomes"]]
    return out


_FIELDS = (
    "study", "question", "scale", "data", "comparison", "measure", "metric", "unit", "effect",
    "low", "high", "n", "paper", "verdict", "words", "seeds_needed", "pilot", "command",
)  # fmt: skip


def _row(report, outcome, command):
    interval = outcome["interval"] or {"mean": None, "low": None, "high": None, "n": 0}
    return {
        "study": report["study"],
        "question": report["question"],
        "scale": report["scale"],
        "data": report["data"],
        "comparison": outcome["title"],
        "measure": outcome["measure"],
        "metric": outcome["metric"],
        "unit": outcome["unit"],
        "effect": interval["mean"],
        "low": interval["low"],
        "high": interval["high"],
        "n": interval["n"],
        "paper": outcome["paper"] or None,
        "verdict": outcome["agreement"],
        "words": outcome["words"],
        "seeds_needed": outcome["seeds_needed"],
        "pilot": report["protocol"] is not None,
        "command": command,
    }


def markdown(table) -> str:
    """The rows of a summary as a Markdown table; a study that was not run stands with its command.

    Args:
      table: what `rows` returns.
    """
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{' --- |' * len(_COLUMNS)}"]
    for cells in _cells(table, code="`{}`"):
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    if how := _how(table):
        lines += ["", how]
    return "\n".join(lines) + "\n"


def _how(table):
    """What a reader can do about studies that were not run; None where all were."""
    can = any(row["verdict"] == NOT_RUN and row["command"] for row in table)
    return _HOW if can else None


def page(table) -> str:
    """The same as an HTML page, the sentences of the verdicts below the table."""
    done, how = [row for row in table if row["verdict"] != NOT_RUN], _how(table)
    studies = list(dict.fromkeys(row["study"] for row in table))
    count = len({row["study"] for row in done})
    blocks = [
        reporting.Table(
            title="All studies", columns=_COLUMNS[:-1],
            rows=tuple(cells[:-1] for cells in _cells(table, code=None)),
            note="Differences are arm − other, lower is better; costs are ratios. Intervals: "
            "Student's t over seeds." + (f" {how}" if how else ""),
        ),
        *(
            reporting.Prose(
                title=f"{name}: {mine[0]['question']}",
                paragraphs=tuple(f"{row['comparison']}. {row['words']}" for row in mine),
            )
            for name in studies
            if (mine := [row for row in done if row["study"] == name])
        ),
        *(
            reporting.Prose(
                title=f"{row['study']}: {row['question']}",
                paragraphs=(f"{NOT_RUN[0].upper()}{NOT_RUN[1:]}. {row['command'] or ''}",),
            )
            for row in table
            if row["verdict"] == NOT_RUN
        ),
    ]  # fmt: skip
    return reporting.page("Studies", f"{count} of {len(studies)} studies run", blocks)


def write(folder, table):
    """Writes summary.json, summary.md and summary.html in a folder, each whole or not at all."""
    folder = pathlib.Path(folder)
    files.write_json(folder / DATA, table)
    files.write_text(folder / TEXT, markdown(table))
    files.write_text(folder / PAGE, page(table))


def _cells(table, code):
    """Tuples of text, one per row; study and question stand once for consecutive rows.

    Args:
      code: how the command of a study that was not run is written; None: not here.
    """
    out, before = [], None
    for row in table:
        key = (row["study"], row["scale"], row["data"])
        name, question = ("", "") if key == before else (row["study"], row["question"])
        before = key
        if row["verdict"] == NOT_RUN:
            how = f": {code.format(row['command'])}" if row["command"] and code else ""
            out.append((name, *["–"] * 4, NOT_RUN + how, *["–"] * 3, question))
            continue
        out.append(
            (
                name,
                row["comparison"],
                _number(row, row["effect"]),
                "–" if row["low"] is None else
                f"{_number(row, row['low'])} to {_number(row, row['high'])}",
                str(row["n"]),
                row["verdict"] + _needed(row),
                row["paper"] or "–",
                row["scale"],
                row["data"],
                question,
            )
        )  # fmt: skip
    return out


def _number(row, value):
    if value is None:
        return "–"
    return f"{value:+.4f}" if row["measure"] == "final" else f"{value:.3g} ×"


def _needed(row):
    return "" if row["seeds_needed"] is None else f" (about {row['seeds_needed']} seeds would)"
