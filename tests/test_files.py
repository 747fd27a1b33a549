"""Files that are hostile or damaged cost one line that names them."""

import json
import os
import socket

import pytest
from etils import epath

from cla_jax import files
from cla_jax.messages import printable, shown


def refused(text: str | bytes, **options) -> str:
    with pytest.raises(ValueError) as caught:
        files.parse_json(text, "x.json", **options)
    message = str(caught.value)
    assert message.startswith("x.json")
    assert message.isprintable()
    assert len(message) < 400
    return message


def test_only_ordinary_files_are_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    with socket.socket(socket.AF_UNIX) as made:
        monkeypatch.chdir(tmp_path)  # the path of a socket may be no longer than 107 bytes
        made.bind("socket")
    for name, what in (
        ("pipe", "a pipe"),
        ("folder", "a directory"),
        ("zero", "a device"),
        ("loop", "symbolic links"),
        ("dangling", "a link to a file that does not exist"),
        ("socket", "a socket"),
        ("nothing", "missing"),
        ("a\0b", "NUL"),
        ("n" * 300, "too long"),
    ):
        for read in (files.read_json, files.read_text, lambda file: list(files.read_lines(file))):
            with pytest.raises(ValueError, match=what):
                read(tmp_path / name)


def test_links_are_followed_where_that_is_allowed(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").symlink_to("a.json")
    assert files.read_object(tmp_path / "b.json") == {}
    with pytest.raises(ValueError, match=r"b\.json is a symbolic link"):
        files.read_object(tmp_path / "b.json", links=False)


def test_a_remote_path_is_read_like_a_local_one(tmp_path, monkeypatch):
    """Without a cloud: what epath opens for gs:// is a file here."""
    (tmp_path / "a.json").write_text('{"a": 1}')
    remote = epath.Path("gs://bucket/a.json")
    monkeypatch.setattr(type(remote), "open", lambda path, mode: (tmp_path / path.name).open(mode))
    assert files.read_object(remote) == {"a": 1}
    with pytest.raises(ValueError, match=r"gs://bucket/b\.json is missing"):
        files.read_object(remote.parent / "b.json")


def test_files_have_a_limit(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("[1, 2]")
    assert files.read_json(file, 6) == [1, 2]
    with pytest.raises(ValueError, match=r"a\.json is too large: the limit is 5 bytes"):
        files.read_json(file, 5)


def test_lines_that_are_too_long_are_left_out(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"a\n" + b"b" * 99 + b"\r\nc\r\n\n" + b"d" * 10)
    assert list(files.read_lines(file, longest=12)) == [b"a", b"c", b"", b"d" * 10]
    with pytest.raises(ValueError, match="too large"):
        list(files.read_lines(file, limit=50))


def test_a_byte_order_mark_is_no_content(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert files.read_json(tmp_path / "a.json") == [1]
    (tmp_path / "a.json").write_bytes(b"[1, \xff]")
    with pytest.raises(ValueError, match=r"a\.json is not text in UTF-8: byte 4"):
        files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "line 1, column 2"),
        ("[" * 100_000, "too deeply"),
        ("[" * 100 + "]" * 100, "too deeply"),
        ('{"a":' * 100 + "1" + "}" * 100, "too deeply"),
        ("[" + "[]," * 2_000_000 + "[]]", "more than 2,000,000"),
        ("9" * 5000, "5,000 digits"),
        ("1e999", "too large"),
        ("NaN", "NaN"),
        ("-Infinity", "Infinity"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        (r'["\ud83d"]', "lone surrogate"),
        (r'{"\udc00": 1}', "lone surrogate"),
        ('{"' + "k" * 10**6 + '": 1, "' + "k" * 10**6 + '": 2}', "twice"),
    ],
    ids=str,
)
def test_json_that_is_refused(text, what):
    assert what in refused(text)


def test_json_that_is_accepted():
    assert files.parse_json(r'["\ud83d\ude00", 1e308, -0.5]', "x") == ["\U0001f600", 1e308, -0.5]
    assert files.parse_json('{"a": 1, "a": 2}', "x", duplicates=True) == {"a": 2}
    assert files.parse_json("[Infinity, 1e999]", "x", finite=False) == [float("inf")] * 2
    assert files.parse_json("9" * 308, "x") < float("inf")


def test_fields_have_types():
    record = {"a": {"b": 1, "c": True, "d": None}, "e": 2.5, "f": "x" * 10**6, "g": []}
    assert files.field(record, "a.b", int, "x.json") == 1
    assert files.field(record, "a.b", float, "x.json") == 1
    assert files.field(record, "a.d", int, "x.json", 7) == 7
    assert files.field(record, "h.i", str, "x.json", "") == ""
    for path, kind, what in (
        ("e", int, "field e: expected an integer, found 2.5"),
        ("a.c", int, "field a.c: expected an integer, found True"),
        ("a.b.c", int, "field a.b.c: expected an object, found 1"),
        ("f", float, "field f: expected a number, found 'xxx"),
        ("g", dict, "field g: expected an object, found []"),
        ("a.d", int, "field a.d is missing"),
    ):
        with pytest.raises(ValueError) as caught:
            files.field(record, path, kind, "x.json")
        assert what in str(caught.value)
        assert len(str(caught.value)) < 300
    with pytest.raises(ValueError, match="not a JSON object, but an array"):
        files.as_object([], "x.json")


def test_other_peoples_words_are_printable_and_short():
    hostile = "\x1b[2J\r\n\u202e\u2028\ud800" + "x" * 10**6 + "\x07"
    for text in (printable(hostile), shown(hostile), shown({hostile: [hostile] * 10**5})):
        assert text.isprintable()
        assert len(text) <= 700
    assert printable("plain é 漢字") == "plain é 漢字"
    assert "bits" in shown(10**5000)
    assert shown([[[[[[1]]]]]]) == "[[[[...]]]]"
    assert json.dumps(printable("a\tb")) == r'"a\\tb"'
