"""`train_step`: a whole train step (work A, see `work`) against transformers' OLMoE, and the peak.

Both sides start from the same weights (ours, ported to a Hugging Face folder that transformers
opens) and take the same batches; both compute forward with the load-balancing loss, backward,
clipping and AdamW, with parameters and moments in --dtype. If the first losses do not agree there
is no ratio and the run fails.

The peer is tuned first (`tuning`), with fused AdamW and sdpa attention. Its best meets us twice:
with the allocator settings that we have, and as shipped. Shares of peak are FLOPs by `accounting`
(causal attention counted in half) over the FLOP/s of the same round's best matrix product.
"""

import os
import pathlib
import tempfile
import time

import jax
import numpy as np

from olmoe_jax import accounting, checkpoints, machine
from olmoe_jax import losses as losses_lib
from olmoe_jax.benchmarking import matmul_peak, tables, tuning, work, workers
from olmoe_jax.benchmarking import rounds as rounds_lib
from olmoe_jax.checkpoints import naming
from olmoe_jax.model import experts
from olmoe_jax.porting import port

PEER = pathlib.Path(__file__).parent / "peers" / "transformers_step.py"
LOSSES = 20  # of the first steps, which must agree
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # nats: order of summation, rounding
WARM_UP = 2  # steps; they are among the losses
AS_SHIPPED_STEPS = 2  # per round
OURS, THEIRS, PEAK = "ours", "transformers", "all at matmul peak"
SAME_ALLOCATOR, AS_SHIPPED = "same allocator", "as shipped"


def run(options):
    """The suite; (what --json gets, whether the losses agree)."""
    backend = experts.resolve(options.expert_backend or "auto")
    config = work.config(dtype=options.dtype, expert_backend=backend)
    result = measure(config, options)
    show(result)
    return result, result["losses_agree"]


def measure(config, options) -> dict:
    """All of it, for a config made by `work.config`."""
    ours = Ours(config)
    result = {
        "suite": "train_step",
        "dtype": config.model.dtype,
        "expert_backend": config.model.expert_backend,
        "tokens_per_step": config.tokens_per_step,
        "flops_per_step": _flops(config),
        "allocator_tuned": options.allocator_tuned,
        **_memory(config, ours.trainer.compiled),
    }
    if options.peer_python is None:
        phases = {"without a peer": _rounds([ours], config, options)}
    else:
        os.makedirs(options.scratch, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="train_step_", dir=options.scratch) as folder:
            phases, more = _against_peer(ours, config, options, pathlib.Path(folder))
        result |= more
    result["losses_agree"] = all(
        gap <= TOLERANCE[config.model.dtype]
        for gap in result.get("largest_loss_differences", {}).values()
    )
    return result | _figures(phases, config, with_ratios=result["losses_agree"])


def _against_peer(ours, config, options, folder):
    """({phase: Rounds}, what the result says about the peer)."""
    opening = _export(config, ours.trainer.state["params"], folder)
    phases, losses, gaps = {}, {}, {}
    # Where the allocator cannot be tuned, both sides are as shipped, which is the same.
    tuned = {SAME_ALLOCATOR: options.allocator_tuned}
    tuned |= {AS_SHIPPED: False} if options.allocator_tuned else {}
    for phase, allocator_tuned in tuned.items():
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        with workers.Worker.peer(
            options, PEER, allocator_tuned=allocator_tuned, environment=environment
        ) as worker:
            described = worker.ask(do="describe")
            worker.ask(do="open", **opening)
            if not phases:
                print(f"tuning transformers {described['transformers']}", flush=True)
                best, tried = tuning.tune(worker, described["experts"], config)
            theirs = _Theirs(worker, best)
            ours.restart()
            enough = LOSSES if not phases else 0
            steps = AS_SHIPPED_STEPS if phases else (LOSSES - WARM_UP) // options.rounds
            sides = [ours, theirs]
            phases[phase] = _rounds(sides, config, options, steps=max(1, steps), enough=enough)
            losses[phase] = {side.name: side.losses[:LOSSES] for side in sides}
            gap = np.abs(np.subtract(*losses[phase].values()))
            gaps[phase] = float(np.nan_to_num(gap, nan=np.inf).max())
            described = worker.ask(do="describe")
    return phases, {
        "peer": described,
        "variants": tried,
        "variant": best.text(),
        "losses": losses,
        "largest_loss_differences": gaps,
    }


