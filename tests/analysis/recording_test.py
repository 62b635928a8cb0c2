import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import olmoe_jax
from olmoe_jax import checkpoints, config
from olmoe_jax.analysis import layerwise, recording, sinks, suites, trace
from olmoe_jax.analysis import texts as texts_lib
from olmoe_jax.data import tokenizer as tokenizer_lib
from olmoe_jax.porting import port, sources
from tests.analysis import models
from tests.porting import foreign, tiny

FP32 = 2e-6  # order of summation over three layers, of weights below 1
HALF = 2.0**-11  # float16, relative
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.folder(tmp_path_factory.mktemp("model") / "tiny")


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, params, tokens):
    return model.apply({"params": params}, tokens, return_routing=True)


def _expected(directory, text, **changes):
    """(Block, near-ties per layer) by `model.apply`, window by window, and NumPy loops."""
    model, params = olmoe_jax.load(directory, dtype="float32")
    c = dataclasses.replace(model.config, **changes)
    model, k, length = olmoe_jax.Transformer(c), c.num_experts_per_token, text.context_length
    rows, ties = [], np.zeros(c.num_moe_layers, int)
    for start in range(0, len(text.tokens), length):
        tokens = np.zeros(length, np.int32)
        found = text.tokens[start : start + length]
        tokens[: len(found)] = found
        out = _apply(model, params, tokens[None])
        scores = np.asarray(out.routing.logits, np.float64)[:, 0]
        for t in range(len(found)):
            probs = np.exp(scores[:, t]) / np.exp(scores[:, t]).sum(axis=-1, keepdims=True)
            ids = np.argsort(-probs, axis=-1, kind="stable")[:, :k]
            for layer, row in enumerate(scores[:, t]):
                a, b = np.sort(row)[::-1][k - 1 : k + 1] if k < len(row) else (1.0, 0.0)
                ties[layer] += a - b <= (abs(a) + abs(b)) / 256
            at = start + t
            ends = at + 1 == len(text.tokens) or text.documents[at] != text.documents[at + 1]
            following = -1 if ends else text.tokens[at + 1]
            logits = np.asarray(out.logits, np.float64)[0, t]
            loss = np.nan if ends else np.log(np.exp(logits).sum()) - logits[following]
            predicted = logits[: c.vocab_size].argmax()
            rows.append((ids, np.take_along_axis(probs, ids, -1), predicted, following, loss))
    ids, weights, predicted, following, loss = map(np.array, zip(*rows, strict=True))
    return trace.Block(
        expert_ids=ids, weights=weights, input_ids=text.tokens, predicted_ids=predicted,
        next_ids=following, documents=text.documents, losses=loss,
    ), tuple(ties.tolist())  # fmt: skip


def _agrees(got, want):
    for name in ("expert_ids", "input_ids", "predicted_ids", "next_ids", "documents"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), name)
    np.testing.assert_allclose(got.weights, want.weights, atol=FP32)
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-5)


def test_weights_that_are_not_as_they_were_written_are_not_recorded(model, tmp_path):
    port.port(model, tmp_path / "tiny", to="orbax", announce=tiny.quiet)
    manifest = tmp_path / "tiny" / "manifest" / "process_0.json"
    content = json.loads(manifest.read_text())
    content["leaves"]["layers/01/moe/w_up"]["pieces"][0]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))
    with pytest.raises(checkpoints.DamagedError, match=r"arrays damaged \(layers/01/moe/w_up\)"):
        models.record(tmp_path / "tiny", models.three_texts(), accumulate=models.Blocks)


@pytest.mark.parametrize("streamed", [False, True])
def test_every_token_is_recorded_as_the_model_computes_it(model, streamed):
    found = models.record(model, models.three_texts(), accumulate=models.Blocks, streamed=streamed)
    for text, one in zip(models.three_texts(), found, strict=True):
        block, ties = _expected(model, text)
        _agrees(trace.join(one.accumulated), block)
        assert one.info.near_ties == ties
        info = dataclasses.replace(one.info, near_ties=())
        assert info == one.accumulated.info
        assert info == trace.TraceInfo(
            model="tiny", domain=text.domain, layers=(0, 1, 2), num_experts=5,
            num_experts_per_token=2, num_tokens=len(text.tokens), num_documents=3,
            vocab_size=models.VOCAB, context_length=models.LENGTH, data=text.data,
            precision="float32",
        )  # fmt: skip
    assert sum(sum(one.info.near_ties) for one in found) > 0


