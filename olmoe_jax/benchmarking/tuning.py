"""The best way to run transformers on this machine: what it offers, each tried for a few steps.

Experts implementation × threads × compiled or not. What fails or takes far longer than the best is
tried neither compiled nor with fewer threads; what needs more memory than there is is not tried.
"""

import dataclasses
import itertools

from olmoe_jax import accounting, machine

STEPS = 3  # timed, after one
HOPELESS, HOPELESS_AT_FIRST = 1.5, 2.0  # times the best so far

BOTH = (False, True)  # as it is, compiled
GROUPED, BATCHED = "grouped_mm", "batched_mm"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run the peer."""

    experts: str
    threads: int
    compiled: bool

    def text(self) -> str:
        """As in "grouped_mm, 2 threads, eager"."""
        plural = "s" if self.threads > 1 else ""
        how = "torch.compile" if self.compiled else "not compiled"
        return f"{self.experts}, {self.threads} thread{plural}, {how}"


def tune(worker, implementations, config):
    """(best Variant, [{"variant": text, "seconds": per step or None, "note": text}] of all).

    Args:
      worker: a workers.Worker of peers/transformers_step.py, opened.
      implementations: names of experts implementations.
      config: the work.

    Raises:
      ValueError: none of them runs.
    """
    cores = machine.cores()
    # The likely best first: what follows is then soon seen to be hopeless.
    ordered = sorted(implementations, key=lambda name: (name != GROUPED, name))
    thread_counts = sorted({cores, max(1, cores // 2)}, reverse=True)
    best, fastest, tried = None, float("inf"), []
    useless = set()  # (experts, threads, compiled)
    for variant in itertools.starmap(Variant, itertools.product(ordered, thread_counts, BOTH)):
        # Fewer threads, or the compiler, will not make it the best.
        if useless & {(variant.experts, n, False) for n in (variant.threads, cores)}:
            continue
        note, seconds = _too_large(variant.experts, config), None
        if not note:
            seconds, note = _try(worker, variant, fastest)
        tried.append({"variant": variant.text(), "seconds": seconds, "note": note})
        print(f"  {line(tried[-1])}", flush=True)
        if note:
            useless.add(dataclasses.astuple(variant))
        elif seconds < fastest:
            best, fastest = variant, seconds
    if best is None:
        first = tried[0]
        raise ValueError(f"no variant of the peer runs; {first['variant']}: {first['note']}")
    return best, tried


def line(one) -> str:
    """One of what `tune` tried, for a person."""
    seconds = "" if one["seconds"] is None else f"{one['seconds']:.2f} s"
    return f"{one['variant']:36} {seconds:>8}  {one['note'][:80]}".rstrip()


def start(worker, variant):
    """Makes the peer begin again, as `variant`.

    Raises:
      ValueError: it cannot.
    """
    ask(worker, do="start", **dataclasses.asdict(variant))


def ask(worker, **request) -> dict:
    """`worker.ask`; an answer {"error": …} is a ValueError."""
    answer = worker.ask(**request)
    if "error" in answer:
        raise ValueError(f"transformers: {answer['error']}")
    return answer


def _try(worker, variant, fastest):
    """(seconds per step, or None; why no more was tried, or "")."""
    try:
        start(worker, variant)
        first = ask(worker, do="steps", count=1)["seconds"]  # compiles, asks for memory
        if first > HOPELESS_AT_FIRST * fastest and not variant.compiled:
            return first, "one step, not tried further"
        seconds = ask(worker, do="steps", count=1)["seconds"]
        if seconds > HOPELESS * fastest:
            return seconds, "two steps, not tried further"
        more = [ask(worker, do="steps", count=1)["seconds"] for _ in range(STEPS - 1)]
        return min([seconds, *more]), ""
    except ValueError as error:
        return None, str(error)


def _too_large(name, config):
    """Why an implementation cannot be tried, or "".

    batched_mm copies, for each row, the whole of its expert's weights, and keeps them all for the
    backward pass.
    """
    model, free = config.model, machine.free_memory()
    size = accounting.BYTES[model.dtype]
    rows = config.tokens_per_step * model.num_experts_per_token * model.num_moe_layers
    needed = rows * 3 * model.d_model * model.d_ff * size
    if name != BATCHED or free is None or needed < free:
        return ""
    return f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