class Ours:
    """Our side: `steps` makes a Sample, `losses` are those of all steps since `restart`: cross
    entropy and the load-balancing loss, weighted as the peer of its convention does."""

    name = OURS

    def __init__(self, config):
        self.trainer = work.Trainer(config)
        self.losses = []
        self._batches = [work.batch(ids) for ids in work.tokens(config, LOSSES)]
        # What the balancing loss, logged so that 1 is balanced, adds to the loss on both sides.
        self._weight = config.losses.load_balancing_weight * losses_lib.balanced_value(
            config.losses.load_balancing_convention, config.model.num_experts_per_token
        )

    def restart(self):
        self.trainer.restart()
        self.losses = []

    def steps(self, count):
        metrics, begun, first = [], time.perf_counter(), len(self.losses)
        for n in range(first, first + count):
            metrics.append(self.trainer.step(self._batches[n % len(self._batches)]))
        jax.block_until_ready((self.trainer.state, metrics))
        seconds = time.perf_counter() - begun
        for found in jax.device_get(metrics):
            loss = found["loss"] + self._weight * found["load_balancing_loss"]
            self.losses.append(float(loss))
        return rounds_lib.Sample(seconds / max(count, 1))


class _Theirs:
    """The peer's side, as `Ours`."""

    name = THEIRS

    def __init__(self, worker, variant):
        self.losses = []
        self._worker = worker
        tuning.start(worker, variant)

    def steps(self, count):
        answer = tuning.ask(self._worker, do="steps", count=count)
        self.losses += answer["losses"]
        return rounds_lib.Sample(answer["seconds"] / max(count, 1))


def _rounds(sides, config, options, *, steps=AS_SHIPPED_STEPS, enough=0):
    """Rounds of `steps` steps of each side and a matrix product; then steps up to `enough`."""
    dtype = config.model.dtype
    for side in sides:
        side.steps(WARM_UP)
    matmul_peak.sample(dtype)
    contestants = {side.name: lambda side=side: side.steps(steps) for side in sides}
    contestants[PEAK] = lambda: matmul_peak.sample(dtype)
    found = rounds_lib.compare(contestants, rounds=options.rounds)
    for side in sides:
        side.steps(max(0, enough - len(side.losses)))
    return found


def _export(config, params, folder) -> dict:
    """Our weights as a Hugging Face folder and the batches as a file; what the peer opens."""
    with checkpoints.Checkpoints(folder / "run", config) as saver:
        saver.save_params(0, params)
    (_, checkpoint), = naming.list_checkpoints(folder / "run")  # fmt: skip
    dtype, optimizer = config.model.dtype, config.optimizer
    port.port(checkpoint, folder / "huggingface", to=port.HUGGING_FACE, announce=lambda line: None)
    np.save(folder / "batches.npy", work.tokens(config, LOSSES))
    return {
        "folder": str(folder / "huggingface"),
        "batches": str(folder / "batches.npy"),
        "dtype": dtype,
        "device": workers.torch_device(),
        "balance_weight": config.losses.load_balancing_weight,
        "clip_norm": optimizer.clip_norm,
        "optimizer": {
            "lr": optimizer.learning_rate,
            "betas": (optimizer.beta1, optimizer.beta2),
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
        },
    }


def _flops(config):
    length = config.data.sequence_length
    return config.tokens_per_step * accounting.flops_per_token(config.model, length).training