def test_streamed_and_resident_give_the_same_bits(model, tmp_path):
    texts = models.three_texts()
    once = models.record(
        model, texts, tmp_path / "resident", streamed=False, accumulate=models.Blocks
    )
    layer = models.record(model, texts, tmp_path / "streamed", streamed=True)
    few = models.record(model, texts, tmp_path / "few", streamed=True, carried_tokens=30)
    direct = models.record(model, texts, accumulate=models.Blocks, streamed=False)
    for a, b, c, d in zip(once, layer, few, direct, strict=True):
        assert a.info == b.info == c.info == d.info
        models.same(models.whole(a.trace), models.whole(b.trace))
        models.same(models.whole(a.trace), models.whole(c.trace))
        models.same(models.whole(a.trace), trace.join(a.accumulated))
        exact = trace.join(d.accumulated).weights
        np.testing.assert_allclose(models.whole(a.trace).weights, exact, rtol=HALF)
    assert not list(tmp_path.glob("*.scratch")) and not list(tmp_path.glob("*/*.partial"))
    assert sorted(p.name for p in (tmp_path / "few").iterdir()) == ["a", "b%2Fc", "d"]


def _run(**changes):
    data = config.DataConfig(sequence_length=16)
    return config.Config(model=dataclasses.replace(tiny.MODEL, **changes), data=data)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 4, "moe_every": 2, "num_shared_experts": 1},
        {
            "normalize_expert_weights": True, "norm_position": "post", "tie_embeddings": True,
            "norm": "layernorm_nonparametric", "vocab_multiple": 8,
        },
    ],
    ids=["every second layer", "everything else"],
)  # fmt: skip
def test_other_architectures(changes, tmp_path):
    run = _run(**changes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0.1, 0.5, x.shape), jnp.float32),
        checkpoints.abstract_params(run.model),
    )
    with checkpoints.Checkpoints(tmp_path / "run", run) as kept:
        kept.save_params(3, params)
    ids = np.random.default_rng(1).integers(0, run.model.vocab_size, 19).astype(np.int32)
    text = texts_lib.Text("a", ids, np.arange(19, dtype=np.int32) // 8, 8)
    (found,) = models.record(tmp_path / "run", [text], accumulate=models.Blocks, streamed=True)
    block, ties = _expected(tmp_path / "run", text)
    _agrees(trace.join(found.accumulated), block)
    moe = [i for i in range(run.model.num_layers) if run.model.is_moe_layer(i)]
    assert (found.info.layers, found.info.near_ties) == (tuple(moe), ties)
    assert (found.info.checkpoint, found.info.step) == (suites.one(tmp_path / "run").name, 3)


def test_sigmoid_scores_and_biases_are_recorded_as_the_model_computes_them(tmp_path):
    run = _run(router_scores="sigmoid", router_bias=True, normalize_expert_weights=True)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0.1, 0.5, x.shape), jnp.float32),
        checkpoints.abstract_params(run.model),
    )
    with checkpoints.Checkpoints(tmp_path / "run", run) as kept:
        kept.save_params(3, params)
    ids = rng.integers(0, run.model.vocab_size, 400).astype(np.int32)
    text = texts_lib.Text("a", ids, np.arange(400, dtype=np.int32) // 8, 8)
    (found,) = models.record(tmp_path / "run", [text], accumulate=models.Blocks, streamed=True)
    model, params = olmoe_jax.load(tmp_path / "run")
    routing = _apply(model, params, ids.reshape(-1, 8)).routing
    logits, chosen = (
        np.moveaxis(np.asarray(a).reshape(2, 400, -1), 0, 1)
        for a in (routing.logits, routing.expert_ids)
    )
    block = trace.join(found.accumulated)
    np.testing.assert_array_equal(block.expert_ids, chosen)
    shares = 1 / (1 + np.exp(-logits.astype(np.float64)))
    shares /= shares.sum(-1, keepdims=True)
    np.testing.assert_allclose(block.weights, np.take_along_axis(shares, chosen, -1), atol=FP32)
    rounded = np.asarray(logits, jnp.bfloat16).astype(np.float64)
    biased = 1 / (1 + np.exp(-rounded)) + np.asarray(
        params["layers"]["block_0"]["moe"]["router_bias"]
    )
    again = np.sort(np.argsort(-biased, axis=-1, kind="stable")[..., :2])
    changed = (again != np.sort(chosen)).any(-1).sum(0)
    assert found.info.near_ties == tuple(changed) and 0 < changed.sum() < 40


def test_all_four_kinds_of_directory_give_one_trace(tmp_path):
    tiny.make(tmp_path)
    ids = np.arange(20, dtype=np.int32)
    text = texts_lib.Text("a", ids, np.zeros(20, np.int32), 16)
    found = [
        models.record(tmp_path / name, [text], accumulate=models.Blocks, streamed=True)[0]
        for name in ("run", "hf", "olmo", "orbax")
    ]
    for one in found[1:]:
        models.same(trace.join(one.accumulated), trace.join(found[0].accumulated))
    assert [one.info.model for one in found] == ["run", "hf", "olmo", "orbax"]


def test_bfloat16_is_mimicked(model):
    text = models.text("a", 600, seed=3)
    exact, _ = _expected(model, text)
    found = {}
    for dtype, precision in (("float32", "bfloat16"), ("bfloat16", "bfloat16")):
        options = {"dtype": dtype, "precision": precision, "accumulate": models.Blocks}
        (one,) = models.record(model, [text], streamed=True, **options)
        (two,) = models.record(model, [text], streamed=False, **options)
        models.same(trace.join(one.accumulated), trace.join(two.accumulated))
        assert one.info.precision == "bfloat16"
        found[dtype] = trace.join(one.accumulated)
    block, _ = _expected(model, text, router_dtype="bfloat16")
    # Where the router's input lies between two bfloat16 numbers, its last bit decides.
    assert (found["float32"].expert_ids == block.expert_ids).mean() > 0.99
    assert (np.abs(found["float32"].weights - block.weights) < FP32).mean() > 0.99
    assert (np.abs(exact.weights - block.weights) < FP32).mean() < 0.1
    for block in found.values():
        changed = (np.sort(block.expert_ids) != np.sort(exact.expert_ids)).any(axis=-1)
        assert 0 < changed.mean() < 0.2


def test_near_ties_are_those_that_rounding_can_close():
    def rounded(x):
        return np.asarray(x, jnp.bfloat16).astype(np.float64)

    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (4000, 6)).astype(np.float32)
    found = np.asarray(layerwise.is_near_tie(jnp.asarray(logits), 2))
    ordered = np.argsort(-logits, axis=-1)
    a, b = (np.take_along_axis(logits, ordered[:, i : i + 1], 1)[:, 0] for i in (1, 2))
    closed = rounded(a) <= rounded(b)
    assert closed.sum() > 10 and not (closed & ~found).any()
    assert found.sum() < 8 * closed.sum()
    assert not layerwise.is_near_tie(jnp.zeros((3, 6)), 6).any()


