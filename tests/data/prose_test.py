from olmoe_jax.data import prose

DOCSTRING = """Return the thing that a reader of this sentence would expect.

    It goes on over
    several lines, which belong together.

    Parameters
    ----------
    x : array_like
        The input that the function reads, of whatever shape it has.

    .. directive:: argument
       With a body that reads like a sentence of several words, but is left out.
    >>> the_code(of, a, doctest, is, not_, prose, at, all)
    A doctest may print a sentence of several words, which is no prose either.

    An example follows, with a colon that ends this whole sentence::

        a literal block may read like a sentence, too. It is left out all the same.

    * A bullet of a list, which is a sentence of its own, too.
    * another ``bullet`` that says something with *emphasis* in it.
"""

MARKDOWN = """# A heading is no paragraph

[![badge](https://x/y.svg)](https://x/y)

This **package** does something, as [its manual](https://example.org/manual) says at length.

```python
print("this fenced code is not prose, whatever it may say here")
```

| a | table | of | several | cells | in | one | row |
"""


def test_docstrings_give_their_sentences_only():
    assert prose.paragraphs(DOCSTRING) == [
        "Return the thing that a reader of this sentence would expect.",
        "It goes on over several lines, which belong together.",
        "The input that the function reads, of whatever shape it has.",
        "An example follows, with a colon that ends this whole sentence:",
        "A bullet of a list, which is a sentence of its own, too.",
        "another bullet that says something with emphasis in it.",
    ]


def test_markdown_loses_code_tables_badges_and_links():
    assert prose.paragraphs(MARKDOWN) == [
        "This package does something, as its manual says at length."
    ]


def test_what_is_prose():
    assert prose.is_prose("This is a sentence of more than eight words, clearly.")
    assert not prose.is_prose("Too few words here.")
    assert not prose.is_prose("many words but nothing that ends or divides a sentence")
    assert not prose.is_prose("x[1:2] = {3} + y[4] * (z - 5) ; 6 7 8 9 10 11 12.")
