"""Hugging Face's `generate` under torch, as a contestant of `benchmarks.serving`.

All requests are one batch. With `reuse`, the common prefix goes through the model once. Its cache is then
repeated for every request, as the documentation of transformers on caches describes. So the prefix is
computed once, but stored once for each request.
"""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.child import Contestant, serve, versions
from benchmarks.torch_peer import PACKAGES, llama, torch, transformers


def contestant(spec: dict[str, Any]) -> Contestant:
    torch.set_num_threads(spec["threads"])
    prompts = torch.tensor(spec["prompts"])  # of equal length
    new_tokens, shared = spec["new_tokens"], spec["shared"] if spec["reuse"] else 0
    positions = prompts.shape[1] + new_tokens
    model = llama(spec["shape"], positions=positions, use_cache=True).eval()
    settings = transformers.GenerationConfig(
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,  # the cache too
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
    )

    def burst(_: int) -> dict[str, Any]:
        begin = time.perf_counter()
        with torch.inference_mode():
            cache = transformers.DynamicCache(config=model.config)
            if shared:
                model(prompts[:1, :shared], past_key_values=cache, logits_to_keep=1)
                cache.batch_repeat_interleave(len(prompts))
            output = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                past_key_values=cache,
                generation_config=settings,
            )
        seconds = time.perf_counter() - begin
        assert output.sequences.shape == (len(prompts), positions)
        layers = output.past_key_values.layers
        kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        tokens = len(prompts) * new_tokens
        return {"tokens_per_second": tokens / seconds, "kv_bytes": kv_bytes}

    burst(0)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Contestant(burst, {"parameters": parameters, "versions": versions(*PACKAGES)})


if __name__ == "__main__":
    serve(contestant)
