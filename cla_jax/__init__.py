"""Cross-layer attention in JAX: training, cached decoding, accuracy against KV-cache memory."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cla_jax.decoder import Decoder

__version__ = "0.1.0"
__all__ = ["Decoder"]


def __getattr__(name: str) -> Any:
    """Public names, imported when they are first used: `import cla_jax` does not wait for jax."""
    if name == "Decoder":
        from cla_jax.decoder import Decoder

        return Decoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
