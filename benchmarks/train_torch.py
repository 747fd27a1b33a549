"""Hugging Face's `LlamaForCausalLM` under torch, as one contestant of `benchmarks.train_step`.

The fastest settings that compute the same thing: scaled_dot_product_attention, no KV cache, the fused
AdamW, gradients set to None, one clipping over all gradients.
"""

import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.child import Contestant, serve, versions
from benchmarks.torch_peer import PACKAGES, llama, torch


def contestant(spec: dict[str, Any]) -> Contestant:
    torch.set_num_threads(spec["threads"])
    shape, settings = spec["shape"], spec["optimizer"]
    model = llama(shape, positions=spec["seq_len"], use_cache=False).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings["peak_lr"],
        betas=(settings["b1"], settings["b2"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        fused=True,
    )
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: 0.1 + 0.45 * (1 + math.cos(math.pi * min(step / spec["total_steps"], 1))),
    )
    tokens = torch.randint(
        0,
        shape["vocab_size"],
        (spec["batches"], spec["batch_size"], spec["seq_len"] + 1),
        generator=torch.Generator().manual_seed(0),
    )

    def mean_loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=inputs).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    if spec["compile"]:
        mean_loss = torch.compile(mean_loss)
    batch = 0

    def steps(count: int) -> dict[str, Any]:
        nonlocal batch
        loss = torch.zeros(())
        for _ in range(count):
            window = tokens[batch % len(tokens)]
            batch += 1
            loss = mean_loss(window[:, :-1], window[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip_norm"], foreach=True)
            optimizer.step()
            rate.step()
            optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.item()}

    first = steps(1)  # compiles, allocates the moments
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Contestant(steps, {"parameters": parameters, "versions": versions(*PACKAGES), **first})


if __name__ == "__main__":
    serve(contestant)
