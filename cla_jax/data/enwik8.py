"""The prose of enwik8: articles of the English Wikipedia of 2006, without their markup.

enwik8 is the first 100 MB of raw XML. Two thirds of its bytes are sentences. The rest is markup, tables and
lists of links: it teaches a small model little. `articles` keeps the sentences. The steps and their order
are fixed, and the result is checked by its SHA-256 (7,825 articles, 62.2 MB).
"""

import html
import re
from collections.abc import Iterator

ENWIK8_SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
# Of the file of JSON lines {"text": ...} that holds all articles.
PROSE_SHA256 = "c62ee4e6e14cf66fcc21f1a00bb8bd1e865573c26f71c76ac7fe7656fc0e2580"

_PAGE = re.compile(r"<page>(.*?)</page>", re.DOTALL)
_TITLE = re.compile(r"<title>(.*?)</title>", re.DOTALL)
_TEXT = re.compile(r"<text[^>]*>(.*?)</text>", re.DOTALL)
_NAMESPACES = frozenset(
    ("Wikipedia", "Talk", "Template", "Image", "Category", "Portal", "MediaWiki", "User", "Help")
)

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_ELEMENT = re.compile(
    r"<(math|gallery|timeline|ref|nowiki|pre|table|div|code)\b[^>]*?(?:/>|>.*?</\1\s*>)",
    re.DOTALL | re.IGNORECASE,
)
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)
_FILE = re.compile(
    r"\[\[\s*(?:image|file|media)\s*:"
    r"(?:[^\[\]]|\[\[[^\[\]]*\]\]|\[[^\[\]]*\])*\]\]",
    re.IGNORECASE,
)
_NAMESPACE_LINK = re.compile(
    r"\[\[\s*(?:Category|Wikipedia|Template|simple|[a-z]{2,3}(?:-[a-z-]+)?)\s*:[^\[\]]*\]\]"
)
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_EXTERNAL_LINK = re.compile(r"\[(?:http|https|ftp|irc|news|mailto)[^\s\]]*\s*([^\]]*)\]")
_ADDRESS = re.compile(r"https?://\S+")
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")

_REFERENCE_SECTIONS = frozenset(
    (
        "see also",
        "external links",
        "external link",
        "references",
        "further reading",
        "bibliography",
        "notes",
        "related topics",
        "sources",
    )
)
_WORD = re.compile(r"[A-Za-z']{2,}")
_EMPTY_PARENTHESES = re.compile(r"\([\s,;]*\)")
_SPACES = re.compile(r"\s+")
_SPACE_BEFORE_STOP = re.compile(r" ([,.;:])")


def articles(xml: bytes) -> Iterator[str]:
    """The title of each article and its sentences, one paragraph a line.

    Args:
      xml: the content of enwik8. Bytes that are not UTF-8 are dropped: the file ends in the middle of a page.
    """
    for page in _PAGE.finditer(xml.decode("utf-8", errors="ignore")):
        title, text = _TITLE.search(page[1]), _TEXT.search(page[1])
        if title is None or text is None:
            continue
        name = html.unescape(title[1])
        if ":" in name and name.split(":")[0] in _NAMESPACES:
            continue
        source = html.unescape(html.unescape(text[1]))
        if source.lower().startswith("#redirect"):
            continue
        paragraphs = list(_paragraphs(_without_markup(source)))
        if sum(map(len, paragraphs)) >= 300:
            yield "\n".join([name, *paragraphs])


def _without_markup(text: str) -> str:
    text = _COMMENT.sub("", text)
    text = _ELEMENT.sub("", text)
    text = _repeated(_TEMPLATE, text, 6)  # the innermost first
    text = _repeated(_TABLE, text, 3)
    text = _FILE.sub("", text)
    text = _NAMESPACE_LINK.sub("", text)
    for _ in range(2):
        text = _LINK.sub(r"\1", text)
    text = _EXTERNAL_LINK.sub(r"\1", text)
    text = _ADDRESS.sub("", text)
    text = _TAG.sub("", text)
    for quotes in ("'''''", "'''", "''"):
        text = text.replace(quotes, "")
    return html.unescape(text).replace("\u00a0", " ")


def _repeated(pattern: re.Pattern[str], text: str, most: int) -> str:
    for _ in range(most):
        before, text = text, pattern.sub("", text)
        if text == before:
            break
    return text


def _paragraphs(text: str) -> Iterator[str]:
    """The lines that are prose: at least 80 characters and 12 words, outside of sections of references."""
    skip = False
    for line in map(str.strip, text.split("\n")):
        if len(line) >= 2 and line[0] == line[-1] == "=":
            skip = line.strip("= \t").strip().lower() in _REFERENCE_SECTIONS
            continue
        if skip or not line or line[0] in "|!{}":
            continue
        line = line.lstrip("*#:; ").strip()
        if len(line) < 80 or len(_WORD.findall(line)) < 12:
            continue
        line = _EMPTY_PARENTHESES.sub("", line)
        line = _SPACES.sub(" ", line)
        yield _SPACE_BEFORE_STOP.sub(r"\1", line)
