"""The JSON files of the analyses: their schema, and writing them.

All shares lie in 0..1, all information is in bits, layers are keyed by their index in the model as
a string, experts are places in a list. "EST" is {"value", "low", "high"}: a number (or list) and
its 95 % interval over documents, null where documents are not known. NaN is null.

  router_saturation.json
    model, domains, layers, reference: name of the last checkpoint
    chance: {topk: k / experts, top1: 1 / experts}
    checkpoints: [{name, step, train_tokens, share: of training, against_final: LAYERS}]
    neighbours: [{from, to, step, train_tokens, share: of `to`; values: LAYERS}]
      LAYERS: {layer: {topk: EST, top1: EST}, mean: {topk: EST, top1: EST}}
  coactivation.json
    model, checkpoint, domain, definition: "paper" or "adjacent"
    chance: of sets drawn at random; threshold: of groups
    layers: {layer: {matrix: [experts][experts], share of the row expert's tokens that also chose
      the column's, null on the diagonal; pairs: [{experts: [a, b], value: EST, lift}] strongest
      first; groups: [{experts, weakest}]; order: experts of the published heat map}}
  domain_specialisation.json
    {layer: {domain: {topk, top1: [experts], share of the domain's tokens with the expert among
      their k, or first; topk_low, topk_high, top1_low, top1_high: [experts];
      tv_topk, tv_top1: EST, total-variation distance from uniform; tv_topk_random,
      tv_top1_random: {mean, high}, that of a random router on as many tokens;
      specific_topk, specific_top1: {value, chance, chance_high, p_value, baseline}, distance from
      the mean of all domains, and by chance}}}
    top1 and what follows from it is null for a domain whose source has no first choices.
  domain_information.json
    model, checkpoint, domains, uniform: {topk, top1}, notes: [sentences]
    layers: {layer: {topk, top1: {plug_in, corrected: EST, correction, chance, chance_high,
      p_value}}}; mean_p_value: {topk, top1}; most: the largest possible value
  expert_paths.json
    model, domain, threshold
    paths: [{from_layer, to_layer, from_expert, to_expert, tokens, share: EST of the first expert's
      tokens, expected: share of all tokens that go to the second}], most tokens first
  vocabulary_specialisation.json
    model, domain, min_count
    kinds: {input | predicted | next: {topk | top1: {num_ids, layers: {layer: {mean: EST,
      random: chance level, experts: [mean per expert or null], num_ids: [per expert]}}}}}
  expert_tokens.json
    {layer: {kind: {rank: {expert: [{id, text, share, count}]}}}}, strongest first
  load.json
    rows: [{model, checkpoint, step, train_tokens, share, domain, num_tokens, rank, layers: {layer:
      {load: [experts], shares of the choices; max_violation: EST; entropy: EST, of the largest;
      dead: [expert ids]; dead_by_chance: expected number;
      confidence, first_weight, logit_spread: EST or null}}}]
  expert_matching.json
    one, two: names; by: "routing" or "weights"
    layers: {layer: {match: [expert of two, for each of one], similarity: [of each pair],
      mean: EST, chance, same_index: mean of pairs of equal index, moved: share of experts whose
      match has another index; overlap: EST, overlap_same_index (by routing)}}
  prompt.json
    model, checkpoint, prompts: [{text, tokens: [{id, text, predicted: {id, text}, the model's most
      probable next token}], layers: {layer: {experts: [tokens][k], by falling weight; weights:
      [tokens][k], of the softmax over all experts}}}]
  expert_matching_weights.json: as expert_matching.json, by "weights"
  expert_siblings.json
    checkpoints: [{name, layers: {layer: {matrix: [experts][experts], cosines of the weights of the
      model's experts; mean, closest: over pairs of different experts}}}], the first and the last
  interventions.json
    unit; weights_renormalised: whether the model divides the chosen weights by their sum
    domains: {domain: {tokens, documents, loss: EST without intervention}}
    contrasts: {muted | excluded: {own, control, elsewhere: EST, mean change of a domain's loss by
      its own experts, by random ones, and of the other domains by the former; beyond_control,
      beyond_elsewhere: EST, the differences; control_p, elsewhere_p: share of sign flips over
      experts that reach them; control_pairs, elsewhere_pairs: over how many}}
    interventions: [{kind: muted, excluded or uniform; layer: null for all; expert; chosen:
      [{domain, as: own or control}]; domains: {domain: {change: EST, share of its tokens}}}]
  model_comparison.json
    models: [names], metrics: {name: {unit, models: {model: {depth: [0..1], value: [], low, high}},
      differences: {"b − a": {depth, value, low, high}}}}
"""

import contextlib
import dataclasses
import json
import math
import pathlib

import numpy as np

from olmoe_jax import files

DIGITS = 6
NAMES = (
    "router_saturation", "coactivation", "domain_specialisation", "domain_information",
    "expert_paths", "vocabulary_specialisation", "expert_tokens", "load", "expert_matching",
    "expert_matching_*", "prompt", "expert_siblings", "interventions", "model_comparison",
)  # fmt: skip
SUMMARY = "summary"


def plain(value):
    """What JSON holds: lists, rounded floats, None for NaN and infinities, string keys."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def clear(output, models=()) -> None:
    """Removes the JSON files of a former run from a directory and from the folders of models in it.

    Args:
      output: the directory.
      models: names beside those of the former run's summary.
    """
    output, former = pathlib.Path(output), ()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        former = tuple(json.loads((output / f"{SUMMARY}.json").read_text())["models"])
    names = {name for name in (*models, *former) if pathlib.Path(name).name == name}
    for folder in (*(output / name for name in sorted(names)), output):
        for name in (*NAMES, SUMMARY):
            for path in folder.glob(f"{name}.json"):
                path.unlink()
        with contextlib.suppress(OSError):  # is not empty, or not there
            if folder != output:
                folder.rmdir()


def write(path, value) -> None:
    """Writes JSON, whole or not at all."""
    text = json.dumps(plain(value), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    files.write_text(path, text + "\n")
