"""Damages files at random and reads them: the process that tests/test_fuzz.py starts.

    python -m tests.fuzzing DIRECTORY SEED CASES [READER ...]

For each case one file of a whole example is damaged: a value of its JSON, some of its bytes, or what
the file is (a pipe, a device, a link). Then it is read as a command would read it. What is neither read nor
refused in one short line that a command prints is reported, as JSON lines. The memory of the process is
limited to 1 GiB above what the libraries take, and a case that computes or waits for too long ends it.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath
from rich.console import Console

import cla_jax.checkpoint
from cla_jax import files, messages, report, runs, seals, traces
from cla_jax.config import DataConfig, LatentKV
from cla_jax.data import prepare, sources, tokenizers
from cla_jax.interop import foreign, gguf, hf, task_data
from experiments import smoke
from launch import cli, status
from launch.sweeps import records

MEMORY = 1 << 30
COMPUTES_S, WAITS_S = 2, 60  # far above the two seconds that a case may take on an idle machine
LONGEST = 700  # characters of a message: a path, and a few hundred beside it

# ------------------------------------------------------------------------------------- damage

_DEEP = "[" * 100_000
# Texts in the place of a value, as JSON has them.
VALUES = (
    *("null", "true", "false", "0", "-1", "1", "0.5", "-0.0", "1e308", "1e999", "NaN", "-Infinity"),
    *(str(2**31), str(2**40), str(2**63), str(-(2**63)), "1" + "0" * 400, "9" * 5000),
    *(
        '""',
        '"x"',
        '"5"',
        '"\\u001b[2J\\u202e"',
        '"\\ud83d"',
        '"a/../b"',
        '"\\u0000"',
        '"' + "y" * 10**6 + '"',
    ),
    *("[]", "{}", "[null]", '[1, "a", {}]', '{"a": 1}', "[[[[]]]]", '{"vocab": {}}', _DEEP),
    "[" + "0," * 10**5 + "0]",
)
_MARK = "\x00here\x00"


def damage_value(content: bytes, rng: random.Random) -> bytes:
    """Changes a value of a JSON text, takes it out, or has it twice."""
    tree = json.loads(content)
    holder: Any = [tree]
    key: Any = 0
    while rng.random() < 0.75 and isinstance(inner := holder[key], dict | list) and inner:
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        holder, key = inner, rng.choice(keys)
    what = rng.choice(("change", "change", "change", "remove", "twice"))
    if what == "remove" and holder[key] is not tree:
        del holder[key]
    elif what == "twice" and isinstance(holder, dict):
        text = json.dumps(tree).replace(
            json.dumps(key) + ":", f"{json.dumps(key)}: 1, {json.dumps(key)}:", 1
        )
        return text.encode()
    else:
        whole, holder[key] = holder[key] is tree, _MARK
        value = rng.choice(VALUES)
        return (value if whole else json.dumps(tree).replace(json.dumps(_MARK), value)).encode()
    return json.dumps(tree).encode()


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, inserts or doubles bytes; most of the time near the beginning, where headers are."""
    end = min(len(content), 4096) if rng.random() < 0.7 else len(content)
    at = rng.randrange(end) if end else 0
    some = rng.choice(
        (b"\x00", b"\xff" * 8, b"\xff", b"\x7f\xff\xff\xff", b"}", b'"', rng.randbytes(4))
    )
    match rng.randrange(5):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + some + content[at:]
        case 2:
            return content[:at] + content[at : at + 64] + content[at:]
        case _:
            return content[:at] + some + content[at + len(some) :]


def damage_shape(header: dict[str, Any], rng: random.Random) -> bytes:
    """Gives a tensor another shape and, unlike `damage_value`, the bytes that it needs."""
    tensor = header[rng.choice(sorted(header.keys() - {"__metadata__"}))]
    shape, (begin, end) = tensor["shape"], tensor["data_offsets"]
    size = (end - begin) // max(math.prod(shape), 1)
    tensor["shape"] = rng.choice(
        ([], [0], [1], shape[::-1], shape[:1], [math.prod(shape)], [1, *shape], [*shape, 1])
    )
    tensor["data_offsets"] = [begin, begin + size * math.prod(tensor["shape"])]
    return json.dumps(header).encode()


