import dataclasses
import json
import typing

import pytest

from olmoe_jax import config as config_lib

MODEL = config_lib.ModelConfig(
    vocab_size=97, max_length=89, num_layers=6, d_model=10, num_heads=5, num_kv_heads=5, d_ff=7,
    num_experts=11, num_experts_per_token=3,
)  # fmt: skip


def _config(**changes):
    sections = {
        "model": MODEL,
        "data": config_lib.DataConfig(sequence_length=83),
        "training": config_lib.TrainingConfig(batch_size=6),
    }
    return config_lib.Config(**(sections | changes))


def test_flags_and_back_is_the_same_config():
    config = _config(
        model=dataclasses.replace(MODEL, head_dim=14, clip_qkv=None),
        data=config_lib.DataConfig(sequence_length=83, tokenizer="t.json"),
        checkpoint=config_lib.CheckpointConfig(interval=5, full_state_at=(10, 15)),
    )
    assert config_lib.from_flags(config_lib.Config, config_lib.to_flags(config)) == config


def test_json_and_back_is_the_same_config():
    config = _config(checkpoint=config_lib.CheckpointConfig(interval=5, full_state_at=(10, 15)))
    assert (
        config_lib.from_flags(config_lib.Config, json.loads(config_lib.to_json(config))) == config
    )


def test_an_empty_optional_field_can_be_set_by_a_flag():
    flags = config_lib.to_flags(_config()).lock()
    # A flag's parser is chosen by this type; that of a plain None takes no value.
    assert (flags.data.get_type("tokenizer"), flags.model.get_type("clip_qkv")) == (str, float)
    flags.data.tokenizer = "t.json"
    flags.model.clip_qkv = 8.5
    config = config_lib.from_flags(config_lib.Config, flags)
    assert (config.data.tokenizer, config.model.clip_qkv) == ("t.json", 8.5)


def test_every_field_of_every_section_reaches_the_flags():
    flags = config_lib.to_flags(config_lib.Config())
    for section, kind in typing.get_type_hints(config_lib.Config).items():
        assert set(flags[section]) == {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("d_fff", 3), ValueError, "config.model.d_fff .* nearest field is config.model.d_ff"),
        (("d_ff", 3.0), TypeError, r"config.model.d_ff is 3.0: expected int, got float"),
        (("d_ff", True), TypeError, r"config.model.d_ff is True: expected int, got bool"),
        (("remat", 1), TypeError, r"config.model.remat is 1: expected bool, got int"),
        (("dtype", None), TypeError, r"config.model.dtype is None: expected str"),
    ],
)
def test_wrong_fields_and_types_are_named(change, error, message):
    values = dataclasses.asdict(_config())
    values["model"][change[0]] = change[1]
    with pytest.raises(error, match=message):
        config_lib.from_flags(config_lib.Config, values)


def test_a_section_set_as_a_whole_must_be_complete():
    values = dataclasses.asdict(_config()) | {"mesh": {"data": 3}}
    with pytest.raises(ValueError, match="config.mesh: missing expert, fsdp, tensor"):
        config_lib.from_flags(config_lib.Config, values)
    with pytest.raises(TypeError, match="config.mesh is 3: expected the fields of MeshConfig"):
        config_lib.from_flags(config_lib.Config, values | {"mesh": 3})


