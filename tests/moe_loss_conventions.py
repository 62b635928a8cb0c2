"""What others call load-balancing loss and router z-loss, on the same logits, and ours beside it.

Each convention is written down here from its source, in NumPy loops, and every value on
`experiments/results/moe_loss_conventions.md` comes from these functions;
`python -m tests.moe_loss_conventions` writes that page again.

Letters: n layers, g devices, s sequences of a device, l length, e experts, k chosen experts.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np

from olmoe_jax import losses
from tests import oracles

PAGE = pathlib.Path(__file__).parents[1] / "experiments/results/moe_loss_conventions.md"
LAYERS, DEVICES, SEQUENCES, LENGTH, EXPERTS, K = 3, 2, 2, 7, 8, 2


def logits():
    """float32 [n, g, s, l, e]: unbalanced, in each layer and on each device otherwise."""
    rng = np.random.default_rng(2409)
    shape = (LAYERS, DEVICES, SEQUENCES, LENGTH, EXPERTS)
    lean = rng.normal(size=(LAYERS, DEVICES, 1, 1, EXPERTS))
    return (rng.normal(size=shape) + lean).astype(np.float32)


def _tokens(x):
    """[…, e] → float64 [tokens, e]."""
    return np.asarray(x, np.float64).reshape(-1, x.shape[-1])


def _counts(x, k):
    """[e]: of how many tokens of x [tokens, e] an expert is among the first k."""
    chosen = np.argsort(-x, axis=-1, kind="stable")[:, :k]
    return np.array([(chosen == e).sum() for e in range(x.shape[-1])], np.float64)


def _share_and_probability(x, k):
    """([e] share of the tokens that go to an expert: Σ = k, [e] its mean probability)."""
    x = _tokens(x)
    return _counts(x, k) / len(x), oracles.softmax(x).mean(axis=0)


# Load balancing: [n, g, s, l, e] → value


def paper_share_of_tokens(x):
    """Equation 3 with f the share of tokens, as its words have it; a layer of the whole batch."""
    values = []
    for layer in x:
        f, p = _share_and_probability(layer, K)
        values.append(EXPERTS * sum(f[i] * p[i] for i in range(EXPERTS)))
    return np.mean(values)


def training_code(x):
    """Counts and mean scores of all layers in one product; a device by itself, then their mean."""
    values = []
    for device in range(DEVICES):
        tokens, total = x[0, 0, ..., 0].size, 0.0
        for layer in x[:, device]:
            flat = _tokens(layer)
            total += _counts(flat, K) @ oracles.softmax(flat).mean(axis=0)
        values.append(EXPERTS / (LAYERS * tokens * K) * total)
    return np.mean(values)


def transformers(x):
    """Tokens of all layers one behind the other, then shares and means: layers are pooled."""
    f, p = _share_and_probability(x, K)
    return EXPERTS * (f @ p)


def switch(x):
    """Equations 4–6: f from the most probable expert; a layer of the whole batch."""
    values = []
    for layer in x:
        f, p = _share_and_probability(layer, 1)
        values.append(EXPERTS * (f @ p))
    return np.mean(values)


def mesh_tensorflow(x):
    """The mean over chosen places, experts and groups of a group's shares times its mean gates."""
    values = []
    for layer in x:
        for group in layer.reshape(-1, *layer.shape[-2:]):
            flat = _tokens(group)
            order = np.argsort(-flat, axis=-1, kind="stable")[:, :K]
            gates = oracles.softmax(flat).mean(axis=0)
            density = [[np.mean(order[:, j] == e) for e in range(EXPERTS)] for j in range(K)]
            values.append(np.mean(np.array(density) * gates) * EXPERTS**2)
    return np.mean(values)


def olmo_core(x):
    """`local_batch`: counts · mean scores / tokens · e/k; each layer with weight / layers."""
    total = 0.0
    for layer in x:
        for device in layer:
            flat = _tokens(device)
            dot = _counts(flat, K) @ oracles.softmax(flat).mean(axis=0)
            total += EXPERTS / K * dot / len(flat) / LAYERS / DEVICES
    return total


def olmo_core_instance(x):
    """`instance`: the same of each sequence, added up over the tokens of the device."""
    total = 0.0
    for layer in x:
        for device in layer:
            dots = 0.0
            for sequence in device:
                scores = oracles.softmax(np.asarray(sequence, np.float64)).mean(axis=0)
                dots += scores @ _counts(sequence, K)
            total += EXPERTS / K * dots / device[..., 0].size / LAYERS / DEVICES
    return total


def megatron(x):
    """Σ of probabilities · counts · e / (k T²) of a device; every layer with the whole weight."""
    values = []
    for device in range(DEVICES):
        total = 0.0
        for layer in x[:, device]:
            flat = _tokens(layer)
            summed = oracles.softmax(flat).sum(axis=0)
            total += (summed * _counts(flat, K)).sum() * EXPERTS / (K * len(flat) ** 2)
        values.append(total)
    return np.mean(values)


