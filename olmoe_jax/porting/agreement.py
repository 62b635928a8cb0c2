"""Whether a ported model computes what it computed: against transformers where that is possible."""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np

from olmoe_jax import generation, loading, machine
from olmoe_jax.model import transformer
from olmoe_jax.porting import causes, folders, sources, transposing

TOLERANCE = 2e-5  # of the largest logit: order of summation in float32
NOISIER = 4  # times transformers' own distance from float64, up to which ours is order of summation
TIE = 1e-5  # router logits nearer than this, of the largest, may be ordered either way
SEQUENCES, LENGTH, LONGEST = 2, 64, 1024
GREEDY = 8  # tokens of the continuation
ROOM = 2.3  # memory taken per byte of a float32 model: transformers 5.24 takes 2.1 to load one


def check(source, target, announce) -> tuple[str, ...]:
    """Claims on logits and a greedy continuation of `source` and `target` (see `verification`).

    Raises:
      ValueError: they do not agree.
    """
    foreign = [s for s in (target, source) if _is_hugging_face(s)]
    if reason := _too_large(source):
        return (f"not checked: logits, as {reason}",)
    if foreign and (reason := _no_transformers(foreign[0])):
        return (f"not checked: logits against transformers, as {reason}",)
    announce("verifying: logits")
    with jax.default_matmul_precision("highest"):
        if not foreign:
            return _ours_with_ours(source, target)
        ours = source if foreign[0] is target else target
        return _ours_with_theirs(ours, foreign[0], _rounding(source, target))


def _is_hugging_face(side):
    return isinstance(side, sources.Foreign) and side.format == folders.HUGGING_FACE


def _too_large(side) -> str | None:
    """Why a model in float32 does not fit in memory; one is there at a time."""
    needed = int(ROOM * 4 * sum(math.prod(shape) for shape, _ in side.leaves.values()))
    free = machine.free_memory()
    if free is None or needed <= free:
        return None
    return f"a model in float32 takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"


def _no_transformers(theirs) -> str | None:
    """Why transformers cannot open that folder here."""
    missing = [n for n in ("torch", "transformers") if importlib.util.find_spec(n) is None]
    if missing:
        return f"{' and '.join(missing)} cannot be imported (pip install torch transformers)"
    transformers = importlib.import_module("transformers")
    family = theirs.folder.config["model_type"]
    if family not in transformers.CONFIG_MAPPING:
        return f"transformers {transformers.__version__} does not know {family}"
    return None


def _rounding(source, target) -> str | None:
    """The dtype to which the port rounded, through which both models must pass; None: to none."""
    kinds = {(source.leaves[n][1], kind) for n, (_, kind) in target.leaves.items()}
    return next((b for a, b in kinds if transposing.loses(a, b)), None)


def _tokens(config) -> np.ndarray:
    """Random int32 [SEQUENCES, length], long enough to leave a sliding window."""
    length = min(config.max_length, max(LENGTH, (config.sliding_window or 0) + 16), LONGEST)
    rng = np.random.default_rng(0)
    return rng.integers(0, config.padded_vocab_size, (SEQUENCES, length), dtype=np.int32)


def _load_ours(side, rounding=None):
    """(ModelConfig, params) in float32, padding of the vocabulary as tokens like any other.

    Experts are computed by the reference: for so few tokens it takes a quarter of the memory and
    half the time of the one that sorts them (measured, 64 experts of OLMoE's size, 64 tokens).
    """
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    model, params = loading.load(side.path, dtype="float32", sharding=host)
    if rounding is not None:
        kind = jnp.dtype(rounding)
        params = jax.tree.map(lambda x: x.astype(kind).astype(jnp.float32), params)
    c = model.config
    backend = c.expert_backend if c.expert_backend == "capacity" else "dense"
    return dataclasses.replace(c, vocab_size=c.padded_vocab_size, expert_backend=backend), params


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, params, tokens):
    return model.apply({"params": params}, tokens, return_routing=True)


def _logits(config, params, tokens):
    """(float32 logits [b, l, v], bool [b, l]: a router's choice was a tie here or before)."""
    out = _apply(transformer.Transformer(config), params, tokens)
    tied = np.zeros(tokens.shape, bool)
    if out.routing is not None and config.num_experts_per_token < config.num_experts:
        scores = -np.sort(-np.asarray(out.routing.logits), axis=-1)  # [n, b, l, e]
        k = config.num_experts_per_token
        gap = scores[..., k - 1] - scores[..., k]
        tied = (gap <= TIE * np.abs(scores).max(axis=-1)).any(axis=0)
    return np.asarray(out.logits, np.float32), np.maximum.accumulate(tied, axis=1)


