"""Prepared data: exact totals, found again, and never taken for complete when it is not."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
from array_record.python.array_record_module import ArrayRecordReader

from cla_jax.config import DataConfig
from cla_jax.data import prepare, sources, tokenizers
from cla_jax.data.workers import Workers

SMALL = DataConfig(source="sotu:6", seq_len=64, held_out=0.3)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> prepare.Prepared:
    return prepare.prepare(SMALL, tmp_path_factory.mktemp("data"))


def test_a_reader_that_may_start_no_threads_is_refused(shared):
    """The library would wait for ever for the threads of its pool that were started."""
    program = f"""
import resource
from pathlib import Path
from cla_jax.data import records
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (200 << 20), resource.RLIM_INFINITY))
records.read(Path({os.fspath(shared.path)!r}), "train")[0]
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 1
    assert ended.stderr.endswith("can't start new thread\n")


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    refusal = r"\.lock cannot be locked \(No locks available\): .* --placement\.data-dir"
    with pytest.raises(ValueError, match=refusal):
        prepare.prepare(SMALL, tmp_path)


def test_the_library_of_records_is_loaded_before_progress_is_drawn(tmp_path):
    """Loading it changes how all threads import, and the one that draws would fail."""
    program = """
import contextlib, sys
from cla_jax.config import DataConfig
from cla_jax.data import prepare

@contextlib.contextmanager
def drawn():
    assert "tensorflow_datasets" in sys.modules
    yield lambda _: None

prepare._terminal = drawn
prepare.prepare(DataConfig(source="sotu:4", seq_len=32, held_out=0.3), sys.argv[1])
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=300)


@pytest.fixture
def copied(shared, tmp_path) -> Path:
    """A private copy of prepared data, to be damaged."""
    path = tmp_path / shared.path.name
    shutil.copytree(shared.path, path)
    return path


def write_texts(directory: Path, texts) -> str:
    directory.mkdir(exist_ok=True)
    for index, text in enumerate(texts):
        (directory / f"{index:03}.txt").write_bytes(text.encode())
    return f"text:{directory}/*.txt"


def stream(tokenizer, texts) -> np.ndarray:
    parts = [[tokenizer.end]]
    for text in texts:
        parts += [tokenizer.encode(text), [tokenizer.end]]
    return np.concatenate(parts)


def rebuilt(windows, seq_len: int) -> np.ndarray:
    """The stream that windows were cut from, checking that each starts where the last one ended."""
    tokens = [windows[0]["tokens"][:1]]
    for window in windows:
        assert window["tokens"].shape == (seq_len + 1,)
        assert window["tokens"][0] == tokens[-1][-1]
        tokens.append(window["tokens"][1 : 1 + window["n_targets"]])
    return np.concatenate(tokens)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:500"])
@pytest.mark.parametrize("seq_len", [64, 1000])
def test_every_token_of_the_text_is_a_target_once(tmp_path, tokenizer, seq_len):
    config = DataConfig(source="sotu:6", tokenizer=tokenizer, seq_len=seq_len, held_out=0.3)
    data = prepare.prepare(config, tmp_path)
    texts = list(sources.documents("sotu:6"))
    held = [text for text in texts if sources.is_held_out(text, 0.3)]
    train = [text for text in texts if not sources.is_held_out(text, 0.3)]

    expected = stream(data.tokenizer, held)
    np.testing.assert_array_equal(rebuilt(data.split("held_out"), seq_len), expected)
    totals = data.totals["held_out"]
    assert totals["documents"] == len(held)
    assert totals["tokens"] == len(expected) - 1
    assert totals["tokens"] == sum(int(w["n_targets"]) for w in data.split("held_out"))
    assert totals["bytes"] == sum(len(text.encode()) for text in held)
    assert totals["bytes"] == sum(int(w["n_bytes"]) for w in data.split("held_out"))

    expected = stream(data.tokenizer, train)
    windows = data.split("train")
    assert len(windows) == (len(expected) - 1) // seq_len == data.totals["train"]["windows"]
    assert all(window["n_targets"] == seq_len for window in windows)
    got = rebuilt(windows, seq_len)
    np.testing.assert_array_equal(got, expected[: len(got)])
    assert data.totals["train"]["tokens"] == len(expected) - 1


def test_bytes_stand_at_their_targets(tmp_path):
    # Two documents of 5 and 4 bytes: E a b c d e E f g h i E, in windows of 4 targets.
    texts = ["abcde", "fghi"]
    held = [text for text in texts if sources.is_held_out(text, 0.9999)]
    assert held == texts
    filler = "0"
    while sources.is_held_out(filler, 0.9999):
        filler = str(int(filler) + 1)
    source = write_texts(tmp_path / "in", [*texts, filler])
    data = prepare.prepare(DataConfig(source=source, seq_len=4, held_out=0.9999), tmp_path / "out")
    windows = [dict(window) for window in data.split("held_out")]
    assert [int(w["n_targets"]) for w in windows] == [4, 4, 3]
    assert [int(w["n_bytes"]) for w in windows] == [4, 3, 2]
    assert windows[2]["tokens"].tolist() == [*b"ghi", 256, 256]  # padded with the end token
    assert rebuilt(windows, 4).tolist() == [256, *b"abcde", 256, *b"fghi", 256]


def test_odd_text_counts_all_its_bytes(tmp_path):
    texts = [f"{i} cafe\u0301 😀 <|endoftext|> \u0041\u030a" for i in range(40)]
    source = write_texts(tmp_path / "in", texts)
    config = DataConfig(source=source, tokenizer="bpe:300", seq_len=16, held_out=0.3)
    data = prepare.prepare(config, tmp_path / "out")
    held = [text for text in texts if sources.is_held_out(text, 0.3)]
    tokens = rebuilt(data.split("held_out"), 16)
    # Only the boundaries are end tokens, not the documents' own spelling of it.
    assert (tokens == data.tokenizer.end).sum() == len(held) + 1
    assert data.tokenizer.decode(tokens) == "".join(held)
    bytes_of_windows = sum(int(w["n_bytes"]) for w in data.split("held_out"))
    assert bytes_of_windows == sum(len(text.encode()) for text in held)


def test_documents_without_a_token_are_left_out(tmp_path):
    inner = hf.Tokenizer(hf.models.WordLevel({"[UNK]": 0, "<|endoftext|>": 1}, unk_token="[UNK]"))
    inner.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<|endoftext|>"])
    inner.save(str(tmp_path / "words.json"))
    source = write_texts(tmp_path / "in", [*(f"{i} words" for i in range(20)), " ", "\n", "\t "])
    config = DataConfig(
        source=source, tokenizer=str(tmp_path / "words.json"), seq_len=4, held_out=0.3
    )
    data = prepare.prepare(config, tmp_path / "out")
    assert sum(totals["documents"] for totals in data.totals.values()) == 20
    assert sum(totals["tokens"] for totals in data.totals.values()) == 20 * 3


def test_tokens_are_as_small_as_the_vocabulary_allows(shared):
    assert shared.split("train")[0]["tokens"].dtype == np.uint16
    assert prepare._dtype((1 << 16) + 1) == np.int32
    assert prepare._dtype(1 << 16) == np.uint16


def test_many_shards_hold_the_same_windows(shared, tmp_path, monkeypatch):
    from cla_jax.data import records

    monkeypatch.setattr(records, "_SHARD_BYTES", 3000)
    data = prepare.prepare(SMALL, tmp_path)
    shards = [os.fspath(file) for file in data.path.rglob("*train.array_record*")]
    assert len(shards) > 3
    assert sum(ArrayRecordReader(shard).num_records() for shard in shards) == len(
        data.split("train")
    )
    ours, theirs = data.split("train"), shared.split("train")
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_windows_are_random_access(shared):
    windows = shared.split("train")
    some = [5, 0, len(windows) - 1, 5]
    for index, example in zip(some, windows.take(some), strict=True):
        np.testing.assert_array_equal(example["tokens"], windows[index]["tokens"])
    for index in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows[index]


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_the_number_of_processes_changes_nothing(tmp_path, monkeypatch, tokenizer):
    """Nor does where the text is cut into batches: windows begin and end anywhere in them."""
    texts = [f"{i} caf\u00e9  \U0001f600\n" * (1 + i * i % 7) for i in range(200)]
    source = write_texts(tmp_path / "in", texts)
    config = DataConfig(source=source, tokenizer=tokenizer, seq_len=16, held_out=0.3)
    alone = prepare.prepare(config, tmp_path / "alone")
    monkeypatch.setattr(prepare, "_BATCH_CHARACTERS", 100)
    monkeypatch.setattr(prepare, "_ALONE", 3)
    together = prepare.prepare(config, tmp_path / "together", processes=2)
    for file in damaged_files(alone.path):
        assert file.read_bytes() == (together.path / file.relative_to(alone.path)).read_bytes()


# ------------------------------------------------------------------------------- found again


def test_preparing_again_does_nothing(copied, monkeypatch):
    before = {file: file.stat().st_mtime_ns for file in copied.rglob("*")}
    monkeypatch.setattr(prepare, "_make", None)  # would raise
    again = prepare.prepare(SMALL, copied.parent)
    assert again.path == copied
    assert {file: file.stat().st_mtime_ns for file in copied.rglob("*")} == before
    assert again.tokenizer == tokenizers.byte_tokenizer()


def test_the_name_is_readable_and_changes_with_what_is_prepared(tmp_path):
    tok = tmp_path / "tok.json"
    tok.write_text(tokenizers.byte_tokenizer().to_json())
    source = write_texts(tmp_path / "in", ["one", "two"])
    sotu = {"source": "sotu:6"}
    variants = [
        sotu,
        {"source": "sotu:7"},
        sotu | {"seq_len": 65},
        sotu | {"held_out": 0.31},
        sotu | {"tokenizer": "bpe:300"},
        sotu | {"tokenizer": "bpe:301"},
        sotu | {"end_token": "<|end|>"},
        sotu | {"tokenizer": str(tok)},
        {"source": source},
    ]
    configs = [DataConfig(**({"seq_len": 64, "held_out": 0.3} | fields)) for fields in variants]
    paths = [prepare.prepared_path(config, tmp_path) for config in configs]
    text = tok.read_text()
    tok.write_text(text + "\n")  # the same tokenizer
    assert prepare.prepared_path(configs[-2], tmp_path) == paths[-2]
    tok.write_text(tokenizers.train_bpe(["two two"], 259).to_json())
    assert prepare.prepared_path(configs[-2], tmp_path, text) == paths[-2]  # a run's copy
    (tmp_path / "in" / "000.txt").write_text("eno")
    paths += [prepare.prepared_path(config, tmp_path) for config in configs[-2:]]
    assert len({path.name for path in paths}) == len(paths)
    assert paths[0].name.startswith("sotu-6-byte-64-")
    across = DataConfig(source="sotu:6", seq_len=64, held_out=0.3, attend_across_documents=False)
    assert prepare.prepared_path(across, tmp_path) == paths[0]  # decided in training


def test_a_changed_input_is_prepared_anew(tmp_path):
    texts = [f"document {i} " * 5 for i in range(30)]
    source = write_texts(tmp_path / "in", texts)
    config = DataConfig(source=source, seq_len=8, held_out=0.3)
    first = prepare.prepare(config, tmp_path / "out")
    write_texts(tmp_path / "in", [text.upper() for text in texts])
    second = prepare.prepare(config, tmp_path / "out")
    assert first.path != second.path
    assert "DOCUMENT" in second.tokenizer.decode(rebuilt(second.split("train"), 8))


@pytest.mark.parametrize("how", ["grows", "same fingerprint", "one more file"])
def test_a_source_that_changes_while_it_is_prepared_is_not_kept(tmp_path, monkeypatch, how):
    source = write_texts(tmp_path / "in", [f"document {i} " * 5 for i in range(30)])
    config = DataConfig(source=source, seq_len=8, held_out=0.3)
    if how == "same fingerprint":  # a change in the middle of a large file
        monkeypatch.setattr(sources, "_HASHED_WHOLE", 0)
        monkeypatch.setattr(sources, "_HASHED_END", 2)

    def change(_: int) -> None:
        if how == "one more file":
            (tmp_path / "in" / "zzz.txt").write_text("one more")
        elif how == "grows":
            with (tmp_path / "in" / "000.txt").open("a") as file:
                file.write("more")
        else:
            (tmp_path / "in" / "000.txt").write_text("dxcument 0 " * 5)

    with pytest.raises(ValueError, match=r"the source .* changed while .* start again"):
        prepare.prepare(config, tmp_path / "out", progress=change)
    assert [path for path in (tmp_path / "out").iterdir() if path.is_dir()] == []
    prepare.prepare(config, tmp_path / "out")


def test_progress_counts_documents(tmp_path):
    seen = []
    prepare.prepare(SMALL, tmp_path, progress=seen.append)
    assert seen[-1] == 6
    assert seen == sorted(seen)


# ------------------------------------------------------------------------------------- damage


def damaged_files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "empty"])
def test_any_damaged_file_is_named_and_left_alone(copied, damage):
    files = damaged_files(copied)
    assert {"manifest.json", "tokenizer.json", "dataset_info.json"} <= {f.name for f in files}
    for file in files:
        content = file.read_bytes()
        if damage == "flip":
            # The lowest bit of a digit of a number, say, leaves valid JSON.
            middle = len(content) // 2
            file.write_bytes(
                content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            )
        elif damage == "truncate":
            file.write_bytes(content[:-1])
        elif damage == "empty":
            file.write_bytes(b"")
        else:
            file.unlink()
        with pytest.raises(ValueError, match=rf"{file.name} .*delete {copied} to prepare it again"):
            prepare.prepare(SMALL, copied.parent)
        assert file.exists() == (damage != "delete")
        file.write_bytes(content)
    prepare.prepare(SMALL, copied.parent)  # all whole again


def test_totals_in_the_manifest_are_protected(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["totals"]["held_out"]["bytes"] += 1
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json was altered"):
        prepare.prepare(SMALL, copied.parent)


class Stopped(Exception):
    pass


def interrupt(done: int) -> None:
    raise Stopped(done)


def test_an_interrupted_preparation_leaves_nothing(tmp_path):
    with pytest.raises(Stopped):
        prepare.prepare(SMALL, tmp_path, progress=interrupt)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert prepare.prepare(SMALL, tmp_path).totals["train"]["documents"] == 4


def test_a_killed_preparation_is_replaced(tmp_path):
    code = f"""
