"""`moe_layer`: one MoE layer, forward and backward, beside transformers' block and the peak.

The router is included; gradients are those of the input, the router and all expert weights. Each of
our backends does the same work twice: tokens choose their experts at random, or all of them the
same k (nothing may be dropped). What comes out is compared in every round with the `dense` backend
in float32, and so is what the peer computes.

The peer is tuned first: transformers' implementations of experts, with and without torch.compile,
on one core and all; the fastest goes into the rounds, with our allocator settings and then as
shipped.
"""

import dataclasses
import functools
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from olmoe_jax import accounting, machine
from olmoe_jax.benchmarking import matmul_peak, moe_work, tables, workers
from olmoe_jax.benchmarking import rounds as rounds_lib

# Tokens, and the layer of the suite `train_step`, or of OLMoE-1B-7B.
_SMALL = {"d_model": 512, "d_ff": 256, "num_experts": 64, "num_experts_per_token": 8}
_OLMOE = _SMALL | {"d_model": 2048, "d_ff": 1024}
SHAPES = {"a": (2048, _SMALL), "b2048": (2048, _OLMOE), "b8192": (8192, _OLMOE)}

PEAK, PEER, PEER_AS_SHIPPED = "peak", "transformers", "transformers as shipped"
SCRIPT = pathlib.Path(__file__).parent / "peers" / "transformers_layer.py"
IMPLEMENTATIONS = ("grouped_mm", "eager", "batched_mm")  # the likely best first
HOPELESS = 3.0  # times the best so far: one pass is enough
TUNING_TOKENS = 2048
SECONDS = 1.0  # of one contestant in one round, or one pass if that takes longer


@dataclasses.dataclass(frozen=True)
class _Work:
    """What all contestants compute.

    Attributes:
      params: on our device.
      tokens, expected: routing → inputs, and what must come out.
    """

    config: object
    params: dict
    tokens: dict
    expected: dict


def run(options):
    """The suite; (what --json gets, whether everybody's values agree).

    Raises:
      ValueError: no such --shape or --expert_backend; the peer failed.
    """
    if options.shape not in SHAPES:
        raise ValueError(f"--shape={options.shape}: must be one of {', '.join(SHAPES)}")
    count, shape = SHAPES[options.shape]
    config = moe_work.make_config(dtype=options.dtype, **shape)
    backends = moe_work.backends(options.expert_backend)
    scratch = os.path.abspath(os.path.expanduser(options.scratch))
    os.makedirs(scratch, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="moe_layer_", dir=scratch) as folder:
        work = _make_work(config, count, pathlib.Path(folder), options.peer_python is not None)
        measured = _measure(work, backends, pathlib.Path(folder), options)
    result = {
        "suite": "moe_layer",
        "shape": {"name": options.shape, "tokens": count, **shape},
        "dtype": options.dtype,
        "flops": count * accounting.moe_flops_per_token(config).training,
        "tolerance": moe_work.TOLERANCE[options.dtype],
        **measured,
        "environment": machine.environment(),
    }
    _show(result, backends)
    return result, not result["wrong"]


def _say(line):
    print(line, flush=True)


def _make_work(config, count, folder, for_peer):
    """_Work; for a peer also as files."""
    params = moe_work.make_params(config)
    tokens = {
        routing: moe_work.make_tokens(config, params["router"], count=count, routing=routing)
        for routing in (moe_work.BALANCED, moe_work.TO_FEW)
    }
    if for_peer:
        balanced = tokens[moe_work.BALANCED]
        for name, array in (params | {"x": balanced.x, "d_y": balanced.d_y}).items():
            plain = array if array.dtype == np.float32 else array.view(np.uint16)
            np.save(folder / f"{name}.npy", plain)
    params = jax.tree.map(jnp.asarray, params)
    expected = {
        routing: moe_work.truth(config, params, given, routing=routing)
        for routing, given in tokens.items()
    }
    return _Work(config, params, tokens, expected)