def test_padding_has_no_near_ties(model):
    weights = layerwise.Weights(sources.open_source(model), foreign.MODEL)
    x = np.random.default_rng(0).normal(0, 1, (2, 300, foreign.MODEL.d_model)).astype(np.float32)
    real = np.zeros((2, 300), bool)
    real[1] = True
    _, choices = layerwise.apply_layer(
        weights.layer(0), x, real, config=foreign.MODEL, is_moe=True
    )  # fmt: skip
    assert choices.near_ties[0] == 0 < choices.near_ties[1] < 60
    assert (np.asarray(choices.expert_ids)[0] == -1).all()
    assert (np.asarray(choices.weights)[0] == 0).all()


def test_only_products_are_rounded_to_the_compute_dtype(model):
    c = dataclasses.replace(foreign.MODEL, dtype="bfloat16")
    _, exact = olmoe_jax.load(model)
    layer = layerwise.Weights(sources.open_source(model), c).layer(1)
    stacked = exact["layers"]["block_0"]
    for name, kind in (("router", "float32"), ("w_down", "bfloat16")):
        assert layer["moe"][name].dtype == kind
        np.testing.assert_array_equal(layer["moe"][name], stacked["moe"][name][1].astype(kind))
    scale = layer["ffn_norm"]["scale"]
    assert scale.dtype == "float32" and (scale == stacked["ffn_norm"]["scale"][1]).all()


def test_padding_of_the_vocabulary_is_never_predicted_but_counts():
    rng = np.random.default_rng(0)
    c = dataclasses.replace(foreign.MODEL, norm="layernorm_nonparametric", vocab_size=5)
    head, x = rng.normal(0, 1, (7, c.d_model)), rng.normal(0, 1, (2, 300, c.d_model))
    targets = rng.integers(-1, 5, (2, 300)).astype(np.int32)
    head, x = head.astype(np.float32), x.astype(np.float32)
    predicted, losses = layerwise.apply_head({}, head, x, targets, config=c)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + c.norm_eps)
    logits = normed @ head.T
    assert (logits.argmax(-1) > 4).any()
    np.testing.assert_array_equal(predicted, logits[..., :5].argmax(-1))
    chosen = np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
    expected = np.where(targets < 0, np.nan, np.log(np.exp(logits).sum(-1)) - chosen)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_a_second_layer_compiles_nothing(model, compilations):
    models.record(model, models.three_texts(), accumulate=models.Blocks, streamed=True)
    before = compilations()
    models.record(model, models.three_texts(), accumulate=models.Blocks, streamed=True)
    assert compilations() == before