def damage_file(file: Path, rng: random.Random) -> None:
    """Puts something else in the place of a file."""
    match rng.randrange(8):
        case 0:
            pass
        case 1:
            os.mkfifo(file)
        case 2:
            file.mkdir()
        case 3:
            file.symlink_to(rng.choice(("/dev/zero", "/dev/stdin", "nothing", file.name, "..")))
        case 4:  # a file with nothing in it, as large as a disk
            with file.open("wb") as sparse:
                sparse.truncate(1 << 36)
        case 5:
            file.write_bytes(b"\xef\xbb\xbf" + rng.choice((b"", b"{}", b"[1]", b"\x00" * 99)))
        case 6:
            file.write_bytes(rng.choice((_DEEP.encode(), b"9" * 5000, b"\x1f\x8b" + bytes(30))))
        case _:
            file.write_bytes(rng.randbytes(rng.choice((1, 7, 8, 100, 5000))))


def damage(file: Path, rng: random.Random) -> str:
    """Damages a file in place; says how."""
    content = file.read_bytes()
    kind = rng.random()
    if kind < 0.2:
        file.unlink()
        damage_file(file, rng)
        return "file"
    if kind < 0.75:
        with contextlib.suppress(ValueError):
            if file.suffix == ".jsonl":
                lines = content.splitlines()
                i = rng.randrange(len(lines))
                lines[i] = damage_value(lines[i], rng)
                file.write_bytes(b"\n".join(lines))
            elif file.suffix == ".safetensors":
                length = int.from_bytes(content[:8], "little")
                header = content[8 : 8 + length]
                if rng.random() < 0.5:
                    header = damage_shape(json.loads(header), rng)
                else:
                    header = damage_value(header, rng)
                file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
            else:
                file.write_bytes(damage_value(content, rng))
            return "value"
    file.write_bytes(damage_bytes(content, rng))
    return "bytes"


# ------------------------------------------------------------------------------------ readers


Reader = Callable[[Path], str | None]


def _model(read: Callable[[Path], Any]) -> Reader:
    def use(path: Path) -> None:
        found = read(path)
        with files.about(path):
            tokenizer = tokenizers.load(found.tokenizer_json, found.end_token or "<|endoftext|>")
        tokenizer.decode(tokenizer.encode("a text, 12 é"))
        foreign.check(found)
        for tensor in found.tensors.values():
            tensor.read()

    return use


def _run(path: Path) -> str | None:
    (run,) = runs.find_runs([path])
    problems: list[str] = []
    rows = report.read([run], problems=problems)
    if rows:
        Console(file=io.StringIO()).print(report.table(rows))
        report.tasks.table(rows)
        report.notes(rows)
        problems += rows[0].altered
    problems += filter(None, [cla_jax.checkpoint.verify(run.checkpoints / "00000030")])
    return max(problems, key=len, default=None)


def _sweep(path: Path) -> str | None:
    found = status.lines(epath.Path(path))
    Console(file=io.StringIO()).print(status.table(epath.Path(path), found))
    assert found[-1]["trial"] == "two", "the other trial has no line"
    assert found[-1]["state"] == "waiting", "the other trial suffers"
    return next((line["error"] for line in found if line["state"] == "unreadable"), None)


def _source(path: Path) -> None:
    for _ in sources.documents(f"jsonl:{path / 'a.jsonl'}"):
        pass


def _prepared(path: Path) -> None:
    (only,) = (each for each in path.iterdir() if each.name[0] != ".")
    windows = prepare.open_prepared(only).split("train")
    windows[0]


def _trace(path: Path) -> None:
    traces.read_trace(path / "trace.jsonl", lambda text: list(text.encode()))