def _measure(work, backends, folder, options):
    ours = {}
    for backend in backends:
        config = dataclasses.replace(work.config, expert_backend=backend)
        for routing, tokens in work.tokens.items():
            ours[f"{backend}, {routing}"] = moe_work.contestant(
                config, work.params, tokens, work.expected[routing], seconds=SECONDS
            )
    contestants = {PEAK: functools.partial(matmul_peak.sample, options.dtype), **ours}
    best = f"{backends[0]}, {moe_work.BALANCED}"
    open_peer = functools.partial(workers.Worker.peer, options, SCRIPT)
    peer = None
    with open_peer(allocator_tuned=options.allocator_tuned) as worker:
        if worker is not None:
            peer = _open(worker, work, folder)
            peer |= _tune(worker, work, options)
            contestants[PEER] = _peer_contestant(worker, work, folder, peer["settings"])
        found = _compare(contestants, options.rounds)
    result = _summary(found, work, backends, options) | found.account()
    if peer is None:
        return result
    result |= {"peer": peer, "ratio_same_allocator": found.speed(best, against=PEER).median}
    # One peer at a time: at OLMoE's size each holds gigabytes.
    with open_peer(allocator_tuned=False) as worker:
        _open(worker, work, folder)
        contestants = {
            PEAK: contestants[PEAK],
            best: contestants[best],
            PEER_AS_SHIPPED: _peer_contestant(worker, work, folder, peer["settings"]),
        }
        shipped = _compare(contestants, options.rounds)
    result["ratio_as_shipped"] = shipped.speed(best, against=PEER_AS_SHIPPED).median
    result["wrong"] += _wrong(shipped, [PEER_AS_SHIPPED], options.dtype)
    result["contestants"][PEER_AS_SHIPPED] = _row(shipped, PEER_AS_SHIPPED, work)
    for name, value in shipped.account().items():
        result[name] = value if name == "foreign_limit" else result[name] + value
    return result


def _compare(contestants, rounds):
    for name, contest in contestants.items():
        if name != PEAK:
            contest()  # the first use of memory is slower
    return rounds_lib.compare(contestants, rounds=rounds)


def _open(worker, work, folder):
    """Hands the work to the peer; its versions."""
    c = work.config
    return worker.ask(
        do="open_layer", folder=str(folder), device=workers.torch_device(),
        d_model=c.d_model, d_ff=c.d_ff, num_experts=c.num_experts,
        num_experts_per_token=c.num_experts_per_token,
    )  # fmt: skip


def _tune(worker, work, options):
    """The peer's fastest settings, and all that were tried on the first TUNING_TOKENS tokens."""
    tokens = min(TUNING_TOKENS, len(work.tokens[moe_work.BALANCED].x))
    tried = []

    def attempt(**settings):
        row = dict(settings)
        needed, free = _bytes_of_batched_mm(work.config, tokens), machine.free_memory()
        if settings["experts_implementation"] == "batched_mm" and free and needed > free:
            row["left_out"] = f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
        else:
            best = min((r["seconds"] for r in tried if "seconds" in r), default=None)
            answer = worker.ask(
                do="run", seconds=SECONDS / 2, tokens=tokens,
                limit=None if best is None else HOPELESS * best, **settings,
            )  # fmt: skip
            row |= {"left_out": answer["error"]} if "error" in answer else answer
        tried.append(row)
        said = f"{row['seconds']:.3f} s" if "seconds" in row else row["left_out"]
        _say(f"transformers: {_settings_text(settings)}: {said}")

    def fastest():
        ran = [row for row in tried if "seconds" in row]
        if not ran:
            raise ValueError(f"transformers runs in no way: {tried[0]['left_out']}")
        row = min(ran, key=lambda row: row["seconds"])
        return {name: row[name] for name in ("experts_implementation", "threads", "compiled")}

    for name in IMPLEMENTATIONS:
        attempt(experts_implementation=name, threads=machine.cores(), compiled=False)
    attempt(**fastest() | {"compiled": True})
    if machine.cores() > 1:
        attempt(**fastest() | {"threads": 1})
    return {"tried": tried, "tokens_tried": tokens, "settings": fastest()}


def _bytes_of_batched_mm(config, tokens):
    """It copies its expert's weights for every choice, and makes a gradient of each copy."""
    weights = 3 * config.d_model * config.d_ff * accounting.BYTES[config.dtype]
    return 2 * tokens * config.num_experts_per_token * weights