# Router z-loss: [n, g, s, l, e] → value


def z_paper(x):
    """Equation 4 of each layer, their mean: the mean of (log Σ exp logits)²."""
    return np.mean([np.mean(oracles.logsumexp(_tokens(layer)) ** 2) for layer in x])


def z_training_code(x):
    """log(Σ exp) without a shift, squared and added over layers and tokens / (n · tokens · k)."""
    values = []
    for device in range(DEVICES):
        z = np.log(np.exp(np.asarray(x[:, device], np.float64)).sum(axis=-1))
        values.append((z**2).sum() / (x[:, 0, ..., 0].size * K))
    return np.mean(values)


def z_olmo_core(x):
    """Σ over tokens / tokens of a device; each layer with weight / layers."""
    total = 0.0
    for layer in x:
        for device in layer:
            z = oracles.logsumexp(_tokens(device))
            total += (z**2).sum() / len(z) / LAYERS / DEVICES
    return total


def z_megatron(x):
    """The mean over a device's tokens; every layer with the whole weight."""
    return sum(np.mean(oracles.logsumexp(_tokens(layer)) ** 2) for layer in x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convention:
    """A row of the page.

    Attributes:
      name: whose it is.
      value: [n, g, s, l, e] logits → the loss that its weight multiplies.
      balanced: that value where all experts are equally probable and equally chosen; of the z-loss:
        of logits that are all 0, in units of (log e)².
      over: the tokens of which shares and means are taken.
      formula: for the page.
      ours: the convention of `losses.load_balancing_loss`; "" for a z-loss.
      group: `losses.load_balancing_group` with which ours is the same, in sequences.
      factor: theirs / ours.
      in_words: the factor as it depends on the model.
      source: repository, file, commit or version.
    """

    name: str
    value: Callable
    balanced: float
    over: str
    formula: str
    ours: str
    group: int = 0
    factor: float = 1.0
    in_words: str = "1"
    source: str


_PAPER = "arXiv 2409.02060"
_FORK = (
    "Muennighoff/megablocks, `megablocks/layers/moe.py`, branches olmoe 4a25bc7 and zloss b3c25d7"
)
_CORE = "allenai/OLMo-core fa6c501, `src/olmo_core/nn/moe/loss.py`, `moe.py`"
_MEGATRON = (
    "NVIDIA/Megatron-LM, `megatron/core/transformer/moe/moe_utils.py` 00611e6, `router.py` 005742f"
)

BALANCE = (
    Convention(
        name="OLMoE, paper", value=paper_share_of_tokens, balanced=K, over="batch",
        formula="E · Σᵢ fᵢ Pᵢ, f: share of the tokens (Σ f = k)", ours="olmoe", factor=K,
        in_words="k", source=f"{_PAPER}, equation 3",
    ),
    Convention(
        name="OLMoE, training code", value=training_code, balanced=1, over="device",
        formula="E / (n T k) · Σₙᵢ countₙᵢ · mean scoreₙᵢ", ours="olmoe", group=SEQUENCES,
        source=_FORK,
    ),
    Convention(
        name="transformers", value=transformers, balanced=K, over="batch, all layers pooled",
        formula="E · Σᵢ fᵢ Pᵢ, f: share of the tokens (Σ f = k)", ours="huggingface",
        source="huggingface/transformers 5.24.0, `models/olmoe/modeling_olmoe.py`",
    ),
    Convention(
        name="Switch Transformer", value=switch, balanced=1, over="batch",
        formula="E · Σᵢ fᵢ Pᵢ, f: share of the tokens whose first expert it is", ours="switch",
        source="arXiv 2101.03961, equations 4–6",
    ),
    Convention(
        name="Mesh TensorFlow, switch gating of k", value=mesh_tensorflow, balanced=1,
        over="group (here a sequence)",
        formula="E² · mean over k, i of density · mean gate", ours="olmoe", group=1,
        source="tensorflow/mesh b6e9d08, `mesh_tensorflow/transformer/moe.py`, `_switch_gating`",
    ),
    Convention(
        name="OLMo-core, local_batch", value=olmo_core, balanced=1, over="device",
        formula="E / k · Σᵢ countᵢ · mean scoreᵢ / T, weight / n for each layer", ours="olmoe",
        group=SEQUENCES, source=_CORE,
    ),
    Convention(
        name="OLMo-core, instance", value=olmo_core_instance, balanced=1, over="sequence",
        formula="the same of each sequence, Σ / T", ours="olmoe", group=1, source=_CORE,
    ),
    Convention(
        name="Megatron-LM, aux_loss", value=megatron, balanced=LAYERS, over="device",
        formula="E / (k T²) · Σᵢ countᵢ · Σ scoreᵢ, the whole weight for each layer", ours="olmoe",
        group=SEQUENCES, factor=LAYERS, in_words="n", source=_MEGATRON,
    ),
)  # fmt: skip
Z_LOSS = (
    Convention(
        name="OLMoE, paper", value=z_paper, balanced=1, over="batch",
        formula="mean over tokens of (log Σᵢ exp xᵢ)²", ours="", source=f"{_PAPER}, equation 4",
    ),
    Convention(
        name="OLMoE, training code", value=z_training_code, balanced=1 / K, over="device",
        formula="Σ over n, tokens of (log Σᵢ exp xᵢ)² / (n T k)", ours="", factor=1 / K,
        in_words="1 / k", source=_FORK,
    ),
    Convention(
        name="ST-MoE, as Switch in transformers", value=z_paper, balanced=1, over="batch",
        formula="mean over tokens of (log Σᵢ exp xᵢ)², of one layer", ours="",
        source="huggingface/transformers 5.24.0, "
        "`models/switch_transformers/modeling_switch_transformers.py`",
    ),
    Convention(
        name="OLMo-core", value=z_olmo_core, balanced=1, over="device",
        formula="Σ over tokens of (log Σᵢ exp xᵢ)² / T, weight / n for each layer", ours="",
        source=_CORE,
    ),
    Convention(
        name="Megatron-LM", value=z_megatron, balanced=LAYERS, over="device",
        formula="mean over tokens of (log Σᵢ exp xᵢ)², the whole weight for each layer", ours="",
        factor=LAYERS, in_words="n", source=_MEGATRON,
    ),
)  # fmt: skip


def ours(convention, x):
    """Our value with the convention and group that a row names."""
    x = x.reshape(LAYERS, DEVICES * SEQUENCES, LENGTH, EXPERTS)
    mask = np.ones(x.shape[1:3], bool)
    if not convention.ours:
        return float(losses.router_z_loss(x, mask))
    ids = np.argsort(-x, axis=-1, kind="stable")[..., :K].astype(np.int32)
    statistics = losses.routing_statistics(
        x, ids, mask, convention=convention.ours, group=convention.group
    )
    value = losses.load_balancing_loss(
        statistics, convention=convention.ours, num_experts_per_token=K
    )
    return float(value)


def page() -> str:
    """The Markdown page."""
    groups = {0: "0", 1: "1", SEQUENCES: "sequences of a device"}
    lines = [
        "# Load-balancing loss and router z-loss: whose is which\n",
        "The same router logits through the formulas of others, each restated from its source in "
        "`tests/moe_loss_conventions.py` (`python -m tests.moe_loss_conventions` writes this "
        f"page). {LAYERS} layers, {DEVICES} devices of {SEQUENCES} sequences of {LENGTH} tokens, "
        f"{EXPERTS} experts, top-{K}; seeded normal logits, unbalanced. Values are what the weight "
        "multiplies. n: MoE layers, T: tokens, E: experts, k: chosen experts.\n",
        "theirs = factor · ours, for every input: ours is `losses.load_balancing_loss` with this "
        "convention and group of sequences (`losses.load_balancing_convention`, "
        "`losses.load_balancing_group`; 0 is the whole batch). So our weight is theirs times the "
        "factor.\n",
        "## Load-balancing loss\n",
        "| | formula | statistics over | balanced | value | our convention | our group | factor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    x = logits()
    for c in BALANCE:
        lines.append(
            f"| {c.name} | {c.formula} | {c.over} | {c.balanced:g} | {c.value(x):.6f} | {c.ours} | "
            f"{groups[c.group]} | {c.in_words} |"
        )
    lines += [
        "\nThe mean over layers, and over devices or groups, of one layer's loss, where a row does "
        "not say otherwise. The paper does not say whether f counts tokens or slots; its training "
        "code counts slots. Three differences no factor makes up for: fewer tokens are further "
        "from balance by chance (a device's more than the batch's, a sequence's more than a "
        "device's), pooled layers offset each other, and the first expert alone is not all k.\n",
        "## Router z-loss\n",
        "Factor: of `losses.router_z_loss`.\n",
        "| | formula | logits of 0 | value | factor |",
        "|---|---|---|---|---|",
    ]
    for c in Z_LOSS:
        lines.append(
            f"| {c.name} | {c.formula} | {c.balanced:g} · (log E)² | {c.value(x):.6f} | "
            f"{c.in_words} |"
        )
    lines += [
        "\nOLMoE was trained with weight 0.001 and k = 8 in the training code's convention: "
        "0.000125 here and in the paper's equation (`experiments/configs/olmoe_1b_7b.py`). The "
        "same 0.001 is eight times as strong in OLMo-core, and 128 times, with 16 layers, in "
        "Megatron-LM.\n",
        "## Sources\n",
    ]
    lines += [f"- {name}" for name in dict.fromkeys(c.source for c in (*BALANCE, *Z_LOSS))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
