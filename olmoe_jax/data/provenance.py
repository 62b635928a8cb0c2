"""Which documents a run trains on at any step, past or future: from its config.json and data."""

import dataclasses
import json
import os
import pathlib

import numpy as np

from olmoe_jax import files
from olmoe_jax.data import layout, pipeline


@dataclasses.dataclass(frozen=True)
class Span:
    """Tokens start..end (exclusive) of one row, all of one document."""

    start: int
    end: int
    number: int
    document: layout.DocumentRecord


@dataclasses.dataclass(frozen=True)
class StepContents:
    """One step's global batch.

    Attributes:
      windows: index into the train split of each row.
      rows: per row its documents, in order; padding at the end is left out.
      batch: the arrays, as in `pipeline.Batches.batch`.
    """

    step: int
    epoch: float
    windows: list[int]
    rows: list[list[Span]]
    batch: dict[str, np.ndarray]


def step_contents(workdir, step) -> StepContents:
    """What a run's step number `step` (from 0) trains on.

    Args:
      workdir: of a run; its config.json names the data, the seed and the batch size.
    Raises:
      FileNotFoundError, ValueError: there is no run, its data is gone, or the step is negative.
    """
    if step < 0:
        raise ValueError(f"--step={step}: steps are numbered from 0")
    config, data = _read_run(workdir)
    batches = pipeline.Batches(
        data,
        batch_size=config["training"]["batch_size"],
        seed=config["training"]["seed"],
        start_step=config["data"]["start_step"],
        mask_repetitive_windows=config["data"]["mask_repetitive_windows"],
    )
    batch = batches.batch(step)
    rows = [spans(data, row) for row in batch["documents"]]
    position = (step + config["data"]["start_step"]) * config["training"]["batch_size"]
    epoch = position / data.num_windows("train")
    return StepContents(step, epoch, batches.indices(step), rows, batch)


def spans(data, documents) -> list[Span]:
    """The runs of one document number in a row `documents` [length], padding left out."""
    edges = np.flatnonzero(np.diff(documents)) + 1
    starts, ends = [0, *edges.tolist()], [*edges.tolist(), len(documents)]
    found = [(s, e, int(documents[s])) for s, e in zip(starts, ends, strict=True)]
    return [Span(s, e, n, data.document(n)) for s, e, n in found if n != layout.PADDING_DOCUMENT]


def save_arrays(path, batch):
    """Writes the batch to an .npz file, whole or not at all."""
    with files.whole(os.path.expanduser(path)) as file:
        np.savez(file, **batch)


def _read_run(workdir):
    """(config as nested dicts, PreparedData) of a workdir."""
    path = pathlib.Path(os.path.expanduser(workdir)) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --workdir names no run")
    try:
        run = json.loads(path.read_text())
        config = run["config"]
        # Data inside the workdir is named relative to it.
        data_path, sequence_length = (
            path.parent / run["data_path"],
            config["data"]["sequence_length"],
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the config.json of a run ({error!r})") from None
    return config, pipeline.open(data_path, sequence_length=sequence_length)
