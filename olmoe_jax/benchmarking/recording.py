"""`recording`: routing traces recorded layer by layer, beside transformers and the machine's limit.

A Hugging Face folder of random bfloat16 weights in the preset's true shapes (LAYERS layers, or
--num_layers) is run over random tokens in --dtype by `analysis.recording`, streamed: one layer's
weights in memory, activations on the disk, a trace in the end. The limit is reading the folder once
and computing the forward pass at the matmul peak, one after the other; both are measured in the
same round. Every contestant finds the folder out of memory, where the system lets go of files.

The peer is transformers over the same folder and tokens, with router logits, once with its loading
and once without (ours then without reading weights). Its implementation of experts is the fastest
of a short trial, its allocator has our settings. Away from near-ties its experts must be ours;
otherwise there is no ratio and the run fails.
"""

import dataclasses
import os
import pathlib
import shutil
import tempfile
import time

import numpy as np

from olmoe_jax import accounting, machine, presets
from olmoe_jax.analysis import recording, texts, trace
from olmoe_jax.benchmarking import matmul_peak, page_cache, port, tables, workers
from olmoe_jax.benchmarking import rounds as rounds_lib
from olmoe_jax.porting import safetensors

PEER = pathlib.Path(__file__).parent / "peers" / "transformers_recording.py"
LAYERS = 2  # at OLMoE's width: 2.1 GB
WINDOWS = 1  # of 2,048 tokens, or of the preset's length: a round takes well under a minute
SHARDS = 1
IMPLEMENTATIONS = ("grouped_mm", "eager")  # batched_mm copies its expert for every choice: 800 GB
TUNING_TOKENS = 512
DISK_COPIES = 1.2  # of the folder: activations and traces beside it are small

OURS, THEIRS = "ours, layer by layer", "transformers"
READ, PEAK, LIMIT = "reading the folder", "computing at matmul peak", "limit: reading, then peak"
LOADING = "loading"  # of a sample's values: seconds

# A near-tie: the k-th and the next logit differ by less than this, relative to the token's largest.
NEAR_TIE = {"float32": 1e-4, "bfloat16": 2**-6}
# Of other choices where there is no tie, the share to which near-ties of other tokens may lead.
DIFFERENT = {"float32": 1e-3, "bfloat16": 3e-2}


@dataclasses.dataclass(frozen=True)
class _Work:
    """What is recorded: a folder `source` in `folder`, and a text of whole windows."""

    config: object
    folder: pathlib.Path
    text: texts.Text
    dtype: str

    @property
    def source(self):
        return self.folder / "source"

    @property
    def flops(self):
        each = accounting.flops_per_token(self.config, self.text.context_length).forward
        return len(self.text.tokens) * each


def run(options):
    """The suite; (what --json gets, whether the peer chose our experts).

    Raises:
      OSError: there is not enough room for the weights.
      ValueError: no Hugging Face class has this architecture, it has no experts, or the peer
        failed.
    """
    layers = LAYERS if options.num_layers is None else options.num_layers
    config = presets.get(options.preset, num_layers=layers)
    result = {"suite": "recording", "preset": options.preset, **measure(config, options)}
    show(result)
    return result, result["choices_agree"]


def measure(config, options) -> dict:
    """All of it but the preset's name.

    Args:
      config: ModelConfig.
      options: options.Options.
    """
    shapes = port.tensor_shapes(config)
    size = sum(safetensors.num_bytes("bfloat16", shape) for shape in shapes.values())
    scratch = os.path.abspath(os.path.expanduser(options.scratch))
    machine.check_disk(
        scratch, DISK_COPIES * size, "weights and activations",
        "name another --scratch or a smaller --num_layers",
    )  # fmt: skip
    os.makedirs(scratch, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="recording_", dir=scratch) as folder:
        work = _Work(config, pathlib.Path(folder), _random_text(config), options.dtype)
        print(f"writing {len(shapes):,} random tensors, {size / 1e9:.2f} GB", flush=True)
        port.write_random_folder(work.source, config, shards=SHARDS)
        return {
            "num_layers": config.num_layers,
            "dtype": options.dtype,
            "tokens": len(work.text.tokens),
            "context_length": work.text.context_length,
            "bytes": size,
            "flops": work.flops,
            "allocator_tuned": options.allocator_tuned,
            **_compare(work, options),
            "environment": machine.environment(),
        }


def _random_text(config):
    length = min(texts.CONTEXT_LENGTH, config.max_length)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, WINDOWS * length, np.int32)
    documents = np.arange(len(tokens), dtype=np.int32) // length
    return texts.Text("random", tokens, documents, length)


