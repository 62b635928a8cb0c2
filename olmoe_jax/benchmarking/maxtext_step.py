"""`maxtext_step`: work A's train step (see `work`) against MaxText's on the same device.

Both start from the same weights and take the same batches: forward with the load-balancing loss
(taken per sequence, as MaxText does), backward, clipping and AdamW, with parameters and moments in
--dtype. As in the block that MaxText has (Qwen3-MoE), QK-norm is over each head and the weights of
a token's experts sum to 1. If the first losses do not agree there is no ratio and the run fails.

MaxText computes dropless experts in two ways that run without a TPU: "ragged", its own choice, and
"dense", every expert for every token. Each makes a first step, with our allocator settings; the
faster one then meets us in rounds. `--peer_python` names an environment with MaxText (Python 3.12;
`pip install maxtext` without the libraries of a TPU or GPU image: see peers/maxtext_step.py).
"""

import dataclasses
import os
import pathlib
import tempfile

import numpy as np

from olmoe_jax import machine
from olmoe_jax.benchmarking import rounds as rounds_lib
from olmoe_jax.benchmarking import tables, train_step, work, workers
from olmoe_jax.checkpoints import layout
from olmoe_jax.model import experts

PEER = pathlib.Path(__file__).parent / "peers" / "maxtext_step.py"
OURS, THEIRS = train_step.OURS, "MaxText"
MODEL_FIELDS = (
    "d_model", "num_heads", "num_layers", "d_ff", "vocab_size", "num_experts",
    "num_experts_per_token", "rope_theta", "norm_eps",
)  # fmt: skip
OPTIMIZER_FIELDS = ("learning_rate", "beta1", "beta2", "eps", "weight_decay")


def config(*, dtype="float32", expert_backend="auto", **changes):
    """The Config of work A with the block and the load-balancing loss that MaxText has."""
    run_config = work.config(
        dtype=dtype,
        expert_backend=expert_backend,
        qk_norm_per_head=True,
        normalize_expert_weights=True,
        **changes,
    )
    losses = dataclasses.replace(
        run_config.losses, load_balancing_convention="olmoe", load_balancing_group=1
    )
    return dataclasses.replace(run_config, losses=losses)


def run(options):
    """The suite; (what --json gets, whether the losses agree)."""
    backend = experts.resolve(options.expert_backend or "auto")
    result = measure(config(dtype=options.dtype, expert_backend=backend), options)
    _show(result)
    return result, result["losses_agree"]


def measure(run_config, options) -> dict:
    """All of it, for a config made by `config`.

    Raises:
      ValueError: there is no --peer_python, or MaxText fails there.
    """
    if options.peer_python is None:
        raise ValueError("--suite=maxtext_step needs --peer_python, of an environment with MaxText")
    ours = train_step.Ours(run_config)
    os.makedirs(options.scratch, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="maxtext_", dir=options.scratch) as folder,
        workers.Worker.peer(options, PEER, allocator_tuned=options.allocator_tuned) as worker,
    ):
        described = worker.ask(do="describe")
        opening = _export(run_config, ours.trainer.state["params"], pathlib.Path(folder))
        worker.ask(do="open", **opening)
        first_steps, first_losses = {}, []
        for variant in described["variants"]:
            worker.ask(do="start", variant=variant)
            answer = worker.ask(do="steps", count=1)
            first_steps[variant] = answer["seconds"]
            first_losses += answer["losses"]
            print(f"  {variant}: first step {answer['seconds']:.1f} s", flush=True)
        best = min(first_steps, key=first_steps.get)
        if best != variant:
            worker.ask(do="start", variant=best)
            answer = worker.ask(do="steps", count=1)
        ours.steps(1)
        theirs = _Theirs(worker, answer["losses"])
        found = rounds_lib.compare(
            {OURS: lambda: ours.steps(1), THEIRS: lambda: theirs.steps(1)}, rounds=options.rounds
        )
    gaps = [abs(x - y) for x, y in zip(ours.losses, theirs.losses, strict=True)]
    gaps += [abs(ours.losses[0] - loss) for loss in first_losses]
    gap = float(np.nan_to_num(gaps, nan=np.inf).max())
    agree = gap <= train_step.TOLERANCE[run_config.model.dtype]
    return {
        "suite": "maxtext_step",
        "dtype": run_config.model.dtype,
        "expert_backend": run_config.model.expert_backend,
        "tokens_per_step": run_config.tokens_per_step,
        "peer": described,
        "variant": best,
        "largest_loss_difference": gap,
        "losses": {OURS: ours.losses, THEIRS: theirs.losses},
        "losses_agree": agree,
        **_figures(found, first_steps, run_config.tokens_per_step, with_ratios=agree),
    }


