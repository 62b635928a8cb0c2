import dataclasses
import functools
import importlib
import pathlib

import jax
import jax.numpy as jnp
import pytest

from experiments import configs
from olmoe_jax import accounting, presets
from olmoe_jax import config as config_lib
from olmoe_jax.model import transformer
from olmoe_jax.training import step

FOLDER = pathlib.Path(configs.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
OF_A_DIRECTORY = {"upcycled"}  # which its argument names


def _config(name):
    module = importlib.import_module(f"experiments.configs.{name}")
    return config_lib.from_flags(config_lib.Config, module.get_config())


@pytest.mark.parametrize("name", NAMES)
def test_says_how_to_run_it_within_sixty_lines(name):
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 60
    docstring = importlib.import_module(f"experiments.configs.{name}").__doc__
    assert f"configs/{name}.py" in " ".join(docstring.split())
    assert "Hardware: " in docstring


@pytest.mark.parametrize("name", sorted({*NAMES} - OF_A_DIRECTORY))
def test_whole_train_step_has_the_shapes_it_should(name):
    config = _config(name)
    model = transformer.Transformer(config.model, routing_group=config.losses.load_balancing_group)
    key = jax.eval_shape(lambda: jax.random.key(0))
    init = functools.partial(step.init_state, config=config)
    state = jax.eval_shape(init, key)
    shape = (config.training.batch_size, config.data.sequence_length)
    batch = {
        field: jax.ShapeDtypeStruct(shape, dtype)
        for field, dtype in {"tokens": jnp.int32, "token_mask": bool, "loss_mask": bool}.items()
    }
    train = functools.partial(step.train_step, model=model, config=config)
    new_state, metrics = jax.eval_shape(train, state, batch)
    assert new_state == state
    assert metrics["loss"].shape == ()
    if config.model.num_experts:
        layers, experts = config.model.num_moe_layers, config.model.num_experts
        assert metrics["load"].shape == (layers, experts)
    assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.dtype("float32")}


def test_olmoe_recipe_is_the_reference():
    config = _config("olmoe_1b_7b")
    assert accounting.num_params(config.model).total == 6_919_161_856
    assert dataclasses.replace(config.model, dtype="float32", remat=False) == presets.get(
        "olmoe-1b-7b"
    )
    assert config.tokens_per_step == 4_194_304
    assert config.optimizer.warmup_tokens == 2500 * config.tokens_per_step
    assert config.optimizer.decay_tokens == 5e12
    assert config.optimizer == config_lib.OptimizerConfig(
        learning_rate=4e-4, schedule="cosine", warmup_tokens=10_485_760_000,
        warmup_start_fraction=0.1, decay_tokens=5_000_000_000_000, final_fraction=0.1, beta1=0.9,
        beta2=0.95, eps=1e-8, weight_decay=0.1, decay_norms=True, decay_embeddings=True,
        clip_norm=1.0,
    )  # fmt: skip
    assert config.losses == config_lib.LossesConfig(
        load_balancing_weight=0.01, load_balancing_convention="olmoe", load_balancing_group=4,
        router_z_weight=1.25e-4, count_masked=True,
    )  # fmt: skip
    assert config.training.num_steps * config.tokens_per_step // 10**9 == 5033
    assert (config.training.seed, config.training.micro_batches) == (6198, 1)
    assert (config.checkpoint.interval, config.model.dtype) == (5000, "bfloat16")
    assert config.data.mask_repetitive_windows


def test_annealing_differs_from_the_main_run_only_where_the_reference_does():
    main, anneal = _config("olmoe_1b_7b"), _config("olmoe_1b_7b_anneal")
    differ = [
        line.split(":")[0].removeprefix("config.") for line in config_lib.differences(main, anneal)
    ]
    assert differ == [
        "optimizer.learning_rate", "optimizer.schedule", "optimizer.warmup_tokens",
        "optimizer.decay_tokens", "optimizer.final_fraction", "training.num_steps", "training.seed",
        "training.initial_checkpoint", "training.initial_optimizer_state",
        "checkpoint.full_state_at",
    ]  # fmt: skip
    assert (anneal.optimizer.learning_rate, anneal.optimizer.schedule) == (4e-5, "linear")
    assert (
        anneal.optimizer.learning_rate
        == main.optimizer.learning_rate * main.optimizer.final_fraction
    )
    assert anneal.training.num_steps * anneal.tokens_per_step // 10**9 == 100
    assert main.training.num_steps in main.checkpoint.full_state_at  # its moments are still there
    start = anneal.training.initial_checkpoint
    assert start.endswith(f"resume/step{main.training.num_steps}-tokens5033B")


def test_dense_control_is_the_papers():
    config = _config("dense_1b")
    assert accounting.num_params(config.model).total == 1_279_854_592
    assert round(config.training.num_steps * config.tokens_per_step / 1e9) == 130
    assert config.optimizer.warmup_tokens == 2000 * config.tokens_per_step
    assert not config.optimizer.decay_embeddings


def test_demo_is_as_large_as_promised():
    config = _config("demo")
    model = config.model
    assert model.num_layers >= 4 and model.d_model >= 128 and model.vocab_size >= 4096
    assert model.num_experts >= 16 and model.num_experts_per_token >= 2
    assert config.data.sequence_length >= 256 and config.data.path == "embedded"


def test_tiny_moe_routes_as_olmoe_and_takes_its_tokenizer():
    model = _config("tiny_moe").model
    assert (model.num_layers, model.num_experts, model.num_experts_per_token) == (2, 64, 8)
    assert model.vocab_size == 50_280


def test_a_config_of_a_directory_asks_for_it():
    with pytest.raises(ValueError, match="upcycled.py:DIR"):
        importlib.import_module("experiments.configs.upcycled").get_config()
