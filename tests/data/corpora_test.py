import gzip
import json

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from olmoe_jax.data import corpora

RECORDS = [
    {"id": "a-1", "text": "one\ntwo é", "source": "wiki", "metadata": {"n": 1}},
    {"id": 2, "text": "three", "source": "code"},
    {"text": "four", "source": ""},
    {"id": "e", "text": "", "source": "wiki"},
    {"id": "f", "text": "five", "source": "wiki", "domain": "encyclopedia"},
]
EXPECTED = [
    corpora.Document("a-1", "one\ntwo é", "wiki", "wiki"),
    corpora.Document("2", "three", "code", "code"),
    corpora.Document("part:4", "four", "part", "part"),
    corpora.Document("f", "five", "wiki", "encyclopedia"),
]


def _lines(records=RECORDS):
    lines = [json.dumps(r, ensure_ascii=False) for r in records]
    return ("\n".join([lines[0], lines[1], "", *lines[2:]]) + "\n").encode()


def _read(path, on_error="stop", slice_bytes=corpora.SLICE_BYTES):
    problems = corpora.Problems(on_error)
    found = [
        document
        for piece in corpora.slices(str(path), problems, slice_bytes=slice_bytes)
        for document in corpora.documents(piece, problems)
    ]
    return found, problems


def _pack(path, content):
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        half = len(content) // 2  # two frames, as parallel compressors write them
        frames = [zstandard.ZstdCompressor().compress(c) for c in (content[:half], content[half:])]
        content = b"".join(frames)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["part.jsonl", "part.json", "part.jsonl.gz", "part.jsonl.zst"])
def test_every_packing_of_a_dolma_file_gives_the_same_documents(tmp_path, name):
    found, _ = _read(_pack(tmp_path / name, _lines()))
    assert found == EXPECTED


@pytest.mark.parametrize("slice_bytes", [1, 53, 97])
@pytest.mark.parametrize("name", ["part.jsonl", "part.txt"])
def test_documents_do_not_depend_on_the_size_of_slices(tmp_path, monkeypatch, name, slice_bytes):
    monkeypatch.setattr(corpora, "READ_BYTES", 7)
    monkeypatch.setattr(corpora, "DOCUMENT_BYTES", 31)
    path = _pack(tmp_path / name, _lines() * 5 + b"no newline at the end")
    found, problems = _read(path, "skip", slice_bytes)
    whole, _ = _read(path, "skip")
    assert found == whole
    assert problems.count == (1 if name == "part.jsonl" else 0)


def test_a_slice_hash_tells_files_lines_and_contents_apart():
    hashes = {
        corpora.Slice(kind, name, line, payload, ends).sha256()
        for kind, name, line, payload, ends in [
            ("dolma", "a", 1, b"x", None),
            ("dolma", "b", 1, b"x", None),
            ("dolma", "a", 2, b"x", None),
            ("dolma", "a", 1, b"y", None),
            ("text", "a", 1, b"x", (1,)),
        ]
    }
    assert len(hashes) == 5


