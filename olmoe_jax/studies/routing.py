"""What the routers of a study's arms do: measured on its finished runs, by `olmoe_jax.analysis`.

    WORKDIR/routing/ARM/seed_N/STEP-KEY/DOMAIN/   routing traces, which make measuring again cheap

KEY is of the checkpoint's files and of the texts: where a run was made again, or lies elsewhere, it
is another one, and the traces are made again. Those of other keys are removed.

A few thousand tokens of each domain of the validation split are recorded, at the last checkpoint
and at those next to 10, 20 and 40 % of the training. Dense arms have no router; under expert choice
a token's experts depend on the batch, so those arms are left out as well.
"""

import hashlib
import itertools
import json
import shutil

import numpy as np

from olmoe_jax.analysis import counting, domains, matching, recording, saturation, suites, texts
from olmoe_jax.training import runs

FOLDER = "routing"
SHARES = (0.1, 0.2, 0.4)  # of the training, as in the paper's figure 20
MAX_TOKENS = 4096  # of a domain


def measure(plan, found, *, announce=print) -> dict:
    """arm → what its routers do, as plain numbers, means over layers and seeds.

    Only one process at a time may measure a study.

    Args:
      plan: a plans.Plan whose runs are done.
      found: (arm, seed) → results.Run; diverged ones are left out.
    Returns:
      arm → {"left_out": why}, or a dict of
        saturation: share of the training, as text → share of the last checkpoint's choices that
          were already made there; `saturation_chance`: k / experts.
        specialisation: half the sum over experts of |share of a domain's choices − mean of that
          over domains|, mean over domains; `specialisation_chance`: that of documents whose domains
          were permuted. None of a single domain.
        imbalance: the same distance from 1 / experts, whatever the domain; `imbalance_chance`: that
          of a random router on as many tokens.
        matching: similarity (Jaccard) of the experts of two seeds, each with its match, mean over
          pairs of neighbouring seeds, and `matching_chance`; None of a single seed.
        tokens, domains: what it was measured on.
      The definitions are those of `analysis.saturation`, `.domains` and `.matching`.
    """
    out, said = {}, False
    for arm, config in plan.configs.items():
        if why := _unfit(config.model):
            out[arm] = {"left_out": why}
            continue
        mine = [found[arm, seed] for seed in plan.seeds if not found[arm, seed].problem]
        if not mine:
            out[arm] = {"left_out": "every run diverged"}
            continue
        if not said:
            announce("recording what the routers do")
            said = True
        out[arm] = _arm(plan, arm, config, mine)
    return out


def _unfit(model):
    """Why the routing of a model is not recorded; None if it is."""
    if not model.num_experts:
        return "dense"
    if model.router != "token_choice":
        return "a token's experts depend on the batch"
    return None


def _arm(plan, arm, config, mine):
    one_of_its = runs.open_data(config, mine[0].path, _quiet)
    text = texts.from_prepared(
        one_of_its, context_length=config.data.sequence_length, max_tokens=MAX_TOKENS,
        announce=_quiet,
    )  # fmt: skip
    last, early, spread = [], [], []
    for run in mine:
        folder = plan.workdir / FOLDER / arm / f"seed_{run.seed}"
        outputs = {_output(folder, one, text): one for one in _checkpoints(run.path, config)}
        _remove_others(folder, outputs)
        recorded = [_record(one, text, output) for output, one in outputs.items()]
        traces = [[one.trace for one in domain] for domain in recorded]
        counts = [one.accumulated.result() for one in recorded[-1]]
        spread.append(domains.specialisation(counts).topk)
        if len(traces) > 1:
            early.append(saturation.over_training(traces))
        last.append(traces[-1])
    pairs = [matching.by_routing(a, b).layers for a, b in itertools.pairwise(last)]
    flat = [layer for layers in pairs for layer in layers]
    several = len(text) > 1
    k, experts = config.model.num_experts_per_token, config.model.num_experts
    return {
        "saturation": _saturation(early, config.training.num_steps),
        "saturation_chance": k / experts,
        "specialisation": _mean([one.specific for one in spread]) if several else None,
        "specialisation_chance": _mean([s.specific_chance for s in spread]) if several else None,
        "imbalance": _mean([one.tv.value for one in spread]),
        "imbalance_chance": _mean([one.random[:, 0] for one in spread]),
        "matching": _mean([layer.mean.value for layer in flat]) if flat else None,
        "matching_chance": _mean([layer.chance for layer in flat]) if flat else None,
        "tokens": sum(len(one.tokens) for one in text),
        "domains": [one.domain for one in text],
    }


def _checkpoints(path, config):
    """The last checkpoint of a run, behind those next to SHARES, each once; step 0 is none."""
    every = [one for one in suites.checkpoints_of(path) if one.step]
    wanted = [share * config.training.num_steps for share in SHARES]
    chosen = {min(every, key=lambda one, at=at: abs(one.step - at)).step for at in wanted}
    return [one for one in every if one.step in chosen or one is every[-1]]


def _output(folder, checkpoint, text):
    """Where the traces of a checkpoint on texts lie: the name says what they are of."""
    content = json.dumps(recording.identity(checkpoint, text))
    digest = hashlib.sha256(content.encode()).hexdigest()
    return folder / f"{checkpoint.step}-{digest[:12]}"


def _remove_others(folder, outputs):
    """Removes traces that nothing will read again: of a run that was made again, of other texts."""
    kept = {output.name for output in outputs}
    for path in folder.iterdir() if folder.is_dir() else ():
        name = path.name.partition(".")[0]  # .scratch: of an interrupted recording
        if path.is_dir() and name not in kept:
            shutil.rmtree(path)


def _record(checkpoint, text, output):
    """A sinks.Recorded per domain; what lies in `output` is not computed again."""

    def counter(info):
        return counting.Counter(info, vocabulary=False)

    return list(recording.record(checkpoint, text, output, accumulate=counter, announce=_quiet))


def _saturation(seeds, num_steps):
    """{share of the training, as text: mean over layers and seeds}."""
    if not seeds:
        return {}
    points = zip(*(one.against_final for one in seeds), strict=True)
    return {
        f"{point[0].step / num_steps:.2g}": _mean([one.topk.value for one in point])
        for point in points
    }


def _mean(arrays):
    return float(np.mean(arrays))


def _quiet(line):
    del line
