"""What the user chooses when a model generates or is scored. It is not part of a run's config."""

import dataclasses
import math
from numbers import Integral
from typing import Literal

# What reads a KV cache: XLA, or a kernel of `cla_jax.model.decode_kernels`.
CacheAttention = Literal["xla", "native", "mosaic", "paged"]
# What multiplies tokens with weights in decoding: XLA, or the kernel of `cla_jax.model.native.matmul`.
DecodingMatmul = Literal["xla", "native"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    # 0 takes the most likely token; 1 samples the model's distribution.
    temperature: float = 1.0
    # Sample from the k most likely tokens only; 0 for all.
    top_k: int = 0
    # Sample from the smallest set of tokens whose total probability is at least this.
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature != 0 and not 1e-6 <= self.temperature < math.inf:  # NaN too
            raise ValueError(
                f"temperature = {self.temperature} must be 0 (the most likely token), or finite and at "
                "least 1e-6"
            )
        if not isinstance(self.top_k, Integral) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k} must be an integer, and not negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must lie in (0, 1]")


def check_new_tokens(count: int) -> None:
    """Raises ValueError for a number of tokens that cannot be generated."""
    if not isinstance(count, Integral):
        raise ValueError(f"new_tokens = {count} must be an integer")
    if count < 1:
        raise ValueError(f"new_tokens = {count} must be positive")
    if count >= 1 << 31:
        raise ValueError(f"new_tokens = {count} must be below 2**31")


def check_chunk(chunk: int, seq_len: int) -> None:
    """Raises ValueError unless `chunk` divides `seq_len`, the window of a run."""
    if chunk < 1:
        raise ValueError(f"chunk = {chunk} must be positive")
    if seq_len % chunk:
        nearest = min(
            (d for d in range(1, seq_len + 1) if not seq_len % d), key=lambda d: abs(d - chunk)
        )
        raise ValueError(
            f"chunk = {chunk} does not divide data.seq_len = {seq_len}; {nearest} does"
        )
