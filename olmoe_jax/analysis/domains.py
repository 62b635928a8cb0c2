"""Domain specialisation: which experts a domain uses, and whether chance would look the same.

DS(E_i, D) = tokens of D with E_i among their k experts / tokens of D (OLMoE, arXiv 2409.02060,
section 5.3; `top1` counts the first expert only). A balanced router without knowledge of domains
gives k / experts everywhere. Two baselines say what few tokens do: a random router on as many
tokens, and the labels of whole documents permuted.
"""

import dataclasses

import numpy as np

from olmoe_jax.analysis import counts as counts_lib
from olmoe_jax.analysis import resampling

RANKS = ("topk", "top1")
PATH_THRESHOLD = 1.5  # the paper's figures 35 and 36


@dataclasses.dataclass(frozen=True, kw_only=True)
class Specialisation:
    """One rank's numbers ("topk" or "top1").

    Attributes:
      domains: those whose source has counts of this rank; the axis of what follows.
      share: Estimate [layers, domains, experts], DS.
      tv: Estimate [layers, domains], ½ Σ_e |share of the choices − 1 / experts|; sampling alone
        makes it positive, see `random`.
      random: float64 [domains, 2], mean and 95 % quantile of that of a random router.
      specific: [layers, domains], ½ Σ_e |share of the choices − mean of that over domains|.
      specific_chance, specific_high, specific_p: [layers, domains], mean and 95 % quantile by
        chance, share of chance draws that reach `specific`; None of a single domain.
      specific_mean_p: the same of the mean over layers and domains; None of a single domain.
      baseline: "permuted documents"; or "independent tokens" where documents are not known or too
        few to permute: tokens drawn from the mean of the domains, which understates chance.
      information: resampling.Information, or None of a single domain.
    """

    domains: tuple[str, ...]
    share: resampling.Estimate
    tv: resampling.Estimate
    random: np.ndarray
    specific: np.ndarray
    specific_chance: np.ndarray | None
    specific_high: np.ndarray | None
    specific_p: np.ndarray | None
    specific_mean_p: float | None
    baseline: str
    information: resampling.Information | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domains:
    """Domain specialisation of one checkpoint.

    Attributes:
      layers: indices in the model.
      topk, top1: Specialisation; top1 is None where the source has no first choices.
      uniform: {"topk": k / experts, "top1": 1 / experts}.
      notes: what a reader must know, such as that there was one document only.
    """

    model: str
    checkpoint: str
    layers: tuple[int, ...]
    domains: tuple[str, ...]
    topk: Specialisation
    top1: Specialisation | None
    uniform: dict
    notes: tuple[str, ...] = ()


