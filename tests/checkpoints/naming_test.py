import pytest

from olmoe_jax.checkpoints import naming


@pytest.mark.parametrize(
    "step, tokens, name",
    [
        (0, 0, "step0-tokens0K"),
        (1, 999, "step1-tokens0K"),
        (10, 20_480, "step10-tokens20K"),
        (3, 999_999, "step3-tokens999K"),
        (4, 1_000_000, "step4-tokens1M"),
        (5, 999_999_999, "step5-tokens999M"),
        (5000, 20_971_520_000, "step5000-tokens20B"),
        (1_223_842, 5_133_000_000_000, "step1223842-tokens5133B"),
    ],
)
def test_names_round_down_as_the_public_checkpoints_do(step, tokens, name):
    assert naming.checkpoint_name(step, tokens) == name
    assert naming.parse_name(name) == step


@pytest.mark.parametrize(
    "name",
    [
        "step5",
        "step5-tokens3",
        "step5-tokens3K.orbax-checkpoint-tmp",
        "step5-tokens3K.deleted",
        "main",
    ],
)
def test_other_names_are_no_checkpoints(name):
    assert naming.parse_name(name) is None


def test_checkpoints_sort_by_step_and_not_by_name(tmp_path):
    for step in (0, 1, 2, 11, 100, 20):
        (tmp_path / "checkpoints" / naming.checkpoint_name(step, step * 64)).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step300-tokens19K.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("")
    (tmp_path / "checkpoints" / "step400-tokens25K").write_text("a file")
    assert [step for step, _ in naming.list_checkpoints(tmp_path)] == [0, 1, 2, 11, 20, 100]
    assert naming.find(tmp_path).name == "step100-tokens6K"
    assert naming.find(tmp_path / "checkpoints" / "step2-tokens0K").name == "step2-tokens0K"


def test_leftovers_are_the_unfinished_saves_and_nothing_else(tmp_path):
    for name in ("step1-tokens0K", "step2-tokens0K.orbax-checkpoint-tmp", "step3-tokens0K.deleted",
                 "step4-tokens0K.orbax-checkpoint-tmp-17", "mine", "mine.deleted"):  # fmt: skip
        (tmp_path / name).mkdir()
    assert [p.name for p in naming.leftovers(tmp_path)] == [
        "step2-tokens0K.orbax-checkpoint-tmp",
        "step3-tokens0K.deleted",
        "step4-tokens0K.orbax-checkpoint-tmp-17",
    ]


def test_a_removal_that_is_cut_short_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    path = naming.epath.Path(tmp_path / "step1-tokens0K")
    path.mkdir()

    def killed(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        naming.remove(path)
    assert naming.list_complete(tmp_path) == []
    assert len(naming.leftovers(tmp_path)) == 1


def test_find_says_what_is_wrong_with_a_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="typo: no such directory"):
        naming.find(tmp_path / "typo")
    with pytest.raises(FileNotFoundError, match="neither a checkpoint"):
        naming.find(tmp_path)
    (tmp_path / "step1-tokens0K.orbax-checkpoint-tmp").mkdir()
    with pytest.raises(FileNotFoundError, match="did not finish; take another"):
        naming.find(tmp_path / "step1-tokens0K.orbax-checkpoint-tmp")
