"""The same weights in transformers and here, read from the folder that transformers wrote.

`python -m tests.porting.parity_test` measures every case and prints the table of README.md.
"""

import dataclasses
import functools
import importlib
import pathlib
import tempfile

import jax
import numpy as np
import pytest

import olmoe_jax
from olmoe_jax import losses
from tests.porting import peers

FP32 = 2e-5  # order of summation over three layers, relative to the largest value

README = pathlib.Path(__file__).parents[2] / "README.md"


def _marked(case):
    """MoE models compile slowly: outside OLMoE, what their families share is tested together."""
    family, option = case.split(", ")
    alone = option in ("grouped-query", "tied", "head_dim") and family != "OLMoE"
    slow = alone and peers.expected_config(case).num_experts > 0
    return pytest.param(case, marks=[pytest.mark.slow] if slow else [])


_CASES = [_marked(case) for case in peers.CASES]


@functools.cache
def _both(case):
    """(their logits, their router logits or None, our config, our params)."""
    with tempfile.TemporaryDirectory() as directory:
        theirs = peers.save(case, directory)
        model, params = olmoe_jax.load(directory)
    return *peers.run(theirs, peers.tokens()), model.config, params


@functools.partial(jax.jit, static_argnames="config")
def _apply(config, params, tokens):
    model = olmoe_jax.Transformer(config)
    return model.apply({"params": params}, tokens, return_routing=True)


def _relative(got, want):
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


def error(case) -> float:
    """Largest difference of the logits, and of the router's, relative to the largest of them."""
    logits, router_logits, config, params = _both(case)
    out = _apply(config, params, peers.tokens())
    errors = [_relative(out.logits, logits)]
    if router_logits is not None:
        errors.append(_relative(out.routing.logits, router_logits))
    return max(errors)


def table() -> str:
    """Markdown: a row per family, a column per option."""
    rows = [["family", *peers.OPTIONS], ["---"] * (1 + len(peers.OPTIONS))]
    for family in peers.FAMILIES:
        cases = [f"{family}, {option}" for option in peers.OPTIONS]
        rows.append([family, *(f"{error(c):.0e}" if c in peers.CASES else "" for c in cases)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


@pytest.mark.parametrize("case", _CASES)
def test_logits_equal_those_of_transformers(case):
    peers.libraries()
    assert error(case) < FP32
    logits, router_logits, config, _ = _both(case)
    assert logits.std() > 0.1, "logits that say nothing"
    assert (router_logits is None) == (config.num_experts == 0)


@pytest.mark.parametrize("case", _CASES)
def test_the_folders_config_is_understood(case):
    peers.libraries()
    config, expected = _both(case)[2], peers.expected_config(case)
    if not expected.num_experts:  # nothing reads it
        expected = dataclasses.replace(expected, num_experts_per_token=config.num_experts_per_token)
    assert config == expected


@pytest.mark.parametrize(
    ("case", "other"),
    [
        ("OLMoE, norm_topk_prob", {"normalize_expert_weights": False}),
        ("OLMoE, clip_qkv", {"clip_qkv": None}),
        ("OLMoE, clip_qkv", {"clip_before_qk_norm": True}),
        ("Mixtral, plain", {"normalize_expert_weights": False}),
        ("Mixtral, sliding window", {"sliding_window": None}),
        ("Mixtral, sliding window", {"sliding_window": 6}),
        ("Llama, plain", {"rope_theta": 10000.0}),
        ("Llama, plain", {"norm_eps": 1e-5}),
        ("OLMo, clip_qkv", {"clip_qkv": None}),
        ("OLMo 2, plain", {"norm_position": "pre"}),
        ("FlexOlmo, plain", {"norm_position": "pre"}),
        ("Qwen3-MoE, norm_topk_prob", {"normalize_expert_weights": False}),
    ],
)
def test_an_option_that_is_overlooked_shows_in_the_logits(case, other):
    peers.libraries()
    logits, _, config, params = _both(case)
    out = _apply(dataclasses.replace(config, **other), params, peers.tokens())
    assert _relative(out.logits, logits) > 10 * FP32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shards_of_half_precision_hold_the_same_weights(dtype, tmp_path):
    peers.libraries()
    case = "Qwen3-MoE, all together"
    theirs = peers.save(case, tmp_path, dtype=dtype, max_shard_size="9KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    model, params = olmoe_jax.load(tmp_path, dtype="float32")
    logits, _ = peers.run(theirs, peers.tokens())
    assert _relative(_apply(model.config, params, peers.tokens()).logits, logits) < FP32


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["OLMoE", "Mixtral", "FlexOlmo", "Qwen3-MoE"])
def test_load_balancing_loss_equals_that_of_transformers(family, padded):
    torch, _ = peers.libraries()
    case = f"{family}, {peers.PLAIN}"
    _, router_logits, config, params = _both(case)
    mask = np.ones(peers.tokens().shape, bool)
    if padded:
        mask[0, 5:] = mask[1, 11:] = False
    routing = _apply(config, params, peers.tokens()).routing
    statistics = losses.routing_statistics(
        routing.logits, routing.expert_ids, mask, convention="huggingface", group=0
    )
    ours = losses.load_balancing_loss(
        statistics, convention="huggingface", num_experts_per_token=peers.TOP_K
    )
    name = peers.CASES[case][0]
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    theirs = modeling.load_balancing_loss_func(
        tuple(torch.tensor(layer).reshape(-1, peers.EXPERTS) for layer in router_logits),
        peers.EXPERTS, peers.TOP_K, torch.tensor(mask.astype(np.int64)) if padded else None,
    )  # fmt: skip
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def _readme_table():
    """{(family, option): cell} of README.md's table of families."""
    lines = README.read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header = ["family", *peers.OPTIONS]
    assert header in rows, f"README.md has no table with the columns {', '.join(header)}"
    cells = {}
    for row in rows[rows.index(header) + 2 :]:
        if len(row) != len(header):
            break
        cells |= {(row[0], option): cell for option, cell in zip(header[1:], row[1:], strict=True)}
    return cells


def test_the_readme_lists_every_family_and_option_with_its_error():
    cells = _readme_table()
    measured = {place: float(cell) for place, cell in cells.items() if cell}
    listed = {f"{family}, {option}" for family, option in measured}
    hint = "python -m tests.porting.parity_test prints the table"
    assert listed == set(peers.CASES), f"{sorted(listed ^ set(peers.CASES))}: {hint}"
    assert max(measured.values()) < FP32, hint


if __name__ == "__main__":
    print(table(), end="")
