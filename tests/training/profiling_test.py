import functools

import jax
import jax.numpy as jnp
import pytest

from olmoe_jax import config as config_lib
from olmoe_jax.model import transformer
from olmoe_jax.training import profiling
from olmoe_jax.training import step as step_lib


def _step():
    config = config_lib.Config(
        model=config_lib.ModelConfig(
            vocab_size=97, num_layers=2, d_model=16, num_heads=2, num_kv_heads=2, d_ff=8,
            num_experts=4, num_experts_per_token=2, qk_norm=True, max_length=16,
        ),
        data=config_lib.DataConfig(sequence_length=16),
        training=config_lib.TrainingConfig(batch_size=2),
    )  # fmt: skip
    train_step = functools.partial(
        step_lib.train_step, model=transformer.Transformer(config.model), config=config
    )
    state = step_lib.init_state(jax.random.key(0), config=config)
    mask = jnp.ones((2, 16), bool)
    batch = {"tokens": jnp.ones((2, 16), jnp.int32), "token_mask": mask, "loss_mask": mask}
    return jax.jit(train_step), state, batch


def test_a_profile_tells_the_parts_of_a_step_apart(tmp_path):
    train_step, state, batch = _step()
    said = []
    profile = profiling.Profile(tmp_path, said.append)
    train_step = profile.compile(train_step, state, batch)
    for step in range(7):
        profile.before(step)
        state, metrics = train_step(state, batch)
        profile.after(step, metrics)
        assert bool(said) == (step >= 5)
    profile.close()
    (text,) = said  # closing adds nothing
    shares = {line[2:17].strip(): float(line[17:].rstrip("%")) for line in text.splitlines()[1:]}
    assert set(shares) >= {"optimizer", "head and loss", "experts", "attention", "router", "norms"}
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    assert list(tmp_path.glob("**/*.xplane.pb"))


def test_an_instruction_belongs_to_the_first_part_its_scope_names():
    text = """
  %while.8 = (s32[], f32[7]{0}) while(%tuple.1), metadata={op_name="jit(f)/attention/while"}
  ROOT %dot.3 = f32[7]{0} dot(%a, %b), metadata={op_name="jit(f)/block_0/attention/query_norm/x"}
  fusion.4 = f32[7]{0} fusion(%a), calls=%c, metadata={op_name="jit(f)/block_0/ffn_norm/mul"}
  %call.1 = f32[7]{0} custom-call(%a), metadata={op_name="jit(f)/moe/experts/ffi_call"}
  %top.1 = f32[7]{0} sort(%a), metadata={op_name="jit(f)/moe/top_k"}
  %copy.1 = f32[7]{0} copy(%a)
"""
    assert profiling.parts_of(text) == {
        "dot.3": "attention", "fusion.4": "norms", "call.1": "experts", "top.1": "router",
        "copy.1": "rest",
    }  # fmt: skip


def test_no_directory_profiles_nothing_and_a_file_is_refused(tmp_path):
    profile = profiling.Profile(None, pytest.fail)
    assert profile.compile("step", None, None) == "step"
    profile.before(profiling.SKIPPED)
    profile.after(profiling.SKIPPED + profiling.TRACED - 1, None)
    profile.close()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: a file; expected a directory"):
        profiling.Profile(tmp_path / "file", print)


def test_a_run_that_ends_early_closes_its_trace(tmp_path):
    said = []
    profile = profiling.Profile(tmp_path, said.append)
    profile.before(profiling.SKIPPED)
    profile.close()
    with jax.profiler.trace(str(tmp_path / "next")):  # refused while another trace runs
        pass
    assert len(said) == 1


def test_a_run_with_too_few_steps_says_that_there_is_no_profile(tmp_path):
    said = []
    profile = profiling.Profile(tmp_path, said.append)
    profile.before(0)
    profile.after(0, None)
    profile.close()
    profile.close()
    (line,) = said
    assert line.startswith(f"no profile in {tmp_path}: it is of steps 4 to 6 of this process")