def _compare(work, options):
    """The rounds, and what they say."""
    resident, chosen = [], {}

    def prepare(name):
        if name == PEAK:
            return
        page_cache.forget(work.source)
        if (share := page_cache.resident_share(work.source)) is not None:
            resident.append(share)

    contestants = {
        OURS: lambda: _ours(work, chosen),
        READ: lambda: _read(work),
        PEAK: lambda: _peak(work),
    }
    _ours(work, chosen)  # compiles
    matmul_peak.sample(work.dtype)
    peer = workers.Worker.peer(options, PEER, allocator_tuned=options.allocator_tuned)
    with peer as worker:
        about = {}
        if worker is not None:
            about = _open_peer(worker, work)
            contestants[THEIRS] = lambda: _theirs(worker, work, about["experts"], chosen)
        found = rounds_lib.compare(contestants, rounds=options.rounds, prepare=prepare)
    result = {"resident_share": max(resident, default=None), "choices_agree": True}
    if about:
        choices = compare_choices(
            chosen[OURS], chosen[THEIRS]["expert_ids"], chosen[THEIRS]["gaps"], work.dtype
        )
        result |= {"peer": about, "choices": choices, "choices_agree": choices["agree"]}
    return _figures(found, work, with_peer=result["choices_agree"]) | result | found.account()


