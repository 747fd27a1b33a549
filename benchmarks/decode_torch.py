"""Hugging Face's `generate` under torch, as one contestant of `benchmarks.decode`.

Its settings are those that its documentation recommends for speed: inference mode, and attention by
scaled_dot_product_attention. With the static cache, `generate` itself compiles the decode step, which on a
CPU it must be told to do.
"""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.child import Contestant, serve, versions
from benchmarks.common import first_and_rest
from benchmarks.torch_peer import PACKAGES, llama, torch, transformers


class Stamps(transformers.generation.BaseStreamer):
    """When `generate` handed over what: first the prompt, then every new token."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: Any) -> None:  # noqa: ARG002
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def contestant(spec: dict[str, Any]) -> Contestant:
    torch.set_num_threads(spec["threads"])
    counters = torch._dynamo.utils.counters["stats"]
    batch, context = spec["batch"], spec["context"]
    model = llama(spec["shape"], positions=context + spec["new_tokens"], use_cache=True).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, model.config.vocab_size, (batch, context), generator=generator)
    settings = transformers.GenerationConfig(
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
        cache_implementation="static" if spec["static"] else None,
        return_dict_in_generate=True,  # the cache too
        disable_compile=not spec["compile"],
    )
    if spec["compile"]:
        settings.compile_config = transformers.CompileConfig(mode="default", dynamic=False)
        # Without it `generate` compiles on accelerators only. Its own switch, though a private one.
        settings.compile_config._compile_all_devices = True

    kv_bytes = 0

    def call(new_tokens: int) -> tuple[float, float]:
        nonlocal kv_bytes
        stamps = Stamps()
        settings.max_new_tokens = new_tokens
        begin = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                generation_config=settings,
                streamer=stamps,
            )
        end = time.perf_counter()
        assert output.sequences.shape == (batch, context + new_tokens)
        layers = output.past_key_values.layers
        kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        return stamps.times[1] - begin, end - begin

    def burst(new_tokens: int) -> dict[str, Any]:
        before = counters["unique_graphs"]
        times = first_and_rest(call, context, new_tokens)
        return {**times, "compiled": counters["unique_graphs"] - before}

    call(spec["new_tokens"])  # compiles, if it shall
    assert bool(counters["unique_graphs"]) == spec["compile"], "compiled, or did not"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Contestant(
        burst, {"parameters": parameters, "versions": versions(*PACKAGES), "kv_bytes": kv_bytes}
    )


if __name__ == "__main__":
    serve(contestant)
