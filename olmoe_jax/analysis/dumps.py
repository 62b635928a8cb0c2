"""The routing counts released with OLMoE (arXiv 2409.02060), pickled Counters, as Counts.

DIR/expert_counts/DOMAIN.pkl and DIR/expert_counts_top1/DOMAIN.pkl hold a list with a Counter
expert → tokens for each layer; DIR/eid2token/DOMAIN.pkl a list with, for each layer, expert →
Counter token id → tokens (input tokens, among the k); expert_counts_crosslayer_top1/DOMAIN.pkl a
list with a Counter (expert, expert) → tokens for layers 0 → 7 and 7 → 15. Documents, weights and
pairs are not in these dumps, so there are no intervals and no co-activation. The token counts come
from another run than the loads: up to 1.7 % of a layer's choices differ between the two.
"""

import io
import pathlib
import pickle
from collections.abc import Mapping

import numpy as np

from olmoe_jax.analysis import counts as counts_lib
from olmoe_jax.analysis import tallies, trace

LAYERS = (0, 7, 15)
PARTS = ("expert_counts", "expert_counts_top1", "eid2token", "expert_counts_crosslayer_top1")
NAMES = {"olmoe": "OLMoE-1B-7B", "mistral": "Mixtral-8x7B"}  # folder → what it is of
_MOST_EXPERTS = 4096


class _Counter(dict):
    """Counter and defaultdict as plain dicts: their state can set nothing but items."""

    def __init__(self, items=()):
        super().__init__(items if isinstance(items, Mapping) else ())

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a Counter with a state of its own")


def _defaultdict(factory=None):
    del factory
    return _Counter()


class _dtype:
    """Stands for a NumPy dtype, of integers and floats of at most eight bytes."""

    def __init__(self, code, align=False, copy=False):
        del align, copy
        if not isinstance(code, str) or len(code) != 2 or code[0] not in "iuf":
            raise pickle.UnpicklingError(f"a NumPy scalar of type {code!r}; expected integers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else "="
        if order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"a NumPy scalar of byte order {order!r}")
        self.dtype = self.dtype.newbyteorder(order)


def _scalar(kind, data):
    if not isinstance(kind, _dtype) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a NumPy scalar that is not one")
    return np.frombuffer(data, kind.dtype, 1)[0].item()


# What a dump may name → what stands for it here. Anything else is refused before it is called.
_ALLOWED = {
    ("collections", "Counter"): _Counter,
    ("collections", "defaultdict"): _defaultdict,
    ("builtins", "int"): int,
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}; a dump may hold Counters, defaultdicts, integers and "
                "NumPy scalars only"
            )
        return _ALLOWED[module, name]


