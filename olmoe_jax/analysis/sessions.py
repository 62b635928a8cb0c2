"""A model's checkpoints, recorded and counted one by one, for `analyses.find`.

Without kept traces, CHECKPOINT.counted holds what stays of a checkpoint until all are counted: the
counts of every domain and its agreement with the last checkpoint and the one before.
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil

import numpy as np

from olmoe_jax.analysis import analyses, counts_files, recording, saturation
from olmoe_jax.checkpoints import naming

_COUNTED = ".counted"
_OVERLAPS, _ENDS = "overlaps.npz", ("final", "neighbour")


def record(checkpoints, texts, folder, *, keep=True, total_steps=None, announce=print, **options):
    """Records all checkpoints of a model.

    Args:
      checkpoints: `suites.Checkpoint`s of one model, in order of training.
      texts: `texts.Text`s.
      folder: of the traces: FOLDER/CHECKPOINT/DOMAIN, with their counts.
      keep: all traces. Otherwise the last checkpoint is recorded first, and the traces of another
        one are deleted when it and the next have been compared; its counts stay, so that a stopped
        call goes on behind it. They and the last one's traces are for the caller to delete.
      total_steps: of the whole training, for the saturation.
      announce: called with lines for a person.
      options: of `recording.record`.
    Returns:
      (analyses.Recording of each checkpoint, saturation.Saturation or None: with all traces kept
      `analyses.find` computes it).
    """
    folder, said = pathlib.Path(folder), set()

    def announce_once(line):
        if line not in said:  # every checkpoint reads the same text
            said.add(line)
            announce(line)

    def place(checkpoint):
        return folder / (checkpoint.name or "model")

    def one(checkpoint):
        announce(f"recording {checkpoint.model} {checkpoint.name}".rstrip())
        found = recording.record(
            checkpoint, texts, place(checkpoint), announce=announce_once, **options
        )
        traces = {each.info.domain: each.trace for each in found}
        # Which tokens went where is asked of the last one only, and is half of the counting.
        is_last = checkpoint is checkpoints[-1]
        parts = {
            domain: counts_files.of_trace(trace, vocabulary=is_last)
            for domain, trace in traces.items()
        }
        return analyses.Recording(parts, traces)

    if keep or len(checkpoints) == 1:
        return [one(checkpoint) for checkpoint in checkpoints], None
    for leftover in folder.glob(f"*{naming.DELETED}"):
        shutil.rmtree(leftover)
    *earlier, last = checkpoints
    keys = _keys([recording.identity(each, texts, **options) for each in checkpoints])
    known = [_read(place(each), key) for each, key in zip(earlier, keys, strict=True)]
    final, found = one(last), []
    follower = saturation.Follower(final.traces.values())
    for i, checkpoint in enumerate(earlier):
        traces = None
        # The next one is compared with the traces of this one, unless it has been already.
        if known[i] is None or known[i + 1 : i + 2] == [None]:
            recorded = one(checkpoint)
            parts, traces = recorded.parts, list(recorded.traces.values())
        if known[i] is None:
            _write(place(checkpoint), keys[i], parts, follower.add(traces))
        else:
            parts, overlaps = known[i]
            follower.add_known(next(iter(parts.values())).info, overlaps, traces)
            if traces is None:
                announce(f"{checkpoint.model} {checkpoint.name}: was counted before")
                delete(place(checkpoint))
        found.append(analyses.Recording(parts, {}))
        if i:
            delete(place(earlier[i - 1]))
    delete(place(earlier[-1]))
    return [*found, final], follower.result(total_steps=total_steps)


def delete(folder) -> None:
    """Removes a folder, if there is one; a kill in between leaves nothing that looks whole."""
    folder = pathlib.Path(folder)
    leftover = folder.with_name(folder.name + naming.DELETED)
    if leftover.exists():
        shutil.rmtree(leftover)
    if folder.exists():
        folder.rename(leftover)
        shutil.rmtree(leftover)


def _keys(identities):
    """Of each checkpoint but the last: what its counts and overlaps depend on, as SHA-256."""
    out = []
    for before, own in zip([None, *identities], identities[:-1], strict=False):
        content = json.dumps([before, own, identities[-1]])
        out.append(hashlib.sha256(content.encode()).hexdigest())
    return out


def _counted(place):
    return place.with_name(place.name + _COUNTED)


def _write(place, key, parts, overlaps):
    """Keeps the Counts of a checkpoint's domains and its Overlaps, whole or not at all."""
    path = _counted(place)
    partial = path.with_name(path.name + naming.PARTIAL)
    delete(partial)
    for number, part in enumerate(parts.values()):
        counts_files.save(partial / f"{number}.npz", part, key=key)
    arrays = {"key": np.array(key), "domains": np.array(len(parts))}
    for name, overlap in zip(_ENDS, overlaps, strict=True):
        if overlap is not None:
            for field in dataclasses.fields(overlap):
                arrays[f"{name}/{field.name}"] = getattr(overlap, field.name)
    arrays["arrays"] = np.array(len(arrays) + 1)  # a damaged zip may hide some
    np.savez_compressed(partial / _OVERLAPS, **arrays)
    delete(path)
    partial.rename(path)


def _read(place, key):
    """({domain: Counts}, Overlaps) that `_write` kept; None if there are none of this key."""
    path, names = _counted(place), [field.name for field in dataclasses.fields(saturation.Overlap)]
    try:
        with np.load(path / _OVERLAPS, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if str(arrays["key"]) != key or len(arrays) != int(arrays["arrays"]):
            return None
        parts = [counts_files.load(path / f"{i}.npz") for i in range(int(arrays["domains"]))]
        overlaps = tuple(
            saturation.Overlap(**{n: arrays[f"{one}/{n}"] for n in names})
            if f"{one}/{names[0]}" in arrays
            else None
            for one in _ENDS
        )
    except Exception:  # a damaged zip raises nearly anything
        return None
    return {part.info.domain: part for part in parts}, overlaps
