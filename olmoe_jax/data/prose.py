"""Running text out of docstrings, reStructuredText and Markdown: what a person reads, without code and tables."""

import inspect
import re

MIN_WORDS = 8
MIN_TEXT_SHARE = 0.87  # of characters: letters, spaces and the marks of a sentence
_NOT_TEXT = re.compile(r"[^A-Za-z ,.;:'\"()\-–—?!À-ÿ`*]")
_MARKUP = re.compile(r"!?\[([^\]]*)\]\([^)]*\)|<[^>\s][^>]*>|:[a-z:]+:`|``?|(?<![\w*\"])\*\*?(?=\w)|(?<=[\w.])\*\*?(?![\w*\"])|~")
_SKIP_LINE = re.compile(r"\s*(\.\. |:[a-z ]+:\s|\||[-=~^#*+_\"'`.]{3,}\s*$|\[!\[|\[?\w+\]?: ?https?:)")
_BULLET = re.compile(r"([-*+•]|\d+[.)]|#+|\.\. \[\w+\])\s+")


def paragraphs(text) -> list[str]:
    """Paragraphs of running text, each on one line, in order.

    Left out: doctests, literal blocks (after "::" or fenced), directives, tables, headings, and blocks that
    have fewer than MIN_WORDS words or are mostly symbols.
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
    return len(_NOT_TEXT.findall(paragraph)) <= (1 - MIN_TEXT_SHARE) * len(paragraph)


def _clean(text):
    text = _BULLET.sub("", text, count=1) if _BULLET.match(text) else text
    text = _MARKUP.sub(lambda m: m.group(1) or "", text)
    return re.sub(r"\s+", " ", text).strip()


def _blocks(lines):
    """Groups of stripped lines that belong to one paragraph."""
    block, indent, literal, fenced = [], 0, None, False
    for line in lines:
        stripped = line.strip()
        if stripped.startswith(("```", "~~~")):
            fenced = not fenced
            stripped = ""
        if fenced or not stripped:
            if block:
                yield block
            block = []
            continue
        depth = len(line) - len(line.lstrip())
        if literal is not None and depth > literal:
            continue
        literal = None
        if stripped.startswith(">>>") or _SKIP_LINE.match(line):
            if block:
                yield block
            block, literal = [], (depth if stripped.startswith(".. ") else depth - 1)
            if not stripped.startswith((">>>", ".. ")):
                literal = None
            continue
        if block and (depth != indent or _BULLET.match(stripped)) and not (_BULLET.match(block[0]) and depth > indent):
            yield block
            block = []
        if not block:
            indent = depth
        block.append(stripped)
        if stripped.endswith("::"):
            literal = indent
            block[-1] = stripped[:-1]
    if block:
        yield block
