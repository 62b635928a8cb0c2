"""All analyses of recorded models, written as JSON: what `experiments.analyze_routing` runs.

One model: its files (schema: `results`) lie in the output itself; of several, each in a folder of
its name, and `model_comparison.json` and `expert_matching.json` between neighbours above them.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Mapping

from olmoe_jax.analysis import (
    coactivation,
    comparison,
    counts,
    domains,
    expert_weights,
    interventions,
    load,
    matching,
    results,
    saturation,
    trace,
    vocabulary,
    words,
)


@dataclasses.dataclass(frozen=True)
class Recording:
    """One checkpoint: domain → Counts, and domain → Trace, empty where traces were not kept."""

    parts: Mapping[str, counts.Counts]
    traces: Mapping[str, trace.Trace]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What was found of one model, of its last checkpoint but for `saturation` and `health`.

    Attributes:
      domains: domains.Domains.
      load: load.Load over all domains together.
      health: load.Load of every checkpoint and domain, with its share of the training.
      coactivation: coactivation.Coactivation; None where the source has no pairs.
      vocabulary: (kind, rank) → vocabulary.Vocabulary; empty where tokens are not known.
      known: Counts over the domains whose tokens are known, which `vocabulary` is of; or None.
      saturation: saturation.Saturation; None of a single checkpoint or without traces.
      pooled: Counts over all domains.
      sentences: what it comes to, in words; notes: what was left out, and why.
      decode: token id → text, or None.
      effects: interventions.Effects; None where none were made.
    """

    domains: domains.Domains
    load: load.Load
    health: tuple
    coactivation: coactivation.Coactivation | None
    vocabulary: Mapping
    known: counts.Counts | None
    saturation: saturation.Saturation | None
    pooled: counts.Counts
    sentences: tuple[str, ...]
    notes: tuple[str, ...]
    decode: Callable[[int], str] | None = None
    effects: interventions.Effects | None = None


def find(recordings, *, total_steps=None, decode=None, definition="paper", settled=None) -> Found:
    """Runs the analyses of one model.

    Args:
      recordings: Recordings of its checkpoints, in order of training.
      total_steps: of the whole training, where it went on behind the last checkpoint.
      decode: token id → text, or None.
      definition: of co-activation: "paper" or "adjacent" (the released script's).
      settled: saturation.Saturation, if it was computed while there were traces.
    Raises:
      ValueError: the checkpoints do not belong together, or a domain is empty.
    """
    last, notes = recordings[-1], []
    parts = list(last.parts.values())
    pooled = counts.pool(parts) if len(parts) > 1 else parts[0]
    by_domain = domains.specialisation(parts)
    together = load.load(pooled)
    pairs = None
    if pooled.info.num_experts_per_token < 2:
        notes.append("co-activation: each token goes to one expert")
    elif pooled.pairs is None or pooled.adjacent is None:
        notes.append("co-activation: not in this source, which has no pairs of experts")
    else:
        pairs = coactivation.coactivation(pooled, definition=definition)
    known = [part for part in parts if part.vocabulary]
    known = counts.pool(known) if len(known) > 1 else known[0] if known else None
    tokens = {}
    if known is not None:
        try:
            tokens = vocabulary.vocabulary(known)
        except ValueError:  # all else can be found
            notes.append(
                f"vocabulary specialisation: no token occurs {vocabulary.MIN_COUNT} times; take "
                "more text"
            )
    if known is None:
        notes.append("vocabulary specialisation: not in this source, which does not know tokens")
    elif len(known.info.domain) < len(pooled.info.domain):
        notes.append(f"vocabulary specialisation: of {known.info.domain} only")
    if tokens and decode is None:
        notes.append("tokens are given by their numbers: no tokenizer of this model was named")
    if settled is not None:
        pass
    elif len(recordings) > 1 and all(one.traces for one in recordings):
        traces = [list(one.traces.values()) for one in recordings]
        settled = saturation.over_training(traces, total_steps=total_steps)
    elif len(recordings) == 1:
        notes.append("router saturation: needs two or more checkpoints of one training")
    else:
        notes.append("router saturation: needs traces of every checkpoint")
    sentences = [*words.specialised(by_domain), *words.balanced(together)]
    sentences += words.settled(settled) if settled else ()
    sentences += words.worded(known, tokens, decode=decode) if tokens else ()
    sentences += words.together(pairs) if pairs else ()
    if pooled.group_weights is None:
        notes.append("how sure the router is: not in this source, which has no weights")
    every = [part for one in recordings for part in one.parts.values()]
    return Found(
        domains=by_domain, load=together, coactivation=pairs, vocabulary=tokens, known=known,
        health=tuple(load.over_training(every, total_steps=total_steps)),
        saturation=settled, pooled=pooled, sentences=tuple(sentences),
        notes=(*by_domain.notes, *notes), decode=decode,
    )  # fmt: skip


