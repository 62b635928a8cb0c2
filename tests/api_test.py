"""The public API is what the README says, each name with a docstring."""

import subprocess
import sys

import pytest

import olmoe_jax


def test_public_names_are_these():
    assert olmoe_jax.__all__ == [
        "Config",
        "ModelConfig",
        "RoutingOverride",
        "Transformer",
        "accounting",
        "load",
        "presets",
    ]
    assert dir(olmoe_jax) == olmoe_jax.__all__


@pytest.mark.parametrize("name", olmoe_jax.__all__)
def test_every_public_name_has_a_docstring(name):
    assert getattr(olmoe_jax, name).__doc__.strip()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Transfomer'"):
        olmoe_jax.Transfomer  # noqa: B018


@pytest.mark.parametrize(
    "module", ["olmoe_jax.config", "olmoe_jax.data.preparation", "olmoe_jax.accounting"]
)
def test_what_needs_no_model_does_not_import_jax(module):
    code = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