def _ours(work, chosen):
    """One recording, weights to trace; its choices go to `chosen`, the files away."""
    output, begun = work.folder / "traces", time.perf_counter()
    (found,) = recording.record(
        work.source, [work.text], output, dtype=work.dtype, precision=work.dtype, streamed=True,
        announce=lambda line: None,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    chosen[OURS] = trace.join(list(found.trace.blocks())).expert_ids
    shutil.rmtree(output)
    phases = {f"{port.PHASE}{name}": spent for name, spent in found.seconds.items()}
    return rounds_lib.Sample(seconds, phases | {LOADING: found.seconds["weights"]})


def _read(work):
    begun = time.perf_counter()
    page_cache.read_once(work.source)
    return rounds_lib.Sample(time.perf_counter() - begun)


def _peak(work):
    """The forward pass, as if all of it were the product of `matmul_peak`."""
    sample = matmul_peak.sample(work.dtype)
    return rounds_lib.Sample(sample.seconds * work.flops / matmul_peak.flops(), sample.values)


def _open_peer(worker, work):
    """Hands the work to the peer; its versions, and its fastest implementation of experts."""
    np.save(work.folder / "tokens.npy", work.text.tokens.reshape(-1, work.text.context_length))
    about = worker.ask(
        do="open", folder=str(work.source), tokens=str(work.folder / "tokens.npy"),
        dtype=work.dtype, device=workers.torch_device(), k=work.config.num_experts_per_token,
        rows=WINDOWS,
    )  # fmt: skip
    tried = worker.ask(do="tune", implementations=IMPLEMENTATIONS, tokens=TUNING_TOKENS)["tried"]
    for one in tried:
        said = f"{one['seconds']:.3f} s" if "seconds" in one else one["error"]
        print(f"transformers: {one['experts']}: {said}", flush=True)
    ran = [one for one in tried if "seconds" in one]
    if not ran:
        raise ValueError(f"transformers runs in no way: {tried[0]['error']}")
    best = min(ran, key=lambda one: one["seconds"])
    return about | {"tried": tried, "experts": best["experts"]}


def _theirs(worker, work, experts, chosen):
    output = work.folder / "theirs.npz"
    answer = worker.ask(do="record", experts=experts, output=str(output))
    with np.load(output) as arrays:
        chosen[THEIRS] = dict(arrays)
    return rounds_lib.Sample(answer["seconds"], {LOADING: answer["loading"]})


def compare_choices(ours, theirs, gaps, dtype) -> dict:
    """Whether two sides chose the same experts wherever it was clear which.

    It is clear where the logits are no near-tie (NEAR_TIE) and the token's choices in the layers
    before were the same: another expert there is another input here.

    Args:
      ours, theirs: int [tokens, layers, k], in any order.
      gaps: float32 [tokens, layers]: k-th less the next logit, relative to the token's largest.

    Returns:
      choices: of all tokens in all layers; clear, different: how many of them are clear, and how
      many of these differ; agree: at least half are clear, and at most DIFFERENT of these differ.
    """
    other = (np.sort(ours, axis=-1) != np.sort(theirs, axis=-1)).any(axis=-1)
    before = np.cumsum(other, axis=1) > other
    clear = (gaps > NEAR_TIE[dtype]) & ~before
    different = int((other & clear).sum())
    agree = 2 * clear.sum() >= clear.size and different <= DIFFERENT[dtype] * clear.sum()
    return {
        "choices": clear.size,
        "clear": int(clear.sum()),
        "different": different,
        "agree": bool(agree),
    }


def _figures(found, work, *, with_peer):
    """Ratios and rows."""
    count, samples = len(work.text.tokens), found.samples
    limits = [r.seconds + p.seconds for r, p in zip(samples[READ], samples[PEAK], strict=True)]
    of_limit = [x / ours.seconds for x, ours in zip(limits, samples[OURS], strict=True)]
    seconds = {name: found.summary(name) for name in samples} | {
        LIMIT: rounds_lib.summarize(limits)
    }
    rows = {
        name: {
            "seconds": spent,
            "tokens_per_second": count / spent.median,
            "loading": found.summary(name, LOADING) if name in samples else None,
        }
        for name, spent in seconds.items()
    }
    speeds = {"of_limit": rounds_lib.summarize(of_limit)}
    if THEIRS in samples and with_peer:
        speeds["peer"] = found.speed(OURS, against=THEIRS)
        speeds["peer_without_loading"] = rounds_lib.summarize([
            (theirs.seconds - theirs.values[LOADING]) / (ours.seconds - ours.values[LOADING])
            for ours, theirs in zip(samples[OURS], samples[THEIRS], strict=True)
        ])  # fmt: skip
    return {
        **{f"ratio_{name}": speed.median for name, speed in speeds.items()},
        "bytes_per_second": _disk_speed(work, samples[READ]),
        "flops_per_second": found.summary(PEAK, "flops_per_second"),
        "speeds": speeds,
        "contestants": rows,
        "phases": port.phases(found, OURS),
    }


def _disk_speed(work, reads):
    """Bytes per second of reading the folder."""
    size = sum(file.stat().st_size for file in work.source.iterdir())
    return rounds_lib.summarize([size / sample.seconds for sample in reads])


def show(result):
    """Prints the table and what it rests on."""
    print(
        f"\nrecording: {result['preset']}, num_layers {result['num_layers']}, {result['dtype']}: "
        f"{result['tokens']:,} tokens in windows of {result['context_length']:,}, "
        f"{result['bytes'] / 1e9:.2f} GB of weights, {result['flops'] / 1e9:.0f} GFLOP; "
        "median (lowest–highest)"
    )
    rows = [("", "seconds", "tokens/s", "of these loading", "speed, ours ÷ it")]
    speeds = result["speeds"]
    against = {LIMIT: speeds["of_limit"], THEIRS: speeds.get("peer")}
    for name, row in result["contestants"].items():
        loading, speed = row["loading"], against.get(name)
        rows.append((
            name, row["seconds"].text(), f"{row['tokens_per_second']:.0f}",
            loading.text() if loading else "", speed.text() if speed else "",
        ))  # fmt: skip
    print(tables.table(rows))
    spent = ", ".join(f"{name} {seconds.median:.2f}" for name, seconds in result["phases"].items())
    print(f"where our seconds went: {spent}")
    print(
        f"disk: {result['bytes_per_second'].times(1e-9).text()} GB/s; matmul peak: "
        f"{result['flops_per_second'].times(1e-9).text(0)} GFLOP/s"
    )
    share = result["resident_share"]
    there = "unknown" if share is None else f"{share:.0%} at most"
    print(f"the folder leaves memory before each reads it; still there: {there}")
    if "peer" in result:
        _show_peer(result)
    else:
        print("no peer: --peer_python names an environment that has torch and transformers")
    print(tables.footer(result))


def _show_peer(result):
    peer, choices = result["peer"], result["choices"]
    if result["choices_agree"]:
        alone = result["speeds"]["peer_without_loading"]
        print(f"speed, ours ÷ transformers, both without loading: {alone.text()}")
    verdict = "agree" if result["choices_agree"] else "WRONG: do not agree, so there is no ratio"
    print(
        f"experts {verdict}: {choices['different']:,} of {choices['clear']:,} clear choices differ "
        f"({choices['choices']:,} with near-ties and what follows from them)\n"
        f"transformers {peer['transformers']}, torch {peer['torch']}, Python {peer['python']}, "
        f"threads: {peer['threads']}, experts: {peer['experts']}"
    )
