"""Traces of other programs in files: arrays, CSV, JSON lines. Ours are written in the same forms.

Arrays: expert ids [tokens, layers, k], as vLLM (`enable_return_routed_experts`:
`outputs[0].routed_experts`) and SGLang (`return_routed_experts`: int32 in base64) give them for a
request, in one of

    NAME.npy   the ids alone
    NAME.npz   expert_ids (or routed_experts) and any of
                 weights [tokens, layers, k], router_logits [tokens, layers, experts],
                 input_ids, predicted_ids, next_ids, documents, losses [tokens],
                 layers [layers]: their numbers in the model, info: a TraceInfo as JSON

Layers in which every id of every token is 0 are placeholders for dense layers, and left out.

CSV: a row per token and layer, tokens in order and in each the layers in one order;
columns `layer`, `expert_0` … `expert_{k-1}`, and any of `weight_0` …, and of `document`,
`input_id`, `predicted_id`, `next_id`, `loss`, which are the same in all rows of a token.

JSON lines: an object per token with `expert_ids` (per layer k ids), and any of
`weights` (of the same form), `document`, `input_id`, `predicted_id`, `next_id`, `loss`. A first
line {"trace": TraceInfo as JSON} says the rest; ours have it.

Everywhere -1 means that there is none. Files are read whole. What a file does not say of itself is
given as keywords of `read`, which are those of `foreign.make`. One always has to be known from
somewhere: `num_experts`, as ids alone do not say how many experts were never chosen.
"""

import csv
import dataclasses
import json
import os
import pathlib
import zipfile
import zlib

import numpy as np

from olmoe_jax import files
from olmoe_jax.analysis import foreign, trace, trace_files

_IDS = ("expert_ids", "routed_experts")
# Field of Block → its name in a row of CSV or JSON lines.
_COLUMNS = {
    "documents": "document", "input_ids": "input_id", "predicted_ids": "predicted_id",
    "next_ids": "next_id", "losses": "loss",
}  # fmt: skip


def read_arrays(path, **options) -> trace.MemoryTrace:
    """The trace in an .npy or .npz file.

    Args:
      options: of `foreign.make`; what the file says itself goes before.

    Raises:
      FileNotFoundError: no such file. ValueError: it is not such a file, or see `foreign.make`.
    """
    path = _existing(path)
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {n: loaded[n] for n in loaded.files} if path.suffix == ".npz" else None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a file of arrays that numpy.load reads ({error})") from None
    if arrays is None:
        return foreign.make(loaded, where=str(path), **options)
    known = {*_IDS, "weights", "router_logits", *foreign.BY_TOKEN, "losses", "layers", "info"}
    if unknown := sorted(arrays.keys() - known):
        raise ValueError(
            f"{path}: holds {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    if "info" in arrays:
        options["info"] = _parse_info(str(arrays.pop("info")), path)
    if "layers" in arrays:
        arrays["layers"] = tuple(foreign.integers(arrays["layers"], "layers", path).tolist())
    found = [arrays.pop(name) for name in _IDS if name in arrays]
    if len(found) > 1:
        raise ValueError(f"{path}: holds both {' and '.join(_IDS)}")
    return foreign.make(found[0] if found else None, where=str(path), **{**options, **arrays})


def read_json_lines(path, **options) -> trace.MemoryTrace:
    """The trace in a file of JSON lines.

    Raises:
      FileNotFoundError: no such file. ValueError: a line is not as it must be, or see
        `foreign.make`.
    """
    path = _existing(path)
    rows, info = [], options.pop("info", None)
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict) or not {"trace", "expert_ids"} & row.keys():
                raise ValueError(
                    f'{path}, line {number}: expected an object with "expert_ids" per layer'
                )
            if number == 1 and "trace" in row:
                info = _parse_info(json.dumps(row["trace"]), path)
            else:
                rows.append((number, row))
    if not rows:
        raise ValueError(f"{path}: holds no token")
    first, arrays = rows[0][1], {}
    names = {"expert_ids": "expert_ids", "weights": "weights", **_COLUMNS}
    for field, name in names.items():
        if name not in first:
            continue
        shape = _shape(first[name])
        for number, row in rows:
            if name not in row or shape is None or _shape(row[name]) != shape:
                raise ValueError(
                    f"{path}, line {number}: {name} is missing, ragged or of another shape than in "
                    f"the first token ({shape})"
                )
        arrays[field] = np.array([
            np.nan if field == "losses" and row[name] is None else row[name] for _, row in rows
        ])  # fmt: skip
    return foreign.make(where=str(path), info=info, **{**options, **arrays})


