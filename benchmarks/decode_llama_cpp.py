"""llama.cpp, as one contestant of `benchmarks.decode`: what people use to generate text on a CPU.

The model has the shape of the others and random weights. Its file has the weights in float32, bfloat16 or
Q8_0: 8 bits, and a scale for 32 weights. Norms are in float32, and so are keys and values beside float32
weights; otherwise they are in float16, the default. Prompts of a batch are sequences of one context; every
step decodes one token of each.

    pip install -e '.[llama-cpp]'        # builds llama.cpp for this machine: minutes, and a C++ compiler

Imports nothing of this repository that needs jax, so it may run in an environment of its own.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks.child import Contestant, serve, versions
from benchmarks.common import first_and_rest


def write_model(file: Path, shape: dict[str, int], positions: int, weights: str) -> int:
    """Writes a model of random weights in the GGUF format; returns the number of its parameters."""
    import gguf

    kind = gguf.GGMLQuantizationType[weights]
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(positions)
    writer.add_embedding_length(shape["d_model"])
    writer.add_block_count(shape["n_layers"])
    writer.add_feed_forward_length(shape["d_ff"])
    writer.add_head_count(shape["n_heads"])
    writer.add_head_count_kv(shape["n_kv_heads"])
    writer.add_key_length(shape["d_head"])
    writer.add_value_length(shape["d_head"])
    writer.add_rope_dimension_count(shape["d_head"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("none")  # ids in, ids out
    parameters = 0

    def add(name: str, *sizes: int) -> None:
        nonlocal parameters
        parameters += int(np.prod(sizes))
        if len(sizes) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(sizes, np.float32))
            return
        values = 0.01275 * random.standard_normal(sizes, np.float32)
        # As llama.cpp's own converter does: rows that are no whole blocks stay in float16.
        fits = sizes[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        stored = kind if fits else gguf.GGMLQuantizationType.F16
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, stored), raw_dtype=stored)

    width, hidden = shape["d_model"], shape["d_ff"]
    queries, keys = (shape[n] * shape["d_head"] for n in ("n_heads", "n_kv_heads"))
    add("token_embd", shape["vocab_size"], width)  # without another one it is the output head too
    for i in range(shape["n_layers"]):
        add(f"blk.{i}.attn_norm", width)
        add(f"blk.{i}.attn_q", queries, width)
        add(f"blk.{i}.attn_k", keys, width)
        add(f"blk.{i}.attn_v", keys, width)
        add(f"blk.{i}.attn_output", width, queries)
        add(f"blk.{i}.ffn_norm", width)
        add(f"blk.{i}.ffn_gate", hidden, width)
        add(f"blk.{i}.ffn_up", hidden, width)
        add(f"blk.{i}.ffn_down", width, hidden)
    add("output_norm", width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return parameters


def contestant(spec: dict[str, Any]) -> Contestant:
    try:
        import llama_cpp
    except ImportError as missing:
        raise SystemExit(
            f"{missing}: these rows need llama.cpp. Install it with `pip install -e '.[llama-cpp]'`, name "
            "an interpreter that has it with --peer-python, or choose other rows with --only"
        ) from None
    shape, batch, context = spec["shape"], spec["batch"], spec["context"]
    longest = context + spec["new_tokens"]
    is_float32 = spec["weights"] == "F32"
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "model.gguf"
        parameters = write_model(file, shape, longest, spec["weights"])
        llama_cpp.llama_backend_init()
        quiet = llama_cpp.llama_log_callback(lambda *_: None)  # it tells hundreds of lines
        llama_cpp.llama_log_set(quiet, None)
        settings = llama_cpp.llama_model_default_params()
        settings.use_mmap = False  # the file is gone after this block
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), settings)
        assert model, "llama.cpp could not read the model"
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = batch * longest
    options.n_batch = batch * context
    options.n_seq_max = batch
    options.n_threads = options.n_threads_batch = spec["threads"]
    kept = llama_cpp.GGML_TYPE_F32 if is_float32 else llama_cpp.GGML_TYPE_F16
    options.type_k = options.type_v = kept
    session = llama_cpp.llama_init_from_model(model, options)
    assert session, "llama.cpp could not make a context"
    entries = llama_cpp.llama_n_ctx(session)
    sampler = llama_cpp.llama_sampler_init_greedy()
    tokens = llama_cpp.llama_batch_init(batch * context, 0, 1)
    prompts = np.random.default_rng(0).integers(0, shape["vocab_size"], (batch, context)).tolist()

    def step(rows: list[list[int]], first: int) -> list[int]:
        """Appends tokens to all sequences, and draws the next one of each."""
        n = 0
        for sequence, row in enumerate(rows):
            for i, token in enumerate(row):
                tokens.token[n], tokens.pos[n] = token, first + i
                tokens.n_seq_id[n], tokens.seq_id[n][0] = 1, sequence
                tokens.logits[n] = i == len(row) - 1
                n += 1
        tokens.n_tokens = n
        assert llama_cpp.llama_decode(session, tokens) == 0
        lasts = [(sequence + 1) * len(row) - 1 for sequence, row in enumerate(rows)]
        return [llama_cpp.llama_sampler_sample(sampler, session, i) for i in lasts]

    def call(new_tokens: int) -> tuple[float, float]:
        begin = time.perf_counter()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(session), True)
        drawn = step(prompts, 0)
        first = time.perf_counter()
        for i in range(new_tokens - 1):
            drawn = step([[token] for token in drawn], context + i)
        return first - begin, time.perf_counter() - begin

    def burst(new_tokens: int) -> dict[str, Any]:
        return {**first_and_rest(call, context, new_tokens), "compiled": 0}

    call(spec["new_tokens"])
    width = 2 * shape["n_layers"] * shape["n_kv_heads"] * shape["d_head"]
    about = {"parameters": parameters, "versions": versions("llama_cpp_python", "gguf")}
    return Contestant(burst, about | {"kv_bytes": entries * width * (4 if is_float32 else 2)})


if __name__ == "__main__":
    serve(contestant)
