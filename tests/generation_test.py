import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoe_jax import checkpoints, generation
from olmoe_jax import config as config_lib
from olmoe_jax.data import tokenizer as tokenizer_lib
from olmoe_jax.model import transformer

CONFIG = config_lib.ModelConfig(
    vocab_size=83, vocab_multiple=16, max_length=150, num_layers=2, d_model=24, num_heads=3,
    num_kv_heads=3, d_ff=10, num_experts=7, num_experts_per_token=3,
)  # fmt: skip
NEAR = 1e-4  # two logits nearer than this, relative to the largest, may be taken for each other


@functools.cache
def _model(**changes):
    model = transformer.Transformer(dataclasses.replace(CONFIG, **changes), routing_group=4)
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0.0, 0.4, x.shape), jnp.float32),
        checkpoints.abstract_params(model.config),
    )
    return model, params


def _prompt(length, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, ids):
    return model.apply({"params": params}, ids).logits[..., : model.config.vocab_size]


def _best(model, params, ids):
    """The most probable token behind each position, by a forward pass without padding."""
    model = transformer.Transformer(model.config)
    return jnp.argmax(_logits(model, params, np.array([ids], np.int32))[0], -1).tolist()


def _check_causal(model, params, prompt, got):
    """By causality one pass over the result tells what a pass per token would have told."""
    assert got == _best(model, params, [*prompt, *got])[len(prompt) - 1 : -1]


@pytest.mark.parametrize("changes", [{}, {"num_experts": 0, "tie_embeddings": True}])
def test_padding_changes_nothing(changes):
    model, params = _model(**changes)
    got = generation.greedy(model, params, _prompt(5), num_tokens=6)
    _check_causal(model, params, _prompt(5), got)
    assert len(set(got)) > 1


@pytest.mark.parametrize("changes", [{"router": "expert_choice"}, {"expert_backend": "capacity"}])
def test_where_experts_choose_among_all_positions_nothing_is_padded(changes):
    model, params = _model(**changes)
    for seed in range(8):
        got = generation.greedy(model, params, _prompt(7, seed), num_tokens=1)
        assert got == _best(model, params, _prompt(7, seed))[-1:]


def test_a_growing_sequence_passes_from_one_program_to_the_next(compilations):
    model, params = _model()
    whole = generation.greedy(model, params, _prompt(61), num_tokens=8)
    _check_causal(model, params, _prompt(61), whole)
    before = compilations()
    assert generation.greedy(model, params, _prompt(67), num_tokens=7)
    assert compilations() == before


def test_programs_double_in_length_up_to_max_length():
    lengths = [generation._padded(CONFIG, n) for n in (1, 64, 65, 128, 129, 150)]
    assert lengths == [64, 64, 128, 128, 150, 150]


def test_it_stops_behind_the_end_token():
    model, params = _model()
    whole = generation.greedy(model, params, _prompt(5), num_tokens=6)
    end = whole[2]
    assert (
        generation.greedy(model, params, _prompt(5), num_tokens=6, end_token=end)
        == (whole[: whole.index(end) + 1])
    )


def test_padding_of_the_vocabulary_is_never_chosen():
    model, params = _model(tie_embeddings=False)
    params = dict(params, lm_head=params["lm_head"].at[CONFIG.vocab_size :].mul(100.0))
    got = generation.greedy(model, params, _prompt(5), num_tokens=6)
    assert max(got) < CONFIG.vocab_size
    _check_causal(model, params, _prompt(5), got)


def test_mistakes_are_named():
    model, params = _model()
    for ids, num_tokens, match in (
        ([], 1, "no tokens"),
        ([1], 0, "num_tokens is 0"),
        ([1, CONFIG.vocab_size], 1, "has token 83: this model knows 0..82"),
        ([-1], 1, "has token -1"),
        (_prompt(147), 4, "147 tokens and 4 are to be added: the model's max_length is 150"),
    ):
        with pytest.raises(ValueError, match=match):
            generation.greedy(model, params, ids, num_tokens=num_tokens)
    broken = dict(params, embedding=params["embedding"].at[1].set(jnp.nan))
    with pytest.raises(ValueError, match="logits behind 1 tokens are not finite"):
        generation.greedy(model, broken, [1], num_tokens=2)


def test_the_tokenizer_of_a_model_directory_is_found_wherever_it_lies(tmp_path):
    sizes = iter(range(258, 300))

    def put(*folder):
        folder = tmp_path.joinpath(*folder)
        folder.mkdir(parents=True, exist_ok=True)
        made = tokenizer_lib.train(["a bc d"], vocab_size=next(sizes))
        made = dataclasses.replace(made, json=made.json + b" " * next(sizes))
        (folder / "tokenizer.json").write_bytes(made.json)
        return made

    find = generation.find_tokenizer
    assert find(tmp_path) is None and find(tmp_path / "typo") is None
    assert put("hf") == find(tmp_path / "hf") == find(str(tmp_path / "hf"))
    assert put("orbax", "source") == find(tmp_path / "orbax")
    inside, data = put("run", "data"), put("elsewhere")
    checkpoint = tmp_path / "run" / "checkpoints" / "step3-tokens0K"
    checkpoint.mkdir(parents=True)
    for path, expected in (("data", inside), (str(tmp_path / "elsewhere"), data)):
        (tmp_path / "run" / "config.json").write_text(json.dumps({"data_path": path}))
        assert find(tmp_path / "run") == find(checkpoint) == expected
    (tmp_path / "run" / "config.json").write_text("{}")
    assert find(tmp_path / "run") is None
    suite = put("suite", "checkpoints", "step3-tokens0K", "source")
    assert suite == find(tmp_path / "suite")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="hf/tokenizer.json: not a tokenizer.json"):
        find(tmp_path / "hf")


def test_it_equals_transformers_generate(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from olmoe_jax import loading

    torch.manual_seed(0)
    theirs = transformers.OlmoeForCausalLM(
        transformers.OlmoeConfig(
            vocab_size=79, hidden_size=24, intermediate_size=12, num_hidden_layers=2,
            num_attention_heads=3, num_key_value_heads=3, num_experts=7, num_experts_per_tok=3,
            max_position_embeddings=128, initializer_range=0.4, pad_token_id=None,
            eos_token_id=None, bos_token_id=None,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    prompt = np.random.default_rng(1).integers(0, 79, 60)
    with torch.no_grad():
        whole = theirs.generate(
            torch.tensor(prompt)[None], attention_mask=torch.ones(1, 60, dtype=torch.long),
            do_sample=False, max_new_tokens=9,
        )[0]  # fmt: skip
        best = theirs(whole[None]).logits[0].topk(2).values
    margin = (best[59:-1, 0] - best[59:-1, 1]) / best.abs().max()
    assert margin.min() > NEAR, "choose another seed: two tokens are equally probable"
    model, params = loading.load(tmp_path)
    assert generation.greedy(model, params, prompt, num_tokens=9) == whole[60:].tolist()
