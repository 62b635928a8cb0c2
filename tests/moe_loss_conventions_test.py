"""The conventions of `moe_loss_conventions` against ours, against transformers, and as a page."""

import importlib

import numpy as np
import pytest

from olmoe_jax.config import sections
from tests import moe_loss_conventions as peers

FP32 = 1e-5  # order of summation, relative


@pytest.mark.parametrize("convention", peers.BALANCE + peers.Z_LOSS, ids=lambda c: c.name)
def test_ours_times_the_factor_is_theirs(convention):
    x = peers.logits()
    assert convention.factor * peers.ours(convention, x) == pytest.approx(
        convention.value(x), rel=FP32
    )


@pytest.mark.parametrize("convention", peers.BALANCE, ids=lambda c: c.name)
def test_a_balanced_router_has_the_value_that_the_page_says(convention):
    """Token t of a sequence likes experts t, t + 1, … best; every expert equally often."""
    experts = np.arange(peers.EXPERTS)
    liking = -np.mod(np.subtract.outer(experts, experts), peers.EXPERTS).T
    shape = (peers.LAYERS, peers.DEVICES, peers.SEQUENCES, *liking.shape)
    x = np.broadcast_to(1e-9 * liking, shape)
    assert convention.value(x) == pytest.approx(convention.balanced, rel=1e-6)


@pytest.mark.parametrize("convention", peers.Z_LOSS, ids=lambda c: c.name)
def test_logits_of_zero_have_the_z_loss_that_the_page_says(convention):
    value = convention.value(np.zeros_like(peers.logits()))
    assert value == pytest.approx(convention.balanced * np.log(peers.EXPERTS) ** 2)


def test_every_convention_of_ours_is_somebodys():
    assert {c.ours for c in peers.BALANCE} == set(sections.LOAD_BALANCING_CONVENTIONS)


def test_the_values_tell_the_conventions_apart():
    """Those that are the same function of these logits, and no others, have one value."""
    values = [round(c.value(peers.logits()), 9) for c in peers.BALANCE]
    same = [{"OLMoE, training code", "OLMo-core, local_batch"},
            {"Mesh TensorFlow, switch gating of k", "OLMo-core, instance"}]  # fmt: skip
    for value in set(values):
        names = {c.name for c, v in zip(peers.BALANCE, values, strict=True) if v == value}
        assert len(names) == 1 or names in same


def _modeling(name):
    """(torch, the module of a class of transformers), or the test is skipped."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return torch, importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def test_transformers_itself_agrees():
    torch, modeling = _modeling("olmoe")
    layers = tuple(torch.tensor(layer).reshape(-1, peers.EXPERTS) for layer in peers.logits())
    theirs = modeling.load_balancing_loss_func(layers, peers.EXPERTS, peers.K)
    assert float(theirs) == pytest.approx(peers.transformers(peers.logits()), rel=FP32)


def test_switch_in_transformers_itself_agrees():
    torch, modeling = _modeling("switch_transformers")
    x = torch.tensor(peers.logits()).reshape(peers.LAYERS, 1, -1, peers.EXPERTS)  # one group
    balance = [
        float(modeling.load_balancing_loss_func(layer.softmax(-1), layer.argmax(-1))) for layer in x
    ]
    assert np.mean(balance) == pytest.approx(peers.switch(peers.logits()), rel=FP32)
    z = [float(modeling.router_z_loss_func(layer)) for layer in x]
    assert np.mean(z) == pytest.approx(peers.z_paper(peers.logits()), rel=FP32)


def test_the_page_is_up_to_date():
    hint = "python -m tests.moe_loss_conventions writes it"
    assert peers.PAGE.is_file() and peers.PAGE.read_text() == peers.page(), hint