# What a command does with a path. It raises, or returns, what it tells the user.
READERS: dict[str, Reader] = {
    **{family: _model(hf.read) for family in ("llama", "cla", "mistral", "shards")},
    **{family: _model(hf.read) for family in ("lckv-llama", "gpt_crosslayer", "deepseek_v2")},
    "gguf": lambda path: _model(gguf.read)(path / "model.gguf"),
    "run": _run,
    "sweep": _sweep,
    "source": _source,
    "prepared": _prepared,
    "trace": _trace,
    "tasks": lambda path: task_data.check_rows(path / "validation.jsonl"),
    "tasks-csv": lambda path: task_data.check_rows(path / "validation.csv"),
}
# These need a package that is not there in all tests.
ARROW: dict[str, Reader] = {
    "tasks-parquet": lambda path: task_data.check_rows(path / "validation.parquet"),
    "tasks-arrow": lambda path: task_data.check_rows(path / "validation.arrow"),
}

# -------------------------------------------------------------------------------------- cases


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


@contextlib.contextmanager
def _watched(case: dict[str, Any]) -> Iterator[None]:
    """Ends the process, with the case, when it computes or waits for too long."""

    def end(signal_number: int, frame: Any) -> None:
        del signal_number
        where = "".join(traceback.format_stack(frame)[-3:])
        print(json.dumps(case | {"problem": f"takes too long: {where}"}), flush=True)
        os._exit(0)

    signal.signal(signal.SIGPROF, end)
    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_PROF, COMPUTES_S)
    signal.setitimer(signal.ITIMER_REAL, WAITS_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def problem_of(read: Reader, path: Path, file: Path) -> str:
    """What is wrong with how a damaged example is read; empty if it is read, or refused as it should be."""
    try:
        if (words := read(path)) is None:
            return ""
    except ValueError as error:
        words = cli._words(error)
        if words is None:
            return "a library's error: " + "".join(traceback.format_exception(error)[-4:])
    if len(words) > LONGEST or not words.isprintable():
        return f"a message of {len(words):,} characters: {messages.printable(words)}"
    named = (str(file), str(file.parent), str(path))
    return "" if any(name in words for name in named) else f"names no file: {words}"


def run(directory: Path, reader: str, seed: str, cases: int) -> None:
    whole, rng = directory / reader, random.Random(f"{reader} {seed}")
    read, used = (READERS | ARROW)[reader], directory / "used" / reader
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    read(whole)  # the example itself is read, and what is imported late is
    known = sorted(
        file for file in whole.rglob("*") if file.is_file() and file.parent.name != "two"
    )
    shutil.copytree(whole, used)
    _limit_memory()
    for number in range(cases):
        original = rng.choice(known)
        file = used / original.relative_to(whole)
        how = damage(file, rng)
        case = {"reader": reader, "case": number, "file": file.name, "how": how}
        print(json.dumps(case), flush=True)  # for a case that ends the process
        with _watched(case):
            problem = problem_of(read, used, file)
        if problem:
            print(json.dumps(case | {"problem": problem}), flush=True)
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink(
            missing_ok=True
        )
        shutil.copyfile(original, file)


def main(directory: str, seed: str, cases: str, *readers: str) -> None:
    for reader in readers or READERS:
        run(Path(directory), reader, seed, int(cases))
    print(json.dumps({"done": True}), flush=True)


# ------------------------------------------------------------------------------------ examples


def write_examples(directory: Path) -> None:
    """A whole example for each reader, as small as it can be."""
    from tests import interop as made
    from tests import test_interop_gguf, test_report

    llama = made.write_hf(directory / "llama")
    (llama / "tokenizer_config.json").write_text('{"chat_template": "x", "eos_token": "a"}')
    (llama / "generation_config.json").write_text('{"eos_token_id": [256, 1]}')
    latent = LatentKV(rank=24, rope_dims=8)
    deepseek = dataclasses.replace(made.MODEL, n_kv_heads=1, norm_eps=1e-6, kv=latent)
    made.write_hf(directory / "deepseek_v2", deepseek)
    made.write_hf(directory / "mistral", model_type="mistral", sliding_window=None)
    made.write_hf(directory / "cla", model_type="cla", kv_norm="block", kv_map=[0, 1, 2, 3])
    made.write_hf(directory / "lckv-llama", model_type="lckv-llama", layer_types="0_1_2_3")
    shards = made.write_hf(directory / "shards")
    length = int.from_bytes((shards / "model.safetensors").read_bytes()[:8], "little")
    header = json.loads((shards / "model.safetensors").read_bytes()[8 : 8 + length])
    os.rename(shards / "model.safetensors", shards / "one.safetensors")
    index = {"weight_map": {name: "one.safetensors" for name in header if name != "__metadata__"}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "gguf").mkdir()
    test_interop_gguf.write(directory / "gguf" / "model.gguf")
    _write_dolomite(directory / "gpt_crosslayer")
    run = test_report.make(directory, "run", tokenizer=made.tokenizers.byte_tokenizer().to_json())
    test_report.log(run, 30, evaluated=9.0)
    test_report.evaluate(run, 8.0)
    run.write_eval("cached-int8", run.eval("full") | {"chunk": 1})
    score = {
        "metrics": {"acc": 0.5, "acc_stderr": 0.1},
        "n": 3,
        "split": "test",
        "shots": 0,
        "version": 1,
    }
    run.write_eval("tasks-full", {"step": 30, "tasks": {"piqa": score}})
    _write_checkpoint(run)
    for name in ("one", "two"):
        trial = records.Record(epath.Path(directory / "sweep"), name)
        trial.write_trial(smoke.tiny(), {})
    one = records.Record(epath.Path(directory / "sweep"), "one")
    one.write_state(records.State(status="stopped", attempts=2, error="no\nway"))
    one.write_submission(records.Submission(engine="slurm", job="7"))
    one.run.path.mkdir()
    one.run.metrics.write_text(
        '{"step": 3, "loss": 1.5, "eta_s": 4.0}\n{"step": 4, "perplexity": 2.0}\n'
    )
    (directory / "trace").mkdir()
    requests = [{"arrival": 0.5 * i, "prompt": [1, 2, i], "new_tokens": 3} for i in range(4)]
    requests += [{"arrival": 9, "prompt": "a text", "new_tokens": 1, "group": "a"}]
    lines = map(json.dumps, requests)
    (directory / "trace" / "trace.jsonl").write_text("\n".join(lines))
    for folder, name in (("source", "a"), ("tasks", "validation")):
        (directory / folder).mkdir()
        lines = [json.dumps({"text": f"document {i}", "n": [i]}) for i in range(5)]
        (directory / folder / f"{name}.jsonl").write_text("\n".join(lines))
    (directory / "tasks-csv").mkdir()
    rows = [f'"document {i}, with a ""quote""",{i}' for i in range(5)]
    (directory / "tasks-csv" / "validation.csv").write_text("\n".join(["text,n", *rows]) + "\n")
    prepare.prepare(DataConfig(source="sotu:4", seq_len=64, held_out=0.3), directory / "prepared")


def write_arrow_examples(directory: Path) -> None:
    """Those of `ARROW`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": f"document {i}", "n": [i]} for i in range(5)]
    table = pa.Table.from_pylist(rows)
    for reader in ARROW:
        (directory / reader).mkdir()
    pq.write_table(table, directory / "tasks-parquet" / "validation.parquet")
    arrow = directory / "tasks-arrow" / "validation.arrow"
    with pa.OSFile(str(arrow), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def _write_dolomite(directory: Path) -> None:
    from tests import interop as made
    from tests import test_interop_hf as models

    config = dataclasses.replace(
        made.MODEL, n_layers=5, kv_map="0,0,2,2,2", kv_norm="own", bias=True, d_head=12
    )
    directory.mkdir()
    tensors = models.dolomite_tensors(config, nested=False)
    models.stored(directory, tensors, models.COMMON | models.NEW)


def _write_checkpoint(run: runs.Run) -> None:
    """A manifest and a file that it lists: `verify` reads no more."""
    path = run.checkpoints / "00000030"
    path.mkdir(parents=True)
    (path / "data.bin").write_bytes(b"weights")
    listed = {"data.bin": cla_jax.checkpoint._checksum(path / "data.bin")}
    content = {"step": 30, "files": listed, "arrays": {"model.head": [[2, 3], "float32"]}}
    content |= {"run": run.id, "identity": run.record()["identity"]}
    content["checksum"] = seals.digest(content)
    (run.checkpoints / "00000030.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main(*sys.argv[1:])