def _memory(config, compiled):
    """Bytes of the compiled step, and of the tensors that it cannot do without."""
    used = sum(work.memory(compiled).values())
    needed = accounting.step_bytes(config, state_dtype=config.model.dtype).total
    return {"memory_bytes": used, "needed_bytes": needed, "ratio_memory": used / needed}


def _figures(phases, config, *, with_ratios):
    """Contestants, ratios and what they rest on, of {phase: Rounds}."""
    tokens, flops, rows, ratios, shares = config.tokens_per_step, _flops(config), {}, {}, []
    for phase, found in phases.items():
        for name in found.samples:
            seconds = found.summary(name)
            share = matmul_peak.share(found, name, work=flops, against=PEAK)
            if name == PEAK:  # as if the whole step were such products
                seconds = seconds.times(flops / matmul_peak.flops())
            if name == OURS:
                shares.append(share)
            rows[f"{name}, {phase}"] = {
                "seconds": seconds,
                "tokens_per_second": tokens / seconds.median,
                "flops_per_second": flops / seconds.median,
                "share_of_peak": None if name == PEAK else share,
            }
        if THEIRS in found.samples and with_ratios:
            ratios[phase] = found.speed(OURS, against=THEIRS)
    account = [found.account() for found in phases.values()]
    return {
        **{f"ratio_{phase.replace(' ', '_')}": ratio.median for phase, ratio in ratios.items()},
        "ratio_share_of_peak": shares[0].median,
        "speeds": ratios,
        "contestants": rows,
        "foreign_loads": tuple(x for one in account for x in one["foreign_loads"]),
        "foreign_limit": rounds_lib.FOREIGN_LIMIT,
        "rounds_discarded": sum(one["rounds_discarded"] for one in account),
        "rounds_disturbed": sum(one["rounds_disturbed"] for one in account),
        "environment": machine.environment(),
    }


def show(result):
    """Prints the tables and what they rest on."""
    print(
        f"\ntrain_step: {result['tokens_per_step']:,} tokens, "
        f"{result['flops_per_step'] / 1e9:.0f} GFLOP, {result['dtype']}, experts: "
        f"{result['expert_backend']}; median (lowest–highest)"
    )
    rows = [("", "seconds", "tokens/s", "GFLOP/s", "share of peak", "ours ÷ theirs")]
    for name, row in result["contestants"].items():
        side, phase = name.split(", ", 1)
        speed = result["speeds"].get(phase) if side == THEIRS else None
        share = row["share_of_peak"]
        rows.append((
            name, row["seconds"].text(), f"{row['tokens_per_second']:.0f}",
            f"{row['flops_per_second'] / 1e9:.0f}", share.text() if share else "1",
            speed.text() if speed else "",
        ))  # fmt: skip
    print(tables.table(rows))
    allocator = "keeps freed memory" if result["allocator_tuned"] else "as shipped"
    print(
        f"memory of our step: {result['memory_bytes'] / 1e9:.2f} GB, "
        f"{result['ratio_memory']:.2f} × what its tensors need; our allocator: {allocator}"
    )
    if "peer" not in result:
        print("no peer: --peer_python names an environment that has torch and transformers")
    else:
        _show_peer(result)
    print(tables.footer(result))


def _show_peer(result):
    peer, limit = result["peer"], TOLERANCE[result["dtype"]]
    for phase, gap in result["largest_loss_differences"].items():
        count = len(result["losses"][phase][OURS])
        verdict = "agree" if gap <= limit else "WRONG: do not agree, so there is no ratio"
        print(f"{phase}: first {count} losses {verdict}, to {gap:.1e} (limit {limit:.0e})")
    print(
        f"peer: transformers {peer['transformers']}, torch {peer['torch']}, Python "
        f"{peer['python']}, peak memory {peer['peak_bytes'] / 1e9:.1f} GB; tried, seconds per step:"
    )
    for one in result["variants"]:
        chosen = {"note": "chosen"} if one["variant"] == result["variant"] else {}
        print(f"  {tuning.line(one | chosen)}")
