"""`port`: both ways through `experiments.port_weights`, beside `cp` and `sync` of the same bytes.

A Hugging Face folder of random bfloat16 weights in the preset's true shapes goes to an Orbax
directory and back; then every tensor is compared with the one that went in. Three copies of the
model must fit in the scratch folder (olmoe-1b-7b: 13.8 GB each). In a small one the start of Python
and JAX weighs more.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile

import numpy as np

from olmoe_jax import machine, presets
from olmoe_jax.benchmarking import page_cache, tables
from olmoe_jax.benchmarking import rounds as rounds_lib
from olmoe_jax.porting import configs, families, safetensors

ROOT = pathlib.Path(__file__).resolve().parents[2]
COPY, TO_ORBAX, TO_HUGGING_FACE = "copy", "port_to_orbax", "port_to_huggingface"
TITLES = {COPY: "cp, sync", TO_ORBAX: "port --to=orbax", TO_HUGGING_FACE: "port --to=huggingface"}
PHASE = "phase/"  # of the names of a sample's values
DISK_COPIES = 3.1  # source, Orbax directory and what came back, and a little


def run(options):
    """The suite; (what --json gets, whether everything came back)."""
    for flag in ("rounds", "shards"):
        if getattr(options, flag) < 1:
            raise ValueError(f"--{flag}={getattr(options, flag)}: must be at least 1")
    changes = {} if options.num_layers is None else {"num_layers": options.num_layers}
    measured = measure_port(
        presets.get(options.preset, **changes),
        shards=options.shards, rounds=options.rounds, scratch=options.scratch,
    )  # fmt: skip
    result = {"suite": "port", "preset": options.preset, **measured}
    show_port(result)
    return result, not result["tensors_that_differ"] and not result["files_that_differ"]


def _say(line):
    print(line, flush=True)


def measure_port(model_config, *, shards, rounds, scratch) -> dict:
    """Makes a random model, takes it through both ports and compares what came back.

    Args:
      shards: files that hold the weights.
      rounds: undisturbed rounds; at most as many disturbed ones are repeated.
      scratch: folder on the disk to measure; created if need be, and left as it was.

    Raises:
      OSError: there is not enough room.
      ValueError: no Hugging Face class has this architecture, or a port failed.
    """
    shapes = tensor_shapes(model_config)
    size = sum(safetensors.num_bytes("bfloat16", shape) for shape in shapes.values())
    scratch = os.path.abspath(os.path.expanduser(scratch))
    machine.check_disk(
        scratch, DISK_COPIES * size, f"{DISK_COPIES} copies of the model",
        "name another --scratch or a smaller --num_layers",
    )  # fmt: skip
    os.makedirs(scratch, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="port_", dir=scratch) as work:
        work = pathlib.Path(work)
        _say(f"writing {len(shapes):,} random tensors, {size / 1e9:.2f} GB")
        hashes = write_random_folder(work / "source", model_config, shards=shards)
        files = len(list((work / "source").glob("*.safetensors")))
        found, resident = _compare_speed(work, rounds)
        _say("comparing every tensor with the source")
        wrong_tensors, wrong_files = compare_folders(work / "source", work / "returned", hashes)
    return {
        "num_layers": model_config.num_layers,
        "dtype": "bfloat16",
        "files": files,
        "tensors": len(shapes),
        "bytes": size,
        "tensors_that_differ": wrong_tensors,
        "files_that_differ": wrong_files,
        **_speeds(found, size),
        "page_cache": _page_cache(resident),
        "resident_share": min(resident, default=None),
        **found.account(),
        "environment": machine.environment(),
    }


def tensor_shapes(model_config) -> dict:
    """{Hugging Face name: shape} of a model, in the order of its layers."""
    return families.tensor_shapes(families.parts(configs.family_of(model_config), model_config))


def write_random_folder(directory, model_config, *, shards) -> dict:
    """Writes a Hugging Face folder of random bfloat16 weights, tensor by tensor.

    Every tensor has values of its own (±2⁻⁷ to ±2⁻⁵, nine random bits each, never NaN), so that
    two that are mixed up are noticed, and nothing is sparse.

    Args:
      directory: to be created.
      shards: files of about equal size; 1: model.safetensors without an index.

    Returns:
      {name: SHA-256 of the tensor's bytes}, taken before they were written.
    """
    directory, shapes = pathlib.Path(directory), tensor_shapes(model_config)
    directory.mkdir(parents=True)
    hashes, weight_map = {}, {}
    for file, names in _split(shapes, shards).items():
        header = safetensors.build_header({n: ("bfloat16", shapes[n]) for n in names})
        with contextlib.closing(safetensors.Writer(directory / file, header)) as writer:
            for name in names:
                array = _random(shapes[name], seed=len(hashes))
                hashes[name] = _sha256(array)
                writer.write(name, array)
        weight_map |= dict.fromkeys(names, file)
    if shards > 1:
        parameters = sum(int(np.prod(shape)) for shape in shapes.values())
        metadata = {"total_parameters": parameters, "total_size": 2 * parameters}
        index = json.dumps(
            {"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True
        )
        (directory / "model.safetensors.index.json").write_text(index + "\n")
    config = configs.write(
        model_config, dtype="bfloat16", eos_token_id=model_config.vocab_size - 1, pad_token_id=1
    )
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return hashes


def _split(shapes, shards):
    """{file name: tensors}: `shards` files of about equal size, fewer if tensors are too few."""
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    groups, done = {}, 0
    for name, shape in shapes.items():
        groups.setdefault(done * shards // total, []).append(name)
        done += int(np.prod(shape))
    if shards == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{n:05d}-of-{len(groups):05d}.safetensors": names
        for n, names in enumerate(groups.values(), 1)
    }


def _random(shape, *, seed):
    """bfloat16: sign, lowest exponent bit and fraction are random, the exponent 2⁻⁷ or 2⁻⁶."""
    count = int(np.prod(shape))
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**64, size=-(-count // 4), dtype=np.uint64).view(np.uint16)[:count]
    bits &= 0x80FF
    bits |= 0x3C00
    return bits.view("bfloat16").reshape(shape)


def _sha256(array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()


def _compare_speed(work, rounds):
    """(rounds_lib.Rounds, shares of each input in memory just before it was used)."""
    source, copy, orbax, returned = (work / n for n in ("source", "copy", "orbax", "returned"))
    resident = []

    def prepare(name):
        # What is no longer needed goes, what is left is on the disk and out of memory, and the
        # input is read once: each contestant starts from the same state.
        for old in {COPY: (copy, orbax, returned), TO_ORBAX: (copy,)}.get(name, ()):
            shutil.rmtree(old, ignore_errors=True)
        page_cache.forget(work)
        needed = orbax if name == TO_HUGGING_FACE else source
        page_cache.read_once(needed)
        if (share := page_cache.resident_share(needed)) is not None:
            resident.append(share)

    # Where cp may share blocks between files, or let the file system copy, it does not.
    plain = ["--reflink=never"] if sys.platform == "linux" else []
    contestants = {
        COPY: lambda: _then_sync(rounds_lib.run_command(["cp", *plain, "-R", source, copy])),
        TO_ORBAX: lambda: _port(source, orbax, "orbax", work / "result.json"),
        TO_HUGGING_FACE: lambda: _port(orbax, returned, "huggingface", work / "result.json"),
    }
    found = rounds_lib.compare(contestants, rounds=rounds, prepare=prepare)
    return found, resident


def _then_sync(sample):
    """The sample with a `sync` after it: all three end with their bytes on the disk."""
    seconds = rounds_lib.run_command(["sync"]).seconds
    values = sample.values | {f"{PHASE}sync afterwards": seconds}
    return dataclasses.replace(sample, seconds=sample.seconds + seconds, values=values)


def _port(source, output, to, json_file):
    """Runs port_weights as a person does, and takes its own account of where the time went."""
    command = [sys.executable, "-m", "experiments.port_weights", f"--input={source}"]
    command += [f"--output={output}", f"--to={to}", f"--json={json_file}"]
    sample = rounds_lib.run_command(command, cwd=ROOT)
    ported = json.loads(json_file.read_text())["results"][0]
    phases = {f"{PHASE}{name}": seconds for name, seconds in ported["phases"].items()}
    start_up = {f"{PHASE}start-up and exit": sample.seconds - ported["seconds"]}
    return _then_sync(dataclasses.replace(sample, values=sample.values | phases | start_up))


def compare_folders(source, returned, hashes):
    """What did not come back as it went in.

    Args:
      hashes: {tensor: SHA-256} of the source.

    Returns:
      (names of tensors that are missing, new, or not bit-identical; names of files of the source
      that are missing, differ, or as safetensors have another header).
    """
    source, returned = pathlib.Path(source), pathlib.Path(returned)
    found = {}
    for file in sorted(returned.glob("*.safetensors")):
        for name, tensor in safetensors.read_header(file).tensors.items():
            found[name] = _sha256(safetensors.memory_map(file, tensor))
    tensors = sorted(n for n in hashes.keys() | found.keys() if hashes.get(n) != found.get(n))
    files = [p.name for p in sorted(source.iterdir()) if not _is_same(p, returned / p.name)]
    return tensors, files


def _is_same(file, other):
    """Equal bytes; of safetensors only the headers, as the tensors are compared one by one."""
    if not other.is_file() or file.stat().st_size != other.stat().st_size:
        return False
    if file.suffix == ".safetensors":
        return safetensors.read_header(file).text == safetensors.read_header(other).text
    return file.read_bytes() == other.read_bytes()


def _speeds(rounds, size):
    """The ratios and, per contestant, medians and spreads."""
    rows = {}
    for name in rounds.samples:
        seconds, memory = rounds.summary(name), rounds.summary(name, "peak_anonymous_bytes")
        rows[name] = {
            "seconds": seconds,
            "gb_per_second": size / 1e9 / seconds.median,
            "cpu_seconds": rounds.summary(name, "cpu_seconds"),
            "peak_anonymous_mb": memory and memory.high / 1e6,
            "phases": phases(rounds, name),
        }
    speeds = {n: rounds.speed(n, against=COPY) for n in (TO_ORBAX, TO_HUGGING_FACE)}
    return {
        **{f"ratio_{name}": speed.median for name, speed in speeds.items()},
        **{f"peak_anonymous_mb_{name}": rows[name]["peak_anonymous_mb"] for name in speeds},
        "speeds": speeds,
        "contestants": rows,
    }


def phases(rounds, name) -> dict:
    """{phase: rounds.Summary of its seconds} of a contestant whose values have names of PHASE."""
    names = {n for sample in rounds.samples[name] for n in sample.values if n.startswith(PHASE)}
    return {n.removeprefix(PHASE): rounds.summary(name, n) for n in sorted(names)}


def _page_cache(resident):
    found = f"; {min(resident):.0%} or more of it was there" if resident else ""
    return (
        "everything in --scratch written out and dropped from memory, then the input read once, "
        f"before each of the three{found}"
    )


def show_port(result):
    """Prints the table and what it rests on."""
    rows = [("", "seconds", "GB/s", "speed ÷ cp, sync", "CPU s", "peak anonymous MB")]
    for name, row in result["contestants"].items():
        speed, peak = result["speeds"].get(name), row["peak_anonymous_mb"]
        rows.append((
            TITLES[name], row["seconds"].text(), f"{row['gb_per_second']:.2f}",
            speed.text() if speed else "1", row["cpu_seconds"].text(1),
            "no /proc" if peak is None else f"{peak:.0f}",
        ))  # fmt: skip
    print(
        f"\nport: {result['preset']}, num_layers {result['num_layers']}, bfloat16: "
        f"{result['tensors']:,} tensors, {result['bytes'] / 1e9:.2f} GB, files: {result['files']}; "
        f"median (lowest–highest), rounds: {len(result['foreign_loads'])}"
    )
    print(f"{tables.table(rows)}\n\nwhere the time went, seconds (a port's threads summed):")
    for name, row in result["contestants"].items():
        phases = ", ".join(f"{phase} {s.median:.2f}" for phase, s in row["phases"].items())
        print(f"  {TITLES[name]}: {phases}")
    if wrong := result["tensors_that_differ"] + result["files_that_differ"]:
        print(f"WRONG: {len(wrong)} differ: {', '.join(wrong[:3])}")
    else:
        print(f"all {result['tensors']:,} tensors came back bit for bit, headers and config too")
    print(f"page cache: {result['page_cache']}")
    print(tables.footer(result))