def test_items_of_a_tuple_are_checked_and_an_int_is_a_float():
    values = dataclasses.asdict(_config())
    values["checkpoint"]["full_state_at"] = [100, "200"]
    with pytest.raises(
        TypeError, match=r"config.checkpoint.full_state_at\[1\] is '200': expected int"
    ):
        config_lib.from_flags(config_lib.Config, values)
    values["checkpoint"]["full_state_at"] = [100]
    values["optimizer"]["clip_norm"] = 3
    clip_norm = config_lib.from_flags(config_lib.Config, values).optimizer.clip_norm
    assert (clip_norm, type(clip_norm)) == (3.0, float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(num_experts_per_token=12),
            r"num_experts_per_token is 12: must lie in 1..model.num_experts \(11\)",
        ),
        (dict(num_experts_per_token=0), "num_experts_per_token is 0"),
        (
            dict(num_experts=0, num_shared_experts=2),
            "num_shared_experts is 2: must be 0 in a dense",
        ),
        (dict(moe_every=4), r"moe_every is 4: must divide model.num_layers \(6\)"),
        (dict(num_kv_heads=2), r"num_kv_heads is 2: must divide model.num_heads \(5\)"),
        (dict(d_model=11), r"num_heads is 5: must divide model.d_model \(11\)"),
        (dict(head_dim=3), "head_dim is 3: must be even"),
        (dict(head_dim=0), "head_dim is 0: must be positive"),
        (dict(capacity_factor=0.0), "capacity_factor is 0.0: must be positive"),
        (dict(clip_qkv=-1.0), "clip_qkv is -1.0: must be positive"),
        (dict(rope_theta=float("inf")), "rope_theta is inf: must be finite"),
        (dict(init_std=float("nan")), "init_std is nan: must be finite"),
        (dict(init_std=-1.0), "init_std is -1.0: must not be negative"),
        (dict(num_layers=0), "num_layers is 0: must be at least 1"),
        (dict(norm="rms"), "norm is 'rms'"),
        (dict(norm_position="sandwich"), "norm_position is 'sandwich': must be one of pre, post"),
        (dict(sliding_window=0), "sliding_window is 0: must be positive"),
        (dict(qk_norm=False, qk_norm_per_head=True), "qk_norm_per_head is True: needs model.qk_n"),
        (dict(clip_before_qk_norm=True), "clip_before_qk_norm is True: needs .* model.clip_qkv"),
        (
            dict(clip_before_qk_norm=True, clip_qkv=1.0, qk_norm=False),
            "clip_before_qk_norm is True: needs model.qk_norm",
        ),
        (dict(dtype="float16"), "dtype is 'float16'"),
        (dict(router_scores="sigmiod"), "router_scores is 'sigmiod': .*did you mean 'sigmoid'"),
        (dict(router_bias=True, router="expert_choice"), "router_bias is True: .*token_choice"),
        (dict(router_bias=True, num_experts=0), "router_bias is True: needs experts"),
    ],
)
def test_impossible_models_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"config.model.{message}"):
        dataclasses.replace(MODEL, **changes)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("data", dict(sequence_length=1), "data.sequence_length is 1: must be at least 2"),
        ("data", dict(workers=-1), "data.workers is -1"),
        ("losses", dict(router_z_weight=-1.0), "losses.router_z_weight is -1.0"),
        ("losses", dict(router_bias_rate=-1.0), "losses.router_bias_rate is -1.0"),
        (
            "losses",
            dict(load_balancing_convention="hf"),
            "losses.load_balancing_convention is 'hf'",
        ),
        ("optimizer", dict(learning_rate=0.0), "optimizer.learning_rate is 0.0: must be positive"),
        ("optimizer", dict(learning_rate=float("nan")), "optimizer.learning_rate is nan"),
        ("optimizer", dict(beta2=1.5), "optimizer.beta2 is 1.5: must lie in 0..1"),
        ("optimizer", dict(beta1=1.0), "optimizer.beta1 is 1.0: must lie in 0..1, below 1"),
        ("optimizer", dict(beta2=1.0), "optimizer.beta2 is 1.0: must lie in 0..1, below 1"),
        ("optimizer", dict(clip_norm=float("inf")), "optimizer.clip_norm is inf: must be finite"),
        ("training", dict(spike_factor=float("inf")), "training.spike_factor is inf: must be fin"),
        (
            "optimizer",
            dict(warmup_tokens=12, decay_tokens=11),
            r"optimizer.warmup_tokens is 12: must not exceed optimizer.decay_tokens \(11\)",
        ),
        ("optimizer", dict(schedule="cosin"), "optimizer.schedule is 'cosin': .*'cosine'"),
        (
            "training",
            dict(batch_size=6, micro_batches=4),
            "training.micro_batches is 4: must divide",
        ),
        ("training", dict(seed=-1), "training.seed is -1"),
        ("training", dict(seed=2**32), r"training.seed is 4294967296: must be below 2\*\*32"),
        ("training", dict(initial_optimizer_state=True), "needs training.initial_checkpoint"),
        ("checkpoint", dict(interval=0), "checkpoint.interval is 0"),
        ("checkpoint", dict(interval=7, full_state_at=(14, 20)), "full_state_at is 20: .* \\(7\\)"),
        ("mesh", dict(data=0), "mesh.data is 0"),
        ("mesh", dict(data=-1, fsdp=-1), "only one axis may be -1"),
    ],
)
def test_impossible_sections_are_refused(section, changes, message):
    kind = typing.get_type_hints(config_lib.Config)[section]
    with pytest.raises(ValueError, match=message):
        kind(**changes)


def test_a_warm_up_may_be_all_of_the_schedule_and_a_constant_rate_does_not_decay():
    assert config_lib.OptimizerConfig(warmup_tokens=11, decay_tokens=11)
    assert config_lib.OptimizerConfig(warmup_tokens=12, decay_tokens=11, schedule="constant")


def test_window_longer_than_the_model_is_refused():
    with pytest.raises(ValueError, match=r"sequence_length is 97: .* model.max_length \(89\)"):
        _config(data=config_lib.DataConfig(sequence_length=97))


def test_group_that_does_not_divide_a_micro_batch_is_refused():
    training = config_lib.TrainingConfig(batch_size=6, micro_batches=2)
    with pytest.raises(ValueError, match=r"load_balancing_group is 2: .*6 sequences / 2 micro"):
        _config(training=training, losses=config_lib.LossesConfig(load_balancing_group=2))
    assert _config(training=training, losses=config_lib.LossesConfig(load_balancing_group=3))


def test_expert_choice_over_the_whole_batch_needs_one_micro_batch():
    model = dataclasses.replace(MODEL, router="expert_choice")
    with pytest.raises(ValueError, match="micro_batches=1"):
        _config(model=model, training=config_lib.TrainingConfig(batch_size=6, micro_batches=2))
    assert _config(model=model, training=config_lib.TrainingConfig(batch_size=6))


def test_derived_numbers():
    model = dataclasses.replace(MODEL, vocab_multiple=32, moe_every=3)
    assert model.padded_vocab_size == 128
    assert dataclasses.replace(model, vocab_size=128).padded_vocab_size == 128
    assert model.head_size == 2
    assert [model.is_moe_layer(i) for i in range(6)] == [False, False, True] * 2
    assert model.num_moe_layers == 2
    assert dataclasses.replace(model, num_experts=0).num_moe_layers == 0
    assert _config().tokens_per_step == 6 * 83


def test_differences_name_each_field_once():
    a, b = (
        _config(),
        _config(model=dataclasses.replace(MODEL, d_ff=13), mesh=config_lib.MeshConfig(data=1)),
    )
    assert config_lib.differences(a, a) == []
    assert config_lib.differences(a, b) == [
        "config.model.d_ff: 7 != 13",
        "config.mesh.data: -1 != 1",
    ]