BAD_LINES = {
    b'{"id": "x", "text": "cut sho': "malformed or cut short",
    b'{"id": "x"}': 'no field "text"',
    b'{"text": 7}': 'field "text" is a int',
    b'["text"]': "a JSON list, expected an object",
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text": "\\ud800"}': "surrogate",
    b"[" * 100_000: "malformed",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_by_file_and_number_and_can_be_skipped(tmp_path, line):
    path = _pack(tmp_path / "part.jsonl", _lines() + line + b"\n" + _lines())
    with pytest.raises(ValueError, match=rf"^part.jsonl, line 7: .*{BAD_LINES[line]}.*on_error"):
        _read(path)
    found, problems = _read(path, "skip")
    assert [d.text for d in found] == [d.text for d in EXPECTED] * 2
    assert problems.count == 1
    assert problems.messages[0].startswith("part.jsonl, line 7: ")


@pytest.mark.parametrize("name", ["part.jsonl.gz", "part.jsonl.zst"])
@pytest.mark.parametrize("lost", [1, 30])
def test_a_truncated_archive_is_an_error_that_keeps_whole_records(tmp_path, name, lost):
    path = _pack(tmp_path / name, _lines() * 50)
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(ValueError, match=r"part.jsonl.*damaged or cut short after line \d+"):
        _read(path)
    found, problems = _read(path, "skip")
    assert problems.count == 1
    assert [d.text for d in found] == ([d.text for d in EXPECTED] * 50)[: len(found)]


@pytest.mark.parametrize("name", ["part.jsonl.gz", "part.jsonl.zst"])
def test_a_file_that_is_no_archive_is_an_error(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is not compressed at all")
    with pytest.raises(ValueError, match=f"{name}: damaged"):
        _read(tmp_path / name)


def test_only_the_first_messages_are_kept(tmp_path):
    path = _pack(tmp_path / "part.jsonl", b"{}\n" * 11)
    _, problems = _read(path, "skip")
    assert problems.count == 11
    assert len(problems.messages) == corpora.Problems.KEPT
    problems.merge(3, ["more"])
    assert problems.count == 14
    assert len(problems.messages) == corpora.Problems.KEPT


def test_text_is_cut_at_blank_lines_and_separators(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "DOCUMENT_BYTES", 12)
    text = "short\n\nlonger than ten\n\nnext one\n<|endoftext|>\n"
    text += "a\nb\nvery long line without blank\nend"
    (tmp_path / "books.txt").write_text(text)
    found, _ = _read(tmp_path / "books.txt")
    assert [d.text for d in found] == [
        "short\n\nlonger than ten\n\n",
        "next one\n",
        "a\nb\nvery long line without blank\n",
        "end",
    ]
    assert [d.id for d in found] == ["books:1", "books:5", "books:7", "books:10"]
    assert {(d.domain, d.source) for d in found} == {("books", "books.txt")}


@given(st.text(alphabet="ab \n\r\x0b\u2028é", max_size=300))
def test_documents_of_a_text_file_are_its_text(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    found, _ = _read(path, slice_bytes=41)
    joined = "".join(d.text for d in found)
    assert joined.split() == text.split()
    assert joined in text or not joined


def test_bytes_that_are_not_utf8_are_reported_with_their_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\nbad \xff here\n")
    with pytest.raises(ValueError, match="a.txt, line 2: not UTF-8"):
        _read(tmp_path / "a.txt")


def test_the_name_given_is_what_ids_and_errors_say(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{')
    problems = corpora.Problems("skip")
    found = [
        d
        for name in ("a.txt", "b.jsonl")
        for s in corpora.slices(str(tmp_path / name), problems, name=f"sub/{name}")
        for d in corpora.documents(s, problems)
    ]
    assert [(d.id, d.source, d.domain) for d in found] == [
        ("sub/a:1", "sub/a.txt", "a"),
        ("sub/b:1", "b", "b"),
    ]
    assert problems.messages[0].startswith("sub/b.jsonl, line 2: ")


def test_given_documents_come_back_from_their_slices():
    documents = [
        corpora.Document(f"i{n}", f"text {n} é\n", f"s{n}", f"d{n % 3}") for n in range(17)
    ]
    pieces = list(corpora.slices_of(documents, slice_bytes=101))
    assert len(pieces) > 3
    problems = corpora.Problems()
    assert [d for p in pieces for d in corpora.documents(p, problems)] == documents


def test_globs_are_expanded_sorted_and_checked(tmp_path):
    for name in ("b.jsonl", "a.txt", "c.parquet"):
        (tmp_path / name).write_text("x")
    patterns = [f"{tmp_path}/*.jsonl", f"{tmp_path}/a*", f"{tmp_path}/b*"]
    assert corpora.expand(patterns) == [f"{tmp_path}/a.txt", f"{tmp_path}/b.jsonl"]
    with pytest.raises(FileNotFoundError, match="is a directory; name its files: --input='.*txt'"):
        corpora.expand([str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=r"--input=.*nothing\*: no file matches"):
        corpora.expand([f"{tmp_path}/nothing*"])
    with pytest.raises(ValueError, match="c.parquet: unknown kind"):
        corpora.expand([f"{tmp_path}/*"])


def test_on_error_is_checked():
    with pytest.raises(ValueError, match="on_error=ignore"):
        corpora.Problems("ignore")
