import collections
import os
import pathlib
import pickle

import numpy as np
import pytest

from olmoe_jax.analysis import coactivation, comparison, domains, dumps, results, vocabulary, words

ROOT = pathlib.Path(__file__).parents[2]
SHARED = pathlib.Path(os.environ.get("OLMOE_SHARED_DATA", ROOT.parent / "shared" / "data"))
DUMPS = SHARED / "routing_output"
TOKENIZER = SHARED / "tokenizer" / "allenai_gpt-neox-olmo-dolma-v1_5.json"
released = pytest.mark.skipif(
    not DUMPS.is_dir(),
    reason="the released dumps are absent: set OLMOE_SHARED_DATA to their folder",
)
PAPERS = ("github", "arxiv", "wikipedia", "book", "c4")  # rows of the table of the figures


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value))


def small_dump(folder, *, experts=5, k=2, tokens=60, layers=3, domains=("arxiv", "book")):
    """Dumps as the released script writes them, and what they were counted from."""
    made = {}
    for seed, domain in enumerate(domains):
        rng = np.random.default_rng(seed)
        ids = rng.random((tokens, layers, experts)).argsort(-1)[..., :k]
        words_ = rng.integers(0, 9, tokens).tolist()
        loads, firsts, pairs = [], [], []
        for layer in range(layers):
            loads.append(collections.Counter(ids[:, layer].ravel()))  # keys are NumPy integers
            firsts.append(collections.Counter(ids[:, layer, 0]))
            token = collections.defaultdict(collections.Counter)
            for word, row in zip(words_, ids[:, layer], strict=True):
                for e in row:
                    token[e][word] += 1
            pairs.append(token)
        cross = [
            collections.Counter(zip(ids[:, a, 0], ids[:, a + 1, 0], strict=True))
            for a in range(layers - 1)
        ]
        write(folder / "expert_counts" / f"{domain}.pkl", loads)
        write(folder / "expert_counts_top1" / f"{domain}.pkl", firsts)
        write(folder / "eid2token" / f"{domain}.pkl", pairs)
        write(folder / "expert_counts_crosslayer_top1" / f"{domain}.pkl", cross)
        made[domain] = ids, words_
    return made


def test_a_dump_is_counted_as_its_tokens(tmp_path):
    made = small_dump(tmp_path)
    found = dumps.read(tmp_path, model="m")
    assert set(found) == set(made)
    for domain, (ids, tokens) in made.items():
        counts = found[domain]
        assert (counts.info.num_experts, counts.info.num_experts_per_token) == (5, 2)
        assert (counts.info.num_tokens, counts.info.layers) == (60, (0, 7, 15))
        for layer in range(3):
            for e in range(5):
                assert counts.topk[layer, e] == (ids[:, layer] == e).sum()
                assert counts.top1[layer, e] == (ids[:, layer, 0] == e).sum()
        assert counts.paths[0, 1, 3, 2] == ((ids[:, 1, 0] == 3) & (ids[:, 2, 0] == 2)).sum()
        table = vocabulary.entries(counts, "input", "topk", 1)
        for token, expert, n in zip(table.tokens, table.experts, table.counts, strict=True):
            here = np.array(tokens) == token
            assert n == (ids[here, 1] == expert).sum()
            assert table.occurrences[token] == here.sum()
        assert domains.expert_paths(counts, threshold=0)[0].share.low is None
        with pytest.raises(ValueError, match="pairs of experts are not in this source"):
            coactivation.coactivation(counts)


class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "make",
    [
        lambda path: Attack(os.mkdir, str(path)),
        lambda path: Attack(eval, f"__import__('os').mkdir({str(path)!r})"),
        lambda path: [collections.Counter({Attack(os.mkdir, str(path)): 1})],
        lambda path: Attack(getattr, collections.Counter, "fromkeys"),
        lambda path: Attack(np.load, str(path)),
        lambda path: np.arange(3),
        lambda path: collections.OrderedDict(a=1),
        lambda path: Attack(collections.defaultdict, os.getcwd),
        lambda path: Attack(np.dtype, "O"),
    ],
)
def test_a_pickle_that_names_anything_else_is_refused(tmp_path, make):
    file, mark = tmp_path / "expert_counts" / "evil.pkl", tmp_path / "ran"
    write(file, make(mark))
    with pytest.raises(ValueError, match="evil.pkl: not a routing dump"):
        dumps.read(tmp_path)
    assert not mark.exists()


def test_what_may_be_named_is_read(tmp_path):
    value = [
        collections.Counter({np.int64(3): 2, np.int32(1): 5, 4: 1}),
        collections.defaultdict(collections.Counter, {np.int64(0): collections.Counter("a")}),
        collections.defaultdict(int, {1: 2}), np.float32(0.5), (1, True, None),
    ]  # fmt: skip
    for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(value, protocol))
        read = dumps.unpickle(tmp_path / "x.pkl")
        assert read == [{3: 2, 1: 5, 4: 1}, {0: {"a": 1}}, {1: 2}, 0.5, (1, True, None)]


