"""Running text out of docstrings, reStructuredText and Markdown, without code and tables."""

import inspect
import re

MIN_WORDS = 8
MIN_TEXT_SHARE = 0.87  # of characters: letters, spaces and the marks of a sentence
_NOT_TEXT = re.compile(r"[^A-Za-z ,.;:'\"()\-–—?!À-ÿ`*]")
_MARKUP = re.compile(
    r"!?\[([^\]]*)\]\([^)]*\)|<[^>\s][^>]*>|:[a-z:]+:`|``?|(?<![\w*\"])\*\*?(?=\w)|(?<=[\w.])\*\*?(?![\w*\"])|~"
)
_LEFTOVER = re.compile(r"\s_{1,2}(?=[\s.,;:)]|$)|\*\*")
_SKIP_LINE = re.compile(
    r"\s*(\.\. |:[a-z ]+:\s|\||[-=~^#*+_\"'`.]{3,}\s*$|\[!\[|\[?\w+\]?: ?https?:)"
)
_BULLET = re.compile(r"([-*+•]|\d+[.)]|#+|\.\. \[\w+\])\s+")


def paragraphs(text) -> list[str]:
    """Paragraphs of running text, each on one line, in order.

    Left out: doctests, literal blocks (after "::" or fenced), directives, tables, headings, and
    blocks that have fewer than MIN_WORDS words or are mostly symbols.
    """
    out = []
    for block in _blocks(inspect.cleandoc(text).split("\n")):
        paragraph = _clean(" ".join(block))
        if is_prose(paragraph):
            out.append(paragraph)
    return out


def is_prose(paragraph) -> bool:
    """Whether a line of text reads as sentences."""
    if paragraph.count(" ") < MIN_WORDS - 1 or not re.search(r"[.!?:]", paragraph):
        return False
    if "::=" in paragraph:  # a grammar
        return False
    return len(_NOT_TEXT.findall(paragraph)) <= (1 - MIN_TEXT_SHARE) * len(paragraph)


def _clean(text):
    text = _BULLET.sub("", text, count=1) if _BULLET.match(text) else text
    text = _MARKUP.sub(lambda m: m.group(1) or "", text)
    return re.sub(r"\s+", " ", _LEFTOVER.sub("", text)).strip()


def _blocks(lines):
    """Groups of stripped lines that belong to one paragraph."""
    block, indent, literal, fenced, doctest = [], 0, None, False, False
    for line in lines:
        stripped = line.strip()
        if stripped.startswith(("```", "~~~")):
            fenced = not fenced
            stripped = ""
        depth = len(line) - len(line.lstrip())
        if stripped and literal is not None and depth <= literal:
            literal = None  # a literal block or a directive ends where the indent does
        doctest = bool(stripped) and (doctest or stripped.startswith(">>>"))  # ends at a blank line
        left_out = fenced or doctest or literal is not None or not stripped
        if stripped.startswith(".. ") and not left_out:
            literal = depth
        bullet = _BULLET.match(stripped)
        hanging = block and depth > indent and _BULLET.match(block[0])
        if left_out or _SKIP_LINE.match(line) or bullet or (depth != indent and not hanging):
            if block:
                yield block
            block = []
        if left_out or _SKIP_LINE.match(line):
            continue
        if not block:
            indent = depth
        block.append(stripped)
        if stripped.endswith("::"):
            literal = indent
            block[-1] = stripped[:-1]
    if block:
        yield block
