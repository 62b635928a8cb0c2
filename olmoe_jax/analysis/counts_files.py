"""Counts on disk: one .npz file, so that analyses need no trace; beside a trace, so that it is
counted once."""

import dataclasses
import hashlib
import json
import pathlib

import numpy as np

from olmoe_jax import files
from olmoe_jax.analysis import counting, tallies, trace, trace_files
from olmoe_jax.analysis import counts as counts_lib

NAME = "counts.npz"  # in the directory of the trace that was counted
_FORMAT = 2


def of_trace(source, *, vocabulary=True) -> counts_lib.Counts:
    """The Counts of a FileTrace: those kept in its directory if they are of it, else counted and
    kept.

    They belong to the trace while its trace.json and the sizes and times of its chunks are what
    they were, and while counting has the settings of this version.

    Args:
      vocabulary: whether tokens are needed; kept counts may have them anyway.
    Raises:
      ValueError: the trace holds no token, or is damaged.
    """
    path, key = source.path / NAME, _key(source)
    try:
        kept, kept_key = _read(path)
    except (FileNotFoundError, ValueError):
        kept_key = None  # none, or not whole: counted anew
    if kept_key == key and (kept.vocabulary is not None or not vocabulary):
        return kept
    found = counting.count(source, vocabulary=vocabulary)
    save(path, found, key=key)
    return found


def _key(source):
    """What the counts of a trace depend on, as SHA-256."""
    found = [source.path / trace_files.INFO, *sorted(source.path.glob("chunk_*.npz"))]
    state = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in found]
    settings = [_FORMAT, counts_lib.GROUPS, counts_lib.FOLDS, dataclasses.asdict(source.info)]
    return hashlib.sha256(json.dumps([settings, state]).encode()).hexdigest()


def save(path, counts, *, key="") -> None:
    """Writes Counts, whole or not at all.

    Members: "about" (JSON: format, info, folds, path_layers, `key`: what they are of, the number of
    arrays: a damaged zip may hide some), the arrays by their names, and tallies as
    vocabulary/KIND/RANK/LAYER/{keys,counts} and occurrences/KIND/{keys,counts}.
    """
    about = {"format": _FORMAT, "info": dataclasses.asdict(counts.info), "folds": counts.folds}
    about["path_layers"] = counts.path_layers
    about["key"] = key
    about["words"] = counts.vocabulary is not None
    arrays = {}
    for field in dataclasses.fields(counts_lib.Counts):
        value = getattr(counts, field.name)
        if isinstance(value, np.ndarray):
            arrays[field.name] = value
    for (kind, rank), layers in (counts.vocabulary or {}).items():
        for layer, tally in enumerate(layers):
            _put(arrays, f"vocabulary/{kind}/{rank}/{layer}", tally)
    for kind, tally in (counts.occurrences or {}).items():
        _put(arrays, f"occurrences/{kind}", tally)
    about["arrays"] = len(arrays)
    arrays["about"] = np.array(json.dumps(about))
    with files.whole(path) as file:
        np.savez_compressed(file, **arrays)


def load(path) -> counts_lib.Counts:
    """Reads what `save` wrote.

    Raises:
      FileNotFoundError, ValueError: there is no such file, or it is not one of `save`'s.
    """
    return _read(path)[0]


def _read(path):
    """(Counts, key)."""
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file of counts")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop("about")))
        if about["format"] != _FORMAT or about["arrays"] != len(arrays):
            raise ValueError(f"format {about['format']}, {len(arrays)} arrays")
        return _from_arrays(about, arrays), about["key"]
    except Exception as error:  # a damaged zip raises nearly anything
        raise ValueError(f"{path}: not a file of routing counts (format {_FORMAT})") from error


def _from_arrays(about, arrays):
    info = about["info"]
    for name in ("layers", "near_ties"):
        info[name] = tuple(info[name])
    values = {name: array for name, array in arrays.items() if "/" not in name}
    vocabulary = occurrences = None
    if about["words"]:
        vocabulary, occurrences = {}, {}
        for name in arrays:
            kind_of, *rest = name.split("/")
            if rest[-1:] != ["keys"]:
                continue
            if kind_of == "occurrences":
                occurrences[rest[0]] = _get(arrays, f"occurrences/{rest[0]}")
            elif rest[2] == "0":
                vocabulary[rest[0], rest[1]] = tuple(
                    _get(arrays, f"vocabulary/{rest[0]}/{rest[1]}/{layer}")
                    for layer in range(len(info["layers"]))
                )
    return counts_lib.Counts(
        info=trace.TraceInfo(**info), folds=about["folds"],
        path_layers=tuple(tuple(pair) for pair in about["path_layers"]),
        vocabulary=vocabulary, occurrences=occurrences, **values,
    )  # fmt: skip


def _put(arrays, name, tally):
    arrays[f"{name}/keys"], arrays[f"{name}/counts"] = tally.keys, tally.counts


def _get(arrays, name):
    return tallies.Tally(arrays[f"{name}/keys"], arrays[f"{name}/counts"])
