import ast
import collections
import os
import sysconfig

import pytest

from olmoe_jax.data import deduplication, embedded, pieces
from olmoe_jax.data import tokenizer as tokenizer_lib

SOURCE = '''"""Module."""
import os


class A:
    """Class."""

    x = "not a docstring"

    def f(self):
        """Only a docstring."""

    async def g(self):
        """Two
        lines.
        """
        if self:
            def inner():
                \'\'\'Deep.\'\'\'
                return 1
        else:
            try:
                pass
            except ValueError:
                class B:
                    "Handled."
            finally:
                class C:
                    "At last."
        return "no docstring"
'''


def test_docstrings_are_taken_out_and_the_rest_stays_code():
    code, docstrings = embedded.split_docstrings(SOURCE)
    texts = [" ".join(d.split()) for d in docstrings]
    assert texts == [
        "Module.",
        "Class.",
        "Only a docstring.",
        "Two lines.",
        "Deep.",
        "Handled.",
        "At last.",
    ]
    assert not any(d in code for d in docstrings)
    stripped = ast.parse(code)
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [n for n in ast.walk(stripped) if isinstance(n, kinds)]
    assert {f.name for f in functions} == {"A", "f", "g", "inner", "B", "C"}
    assert all(ast.get_docstring(f) is None for f in functions)
    assert "not a docstring" in code and '"no docstring"' in code


@pytest.mark.parametrize(
    "head",
    ["# licence\n#\n# more\n\n", "/* licence\n * more */\n\n", "// a\n// b\n", "#!/x\n# a\n", ""],
)
def test_the_licence_at_the_head_goes_and_later_comments_stay(head):
    rest = "#include <x>\nint x;  // why\n/* kept */\n"
    assert embedded.without_head_comment(head + rest) == rest


def _check(documents):
    """What holds for the corpus whatever its size."""
    assert [d.id for d in documents] == sorted({d.id for d in documents})
    for document in documents:
        assert document.id.startswith(f"{document.domain}/")
        assert document.text.strip() and document.source
        for root in (sysconfig.get_paths()["purelib"], os.getcwd()):
            assert root not in document.id and root not in document.text


def test_a_small_corpus_has_every_domain(monkeypatch):
    monkeypatch.setattr(embedded, "BUDGETS", dict.fromkeys(embedded.BUDGETS, 20_000))
    documents = embedded.collect()
    _check(documents)
    assert {d.domain for d in documents} == set(embedded.BUDGETS)
    assert embedded.fingerprint() == embedded.fingerprint()


@pytest.mark.slow
def test_the_corpus_is_large_varied_and_shares_little_between_splits():
    documents = embedded.build()
    _check(documents)
    size = collections.Counter()
    for document in documents:
        size[document.domain] += len(document.text.encode())
    assert size.total() >= 8_000_000
    assert len(size) >= 4
    assert size["docstrings"] >= 500_000 and size["documentation"] >= 500_000  # the prose
    split = {False: [], True: []}
    for document in documents:
        split[pieces.split_key(document.text, 0) < 0.05].append(document.text)
    train, validation = split[False], split[True]
    assert len(validation) > 50
    words = deduplication.word_ids(train + validation)
    tokens = tokenizer_lib.train(train, vocab_size=4096).encode_batch(train + validation)
    for ids in (words, tokens):
        share = deduplication.shared_span_share(ids[: len(train)], ids[len(train) :])
        assert share < 0.05
    assert embedded.build() == documents