class _Theirs:
    """The peer's side, as `train_step.Ours`, behind the steps of which `losses` are."""

    def __init__(self, worker, losses):
        self.losses, self._worker = list(losses), worker

    def steps(self, count):
        answer = self._worker.ask(do="steps", count=count)
        self.losses += answer["losses"]
        return rounds_lib.Sample(answer["seconds"] / count)


def _export(run_config, params, folder) -> dict:
    """Our weights and batches as files; what the peer opens."""
    (folder / "weights").mkdir()
    for name, leaf in layout.flatten(layout.to_stored(params, run_config.model)).items():
        file = folder / "weights" / f"{name.replace('/', '.')}.npy"
        np.save(file, np.asarray(leaf, np.float32))
    np.save(folder / "batches.npy", work.tokens(run_config, train_step.LOSSES))
    return {
        "folder": str(folder.resolve()),
        "model": {name: getattr(run_config.model, name) for name in MODEL_FIELDS},
        "dtype": run_config.model.dtype,
        "batch_size": run_config.training.batch_size,
        "balance_weight": run_config.losses.load_balancing_weight,
        "clip_norm": run_config.optimizer.clip_norm,
        "optimizer": {name: getattr(run_config.optimizer, name) for name in OPTIMIZER_FIELDS},
    }


def _figures(found, first_steps, tokens, *, with_ratios):
    """Contestants and ratios of Rounds; first_steps: variant → seconds."""
    rows = {}
    for name in found.samples:
        seconds = found.summary(name)
        rows[name] = {"seconds": seconds, "tokens_per_second": tokens / seconds.median}
    for variant, seconds in first_steps.items():
        summary = rounds_lib.summarize([seconds])
        rows[f"{THEIRS}, {variant}, first step"] = {
            "seconds": summary, "tokens_per_second": tokens / seconds
        }  # fmt: skip
    ratios = {"ratio_maxtext": found.speed(OURS, against=THEIRS).median}
    for variant, seconds in first_steps.items():
        ratios[f"ratio_{variant}_first_step"] = seconds / rows[OURS]["seconds"].median
    return {
        **(ratios if with_ratios else {}),
        "contestants": rows,
        **found.account(),
        "environment": machine.environment(),
    }


def _show(result):
    rows = [("", "seconds", "tokens/s", "ours ÷ theirs")]
    ours = result["contestants"][OURS]["seconds"].median
    for name, row in result["contestants"].items():
        ratio = f"{row['seconds'].median / ours:.1f}" if result["losses_agree"] else ""
        cells = row["seconds"].text(), f"{row['tokens_per_second']:.0f}", ratio
        rows.append((name, *cells))
    peer, gap = result["peer"], result["largest_loss_difference"]
    verdict = "agree" if result["losses_agree"] else "WRONG: do not agree, so there is no ratio"
    print(
        f"\nmaxtext_step: {result['tokens_per_step']:,} tokens, {result['dtype']}, our experts: "
        f"{result['expert_backend']}; median (lowest–highest)\n{tables.table(rows)}\n"
        f"losses {verdict}, to {gap:.1e}; peer: MaxText {peer['maxtext']}, jax {peer['jax']}, "
        f"Python {peer['python']}, experts: {result['variant']}\n{tables.footer(result)}"
    )
