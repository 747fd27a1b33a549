"""Hugging Face's `LlamaForCausalLM` under torch, as one contestant of `benchmarks.train_step`.

The fastest settings that compute the same thing: scaled_dot_product_attention, no KV cache, the fused
AdamW, gradients set to None, one clipping over all gradients. Imports nothing of this repository that
needs jax, so it may run in an environment of its own.
"""

import importlib.metadata
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

try:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
except ImportError as missing:
    raise SystemExit(
        f"{missing}: the peer needs torch and transformers. Install them with "
        "`pip install -e '.[bench]'`, name an interpreter that has them with --peer-python, or "
        "measure this repository alone with --only ours"
    ) from None

from benchmarks.child import Contestant, serve


def contestant(spec: dict[str, Any]) -> Contestant:
    torch.set_num_threads(spec["threads"])
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    shape, settings = spec["shape"], spec["optimizer"]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape["vocab_size"],
            hidden_size=shape["d_model"],
            intermediate_size=shape["d_ff"],
            num_hidden_layers=shape["n_layers"],
            num_attention_heads=shape["n_heads"],
            num_key_value_heads=shape["n_kv_heads"],
            head_dim=shape["d_head"],
            max_position_embeddings=shape["seq_len"],
            initializer_range=0.01275,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
            dtype=torch.float32,
        )
    ).train()
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
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
        (spec["batches"], shape["batch_size"], shape["seq_len"] + 1),
        generator=torch.Generator().manual_seed(0),
    )

    def mean_loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=inputs).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    if spec["compile"]:
        mean_loss = torch.compile(mean_loss)
    batch = 0

    def steps(count: int) -> float:
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
        return loss.item()

    first_loss = steps(1)  # compiles, allocates the moments
    parameters = sum(parameter.numel() for parameter in model.parameters())
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return Contestant(steps, {"parameters": parameters, "loss": first_loss, "versions": versions})


if __name__ == "__main__":
    serve(contestant)
