"""`port`: weights from one form to another, streamed, hashed, complete or absent."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import threading
import time

import jax.numpy as jnp
import numpy as np
import tqdm
import yaml
from etils import epath

from olmoe_jax import config as config_lib
from olmoe_jax import machine
from olmoe_jax.checkpoints import manifest, naming, streamed
from olmoe_jax.data import tokenizer as tokenizer_lib
from olmoe_jax.porting import (
    configs,
    families,
    folders,
    safetensors,
    sources,
    targets,
    tokenizer_files,
    translation,
    transposing,
)

ORBAX, HUGGING_FACE, OLMO = sources.ORBAX, folders.HUGGING_FACE, folders.OLMO
TO = (ORBAX, HUGGING_FACE, OLMO)
WORKERS = 2  # threads; each holds one slab (about 64 MB) before and after its transposition
CONFIG_NAME = {HUGGING_FACE: "config.json", OLMO: "config.yaml"}


@dataclasses.dataclass(frozen=True)
class Result:
    """What a port did.

    Attributes:
      path: the directory that is there now.
      tensors: arrays written (in the target's terms), and their bytes.
      bytes_kept: of them, bytes that an interrupted run had already written.
      casts: lines, one per cast of dtypes that took place.
      warnings: lines: NaN found, other programs that would compute something else.
      phases: seconds by what was done, summed over threads.
    """

    path: str
    tensors: int
    bytes: int
    bytes_kept: int
    seconds: float
    casts: tuple[str, ...]
    warnings: tuple[str, ...]
    phases: dict[str, float]


def port(input, output, *, to, dtype=None, strict=False, announce=print) -> Result:
    """Writes the model in `input` to the new directory `output`.

    Args:
      input: a Hugging Face folder, a checkpoint of the original training code (config.yaml beside
        its weights), a run's workdir (the newest checkpoint), one checkpoint, or a ported one.
      to: "orbax", "huggingface" or "olmo" (the original training format).
      dtype: "float32", "bfloat16", or None: as in the source.
      strict: refuse weights with NaN, before anything is written.
      announce: called with lines for a person.

    Raises:
      FileNotFoundError, FileExistsError, ValueError: input, output or settings do not fit; said
        before the output is touched.
      OSError: the disk is too small.
    """
    start = time.monotonic()
    output = pathlib.Path(os.path.expanduser(output)).absolute()
    if output.exists():
        raise FileExistsError(f"{output}: is there already; delete it or name another --output")
    if dtype is not None and dtype not in config_lib.DTYPE_NAMES:
        raise ValueError(f"dtype {dtype!r}: must be one of {', '.join(config_lib.DTYPE_NAMES)}")
    source = sources.open_source(input)
    if output.is_relative_to(os.path.abspath(source.path)):
        raise ValueError(f"{output}: lies in the input {source.path}; name another --output")
    if to != ORBAX:
        source = sources.without_biases(source)
    leaves = {n: (shape, dtype or own) for n, (shape, own) in source.leaves.items()}
    foreign = None if to == ORBAX else _describe(source, to, dtype, leaves)
    total = sum(safetensors.num_bytes(kind, shape) for shape, kind in leaves.values())
    check_disk(output, total)
    warnings = list(foreign.warnings) if foreign else []
    casts = _casts(source.leaves, dtype)
    for line in (*casts, *warnings):
        announce(line)
    if strict:
        _refuse_nan(source)
    state = hashlib.sha256(json.dumps(source.state()).encode()).hexdigest()
    job = {"input": str(source.path), "state_of_input": state, "to": to, "dtype": dtype}
    if foreign is None:
        step = naming.parse_name(source.path.name)
        target = targets.Orbax(output, source, dtype=dtype, step=step, job=job)
    else:
        target = targets.Foreign(
            output, parts=foreign.parts, leaves=leaves, files=foreign.files, plan=foreign.plan,
            job=job,
        )  # fmt: skip
    with target:
        written, nan, phases = stream(source, target, leaves, total)
        begin = time.monotonic()
        target.finish()
        phases["finish"] = time.monotonic() - begin
    if nan:
        first = ", ".join(_in_source(source, name) for name in sorted(nan)[:3])
        warnings.append(f"warning: {len(nan)} arrays hold NaN: {first}")
        announce(warnings[-1])
    count = len(leaves) if foreign is None else len({p.theirs for p in foreign.parts})
    return Result(
        str(output), count, total, total - written, time.monotonic() - start, tuple(casts),
        tuple(warnings), phases,
    )  # fmt: skip


def revisions(input) -> list[tuple[str, pathlib.Path]]:
    """(name, path) of the models in a folder of revisions (`step5000-tokens20B/`, …), by step.

    Empty if `input` is a model itself, or a run's workdir.
    """
    path = pathlib.Path(os.path.expanduser(input))
    is_model = folders.is_folder(path) or naming.is_complete(path)
    if is_model or not path.is_dir() or (path / naming.CHECKPOINTS).is_dir():
        return []
    found = [p for p in path.iterdir() if p.is_dir() and naming.parse_name(p.name) is not None]
    return [(p.name, p) for p in sorted(found, key=lambda p: naming.parse_name(p.name))]


@dataclasses.dataclass(frozen=True)
class _Description:
    """A foreign folder to be written: its parts, small files, Plan and warnings."""

    parts: tuple
    files: dict
    plan: sources.Plan
    warnings: tuple


def _describe(source, to, dtype, leaves):
    """The _Description of `source` as a folder in format `to`."""
    files, name, cast_to = dict(source.files), CONFIG_NAME[to], dtype or source.cast_to
    if source.format == to and (cast_to is None or to == OLMO):  # config.yaml names no dtype
        config = _parse(to, files[name])
    else:
        for other in CONFIG_NAME.values():
            if other != name:
                files.pop(other, None)
        if source.format == to:
            config = configs.with_dtype(_parse(to, files[name]), cast_to)
        elif to == OLMO:
            config = configs.write_training(source.config.model, **_token_ids(source))
        else:
            config, more = _new_hugging_face(source, leaves)
            files |= more
        files[name] = _dump(to, config)
    read = configs.read if to == HUGGING_FACE else configs.read_training
    family, model_config = read(config, f"the {name} to be written")
    if lacking := translation.differences(source.config.model, model_config):
        raise ValueError(f"{name} cannot say what this model computes: here {'; '.join(lacking)}")
    parts = families.parts(family, model_config)
    plan = source.plan if source.format == to and dtype is None else None
    if plan is None:
        shapes = families.tensor_shapes(parts)
        dtypes = {}
        for part in parts:
            kind = leaves[part.ours][1]
            if dtypes.setdefault(part.theirs, kind) != kind:
                raise ValueError(
                    f"{part.theirs} holds arrays of {dtypes[part.theirs]} and of {kind} "
                    f"({part.ours}) in this format: pass --dtype to make them one"
                )
        plan = targets.make_plan(shapes, dtypes, format=to)
    warnings = ()
    if to == HUGGING_FACE:
        text = files.get("tokenizer.json")
        warnings = configs.reader_warnings(family, model_config, text)
    return _Description(parts, files, plan, tuple(f"warning: {w}" for w in warnings))


def _new_hugging_face(source, leaves):
    """(config.json as a dict, {name: bytes} of the other small files) of a folder that has none."""
    kinds, ids = collections.Counter(kind for _, kind in leaves.values()), _token_ids(source)
    config = configs.write(source.config.model, dtype=kinds.most_common(1)[0][0], **ids)
    generation = (json.dumps(ids, indent=2) + "\n").encode()
    files = (
        {} if "generation_config.json" in source.files else {"generation_config.json": generation}
    )
    return config, files


def _token_ids(source):
    """{"eos_token_id": …, "pad_token_id": …} by the source's config, else by its tokenizer."""
    for to, name in CONFIG_NAME.items():
        if name in source.files:
            return configs.token_ids(_parse(to, source.files[name]))
    if source.format is None and "tokenizer.json" in source.files:  # of a model trained here
        tokenizer = tokenizer_lib.Tokenizer(source.files["tokenizer.json"])
        return tokenizer_files.token_ids(tokenizer)
    return {}


def stream(source, target, leaves, total, *, description="port"):
    """Moves every pending slab and shows a progress bar.

    Args:
      source: has `read(name, window)`, as `sources.Checkpoint`.
      target: has `pending()` and `write(name, start, array)`, as `targets.Orbax`.
      leaves: {stored name: (shape, dtype name)} as they are to be written.
      total: bytes of all of them.
      description: of the progress bar.

    Returns:
      (bytes written, names with NaN, {phase: seconds summed over threads}).
    """
    pending, lock = target.pending(), threading.Lock()
    phases, nan, written = collections.Counter(), set(), 0
    sizes = {
        name: safetensors.num_bytes(kind, shape) // max(shape[0], 1)
        for name, (shape, kind) in leaves.items()
    }
    work = sum((stop - start) * sizes[name] for name, start, stop in pending)

    def move(slab):
        name, start, stop = slab
        times = [time.monotonic()]
        array = source.read(name, (slice(start, stop),))
        times.append(time.monotonic())
        bad = _has_nan(array)
        wanted = jnp.dtype(leaves[name][1])
        if array.dtype != wanted:
            cast = np.empty(array.shape, wanted)
            transposing.copy(array, cast, transpose=False)
            array = cast
        times.append(time.monotonic())
        target.write(name, start, array)
        times.append(time.monotonic())
        with lock:
            for phase, a, b in zip(("read", "check", "write"), times[:-1], times[1:], strict=True):
                phases[phase] += b - a
            if bad:
                nan.add(name)
        return (stop - start) * sizes[name]

    bar = tqdm.tqdm(
        total=total, initial=total - work, unit="B", unit_scale=True, desc=description,
        disable=None,
    )  # fmt: skip
    with bar, concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(move, slab) for slab in pending]
        try:
            for future in concurrent.futures.as_completed(futures):
                written += future.result()
                bar.update(written - bar.n + total - work)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return written, nan, dict(phases)


