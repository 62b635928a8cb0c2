"""The examples of CONTRIBUTING.md work as printed."""

import ast
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from experiments import run_study
from olmoe_jax import config
from olmoe_jax.model import routing, transformer
from olmoe_jax.studies import declaration, equality

CONTRIBUTING = pathlib.Path(__file__).parents[1] / "CONTRIBUTING.md"


def _examples():
    """The router and the study of the guide."""
    return re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL)


def test_the_study_of_the_guide_is_one_at_every_scale(tmp_path):
    _, code = _examples()
    path = tmp_path / "rope_theta.py"
    path.write_text(code)
    study = run_study.load(str(path))
    for scale in study.base:
        small, large = study.configs(scale).values()
        assert (small.model.rope_theta, large.model.rope_theta) == (10_000, 500_000)
    assert "--study=rope_theta " in ast.get_docstring(ast.parse(code))


def test_the_guide_names_every_metric_and_all_that_can_be_held_equal():
    text = CONTRIBUTING.read_text()
    names = [*declaration.METRICS, *declaration.MEASURES, *equality.HELD_EQUAL]
    assert [name for name in names if f"`{name}`" not in text] == []


def test_the_router_of_the_guide_is_added_by_one_function_and_its_name(monkeypatch):
    code, _ = _examples()
    names = {"jax": jax, "jnp": jnp, "Routing": routing.Routing}
    exec(code, names)
    monkeypatch.setitem(routing.ROUTERS, "sigmoid_choice", names["sigmoid_choice"])
    model = transformer.Transformer(
        config.ModelConfig(
            vocab_size=11, num_layers=2, d_model=8, num_heads=2, num_kv_heads=2, d_ff=3,
            num_experts=5, num_experts_per_token=2, router="sigmoid_choice",
        )
    )  # fmt: skip
    input_ids = jax.random.randint(jax.random.key(0), (2, 7), 0, 11)
    params = model.init(jax.random.key(1), input_ids)["params"]
    out = model.apply({"params": params}, input_ids, return_routing=True)
    chosen = jnp.take_along_axis(out.routing.logits, out.routing.expert_ids, axis=-1)
    np.testing.assert_allclose(out.routing.weights, jax.nn.sigmoid(chosen), rtol=1e-6)
    assert float(chosen.min(-1).min()) >= float(jnp.sort(out.routing.logits, -1)[..., -2].min())


def test_the_files_and_tables_that_the_guide_names_exist():
    root, text = CONTRIBUTING.parent, CONTRIBUTING.read_text()
    named = set(re.findall(r"`((?:olmoe_jax|tests|experiments)/[\w/]+\.py)`", text)) - {
        "olmoe_jax/grouped_matmul/NAME.py",
        "experiments/configs/NAME.py",
        "experiments/studies/NAME.py",
        "experiments/studies/rope_theta.py",
    }
    assert named and all((root / path).is_file() for path in named)