def test_bad_dumps_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expert_counts/DOMAIN.pkl"):
        dumps.models(tmp_path)
    small_dump(tmp_path)
    with pytest.raises(ValueError, match="expert 4; the model has 4 experts at most, ids 0..3"):
        dumps.read(tmp_path, num_experts=4)
    assert dumps.read(tmp_path, num_experts=6)["book"].topk.shape == (3, 6)
    with pytest.raises(ValueError, match="expected a list of 2 layers, got list of 3"):
        dumps.read(tmp_path, layers=(0, 1))
    file = tmp_path / "expert_counts" / "book.pkl"
    good = file.read_bytes()
    write(file, [collections.Counter()] * 3)
    with pytest.raises(ValueError, match="book.pkl: holds no token"):
        dumps.read(tmp_path)
    write(file, [collections.Counter({0: 61, 1: 60})] * 3)
    with pytest.raises(ValueError, match="expected the same whole number k"):
        dumps.read(tmp_path)
    write(file, [collections.Counter({-1: 60, 1: 60})] * 3)
    with pytest.raises(ValueError, match="expected whole numbers from 0"):
        dumps.read(tmp_path)
    file.write_bytes(good[:-9])
    with pytest.raises(ValueError, match="not a routing dump"):
        dumps.read(tmp_path)


@pytest.fixture(scope="module")
def olmoe():
    return dumps.read(dumps.models(DUMPS)["OLMoE-1B-7B"])


# Distances from uniform in % and the most used expert, layers 0, 7, 15, as published.
PUBLISHED = {
    "github": ((20.0, 44.2, 44.1), (62.6, 77.0, 56.4), (21, 17, 30)),
    "arxiv": ((21.8, 39.6, 42.0), (97.7, 78.5, 93.7), (0, 17, 17)),
    "wikipedia": ((24.2, 32.2, 51.5), (77.2, 84.8, 58.1), (11, 27, 36)),
    "book": ((17.5, 29.6, 32.5), (45.4, 50.7, 36.6), (28, 28, 45)),
    "c4": ((9.1, 15.0, 21.2), (37.7, 33.2, 31.2), (41, 1, 7)),
    "tulu": ((14.7, 26.1, 27.7), (40.4, 55.6, 51.7), (21, 17, 30)),
}


@released
def test_the_published_domain_specialisation_of_olmoe(olmoe):
    result = domains.specialisation(olmoe.values())
    written = results.plain(domains.to_json(result))
    for domain, (distances, most, experts) in PUBLISHED.items():
        for layer, far, share, expert in zip(
            ("0", "7", "15"), distances, most, experts, strict=True
        ):
            cell = written[layer][domain]
            assert round(100 * cell["tv_topk"]["value"], 1) == far
            assert int(np.argmax(cell["topk"])) == expert
            assert round(100 * cell["topk"][expert], 1) == share
    assert round(100 * written["0"]["arxiv"]["top1"][0], 1) == 51.6
    assert round(100 * written["7"]["wikipedia"]["top1"][27], 1) == 51.9
    assert written["0"]["tulu"]["top1"] is None
    said = " ".join(words.specialised(result))
    assert "expert 0 of layer 0: active for 97.7 % of the tokens of arxiv" in said
    assert "no first choices of tulu" in result.notes[0]


@released
def test_mixtral_specialises_little():
    found = dumps.read(dumps.models(DUMPS)["Mixtral-8x7B"])
    result = domains.specialisation(found.values())
    assert result.uniform["topk"] == 0.25
    share, far = result.topk.share.value, result.topk.tv.value
    assert round(share.min(), 2) == 0.10 and round(share.max(), 2) == 0.33
    assert (round(100 * far.min(), 1), round(100 * far.max(), 1)) == (1.8, 9.3)


@released
def test_the_two_released_models_compare_on_one_axis(olmoe):
    models = {}
    for name, folder in dumps.models(DUMPS).items():
        parts = [c for d, c in dumps.read(folder).items() if d in PAPERS]
        models[name] = comparison.curves(
            domains=domains.specialisation(parts), num_layers={"OLMoE-1B-7B": 16}.get(name, 32)
        )
    form = results.plain(comparison.to_json(models))
    gap = form["metrics"]["information"]["differences"]["OLMoE-1B-7B − Mixtral-8x7B"]
    assert min(gap["value"]) > 0.05


@released
def test_tokens_of_experts_in_the_released_dumps(olmoe):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(TOKENIZER))
    raw = pickle.loads((DUMPS / "olmoe" / "eid2token" / "arxiv.pkl").read_bytes())
    often = collections.Counter()
    for counter in raw[1].values():
        often.update(counter)
    tables = vocabulary.expert_tokens(
        olmoe["arxiv"], "input", "topk", 1, most=40, decode=lambda i: tokenizer.decode([i])
    )
    for expert in (3, 43):
        want = sorted(
            ((-n / (often[t] // 8), -n, t) for t, n in raw[1][expert].items() if often[t] >= 80)
        )[:40]
        assert [(w.id, w.count) for w in tables[expert]] == [(t, -n) for _, n, t in want]
    assert " Vehicle" in [word.text for word in tables[3]]
    found = vocabulary.vocabulary(olmoe["arxiv"])["input", "topk"]
    assert found.mean.low is None and (found.mean.value > found.random).all()
