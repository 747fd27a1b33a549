"""Cross-layer attention in JAX: training, cached decoding, accuracy against KV-cache memory."""

__version__ = "0.1.0"