def read_csv(path, **options) -> trace.MemoryTrace:
    """The trace in a CSV file.

    Raises:
      FileNotFoundError: no such file. ValueError: columns or rows are not as they must be, or see
        `foreign.make`.
    """
    path = _existing(path)
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header, rows = next(reader, []), list(reader)
    experts, weights = (_numbered(header, prefix) for prefix in ("expert_", "weight_"))
    if "layer" not in header or not experts:
        raise ValueError(f"{path}: columns {', '.join(header)}: expected layer, expert_0, …")
    if len(weights) not in (0, len(experts)):
        raise ValueError(f"{path}: {len(experts)} columns expert_… but {len(weights)} weight_…")
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(f"{path}, line {number}: {len(row)} values, expected {len(header)}")
    if not rows:
        raise ValueError(f"{path}: holds no token")

    def column(name, kind=np.int64):
        at = header.index(name)
        values = [row[at] for row in rows]
        try:
            if kind == np.float64:
                values = [value or "nan" for value in values]
            return np.array(values, kind)
        except ValueError as error:
            raise ValueError(f"{path}: column {name}: {error}") from None

    layer = column("layer")
    count = next((n for n in range(1, len(layer)) if layer[n] in layer[:n]), len(layer))
    expected = np.resize(layer[:count], -(-len(layer) // count) * count)
    found = np.append(layer, np.full(len(expected) - len(layer), -1))
    if (wrong := found != expected).any():
        bad = int(wrong.argmax())
        what = f"layer {layer[bad]}" if bad < len(layer) else "the end of the file"
        raise ValueError(
            f"{path}, line {bad + 2}: {what}: every token must have the layers of the first one, "
            f"{', '.join(map(str, layer[:count]))}"
        )
    stack = lambda names, kind: np.stack([column(n, kind) for n in names], -1)  # noqa: E731
    arrays = {"expert_ids": stack(experts, np.int64).reshape(-1, count, len(experts))}
    if weights:
        arrays["weights"] = stack(weights, np.float64).reshape(-1, count, len(weights))
    for field, name in _COLUMNS.items():
        if name in header:
            values = column(name, np.float64 if field == "losses" else np.int64).reshape(-1, count)
            if not np.array_equal(values, np.repeat(values[:, :1], count, 1), equal_nan=True):
                raise ValueError(f"{path}: column {name} differs between the layers of a token")
            arrays[field] = values[:, 0]
    options.setdefault("layers", tuple(layer[:count].tolist()))
    return foreign.make(where=str(path), **{**options, **arrays})


def write_arrays(path, source):
    """A Trace as .npz, or its expert ids as .npy, by the name's end."""
    block, path = trace.join(list(source.blocks())), _output(path)
    if path.suffix == ".npy":
        content = lambda file: np.save(file, block.expert_ids)  # noqa: E731
    else:
        arrays = {f.name: getattr(block, f.name) for f in dataclasses.fields(block)}
        arrays = {name: array for name, array in arrays.items() if array is not None}
        arrays["layers"] = np.array(source.info.layers)
        arrays["info"] = np.array(json.dumps(dataclasses.asdict(source.info)))
        content = lambda file: np.savez_compressed(file, **arrays)  # noqa: E731
    with files.whole(path) as file:
        content(file)


def write_json_lines(path, source):
    """A Trace as JSON lines, its TraceInfo in the first."""
    with files.whole(_output(path), "w", encoding="utf-8") as file:
        file.write(json.dumps({"trace": dataclasses.asdict(source.info)}) + "\n")
        for block in source.blocks():
            for row in _rows(block):
                file.write(json.dumps(row) + "\n")


def write_csv(path, source):
    """A Trace as CSV. What TraceInfo says beside the layers is lost."""
    k = source.info.num_experts_per_token
    with files.whole(_output(path), "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        for number, block in enumerate(source.blocks()):
            if not number:
                has = [n for f, n in _COLUMNS.items() if getattr(block, f) is not None]
                kinds = ("expert",) if block.weights is None else ("expert", "weight")
                header = [f"{kind}_{i}" for kind in kinds for i in range(k)]
                writer.writerow([*has, "layer", *header])
            for row in _rows(block):
                for i, layer in enumerate(source.info.layers):
                    weights = [] if block.weights is None else row["weights"][i]
                    shared = ["" if row[n] is None else row[n] for n in has]
                    writer.writerow([*shared, layer, *row["expert_ids"][i], *weights])


READERS = {
    ".npy": read_arrays, ".npz": read_arrays, ".csv": read_csv, ".jsonl": read_json_lines,
}  # fmt: skip
WRITERS = {
    ".npy": write_arrays, ".npz": write_arrays, ".csv": write_csv, ".jsonl": write_json_lines,
}  # fmt: skip


def read(path, **options) -> trace.Trace:
    """The trace at `path`: a directory of ours, or a file in one of the forms above.

    Args:
      options: of `foreign.make`, for files.

    Raises:
      FileNotFoundError: nothing is there. ValueError: it is none of the forms, or see its reader.
    """
    path = pathlib.Path(os.path.expanduser(path))
    if path.is_dir():
        return trace_files.open_trace(path)
    return _by_suffix(READERS, path)(path, **options)


def write(path, source):
    """Writes a Trace to the file `path`, in the form that its name's end says.

    Raises:
      ValueError: no form has that end. FileExistsError: the file is there.
    """
    _by_suffix(WRITERS, pathlib.Path(path))(path, source)


def _by_suffix(table, path):
    if path.suffix not in table:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(table)}")
    return table[path.suffix]


def _existing(path):
    path = pathlib.Path(os.path.expanduser(path))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def _output(path):
    path = pathlib.Path(os.path.expanduser(path))
    if path.exists():
        raise FileExistsError(f"{path}: exists; take another name or delete it")
    return path


def _parse_info(text, path):
    try:
        return trace_files.info_of(json.loads(text))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: its TraceInfo is damaged ({error})") from None


def _shape(value):
    """Of nested lists; None if they are ragged."""
    try:
        return np.shape(value)
    except ValueError:
        return None


def _numbered(header, prefix):
    """The columns prefix0, prefix1, … that are there, in that order."""
    count = sum(name.startswith(prefix) for name in header)
    names = [f"{prefix}{i}" for i in range(count)]
    return names if set(names) <= set(header) else []


def _rows(block):
    """Each token of a block as JSON values; a loss that is not known is None."""
    columns = {n: getattr(block, f) for f, n in _COLUMNS.items() if getattr(block, f) is not None}
    for t in range(len(block)):
        row = {name: column[t].item() for name, column in columns.items()}
        if "loss" in row and np.isnan(row["loss"]):
            row["loss"] = None
        row["expert_ids"] = block.expert_ids[t].tolist()
        if block.weights is not None:
            row["weights"] = block.weights[t].tolist()
        yield row