def specialisation(parts, *, seed=0) -> Domains:
    """Domain specialisation from the Counts of each domain.

    Raises:
      ValueError: no domain, one without tokens, one twice, or models that differ.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("domain specialisation needs at least one domain")
    infos = [part.info for part in parts]
    counts_lib.check_alike(infos, ("model", "checkpoint"))
    names = tuple(info.domain for info in infos)
    if len(set(names)) < len(names):
        raise ValueError(f"domains {', '.join(names)}: one stands there twice")
    for info in infos:
        if not info.num_tokens:
            raise ValueError(f"domain {info.domain} holds no token: leave it out")
    experts, k = infos[0].num_experts, infos[0].num_experts_per_token
    results = {}
    for rank in RANKS:
        held = [part for part in parts if getattr(part, rank) is not None]
        results[rank] = _specialisation(held, rank, seed) if held else None
    return Domains(
        model=infos[0].model, checkpoint=infos[0].checkpoint, layers=infos[0].layers,
        domains=names, uniform={"topk": k / experts, "top1": 1 / experts},
        notes=_notes(parts), **results,
    )  # fmt: skip


def total_variation(loads):
    """½ Σ_e |share of the choices − 1 / experts|; loads [..., experts] → [...]."""
    return 0.5 * np.abs(resampling.normalised(loads) - 1 / loads.shape[-1]).sum(-1)


def _specialisation(parts, rank, seed):
    info = parts[0].info
    experts, k = info.num_experts, info.num_experts_per_token if rank == "topk" else 1
    shares, distances, documents = [], [], []
    for part in parts:
        groups = _documents(part, rank)
        documents.append(groups)
        tokens = part.info.num_tokens
        if groups is None:
            loads = getattr(part, rank)
            shares.append(resampling.Estimate(loads / tokens))
            distances.append(resampling.Estimate(total_variation(loads)))
            continue
        counted = part.group_tokens[part.group_tokens > 0]
        shares.append(resampling.bootstrap(_share, [groups, counted], seed=seed))
        distances.append(resampling.bootstrap(total_variation, [groups], seed=seed))
    loads = np.stack([getattr(part, rank) for part in parts]).astype(np.float64)
    specific = _specific(loads)
    chance = high = p_values = mean_p = permuted = found = None
    known = all(groups is not None and len(groups) > 1 for groups in documents)
    baseline = "independent tokens"
    if len(parts) > 1:
        permuted = resampling.permute(documents, seed=seed) if known else None
        found = resampling.information(
            loads, documents if known else None, permuted=permuted, seed=seed
        )
        if known and resampling.least_p_value([len(g) for g in documents]) <= resampling.SURE:
            baseline, draws = "permuted documents", permuted
        else:
            draws = _independent(loads, seed)
        drawn = np.stack([_specific(draw) for draw in draws])
        chance, high = drawn.mean(0), np.quantile(drawn, resampling.LEVEL, axis=0)
        p_values = resampling.p_value(specific, drawn)
        mean_p = float(resampling.p_value(specific.mean(), drawn.mean((1, 2))))
    random = []
    for part in parts:
        drawn = total_variation(
            resampling.random_router(part.info.num_tokens, experts, k, draws=200, seed=seed)
        )
        random.append((drawn.mean(), np.quantile(drawn, resampling.LEVEL)))
    return Specialisation(
        domains=tuple(part.info.domain for part in parts), share=_stack(shares),
        tv=_stack(distances), random=np.array(random), specific=specific,
        specific_chance=chance, specific_high=high, specific_p=p_values, specific_mean_p=mean_p,
        baseline=baseline, information=found,
    )  # fmt: skip


def _documents(part, rank):
    """[groups, layers, experts] of the groups that hold tokens, or None."""
    groups = getattr(part, f"group_{rank}")
    return None if groups is None else groups[part.group_tokens > 0].astype(np.float64)


def _share(loads, tokens):
    return loads / np.maximum(tokens, 1)[..., None, None]


def _specific(loads):
    """[layers, domains] of loads [domains, layers, experts]."""
    shares = resampling.normalised(loads)
    return 0.5 * np.abs(shares - shares.mean(0)).sum(-1).T


def _independent(loads, seed, draws=resampling.PERMUTATIONS):
    """[draws, domains, layers, experts]: every choice drawn from the mean of the domains."""
    rng = np.random.default_rng(seed)
    probs = resampling.normalised(loads).mean(0)
    slots = loads.sum(-1).astype(np.int64)
    return rng.multinomial(slots, probs, size=(draws, *slots.shape))


def _stack(estimates):
    """Domains as the second axis; an interval only if every domain has one."""
    ends = []
    for name in ("low", "high"):
        arrays = [getattr(estimate, name) for estimate in estimates]
        ends.append(None if any(a is None for a in arrays) else np.stack(arrays, 1))
    return resampling.Estimate(np.stack([e.value for e in estimates], 1), *ends)


def _notes(parts):
    notes = []
    if lacking := [part.info.domain for part in parts if part.top1 is None]:
        notes.append(f"no first choices of {', '.join(lacking)} in this source")
    if len(parts) == 1:
        notes.append("one domain: nothing to compare it with, no information between domains")
    if any(part.group_tokens is None for part in parts):
        notes.append("the source does not tell documents apart: no intervals, no permutations")
        return tuple(notes)
    held = {part.info.domain: int((part.group_tokens > 0).sum()) for part in parts}
    if single := [domain for domain, count in held.items() if count == 1]:
        notes.append(
            f"one document in {', '.join(single)}: no intervals, no permutations (in files of text "
            "a line <|endoftext|> ends a document)"
        )
    if few := [domain for domain, count in held.items() if 1 < count < 10]:
        notes.append(f"fewer than 10 documents in {', '.join(few)}: intervals are rough")
    return tuple(notes)


def to_json(result):
    """domain_specialisation.json."""
    layers = {}
    for row, layer in enumerate(result.layers):
        layers[layer] = {}
        for domain in result.domains:
            cell = {}
            for rank in RANKS:
                cell |= _cell(getattr(result, rank), rank, row, domain)
            layers[layer][domain] = cell
    return layers


def _cell(one, rank, row, domain):
    names = (rank, f"{rank}_low", f"{rank}_high", f"tv_{rank}", f"tv_{rank}_random")
    if one is None or domain not in one.domains:
        return dict.fromkeys((*names, f"specific_{rank}"))
    column = one.domains.index(domain)
    share = one.share[row, column]
    mean, high = one.random[column]
    specific = {"value": one.specific[row, column], "baseline": one.baseline}
    for name, array in (
        ("chance", one.specific_chance),
        ("chance_high", one.specific_high),
        ("p_value", one.specific_p),
    ):
        specific[name] = None if array is None else array[row, column]
    values = (
        share.value, share.low, share.high, one.tv[row, column], {"mean": mean, "high": high}
    )  # fmt: skip
    return dict(zip(names, values, strict=True)) | {f"specific_{rank}": specific}


def information_to_json(result):
    """domain_information.json."""
    ranks = {
        rank: one.information
        for rank in RANKS
        if (one := getattr(result, rank)) is not None and one.information is not None
    }
    layers = {}
    for row, layer in enumerate(result.layers):
        layers[layer] = {rank: _information_row(one, row) for rank, one in ranks.items()}
    return {
        "model": result.model,
        "checkpoint": result.checkpoint,
        "domains": result.domains,
        "uniform": result.uniform,
        "notes": result.notes,
        "most": next((one.most for one in ranks.values()), None),
        "mean_p_value": {rank: one.mean_p_value for rank, one in ranks.items()},
        "layers": layers,
    }


def _information_row(one, row):
    out = {"plug_in": one.plug_in[row], "corrected": one.corrected[row]}
    out["correction"] = one.correction
    for name in ("chance", "chance_high", "p_value"):
        array = getattr(one, name)
        out[name] = None if array is None else array[row]
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Path:
    """Tokens whose first expert is one in a layer and another in a later one.

    Attributes:
      from_layer, to_layer: indices in the model.
      share: Estimate, of the tokens that went to `from_expert`.
      expected: share of all tokens that go to `to_expert`: `share` if layers were independent.
    """

    from_layer: int
    to_layer: int
    from_expert: int
    to_expert: int
    tokens: int
    share: resampling.Estimate
    expected: float


def expert_paths(counts, *, threshold=PATH_THRESHOLD, most=50) -> tuple[Path, ...]:
    """Cross-layer paths of first choices, most tokens first, of experts that are well used.

    Args:
      threshold: both experts must be first choice of this times 1 / experts of the tokens, as in
        the paper's figures 35 and 36; 0 takes all.
      most: paths per pair of layers.
    Raises:
      ValueError: the source has no paths.
    """
    if counts.paths is None:
        raise ValueError(
            f"{counts.info.model} on {counts.info.domain}: cross-layer paths are not in this source"
        )
    found, experts = [], counts.info.num_experts
    for number, (one, two) in enumerate(counts.path_layers):
        folds = counts.paths[:, number]
        total = folds.sum(0)
        leaving, arriving, tokens = total.sum(1), total.sum(0), total.sum()
        used = (leaving[:, None] >= threshold * tokens / experts) & (
            arriving >= threshold * tokens / experts
        )
        ranked = np.argsort(-np.where(used, total, -1), axis=None, kind="stable")[:most]
        for a, b in zip(*np.unravel_index(ranked, total.shape), strict=True):
            if not used[a, b] or not total[a, b]:
                continue
            parts = np.stack([folds[:, a, b], folds[:, a].sum(1)], -1)
            share = resampling.jackknife(lambda x: x[0] / max(x[1], 1), parts)
            found.append(
                Path(
                    from_layer=counts.info.layers[one], to_layer=counts.info.layers[two],
                    from_expert=int(a), to_expert=int(b), tokens=int(total[a, b]), share=share,
                    expected=float(arriving[b] / tokens),
                )
            )  # fmt: skip
    return tuple(found)


def paths_to_json(counts, paths, *, threshold=PATH_THRESHOLD):
    """expert_paths.json."""
    info = counts.info
    return {
        "model": info.model, "checkpoint": info.checkpoint, "domain": info.domain,
        "threshold": threshold, "paths": paths,
    }  # fmt: skip