def with_interventions(found, effects) -> Found:
    """What was found, and interventions.Effects of the same model."""
    sentences = (*found.sentences, *words.caused(effects))
    return dataclasses.replace(found, effects=effects, sentences=sentences)


def write(found, output):
    """Writes a model's JSON files into the directory `output`."""
    output = pathlib.Path(output)
    files = {
        "domain_specialisation": domains.to_json(found.domains),
        "domain_information": domains.information_to_json(found.domains),
        "load": load.to_json(found.health),
    }
    if found.coactivation is not None:
        files["coactivation"] = coactivation.to_json(found.coactivation)
    if found.saturation is not None:
        files["router_saturation"] = saturation.to_json(found.saturation)
    if found.effects is not None:
        files["interventions"] = interventions.to_json(found.effects)
    if found.pooled.paths is not None:
        files["expert_paths"] = domains.paths_to_json(
            found.pooled, domains.expert_paths(found.pooled)
        )
    if found.vocabulary:
        files["vocabulary_specialisation"] = vocabulary.to_json(found.known, found.vocabulary)
        files["expert_tokens"] = vocabulary.tokens_to_json(found.known, decode=found.decode)
    for name, content in files.items():
        results.write(output / f"{name}.json", content)


def write_all(models, output, *, traces=None, weights=None):
    """Writes every model's files, and with several models what lies between them.

    Args:
      models: name → Found.
      traces: name → the traces of its last checkpoint by domain, for the matching of experts; of
        models that were recorded on different tokens nothing is matched.
      weights: name → directory of its last checkpoint, for the matching by weights; models whose
        experts have other shapes are not matched.
    Returns:
      sentences about pairs of models.
    """
    output, sentences = pathlib.Path(output), []
    for name, found in models.items():
        write(found, output / name if len(models) > 1 else output)
    if len(models) < 2:
        return ()
    curves = {
        name: comparison.curves(
            domains=found.domains, load=found.load, saturation=found.saturation,
            vocabulary=found.vocabulary or None, layers=found.pooled.info.layers,
        )
        for name, found in models.items()
    }  # fmt: skip
    results.write(output / "model_comparison.json", comparison.to_json(curves))
    names = list(models)
    for one, two in itertools.pairwise(names):
        suffix = "" if len(names) == 2 else f"_{one}_{two}"
        for name, matched in (
            ("expert_matching", _by_routing(traces or {}, one, two)),
            ("expert_matching_weights", _by_weights(weights or {}, one, two)),
        ):
            if matched is not None:
                results.write(output / f"{name}{suffix}.json", matching.to_json(matched))
                sentences += words.matched(matched)
    return tuple(sentences)


def _by_routing(traces, one, two):
    first, second = (list(traces.get(name, {}).values()) for name in (one, two))
    known = [[(t.info.data, len(t.info.layers)) for t in found] for found in (first, second)]
    return matching.by_routing(first, second) if first and known[0] == known[1] else None


def _by_weights(weights, one, two):
    if not {one, two} <= weights.keys():
        return None
    first, second = (expert_weights.open_experts(weights[name]) for name in (one, two))
    if not first.is_comparable(second):
        return None
    return matching.by_weights(first, second, layers=first.layers, names=(one, two))


def write_siblings(checkpoints, output) -> tuple[str, ...]:
    """Writes how alike the experts of a model are among themselves; returns sentences.

    Args:
      checkpoints: `suites.Checkpoint`s of one model, in order of training: the first and the last
        are read.
      output: directory of the model's files.
    """
    ends = checkpoints[:1] + checkpoints[1:][-1:]
    found = []
    for one in ends:
        experts = expert_weights.open_experts(one.path)
        if experts.num_experts < 2:
            return ()
        found.append((one.name, matching.siblings(experts, layers=experts.layers)))
    path = pathlib.Path(output) / "expert_siblings.json"
    results.write(path, matching.siblings_to_json(found))
    return words.diverged(found[-1][1], *(found[:1] if len(found) > 1 else ()))