def _error(got, want, where=None):
    """Largest difference relative to the largest wanted logit; NaN counts as infinite."""
    difference = np.abs(got - want)
    if where is not None:
        difference = difference[where]
    largest = np.abs(want).max() or 1
    return float(np.nan_to_num(difference.max(initial=0), nan=np.inf) / largest)


def _only_finite(got, want, params, sides):
    """(got, want, bool: what can be compared, a sentence on the rest, which is set to 0 in both).

    Raises:
      ValueError: some are finite on one side only, and it is not the weights that are not. (How far
        a NaN in one expert spreads depends on the implementation: 0 · NaN is NaN.)
    """
    finite = np.isfinite(got) & np.isfinite(want)
    differ = np.isfinite(got) != np.isfinite(want)
    side = "either side"
    if differ.any():
        side = "both sides, as the weights hold NaN or infinity"
        if all(jnp.isfinite(x).all() for x in jax.tree.leaves(params)):
            b, position, token = np.argwhere(differ)[0]
            raise ValueError(
                f"{sides}, although all tensors are equal: {differ.sum():,} of {differ.size:,} are "
                f"finite on one side only; first in sequence {b} at position {position}, token "
                f"{token}: {got[b, position, token]:.6g} instead of "
                f"{want[b, position, token]:.6g}"
            )
    text = f"{(~finite).sum():,} of {finite.size:,} logits not compared: not finite on {side}"
    return np.where(finite, got, 0), np.where(finite, want, 0), finite, text


def _ours_with_ours(source, target):
    rounding = _rounding(source, target)
    config, params = _load_ours(source, rounding)
    tokens = _tokens(config)
    want, _ = _logits(config, params, tokens)
    del params
    config, params = _load_ours(target)
    sides = f"{target.path}: its logits differ from those of {source.path}"
    got, _ = _logits(config, params, tokens)
    got, want, finite, lacking = _only_finite(got, want, params, sides)
    if not finite.any():
        return (f"not checked: logits; {lacking}",)
    error = _error(got, want)
    if not error <= TOLERANCE:
        raise ValueError(
            f"{sides} by {error:.2g} of the largest (allowed: {TOLERANCE:g}), both computed by "
            "olmoe_jax, although all tensors are equal"
        )
    return (
        f"float32 logits of both, computed by olmoe_jax, agree within {error:.1e} of the largest "
        f"on {SEQUENCES} x {tokens.shape[1]} random tokens{'' if finite.all() else '; ' + lacking} "
        "(no Hugging Face folder is involved, so transformers was not asked)",
    )