import os, signal
from cla_jax.config import DataConfig
from cla_jax.data import prepare
kill = lambda done: os.kill(os.getpid(), signal.SIGKILL)
prepare.prepare({SMALL!r}, {str(tmp_path)!r}, progress=kill)
"""
    assert run(code).wait() == -9
    stale = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert [path.suffix for path in stale] == [".partial"]
    (stale[0] / "rubbish").write_text("left by the killed process")
    data = prepare.prepare(SMALL, tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [data.path]
    assert not (data.path / "rubbish").exists()


def test_two_preparations_at_once(tmp_path):
    # Both see no prepared data; the first sleeps while it holds the lock.
    code = f"""
import time
from cla_jax.config import DataConfig
from cla_jax.data import prepare
made = []
slowly = lambda done: (made.append(done), time.sleep(1))
data = prepare.prepare({SMALL!r}, {str(tmp_path)!r}, progress=slowly)
print(len(made), data.totals["train"]["windows"], len(data.split("train")))
"""
    running = [run(code), run(code)]
    outputs = [process.communicate()[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sorted(int(made) for made, _, _ in outputs) == [0, 1]
    assert outputs[0][1:] == outputs[1][1:]
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def run(code: str) -> subprocess.Popen[str]:
    root = str(Path(prepare.__file__).parents[2])
    env = os.environ | {"PYTHONPATH": root}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=-1, text=True)


# ------------------------------------------------------------------------------------- errors


def test_no_held_out_document(tmp_path):
    with pytest.raises(
        ValueError, match=r"data\.held_out = 0\.01 holds out no document of the source"
    ):
        prepare.prepare(DataConfig(source="sotu:6", seq_len=64, held_out=0.01), tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_the_share_that_is_named_holds_out_a_document(tmp_path):
    for name, text in (("a", "one"), ("b", "two two"), ("c", "three")):
        (tmp_path / f"{name}.txt").write_text(text * 300)
    given = lambda share: DataConfig(source=f"text:{tmp_path}/*.txt", seq_len=64, held_out=share)
    with pytest.raises(ValueError, match=r"--data\.held-out ") as refused:
        prepare.prepare(given(0.001), tmp_path / "data")
    share = float(str(refused.value).partition("--data.held-out ")[2].split()[0])
    made = prepare.prepare(given(share), tmp_path / "data")
    assert made.totals["held_out"]["documents"] == 1


def test_less_than_one_training_window(tmp_path):
    config = DataConfig(source="sotu:6", seq_len=1_000_000, held_out=0.3)
    with pytest.raises(ValueError, match=r"\d+ tokens in 4 of 6 documents.*seq_len = 1000000"):
        prepare.prepare(config, tmp_path)


def test_exactly_one_training_window(tmp_path, shared):
    seq_len = shared.totals["train"]["tokens"]
    config = DataConfig(source="sotu:6", seq_len=seq_len, held_out=0.3)
    assert len(prepare.prepare(config, tmp_path).split("train")) == 1
    config = DataConfig(source="sotu:6", seq_len=seq_len + 1, held_out=0.3)
    with pytest.raises(ValueError, match="less than one window"):
        prepare.prepare(config, tmp_path)


def test_a_remote_data_dir_is_refused():
    with pytest.raises(ValueError, match=r"placement\.data_dir = 'gs://x' must be a local"):
        prepare.prepare(SMALL, "gs://x")


def test_a_tfds_source_is_prepared(tmp_path):
    import tensorflow_datasets as tfds

    config = DataConfig(source="tfds:lm1b", seq_len=8, held_out=0.4)
    with tfds.testing.mock_data(num_examples=20):
        texts = list(sources.documents(config.source))
    assert any(sources.is_held_out(text, 0.4) for text in texts)
    # The mock replaces every reader of tfds, ours too: only the tokens' making can run under it.
    with tfds.testing.mock_data(num_examples=20):
        streams = prepare._tokenise(
            config, tokenizers.byte_tokenizer(), tmp_path, lambda _: None, Workers(1)
        )
    total = sum(each.totals["bytes"] for each in streams.values())
    assert total == sum(len(text.encode()) for text in texts)
