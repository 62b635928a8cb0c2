"""Whether what was written is what was read: the bytes, every tensor, and what they compute.

    for claim in verification.verify(input, output):
        print("verified:", claim)

Nothing of what wrote the output is trusted: both sides are opened again, and neither the casts nor
the transpositions of `port` are used.
"""

import collections
import concurrent.futures
import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath

from olmoe_jax.checkpoints import manifest, reading, streamed
from olmoe_jax.porting import agreement, causes, families, sources, translation, transposing

WORKERS = 2  # threads, each with one slab of about 64 MB of both sides
WHOLE = 64 << 20  # bytes up to which an array is read whole to find out why it differs
_BLOCK, _CACHE_LINE = 256, 64  # rows and columns, bytes: as in `transposing`


def verify(input_path, output_path, *, announce=print) -> tuple[str, ...]:
    """Checks a port and returns what was checked, as sentences.

    In this order: the bytes against the hashes noted when they were written, of the output and, if
    it has any (a checkpoint of ours, a folder that `port` wrote), of the input; that both
    configs describe one architecture; every tensor of the input against its counterpart; where
    torch and transformers can be imported, one side is a Hugging Face folder and the model fits in
    memory, float32 logits and a greedy continuation. What could not be checked is a sentence too,
    with the reason. Memory: below 1 GB up to the logits; those take 9 bytes per parameter.

    Args:
      input_path, output_path: what was ported and what `port` made of it, of any kind that
        `olmoe_jax.load` takes.
      announce: called with lines that say what is going on.

    Raises:
      ValueError: something differs; it names the tensor, the first position and the likely cause.
      checkpoints.DamagedError: bytes of the input or the output are not those that were written.
    """
    source, target = sources.open_source(input_path), sources.open_source(output_path)
    if not target.config.model.router_bias:
        source = sources.without_biases(source)
    announce(f"verifying: {target.path}")
    noted = sources.has_hashes(source)
    return (
        *([_check_hashes(source, "the input ")] if noted else []),
        _check_hashes(target),
        _check_architecture(source, target),
        *_check_tensors(source, target),
        *agreement.check(source, target, announce),
    )


def _check_hashes(side, role=""):
    path = epath.Path(side.path)
    leaves = manifest.read(path)  # first: says whether the record itself is whole
    if side.folder is not None:
        sources.check_hashes(side)
    else:
        reading.check_hashes(path, reading.PARAMS, leaves)
    pieces = sum(len(leaf.pieces) for leaf in leaves.values())
    return (
        f"all bytes of {role}{path} have the hashes noted when they were "
        f"written ({pieces:,} pieces)"
    )


def _check_architecture(source, target):
    if differ := translation.differences(target.config.model, source.config.model):
        raise ValueError(
            f"{target.path}: its config describes another model than {source.path}: "
            f"{'; '.join(differ)}"
        )
    return f"the configs of {source.path} and {target.path} describe the same architecture"


def _check_tensors(source, target):
    """Compares every stored array, slab by slab; the claims, one per cast."""
    if differ := set(source.leaves) ^ set(target.leaves):
        raise ValueError(
            f"{target.path}: {len(differ)} arrays are only in it or only in {source.path} "
            f"({min(differ)}, …)"
        )
    slabs = [
        (name, start, stop)
        for name, (shape, kind) in source.leaves.items()
        for start, stop in streamed.slabs(tuple(shape), kind)
    ]
    views = _Views(source), _Views(target)
    kinds = {name: (source.leaves[name][1], target.leaves[name][1]) for name in source.leaves}
    bar = tqdm.tqdm(total=len(slabs), unit="slab", desc="verify", disable=None)

    def compare(slab):
        _compare(*views, slab)
        bar.update()

    with bar, concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(compare, slab) for slab in slabs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return _tensor_claims(source, kinds)


