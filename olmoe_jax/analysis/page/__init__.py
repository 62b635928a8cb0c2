"""report.html of routing analyses: what they come to in words, then what a reader can look through.

`experts` shows one checkpoint, `training` several, `tokens` the words that experts take, `passages`
single texts. What makes the page larger than LIMIT is left out step by step, and the page says so.
"""

import pathlib

from olmoe_jax import files, reporting
from olmoe_jax.analysis import interventions
from olmoe_jax.analysis.page import experts, passages, tokens, training
from olmoe_jax.reporting import figures

PATH = "report.html"
FIGURES = "figures"
LIMIT = 9_500_000  # bytes of the page; 4.8 MB are the library that draws it


def write(output, models, between=(), *, prompts=None):
    """Writes OUTPUT/report.html and the pictures and tables OUTPUT/figures/NAME.png, .svg, .csv.

    Args:
      output: directory.
      models, between, prompts: as of `build`.
    """
    output = pathlib.Path(output)
    blocks = build(models, between, prompts=prompts)
    text = reporting.page("Inside the router", ", ".join(models), blocks)
    files.write_text(output / PATH, text)
    figures.write(blocks, output / FIGURES)


def clear(output) -> None:
    """Removes the page, pictures and tables of a former run."""
    output = pathlib.Path(output)
    (output / PATH).unlink(missing_ok=True)
    for ending in ("png", "svg", "csv"):
        for path in (output / FIGURES).glob(f"*.{ending}"):
            path.unlink()


def build(models, between=(), *, prompts=None, limit=LIMIT) -> list:
    """The blocks of the page.

    Args:
      models: name → analyses.Found.
      between: sentences about pairs of models.
      prompts: name → `prompt.Routed`s of that model.
      limit: bytes of the page.
    """
    for detail in tokens.DETAILS:
        blocks = _without_search(models, between, prompts or {}, detail)
        room = limit - reporting.num_bytes(blocks)
        if room > 0:
            break
    searched = [name for name, found in models.items() if found.vocabulary]
    left_out, unsearched = [detail.left_out] if detail.left_out else [], []
    for name in searched:
        found = tokens.search(name, models[name], max(0, room) // len(searched))
        if found is None:
            unsearched.append(name)
        else:
            blocks.insert(_behind_tokens(blocks, name), found)
    if unsearched:
        of = "" if len(models) == 1 else f" of {', '.join(unsearched)}"
        left_out.append(f"the search for a token{of}")
    if any(not training.has_room(found.health) for found in models.values()):
        left_out.append("intervals of load and health over layers and training")
    notes = [f"{name}: {note}" for name, found in models.items() for note in found.notes]
    if left_out:
        notes.append(f"Left out of the page for its size: {'; '.join(left_out)}.")
    if notes:
        blocks.append(reporting.Prose(title="Notes", paragraphs=tuple(notes)))
    return blocks


def _behind_tokens(blocks, name):
    """Where the search stands: behind the table of each expert's tokens."""
    title = tokens.title(name)
    return 1 + next(i for i, block in enumerate(blocks) if block.title == title)


def _without_search(models, between, prompts, detail):
    blocks = [
        reporting.Prose(title=name, paragraphs=found.sentences, emphasis=True)
        for name, found in models.items()
    ]
    if between:
        blocks.append(reporting.Prose(title="Between the models", paragraphs=tuple(between)))
    for name, routed in prompts.items():
        blocks += passages.blocks(name, routed)
    for name, found in models.items():
        blocks += experts.blocks(name, found, detail)
        if found.effects is not None:
            blocks += interventions.blocks(name, found.effects)
        blocks += training.blocks(name, found)
        if found.vocabulary:
            blocks += tokens.blocks(name, found, detail)
    return blocks