def _has_nan(array) -> bool:
    """Whether an array of floats holds NaN; by its bits, as NumPy is slow in bfloat16."""
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    sign = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    infinity = np.array(np.inf, array.dtype).view(bits.dtype)
    block = 1 << 18  # stays in the cache
    return any(
        (bits[i : i + block] & sign).max(initial=0) > infinity for i in range(0, bits.size, block)
    )


def _refuse_nan(source):
    for name, (shape, kind) in source.leaves.items():
        for bounds in streamed.slabs(shape, kind):
            if _has_nan(source.read(name, (slice(*bounds),))):
                raise ValueError(
                    f"{source.path}: {_in_source(source, name)} holds NaN; --strict refuses it, "
                    "without it NaN is kept"
                )


def _in_source(source, name):
    """How the source calls what holds NaN: its tensor and file, or our array."""
    for part in source.parts if source.folder else ():
        if part.ours == name and _has_nan(source.read_part(part)):
            return f"{part.theirs} in {source.folder.tensors[part.theirs].file}"
    return name


def _casts(leaves, dtype):
    """Lines that name each cast and whether it can lose."""
    kinds = collections.Counter(own for _, own in leaves.values() if dtype not in (None, own))
    return [
        f"cast: {count} arrays from {own} to {dtype}, "
        + ("which rounds (--dtype asked for it)" if transposing.loses(own, dtype) else "exact")
        for own, count in sorted(kinds.items())
    ]


