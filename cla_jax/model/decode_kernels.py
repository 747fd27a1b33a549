"""Kernels for attention through a cache, behind one contract; XLA's attention serves what they do not take.

None is chosen unless it is asked for by name: those for accelerators never ran on one, and `native` needs a
compiler.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax

from cla_jax import eviction
from cla_jax.config import LatentKV, ModelConfig
from cla_jax.messages import near_choice
from cla_jax.model import mosaic, paged
from cla_jax.model.attention import PagedKV, Partial
from cla_jax.model.native import attention as native
from cla_jax.model.platform import describe, warn_once

XLA = "xla"


class Attend(Protocol):
    def __call__(
        self, q_BKNH: jax.Array, kept: PagedKV, positions_BN: jax.Array, starts_BN: jax.Array, /
    ) -> Partial:
        """Attention of N scaled queries of each KV head to the entries that each sees."""
        ...


class Kernel(NamedTuple):
    attend: Attend
    kept_width: Callable[[int], int]  # of heads in the cache; they are padded with zeros
    queries: int  # that it takes for each KV head
    # Why it cannot serve a model, a cache format, a platform with its compute capability, and pages of so
    # many tokens, or rows.
    refusal: Callable[[ModelConfig, str, str, float, int | None], str | None]
    untried: str | None = None  # what was done instead, if it was never run on its hardware
    dtypes: tuple[str, ...] = ("bfloat16",)  # of attention
    latents: bool = False  # whether it reads them


KERNELS = {
    "native": Kernel(
        native.attend,
        native.kept_width,
        native.QUERIES,
        native.refusal,
        dtypes=("float32", "bfloat16"),
        latents=True,
    ),
    "mosaic": Kernel(
        mosaic.attend,
        mosaic.kept_width,
        mosaic.ROWS,
        mosaic.refusal,
        "compiled for H100 and run in jax's interpreter, never on a GPU",
    ),
    "paged": Kernel(
        paged.attend,
        paged.kept_width,
        paged.QUERIES,
        paged.refusal,
        "compiled for TPUs and run in jax's interpreter, never on a TPU",
    ),
}
NAMES = (XLA, *KERNELS)


def refusal(
    name: str,
    config: ModelConfig,
    format: str,
    platform: str,
    compute_capability: float,
    page: int | None = None,
) -> str | None:
    """Why a kernel cannot serve this model, cache format and hardware; None if it can.

    The cache has pages of `page` tokens, or a row of entries for each sequence.
    """
    kernel = KERNELS[name]
    if reason := kernel.refusal(config, format, platform, compute_capability, page):
        return reason
    if isinstance(config.kv, LatentKV) and not kernel.latents:
        return "it does not support model.kv.kind = latent"
    if config.compute_dtype not in kernel.dtypes:
        needed = " or ".join(kernel.dtypes)
        return f"it needs model.compute_dtype = {needed}, not {config.compute_dtype}"
    return None


def check(name: str, config: ModelConfig, caches: Sequence[str], page: int | None = None) -> None:
    """Raises ValueError for a kernel that cannot serve; warns, once, of one that was never tried on hardware.

    `caches` are cache formats, or eviction policies.
    """
    near_choice("attention", name, NAMES)
    if name == XLA:
        return
    for policy in filter(eviction.is_policy, caches):
        raise ValueError(
            f"attention = {name!r} does not support caches that evict tokens ({policy}): use 'xla'"
        )
    platform, capability = describe(jax.devices()[0])
    for format in dict.fromkeys(caches):
        if reason := refusal(name, config, format, platform, capability, page):
            raise ValueError(f"attention = {name!r} cannot be used for decoding: {reason}")
    if untried := KERNELS[name].untried:
        warn_once(f"attention = {name!r}: this kernel was {untried}; compare it with 'xla'")


def check_chunk(name: str, config: ModelConfig, chunk: int) -> None:
    """Raises ValueError for a kernel that does not read the cache in steps of `chunk` tokens.

    For scoring, where all steps are alike: XLA would compute all of them.
    """
    if name != XLA and chunk > (most := max(1, KERNELS[name].queries // config.q_groups)):
        raise ValueError(
            f"chunk = {chunk}: attention = {name!r} reads the cache of this model in steps of up to {most} "
            f"tokens; use --chunk {most}, or 'xla'"
        )