def _ours_with_theirs(ours, theirs, rounding):
    tokens = _tokens(ours.config.model)
    steps = min(GREEDY, tokens.shape[1] // 2)
    prompt = tokens[0, : tokens.shape[1] - steps][:GREEDY]
    want, continuation, version = _their_results(theirs.path, tokens, prompt, steps, rounding)
    config, params = _load_ours(ours, rounding)
    got, tied = _logits(config, params, tokens)
    sides = f"{ours.path}: float32 logits differ from those of transformers for {theirs.path}"
    got, want, finite, lacking = _only_finite(got, want, params, sides)
    if not finite.any():
        return (f"not checked: logits against transformers; {lacking}",)
    error, remark = _error(got, want), ""
    if not error <= TOLERANCE and 0 < tied.sum() <= tied.size // 2:
        untied = _error(got, want, ~tied)
        if untied <= TOLERANCE:
            error, remark = untied, f"; {tied.sum()} left out, behind a tie between two experts"
    if not error <= TOLERANCE:
        del params  # there is room for one model
        exact = np.where(finite, _their_exact_logits(theirs.path, tokens, rounding), 0)
        own, its = _error(got, exact), _error(want, exact)
        config, params = _load_ours(ours, rounding)
        if not own <= NOISIER * its:
            where = f"; from float64: {own:.1e} (transformers' float32: {its:.1e})"
            raise ValueError(_disagreement(sides, config, params, tokens, got, want) + where)
        remark = (
            f": order of summation, as from transformers in float64 ours are {own:.1e} away and "
            f"its own float32 ones {its:.1e}"
        )
    rounded = "" if rounding is None else f", both with weights rounded to {rounding},"
    claim = (
        f"float32 logits of transformers {version} from {theirs.path} and of olmoe_jax from "
        f"{ours.path}{rounded} agree within {error:.1e} of the largest on {SEQUENCES} x "
        f"{tokens.shape[1]} random tokens{remark}"
    )
    if not finite.all():
        return f"{claim}; {lacking}", "not checked: the greedy continuation, for the same reason"
    tolerance = max(TOLERANCE, error)
    return claim, _check_continuation(ours, theirs, config, params, prompt, continuation, tolerance)


def _disagreement(sides, config, params, tokens, got, want):
    """What to do first: a message may be cut."""
    scale = np.abs(want).max()
    b, position, token = np.argwhere(~(np.abs(got - want) <= TOLERANCE * scale))[0]
    cause, tried = _cause(config, params, tokens, want)
    return (
        f"{sides} by {_error(got, want):.2g} of the largest (allowed: {TOLERANCE:g}), although all "
        f"tensors are equal; likely cause: {cause}; do not use the port before that is resolved: "
        "its weights are those of the input but one side computes another model with them; first "
        f"in sequence {b} at position {position}, token {token}: {got[b, position, token]:.6g} "
        f"instead of {want[b, position, token]:.6g}{tried}"
    )


def _cause(config, params, tokens, want) -> tuple[str, str]:
    """The first change of our model that makes its logits agree; else what was tried, at length."""
    tried = []
    for change, other, changed in causes.alternatives(config, params):
        tried.append(change)
        logits, tied = _logits(other, changed, tokens)
        # Left out with at most half of the tokens tied: over few of them any model may agree.
        fair = tied.sum() <= tied.size // 2
        if _error(logits, want) <= TOLERANCE or (fair and _error(logits, want, ~tied) <= TOLERANCE):
            return f"they agree with {change}", ""
    return (
        f"none of the {len(tried)} known ones, perhaps this version of transformers (try another)",
        f"; tried: {', '.join(tried)}",
    )


def _check_continuation(ours, theirs, config, params, prompt, want, tolerance=TOLERANCE):
    model = transformer.Transformer(config)
    got = generation.greedy(model, params, prompt, num_tokens=len(want))
    if got == want:
        return f"the greedy continuation of {len(want)} tokens is the same: {want}"
    at = next(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
    ids = np.array([[*prompt.tolist(), *want[:at]]], np.int32)
    logits = _logits(config, params, ids)[0][0, -1]
    gap = (logits[got[at]] - logits[want[at]]) / np.abs(logits).max()
    if gap > 2 * tolerance:
        raise ValueError(
            f"{ours.path}: the greedy continuation differs from that of transformers for "
            f"{theirs.path} at token {at}: {got[at]} instead of {want[at]}, although the logits of "
            "plain passes agree; likely cause: the cache that transformers generates with"
        )
    return (
        f"the greedy continuation is the same for {at} of {len(want)} tokens; then two are equally "
        f"probable ({got[at]} and {want[at]}: their logits differ by {gap:.1e} of the largest)"
    )


@contextlib.contextmanager
def _their_model(path, rounding):
    """(torch, transformers, the model in float32, its weights rounded first), gradients off."""
    # Not import statements: neither is among what olmoe_jax requires.
    torch, transformers = (importlib.import_module(n) for n in ("torch", "transformers"))
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        if lacking := sorted(info["missing_keys"]):
            raise ValueError(
                f"{path}: transformers {transformers.__version__} finds no values for "
                f"{len(lacking)} parameters ({lacking[0]}, …) and makes them up"
            )
        if hasattr(model, "set_experts_implementation"):  # the fast ones ask for multiples of 16
            model.set_experts_implementation("eager")
        model.eval()
        with torch.no_grad():
            if rounding is not None:
                for parameter in model.parameters():
                    parameter.copy_(parameter.to(getattr(torch, rounding)))
            yield torch, transformers, model
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _their_results(path, tokens, prompt, steps, rounding):
    """(logits [b, l, v], `steps` greedy tokens behind `prompt`, version), all by transformers."""
    with _their_model(path, rounding) as (torch, transformers, model):
        logits = model(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits
        ids = torch.tensor(prompt[None], dtype=torch.long)
        model.generation_config = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=steps, pad_token_id=0
        )
        whole = model.generate(ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :]
        return logits.float().numpy(), whole.tolist(), transformers.__version__


def _their_exact_logits(path, tokens, rounding):
    """Logits [b, l, v] by transformers in float64."""
    with _their_model(path, rounding) as (torch, _, model):

        class InFloat64(torch.overrides.TorchFunctionMode):
            """Norms, softmax and rotations ask for float32 by name: gives them float64."""

            def __torch_function__(self, func, types, args=(), kwargs=None):
                del types
                func = torch.Tensor.double if func is torch.Tensor.float else func
                args = [self._wide(x) for x in args]
                return func(*args, **{k: self._wide(x) for k, x in (kwargs or {}).items()})

            def _wide(self, x):
                return torch.float64 if x is torch.float32 else x

        model.double()
        with InFloat64():
            for module in model.modules():  # its frequencies were rounded to float32
                if hasattr(module, "compute_default_rope_parameters"):
                    module.inv_freq, _ = module.compute_default_rope_parameters(module.config)
            ids = torch.tensor(tokens, dtype=torch.long)
            return model(ids, use_cache=False).logits.numpy()
