"""Hugging Face's Llama under torch, in a shape of `benchmarks.common`.

Imports nothing of this repository that needs jax, so it may run in an environment of its own. Its
users take `torch` and `transformers` from here, where their absence is explained.
"""

from typing import Any

try:
    import torch
    import transformers
except ImportError as missing:
    raise SystemExit(
        f"{missing}: the peer needs torch and transformers. Install them with "
        "`pip install -e '.[bench]'`, name an interpreter that has them with --peer-python, or "
        "measure this repository alone with --only ours"
    ) from None

__all__ = ["PACKAGES", "llama", "torch", "transformers"]

PACKAGES = ("torch", "transformers")


def llama(
    shape: dict[str, Any], *, positions: int, use_cache: bool
) -> transformers.LlamaForCausalLM:
    """A model of random float32 weights whose attention is scaled_dot_product_attention."""
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=shape["vocab_size"],
            hidden_size=shape["d_model"],
            intermediate_size=shape["d_ff"],
            num_hidden_layers=shape["n_layers"],
            num_attention_heads=shape["n_heads"],
            num_key_value_heads=shape["n_kv_heads"],
            head_dim=shape["d_head"],
            max_position_embeddings=positions,
            initializer_range=0.01275,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            use_cache=use_cache,
            bos_token_id=None,
            eos_token_id=None,  # ids are drawn at random: none of them ends a text
            attn_implementation="sdpa",
            dtype=torch.float32,
        )
    )
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    return model