def check_disk(output, total):
    """Refuses to begin where the disk has no room for `total` bytes more at `output`.

    Raises:
      OSError: it has not.
    """
    there = pathlib.Path(f"{output}.partial")
    kept = (
        sum(p.stat().st_blocks * 512 for p in there.rglob("*") if p.is_file())
        if there.is_dir()
        else 0
    )
    machine.check_disk(
        output.parent, int(total * 1.01) - kept, "the output", "free some or name another --output"
    )


def _parse(to, data):
    return json.loads(data) if to == HUGGING_FACE else yaml.safe_load(data)


def _dump(to, config):
    text = (
        json.dumps(config, indent=2) + "\n"
        if to == HUGGING_FACE
        else yaml.safe_dump(config, sort_keys=False)
    )
    return text.encode()


def pairs(input, output, *, to) -> list[tuple[str, str]]:
    """[(input, output)] of single ports: one, or one for each revision in the folder `input`.

    Revisions go to `output/checkpoints/NAME`, as a training run has them, or without `checkpoints`
    for other formats.
    """
    found = revisions(input)
    if not found:
        return [(str(input), str(output))]
    folder = pathlib.Path(os.path.expanduser(output))
    if to == ORBAX:
        folder = folder / naming.CHECKPOINTS
    return [(str(path), str(folder / name)) for name, path in found]


def check_all(pairs, *, dtype=None):
    """Opens every input of a suite and holds their sum against the disk, before any is ported.

    Raises:
      FileNotFoundError, FileExistsError, ValueError: an input, or what is at an output already, is
        not as it must be. OSError: the disk is too small.
    """
    total = 0
    for source, target in pairs:
        leaves = sources.open_source(source).leaves.values()
        if not os.path.exists(target):
            total += sum(safetensors.num_bytes(dtype or own, shape) for shape, own in leaves)
        elif not os.path.exists(os.path.join(target, manifest.FOLDER)):
            raise FileExistsError(f"{target}: is there but was not ported; delete it")
    if pairs:
        check_disk(pathlib.Path(pairs[-1][1]), total)


def table(path) -> list[tuple[str, str, str]]:
    """[(tensor, file or folder in `path`, SHA-256 of each of its pieces)] of what was written."""
    path = epath.Path(path)
    folder = folders.open_folder(path) if folders.is_folder(path) else None
    out = []
    for name, leaf in manifest.read(path).items():
        file = folder.tensors[name].file if folder else f"params/{name.replace('/', '.')}"
        out.append((name, file, " ".join(piece.sha256 for piece in leaf.pieces)))
    return out
