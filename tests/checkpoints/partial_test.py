import concurrent.futures
import json

import pytest

from olmoe_jax.checkpoints import manifest, partial

JOB = {"input": "there", "parts": [1, 2]}


def _begun(path):
    """A directory that an interrupted run left, with two pieces."""
    with partial.Partial(path, JOB) as begun:
        (begun.folder / "data").write_text("half")
        begun.record("a/b", (0, 0), (2, 3), "11")
        begun.record("a/b", (2, 0), (1, 3), "22")
    return begun


def test_it_appears_under_its_name_as_a_whole(tmp_path):
    path = tmp_path / "new" / "out"
    with partial.Partial(path, JOB) as begun:
        assert begun.done == {} and begun.folder == tmp_path / "new" / "out.partial"
        (begun.folder / "inner").mkdir()
        (begun.folder / "inner" / "data").write_text("whole")
        begun.record("a", (0,), (5,), "11")
        assert not path.exists()
        begun.commit()
    assert [p.name for p in path.parent.iterdir()] == ["out"]
    assert [p.name for p in path.rglob("*")] == ["inner", "data"]


def test_the_same_job_goes_on_with_its_pieces(tmp_path):
    _begun(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with partial.Partial(tmp_path / "out", JOB | {"parts": (1, 2)}) as again:
        assert again.done == {
            ("a/b", (0, 0)): manifest.Piece((0, 0), (2, 3), "11"),
            ("a/b", (2, 0)): manifest.Piece((2, 0), (1, 3), "22"),
        }
        again.record("a/b", (0, 0), (2, 3), "33")  # written again
    with partial.Partial(tmp_path / "out", JOB) as again:
        assert again.done["a/b", (0, 0)].sha256 == "33" and len(again.done) == 2


def test_another_job_is_refused_by_what_differs(tmp_path):
    folder = _begun(tmp_path / "out").folder
    before = (folder / partial.JOURNAL).read_bytes()
    message = r"out.partial: left by another job: it had input='there', this one input='here'; run"
    with pytest.raises(ValueError, match=message):
        partial.Partial(tmp_path / "out", JOB | {"input": "here"})
    with pytest.raises(ValueError, match="it had parts=.1, 2., this one parts=None"):
        partial.Partial(tmp_path / "out", {"input": "there"})
    assert (folder / partial.JOURNAL).read_bytes() == before


@pytest.mark.parametrize("make", ["mkdir", "touch"])
def test_what_exists_is_not_touched(make, tmp_path):
    getattr(tmp_path / "out", make)()
    with pytest.raises(FileExistsError, match="out: exists; take another output or delete it"):
        partial.Partial(tmp_path / "out", JOB)
    assert len(list(tmp_path.iterdir())) == 1


def test_what_was_made_meanwhile_is_not_replaced(tmp_path):
    with partial.Partial(tmp_path / "out", JOB) as begun:
        (tmp_path / "out").mkdir()
        with pytest.raises(FileExistsError, match="out: was made meanwhile"):
            begun.commit()
        assert begun.folder.exists() and not list((tmp_path / "out").iterdir())


def test_two_at_once_are_refused(tmp_path):
    with partial.Partial(tmp_path / "out", JOB) as begun:
        begun.record("a", (0,), (5,), "11")
        with pytest.raises(ValueError, match="out.partial: another process is writing it"):
            partial.Partial(tmp_path / "out", JOB)
        begun.record("a", (5,), (5,), "22")
    with partial.Partial(tmp_path / "out", JOB) as again:
        assert len(again.done) == 2


def test_a_torn_last_line_is_forgotten(tmp_path):
    journal = _begun(tmp_path / "out").folder / partial.JOURNAL
    whole = journal.read_bytes()
    for cut in (1, 20, len(whole.splitlines()[-1]) + 1):
        journal.write_bytes(whole[:-cut])
        with partial.Partial(tmp_path / "out", JOB) as again:
            assert list(again.done) == [("a/b", (0, 0))]
            again.record("a/b", (2, 0), (1, 3), "22")
        assert journal.read_bytes() == whole


def test_a_directory_without_a_job_is_not_ours(tmp_path):
    folder = _begun(tmp_path / "out").folder
    first = (folder / partial.JOURNAL).read_bytes().splitlines()[0]
    for torn in (b"", first[:9]):
        (folder / partial.JOURNAL).write_bytes(torn)
        with pytest.raises(ValueError, match="journal.jsonl is missing or empty.; delete"):
            partial.Partial(tmp_path / "out", JOB)
    (folder / "data").unlink()  # killed before anything was written: nothing is lost
    with partial.Partial(tmp_path / "out", JOB) as again:
        assert again.done == {}
    assert json.loads((folder / partial.JOURNAL).read_text()) == JOB


def test_a_damaged_journal_is_refused(tmp_path):
    journal = _begun(tmp_path / "out").folder / partial.JOURNAL
    whole = journal.read_bytes()
    for old, new in ((b'"start"', b'"stort"'), (b'{"name"', b'"name"'), (b"\n{", b"\n7 {")):
        journal.write_bytes(whole.replace(old, new))
        with pytest.raises(ValueError, match="out.partial: journal.jsonl is damaged .*delete that"):
            partial.Partial(tmp_path / "out", JOB)


def test_names_of_unfinished_directories_are_refused(tmp_path):
    for name in ("out.partial", "out.orbax-checkpoint-tmp"):
        with pytest.raises(ValueError, match=f"{name}: such names mark what is unfinished"):
            partial.Partial(tmp_path / name, JOB)
    assert not list(tmp_path.iterdir())


def test_pieces_may_be_recorded_from_many_threads(tmp_path):
    with partial.Partial(tmp_path / "out", JOB) as begun:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: begun.record("a", (i,), (1,), f"{i}"), range(211)))
    with partial.Partial(tmp_path / "out", JOB) as again:
        assert again.done == begun.done and len(again.done) == 211
        assert all(piece.sha256 == str(start[0]) for (_, start), piece in again.done.items())


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    events, sync_one = [], partial._sync_one

    def note(path):
        events.append((path.name, (tmp_path / "out").exists()))
        sync_one(path)

    _begun(tmp_path / "out")
    monkeypatch.setattr(partial, "_sync_one", note)
    with partial.Partial(tmp_path / "out", JOB) as begun:
        begun.commit()
    assert sorted(events[:3]) == [("data", False), ("journal.jsonl", False), ("out.partial", False)]
    assert events[3:] == [("out", True), (tmp_path.name, True)]