def _peer_contestant(worker, work, folder, settings):
    expected = work.expected[moe_work.BALANCED]

    def contest():
        answer = worker.ask(do="run", seconds=SECONDS, **settings)
        if "error" in answer:
            raise ValueError(f"transformers, {_settings_text(settings)}: {answer['error']}")
        worker.ask(
            do="values", folder=str(folder), rows=expected.rows, experts=list(expected.experts)
        )
        got = {name: np.load(folder / f"got_{name}.npy") for name in expected.values}
        return rounds_lib.Sample(answer["seconds"], {"error": expected.error(got)})

    return contest


def _wrong(found, names, dtype):
    return [name for name in names if not moe_work.is_right(found, name, dtype)]


def _row(found, name, work):
    flops = len(work.tokens[moe_work.BALANCED].x)
    flops *= accounting.moe_flops_per_token(work.config).training
    return {
        "seconds": found.summary(name),
        "share_of_peak": matmul_peak.share(found, name, work=flops, against=PEAK),
        "error": found.summary(name, "error").high,
    }


def _summary(found, work, backends, options):
    """Ratios and rows; those without a backend's name are of the first backend."""
    names = [name for name in found.samples if name != PEAK]
    peak = found.summary(PEAK, "flops_per_second")
    rows = {PEAK: {"seconds": found.summary(PEAK), "flops_per_second": peak}}
    result = {"contestants": rows | {name: _row(found, name, work) for name in names}}
    for backend in backends:
        balanced, to_few = (f"{backend}, {r}" for r in (moe_work.BALANCED, moe_work.TO_FEW))
        ratios = {
            "share_of_peak": result["contestants"][balanced]["share_of_peak"].median,
            "all_to_eight": found.speed(balanced, against=to_few).median,
        }
        if PEER in found.samples:
            ratios["same_allocator"] = found.speed(balanced, against=PEER).median
        for name, value in ratios.items():
            result.setdefault(f"ratio_{name}", value)
            result[f"ratio_{name}_{backend}"] = value
    return result | {"wrong": _wrong(found, names, options.dtype)}


def _settings_text(settings):
    how = "torch.compile" if settings["compiled"] else "not compiled"
    return f"{settings['experts_implementation']}, {how}, threads: {settings['threads']}"


def _show(result, backends):
    shape, flops = result["shape"], result["flops"]
    print(
        f"\nmoe_layer: {shape['tokens']:,} tokens, d_model {shape['d_model']}, "
        f"{shape['num_experts']} experts of width {shape['d_ff']}, top-"
        f"{shape['num_experts_per_token']}, {result['dtype']}: {flops / 1e9:.1f} GFLOP forward and "
        "backward; median (lowest–highest)"
    )
    rows = [("", "seconds", "GFLOP/s", "share of peak", "largest error")]
    for name, row in result["contestants"].items():
        if name == PEAK:
            speed = row["flops_per_second"].median
            rows.append(("peak: square product", "", f"{speed / 1e9:.0f}", "100 %", ""))
            continue
        share = rounds_lib.Summary(*(100 * x for x in dataclasses.astuple(row["share_of_peak"])))
        rows.append((
            name, row["seconds"].text(3), f"{flops / row['seconds'].median / 1e9:.0f}",
            f"{share.text(0)} %", f"{row['error']:.0e}",
        ))  # fmt: skip
    print(tables.table(rows))
    for backend in backends:
        to_few = result[f"ratio_all_to_eight_{backend}"]
        line = f"{backend}: {moe_work.TO_FEW} ÷ {moe_work.BALANCED}: {to_few:.2f} of the time"
        if (same := result.get(f"ratio_same_allocator_{backend}")) is not None:
            line += f"; transformers ÷ {backend}, same allocator: {same:.2f}"
        print(line)
    if "peer" in result:
        peer = result["peer"]
        print(
            f"transformers ÷ {backends[0]}, transformers as shipped: "
            f"{result['ratio_as_shipped']:.2f}\n"
            f"transformers {peer['transformers']}, torch {peer['torch']}; fastest of "
            f"{len(peer['tried'])} settings: {_settings_text(peer['settings'])}"
        )
    else:
        print("no peer: --peer_python names an environment that has torch and transformers")
    if result["wrong"]:
        print(f"WRONG: not within {result['tolerance']} of `dense`: {'; '.join(result['wrong'])}")
    else:
        print(f"all values agree with `dense` in float32 to {result['tolerance']} of the largest")
    print(tables.footer(result))
