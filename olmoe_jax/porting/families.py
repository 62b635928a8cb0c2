"""Which part of which foreign tensor is which part of which stored array, by the tables.

`tables` has the families, `parts` one model's correspondence, which reading and writing share;
`match` holds it against what a folder has.
"""

import collections
import dataclasses
import fnmatch
import re

import numpy as np

from olmoe_jax import checkpoints
from olmoe_jax.checkpoints import layout
from olmoe_jax.porting.tables import FAMILIES, TRAINING, UNSUPPORTED, Family, Row

__all__ = [
    "FAMILIES", "TRAINING", "UNSUPPORTED", "Family", "Part", "Row",
    "by_array", "match", "parts", "tensor_shapes",
]  # fmt: skip

_LAYER = re.compile(r"layers/(\d+)/")
_TIED = "the config ties the head to the embedding: a tensor of its own must equal that one"
_EDGES = [{row.ours: row.theirs for row in f.rows} for f in (*FAMILIES.values(), TRAINING)]
_HEADS = {its["lm_head"]: its["embedding"] for its in _EDGES}  # names, in every format


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of a foreign tensor that are a stored array, or one expert of it.

    Attributes:
      theirs: name of the foreign tensor.
      start: first row (along axis 0) of the part in it.
      shape: of the part, as it lies in the foreign tensor.
      ours: name of the stored array.
      index: expert, along axis 0 of the stored array; None: the array as a whole.
      transpose: the part is the transposed array.
    """

    theirs: str
    start: int
    shape: tuple[int, ...]
    ours: str
    index: int | None
    transpose: bool


def parts(family, model_config) -> tuple[Part, ...]:
    """The parts of a model, layer by layer, in the order of the family's rows.

    Every element of every stored array lies in exactly one part, and the parts of a foreign tensor
    follow one another without a gap.

    Raises:
      ValueError: the family has no place for an array of this model, or its rows contradict each
        other.
    """
    stored = layout.to_stored(checkpoints.abstract_params(model_config), model_config)
    shapes = {name: leaf.shape for name, leaf in layout.flatten(stored).items()}
    places = collections.defaultdict(dict)  # row.ours → {layer: stored name}
    for name in shapes:
        layer = _LAYER.match(name)
        template = _LAYER.sub("layers/{layer}/", name)
        places[template][int(layer[1]) if layer else None] = name
    found, ends = [], collections.Counter()
    for row, layer in _in_order(family.rows, model_config.num_layers):
        if layer not in places[row.ours]:
            continue
        for part in _parts_of_row(row, layer, places[row.ours][layer], shapes, ends):
            ends[part.theirs] += part.shape[0]
            found.append(part)
    _check(family, found, shapes)
    return tuple(found)


def _in_order(rows, num_layers):
    """(row, layer or None): rows without a layer as they stand, the others layer by layer."""
    single = [(row, None) for row in rows if "{layer}" not in row.ours]
    layered = [row for row in rows if "{layer}" in row.ours]
    return single + [(row, layer) for layer in range(num_layers) for row in layered]


def _parts_of_row(row, layer, ours, shapes, ends):
    shape = shapes[ours]
    experts = len(shape) == 3
    for index in range(shape[0]) if experts else (None,):
        theirs = row.theirs.format(layer=layer, expert=index)
        inner = shape[1:] if experts else shape
        inner = inner[::-1] if row.transpose else inner
        yield Part(theirs, ends[theirs], inner, ours, index, row.transpose)


def _check(family, found, shapes):
    """Each stored array whole and once; each foreign tensor of one layer and one width."""
    where = f"the table of {family.name}"
    covered = collections.Counter((part.ours, part.index) for part in found)
    wanted = set()
    for name, shape in shapes.items():
        wanted |= {(name, i) for i in range(shape[0])} if len(shape) == 3 else {(name, None)}
    if missing := sorted({name for name, _ in wanted - set(covered)}):
        raise ValueError(
            f"{where} has no place for {len(missing)} of the model's {len(shapes)} arrays "
            f"({_some(missing)}): a model with them cannot be a folder of that kind"
        )
    if twice := [name for (name, _), count in covered.items() if count > 1]:
        raise ValueError(f"{where} names {twice[0]} more than once")
    by_tensor = collections.defaultdict(list)
    for part in found:
        by_tensor[part.theirs].append(part)
    for theirs, its in by_tensor.items():
        layers = {_LAYER.match(part.ours) and _LAYER.match(part.ours)[1] for part in its}
        if len({part.shape[1:] for part in its}) > 1 or len(layers) > 1:
            names = " and ".join(dict.fromkeys(part.ours for part in its))
            raise ValueError(f"{where} puts {names} into one tensor {theirs}: they do not fit")


def by_array(parts) -> dict[str, list[Part]]:
    """{stored name: its parts}, in the order of the parts."""
    found = {}
    for part in parts:
        found.setdefault(part.ours, []).append(part)
    return found


def tensor_shapes(parts) -> dict[str, tuple[int, ...]]:
    """{foreign name: shape} of the tensors that `parts` make up, in the order of the parts."""
    shapes = {}
    for part in parts:
        shapes[part.theirs] = part.start + part.shape[0], *part.shape[1:]
    return shapes


def match(parts, folder_tensors, ignored, where, *, read=None, files=None):
    """Checks that a folder has exactly the tensors that its config asks for.

    A head beside tied embeddings may be there if it has the bits of the embedding (the `state_dict`
    of a tied model has both); any other is unknown: no reader would use it.

    Args:
      parts: as `parts` returns them.
      folder_tensors: {name: shape}.
      ignored: patterns of names that may be there besides.
      where: the folder, for the message.
      read: function from a name to its array, by which such a head is compared; without it, or
        where there is none, every head beside tied embeddings is unknown.
      files: {name: file}, for the message.

    Raises:
      ValueError: tensors are missing, unknown or of another shape.
    """
    shapes = tensor_shapes(parts)
    missing = [name for name in shapes if name not in folder_tensors]
    unknown = [
        name
        for name in folder_tensors
        if name not in shapes and not any(fnmatch.fnmatchcase(name, p) for p in ignored)
    ]
    wrong = [
        f"{name} {list(folder_tensors[name])}, expected {list(shape)}{_inside(name, files)}"
        for name, shape in shapes.items()
        if name in folder_tensors and tuple(folder_tensors[name]) != shape
    ]
    if read is not None and not missing and not wrong:  # else there may be nothing to compare with
        unknown = [name for name in unknown if not _copies_embedding(name, shapes, read)]
    located = [name + _inside(name, files) for name in unknown]
    problems = {"missing": missing, "unknown": located, "of another shape": wrong}
    if not any(problems.values()):
        return
    found = "; ".join(f"{len(v)} {kind} ({_some(v)})" for kind, v in problems.items() if v)
    if any(_HEADS.get(name) in shapes for name in unknown):
        found = f"{found}; {_TIED}"
    raise ValueError(f"{where}: the tensors are not those that its config asks for: {found}")


def _inside(name, files):
    """Where a tensor is, for a message, if that is known."""
    return f" in {files[name]}" if files and name in files else ""


def _copies_embedding(name, shapes, read):
    """Whether a tensor without a place is a head with the bits of the embedding."""
    if _HEADS.get(name) not in shapes:
        return False
    head, embedding = read(name), read(_HEADS[name])
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        return False
    bits = f"u{head.dtype.itemsize}"  # a NaN is no different from itself
    rows = zip(head, embedding, strict=True)
    return all(np.array_equal(one.view(bits), other.view(bits)) for one, other in rows)


def _some(names):
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