def _tensor_claims(source, kinds):
    """One sentence per pair of dtypes."""
    stored = {p.theirs: p.ours for p in source.parts} if source.folder else dict.fromkeys(kinds)
    counts = collections.Counter(kinds[ours or name] for name, ours in stored.items())
    claims = []
    for (own, kind), count in counts.items():
        if own == kind:
            how = "equals its counterpart in the output bit for bit"
        else:
            loss = "rounded to nearest even" if transposing.loses(own, kind) else "exact"
            how = f"cast to {kind} ({loss}) equals its counterpart in the output"
        claims.append(f"each of the {count:,} {own} tensors of the input {how}")
    return claims


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What is compared at a time: one expert, or rows of an array without experts.

    Attributes:
      name, index: the stored array and the expert, or None.
      array: [i, j] or [i] in our orientation; of a foreign side a view of its file.
      first: the array's first row in the whole piece.
    """

    name: str
    index: int | None
    array: np.ndarray
    first: int


class _Views:
    """Pieces of one side, and how a person finds them again."""

    def __init__(self, side):
        self.side, self._parts = side, families.by_array(getattr(side, "parts", ()))

    def pieces(self, name, start, stop) -> list[_Piece]:
        """The rows start..stop of a stored array."""
        if self.side.folder is None:
            rows = self.side.read(name, (slice(start, stop),))
            if rows.ndim < 3:
                return [_Piece(name, None, rows, start)]
            return [_Piece(name, start + i, row, 0) for i, row in enumerate(rows)]
        out = []
        for part in sorted(self._parts[name], key=lambda part: part.index or 0):
            if part.index is None:
                out.append(_Piece(name, None, self._read(part)[start:stop], start))
            elif start <= part.index < stop:
                out.append(_Piece(name, part.index, self._read(part), 0))
        return out

    def whole(self, name, index) -> np.ndarray:
        """One expert, or a whole array without experts."""
        rows = (0, self.side.leaves[name][0][0]) if index is None else (index, index + 1)
        return self.pieces(name, *rows)[0].array

    def place(self, name, index, position=None) -> str:
        """A piece, or one of its elements, by the name that this side has for it."""
        if self.side.folder is None:
            position = (*(() if index is None else (index,)), *(position or ()))
        else:
            part = next(p for p in self._parts[name] if p.index == index)
            name = part.theirs
            if position is None:
                position = (f"{part.start}:{part.start + part.shape[0]}",) if part.start else ()
            else:
                position = position[::-1] if part.transpose else position
                position = (part.start + position[0], *position[1:])
        return f"{name}[{', '.join(map(str, position))}]" if position else name

    def _read(self, part):
        rows = self.side.read_part(part)
        return rows.T if part.transpose else rows


def _compare(source, target, slab):
    """Raises ValueError where a slab of the two sides differs."""
    pairs = zip(source.pieces(*slab), target.pieces(*slab), strict=True)
    for want, got in pairs:
        if not _same(want.array, got.array):
            raise ValueError(_difference(source, target, want, got))


def _same(want, got) -> bool:
    """Whether `got` is `want`, bit for bit or, where the dtypes differ, cast."""
    if want.shape != got.shape:
        return False
    if want.ndim == 1:
        return not _unequal(want, got).any()
    rows, columns = want.shape
    width = columns if want.flags.c_contiguous and got.flags.c_contiguous else _BLOCK
    scratch = [np.empty((_BLOCK, _BLOCK + _CACHE_LINE // x.dtype.itemsize), x.dtype)
               for x in (want, got)]  # fmt: skip
    for i in range(0, rows, _BLOCK):
        for j in range(0, columns, width):
            blocks = []
            for array, room in zip((want, got), scratch, strict=True):
                block = array[i : i + _BLOCK, j : j + width]
                if not array.flags.c_contiguous:  # its columns are rows of the file: read those
                    room[: block.shape[1], : block.shape[0]] = block.T
                    block = room[: block.shape[1], : block.shape[0]].T
                blocks.append(block)
            if _unequal(*blocks).any():
                return False
    return True


def _unequal(want, got) -> np.ndarray:
    """Where `got` is not `want` cast to its dtype. A NaN that was cast may be any NaN."""
    if want.dtype == got.dtype:
        return causes.bits(want) != causes.bits(got)
    cast = causes.rounded(want, got.dtype.name)
    unequal = causes.bits(cast) != causes.bits(got)
    if unequal.any():
        unequal &= ~(np.isnan(cast) & np.isnan(got))
    return unequal


def _difference(source, target, want, got) -> str:
    name, index = want.name, want.index
    here = target.place(name, index)
    if want.array.shape != got.array.shape:
        return (
            f"{target.side.path}: {here} has shape {list(got.array.shape)}: expected "
            f"{list(want.array.shape)}"
        )
    kind = got.array.dtype.name
    unequal = _unequal(np.ascontiguousarray(want.array), np.ascontiguousarray(got.array))
    at = tuple(np.argwhere(unequal)[0].tolist())
    position = (want.first + at[0], *at[1:])
    wanted = causes.rounded(want.array[at].reshape(1), kind)[0]
    cast = "" if want.array.dtype == got.array.dtype else f" cast to {kind}"
    layer = re.match(r"layers/(\d+)/", name)
    where = [f"layer {int(layer[1])}"] if layer else []
    where += [f"expert {index}"] if index is not None else []
    where = f" ({', '.join(where)})" if where else ""
    return (
        f"{target.side.path}: {here}{where} is not what {source.side.path} has; likely cause: "
        f"{_cause(source, target, want, got)}; first at {target.place(name, index, position)}, "
        f"{_number(got.array[at])} instead of {_number(wanted)}, "
        f"{source.place(name, index, position)}{cast}; {unequal.sum():,} of "
        f"{unequal.size:,} values differ"
    )


def _number(value) -> str:
    """A floating-point number such that no two look alike."""
    integer = int(np.asarray(value).reshape(1).view(f"u{value.dtype.itemsize}")[0])
    return f"{float(value):.9g} (0x{integer:0{2 * value.dtype.itemsize}x})"


def _cause(source, target, want, got) -> str:
    name, index, kind = want.name, want.index, got.array.dtype.name
    shape, _ = source.side.leaves[name]
    shape = shape if index is None else shape[1:]
    wanted, found = want.array, got.array
    if np.prod(shape) * jnp.dtype(kind).itemsize <= WHOLE:
        wanted, found = source.whole(name, index), target.whole(name, index)
    found = np.ascontiguousarray(found)
    return causes.of_tensor(
        causes.rounded(np.ascontiguousarray(wanted), kind),
        found,
        head_dim=source.side.config.model.head_size,
        others=_others(source, found),
    )


def _others(source, found):
    """(place, array) of the source's other arrays of this shape, or turned, that begin alike."""
    firsts = [causes.bits(x[:1]).tobytes() for x in (found, np.ascontiguousarray(found.T))]
    for name, (shape, kind) in source.side.leaves.items():
        has_experts = len(shape) == 3
        if tuple(shape[has_experts:]) not in (found.shape, found.shape[::-1]):
            continue
        slabs = streamed.slabs(tuple(shape), kind) if has_experts else [(0, shape[0])]
        for piece in (p for slab in slabs for p in source.pieces(name, *slab)):
            first = causes.rounded(np.ascontiguousarray(piece.array[:1]), found.dtype.name)
            if causes.bits(first).tobytes() in firsts:
                array = causes.rounded(np.ascontiguousarray(piece.array), found.dtype.name)
                yield source.place(name, piece.index), array