def unpickle(path):
    """Reads one dump, of pickle protocol 3 or newer, without running anything that it names.

    Returns:
      lists, tuples, dicts, ints and floats; Counters and defaultdicts come as dicts, NumPy scalars
      as Python numbers.
    Raises:
      FileNotFoundError: no such file.
      ValueError: not a pickle, or one that names anything but Counters, defaultdicts, integers and
        NumPy scalars.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such dump")
    try:
        return _Unpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a broken pickle raises nearly anything
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path}: not a routing dump: {reason}") from error


def models(directory) -> dict[str, pathlib.Path]:
    """Model name → its folder: DIR itself, or those of its folders that hold dumps.

    Raises:
      FileNotFoundError: there are no dumps.
    """
    directory = pathlib.Path(directory)
    folders = [directory, *sorted(p for p in directory.glob("*") if p.is_dir())]
    for group in (folders[:1], folders[1:]):
        found = {NAMES.get(f.name, f.name): f for f in group if (f / "expert_counts").is_dir()}
        if found:
            return found
    raise FileNotFoundError(
        f"{directory}: no routing dumps; expected DIR/expert_counts/DOMAIN.pkl, or such folders "
        "in DIR/MODEL"
    )


def read(directory, *, model="", num_experts=None, layers=LAYERS) -> dict[str, counts_lib.Counts]:
    """Domain → Counts, from the folder of one model.

    Args:
      model: its name; default: after the folder.
      num_experts: of the model; default: one more than the largest id in all files.
      layers: indices in the model of the lists' entries.
    Raises:
      FileNotFoundError, ValueError: no dumps, one that cannot be read, an empty domain, experts
        outside the model's range, or files that contradict each other.
    """
    directory = pathlib.Path(directory)
    files = {
        part: {p.stem: unpickle(p) for p in sorted((directory / part).glob("*.pkl"))}
        for part in PARTS
    }
    if not files["expert_counts"]:
        raise FileNotFoundError(f"{directory}/expert_counts: no .pkl file")
    for part, domains in files.items():
        for domain, value in domains.items():
            _check_form(directory / part / f"{domain}.pkl", part, value, layers)
    experts = _num_experts(directory, files, num_experts)
    k = _experts_per_token(directory, files)
    model = model or NAMES.get(directory.name, directory.name)
    return {
        domain: _counts(directory, files, domain, model, experts, k, tuple(layers))
        for domain in files["expert_counts"]
    }


def _check_form(path, part, value, layers):
    expected = len(layers) - 1 if "crosslayer" in part else len(layers)
    if not isinstance(value, list) or len(value) != expected:
        raise ValueError(f"{path}: expected a list of {expected} layers, got {_kind(value)}")
    for counter in value:
        if not isinstance(counter, dict):
            raise ValueError(f"{path}: expected a Counter for each layer, got {_kind(counter)}")
        inner = [counter] if part != "eid2token" else list(counter.values())
        for one in inner:
            if not isinstance(one, dict):
                raise ValueError(f"{path}: expected a Counter for each expert, got {_kind(one)}")
            for key, number in one.items():
                keys = key if isinstance(key, tuple) and "crosslayer" in part else (key,)
                if not all(isinstance(x, int) and x >= 0 for x in (*keys, number)):
                    raise ValueError(
                        f"{path}: entry {key!r}: {number!r}; expected whole numbers from 0"
                    )


def _kind(value):
    size = f" of {len(value)}" if hasattr(value, "__len__") else ""
    return f"{type(value).__name__}{size}"


def _num_experts(directory, files, given):
    largest, where = -1, None
    for part, domains in files.items():
        for domain, value in domains.items():
            ids = [x for counter in value for key in counter for x in np.atleast_1d(key).tolist()]
            if ids and max(ids) > largest:
                largest, where = max(ids), directory / part / f"{domain}.pkl"
    limit = _MOST_EXPERTS if given is None else given
    if largest >= limit:
        raise ValueError(
            f"{where}: expert {largest}; the model has {limit} experts at most, ids 0..{limit - 1}"
        )
    return largest + 1 if given is None else given


def _experts_per_token(directory, files):
    """k: choices over first choices, the same in every domain that has both."""
    found = {}
    for domain, value in files["expert_counts_top1"].items():
        slots = sum(files["expert_counts"].get(domain, [{}])[0].values())
        tokens = sum(value[0].values())
        if slots and tokens:
            found[domain] = slots / tokens
    if len(set(found.values())) != 1 or next(iter(found.values())) % 1:
        raise ValueError(
            f"{directory}: choices over first choices are {found or 'not given'}: expected the "
            "same whole number k in every domain"
        )
    return int(next(iter(found.values())))


def _counts(directory, files, domain, model, experts, k, layers):
    topk = _loads(files["expert_counts"][domain], experts)
    slots = topk.sum(-1)
    if not slots.any():
        raise ValueError(f"{directory}/expert_counts/{domain}.pkl: holds no token")
    if len(set(slots.tolist())) > 1 or slots[0] % k:
        raise ValueError(
            f"{directory}/expert_counts/{domain}.pkl: {slots.tolist()} choices in its layers: "
            f"expected the same multiple of {k} in each"
        )
    tokens = int(slots[0]) // k
    top1 = files["expert_counts_top1"].get(domain)
    if top1 is not None:
        top1 = _loads(top1, experts)
        if (top1.sum(-1) != tokens).any():
            raise ValueError(
                f"{directory}/expert_counts_top1/{domain}.pkl: {top1.sum(-1).tolist()} tokens, "
                f"expert_counts has {tokens}"
            )
    paths, path_layers = None, ()
    if domain in files["expert_counts_crosslayer_top1"]:
        dumped = files["expert_counts_crosslayer_top1"][domain]
        paths = np.zeros((1, len(dumped), experts, experts), np.int64)
        for number, counter in enumerate(dumped):
            for (a, b), count in counter.items():
                paths[0, number, a, b] = count
        path_layers = tuple((i, i + 1) for i in range(len(dumped)))
    vocabulary = occurrences = None
    if domain in files["eid2token"]:
        path = directory / "eid2token" / f"{domain}.pkl"
        vocabulary, occurrences = _words(path, files["eid2token"][domain], tokens * k, experts, k)
    info = trace.TraceInfo(
        model=model, domain=domain, layers=layers, num_experts=experts, num_experts_per_token=k,
        num_tokens=tokens, num_documents=0,
    )  # fmt: skip
    return counts_lib.Counts(
        info=info, folds=1, topk=topk, top1=top1, paths=paths, path_layers=path_layers,
        vocabulary=vocabulary, occurrences=occurrences,
    )  # fmt: skip


def _loads(counters, experts):
    out = np.zeros((len(counters), experts), np.int64)
    for row, counter in zip(out, counters, strict=True):
        for expert, count in counter.items():
            row[expert] = count
    return out


def _words(path, layers, slots_expected, experts, k):
    """Tallies with one fold; a token occurred as often as its choices of a layer over k."""
    found = []
    for counters in layers:
        flat = sorted((t * experts + e, n) for e, c in counters.items() for t, n in c.items() if n)
        if flat and flat[-1][0] >= 2**32:
            raise ValueError(f"{path}: token id {flat[-1][0] // experts} is too large")
        keys, numbers = (
            (np.array(x, np.int64) for x in zip(*flat, strict=True)) if flat else ((), ())
        )
        if sum(numbers) != slots_expected:
            raise ValueError(
                f"{path}: {sum(numbers)} choices in a layer, expert_counts has {slots_expected}"
            )
        found.append(tallies.Tally(np.asarray(keys, np.uint32), np.asarray(numbers, np.uint32)))
    tokens = found[0].keys // np.uint32(experts)
    slots = np.bincount(tokens, found[0].counts).astype(np.int64)
    ids = np.flatnonzero(slots)
    if (slots[ids] % k).any():
        raise ValueError(f"{path}: choices of a token are no multiple of {k}")
    occurred = tallies.Tally(ids.astype(np.uint32), (slots[ids] // k).astype(np.uint32))
    return {("input", "topk"): tuple(found)}, {"input": occurred}