def _tokenizer(vocab_size):
    return tokenizer_lib.train([f"some text of {vocab_size}"], vocab_size=vocab_size)


def _refused(model, text=None, **options):
    models.record(model, [text or models.text("a", 9)], **({"accumulate": models.Blocks} | options))


def test_settings_and_texts_that_do_not_fit_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="nothing would be kept"):
        _refused(model, accumulate=None)
    for options, message in [
        ({"dtype": "float16"}, "dtype is 'float16': must be one of float32, bfloat16"),
        ({"precision": "fp32"}, "precision is 'fp32': must be one of"),
        ({"tokens_per_batch": 0}, "tokens_per_batch is 0"),
        ({"carried_tokens": 0, "streamed": True}, "carried_tokens is 0"),
        ({"text": models.text("a", 30, length=20)}, "context_length is 20: .* at most 19"),
    ]:
        with pytest.raises(ValueError, match=message):
            _refused(model, **options)
    with pytest.raises(ValueError, match="no text"):
        models.record(model, [], accumulate=models.Blocks)
    with pytest.raises(ValueError, match="two texts are of the domain 'a'"):
        models.record(model, [models.text("a", 5), models.text("a", 6)], accumulate=models.Blocks)
    with pytest.raises(ValueError, match=r"context lengths \[7, 11\]"):
        models.record(
            model, [models.text("a", 5), models.text("b", 6, length=7)], accumulate=models.Blocks
        )
    text = models.text("a", 9)
    wrong = dataclasses.replace(text, tokens=text.tokens + 50)
    with pytest.raises(ValueError, match=r"has token \d+, .* knows 0\.\.52.*tokenizer"):
        _refused(model, wrong)
    with pytest.raises(FileNotFoundError):
        _refused(tmp_path / "none")


def test_models_that_cannot_be_recorded_are_refused(tmp_path):
    for name, changes, message in [
        ("dense", {"num_experts": 0}, "dense model, which routes nothing"),
        ("choice", {"router": "expert_choice"}, "its router is expert_choice"),
    ]:
        run = _run(**changes)
        params = jax.tree.map(
            lambda x: jnp.zeros(x.shape), checkpoints.abstract_params(run.model)
        )  # fmt: skip
        with checkpoints.Checkpoints(tmp_path / name, run) as kept:
            kept.save_params(1, params)
        with pytest.raises(ValueError, match=message):
            _refused(tmp_path / name)


def test_the_tokenizer_must_be_the_models(tmp_path):
    own, other = _tokenizer(258), _tokenizer(261)
    model = dataclasses.replace(foreign.MODEL, vocab_size=300)
    folder = foreign.write_folder(
        tmp_path / "model", dtype="float32", model=model, numbers=True,
        files={"tokenizer.json": own.json},
    )  # fmt: skip
    text = models.text("a", 9)
    _refused(folder, dataclasses.replace(text, tokenizer=own))
    respelt = tokenizer_lib.Tokenizer(json.dumps(json.loads(own.json)).encode())
    _refused(folder, dataclasses.replace(text, tokenizer=respelt))
    with pytest.raises(ValueError, match="other tokens than the model's own"):
        _refused(folder, dataclasses.replace(text, tokenizer=other))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(model, monkeypatch):
    monkeypatch.setattr(recording.machine, "free_disk", lambda path: 1000)
    with pytest.raises(OSError, match="needed for activations .* smaller carried_tokens"):
        _refused(model, models.text("a", 900), streamed=True)


def test_what_does_not_fit_in_memory_is_streamed(model, monkeypatch):
    said = []
    for free, streamed in ((10**12, False), (1000, True)):
        monkeypatch.setattr(recording.machine, "free_memory", lambda free=free: free)
        said.clear()
        models.record(
            model,
            [models.text("a", 40, documents=1)],
            accumulate=models.Blocks,
            announce=said.append,
        )
        assert any("layer by layer" in line for line in said) == streamed
    assert any("1 of 1 documents are longer than the context" in line for line in said)


def test_names_of_domains_become_names_of_folders():
    names = ["a b", "x/y", "..", ".hidden", "é", "50%", "a:b\\c"]
    folders = [sinks.trace_folder("out", name) for name in names]
    assert len(set(folders)) == len(names)
    for folder in folders:
        assert folder.parent == pathlib.Path("out") and folder.name[0] != "."
