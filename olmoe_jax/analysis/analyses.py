"""All analyses of recorded models, written as JSON: what `experiments.analyze_routing` runs.

One model: its files (schema: `results`) lie in the output itself; of several, each in a folder of
its name, and `model_comparison.json` and `expert_matching.json` between neighbours above them.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

from olmoe_jax.analysis import (
    coactivation,
    comparison,
    counts,
    domains,
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


def find(recordings, *, total_steps=None, decode=None, definition="paper") -> Found:
    """Runs the analyses of one model.

    Args:
      recordings: Recordings of its checkpoints, in order of training.
      total_steps: of the whole training, where it went on behind the last checkpoint.
      decode: token id → text, or None.
      definition: of co-activation: "paper" or "adjacent" (the released script's).
    Raises:
      ValueError: the checkpoints do not belong together, or a domain is empty.
    """
    last, notes = recordings[-1], []
    parts = list(last.parts.values())
    pooled = counts.pool(parts) if len(parts) > 1 else parts[0]
    by_domain = domains.specialisation(parts)
    together = load.load(pooled)
    pairs = None
    if pooled.pairs is None and pooled.adjacent is None:
        notes.append("co-activation: not in this source, which has no pairs of experts")
    else:
        pairs = coactivation.coactivation(pooled, definition=definition)
    known = [part for part in parts if part.vocabulary]
    known = counts.pool(known) if len(known) > 1 else known[0] if known else None
    tokens = {} if known is None else vocabulary.vocabulary(known)
    if known is None:
        notes.append("vocabulary specialisation: not in this source, which does not know tokens")
    elif len(known.info.domain) < len(pooled.info.domain):
        notes.append(f"vocabulary specialisation: of {known.info.domain} only")
    settled = None
    if len(recordings) > 1 and all(one.traces for one in recordings):
        traces = [list(one.traces.values()) for one in recordings]
        settled = saturation.over_training(traces, total_steps=total_steps)
    elif len(recordings) == 1:
        notes.append("router saturation: needs two or more checkpoints of one training")
    else:
        notes.append("router saturation: needs traces; keep them (--keep_traces)")
    sentences = [*words.specialised(by_domain), *words.balanced(together)]
    sentences += words.settled(settled) if settled else ()
    sentences += words.worded(known, tokens, decode=decode) if tokens else ()
    sentences += words.together(pairs) if pairs else ()
    every = [part for one in recordings for part in one.parts.values()]
    return Found(
        domains=by_domain, load=together, coactivation=pairs, vocabulary=tokens, known=known,
        health=tuple(load.over_training(every, total_steps=total_steps)),
        saturation=settled, pooled=pooled, sentences=tuple(sentences),
        notes=(*by_domain.notes, *notes),
    )  # fmt: skip


def write(found, output, *, decode=None):
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
    if found.pooled.paths is not None:
        files["expert_paths"] = domains.paths_to_json(
            found.pooled, domains.expert_paths(found.pooled)
        )
    if found.vocabulary:
        files["vocabulary_specialisation"] = vocabulary.to_json(found.known, found.vocabulary)
        files["expert_tokens"] = vocabulary.tokens_to_json(found.known, decode=decode)
    for name, content in files.items():
        results.write(output / f"{name}.json", content)


def write_all(models, output, *, traces=None, decode=None):
    """Writes every model's files, and with several models what lies between them.

    Args:
      models: name → Found.
      traces: name → the traces of its last checkpoint by domain, for the matching of experts; of
        models that were recorded on different tokens nothing is matched.
    Returns:
      sentences about pairs of models.
    """
    output, sentences = pathlib.Path(output), []
    for name, found in models.items():
        write(found, output / name if len(models) > 1 else output, decode=decode)
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
    for one, two in zip(names, names[1:], strict=False):
        pair = [list((traces or {}).get(name, {}).values()) for name in (one, two)]
        if not all(pair):
            continue
        matched = matching.by_routing(*pair)
        suffix = "" if len(names) == 2 else f"_{one}_{two}"
        results.write(output / f"expert_matching{suffix}.json", matching.to_json(matched))
        sentences += words.matched(matched)
    return tuple(sentences)
