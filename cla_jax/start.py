"""Starting from another run: what is refused, and which layers keep their keys and values.

Only config.json of the other run is read here; `cla_jax.uptrain` converts its weights.
"""

import dataclasses
import random
from collections.abc import Mapping

from cla_jax import runs
from cla_jax.config import (
    HEAD_INITS,
    LATENT_INITS,
    Config,
    FromRun,
    HeadsKV,
    LatentKV,
    ModelConfig,
    Scratch,
    YarnScaling,
)
from cla_jax.fields import difference
from cla_jax.messages import shown
from cla_jax.typed_numbers import is_digits

# What a conversion changes, and what does not decide which weights a model has.
_MAY_DIFFER = {"n_kv_heads", "kv_map", "init_std", "compute_dtype"}


def source(start: FromRun) -> runs.Run:
    """The run that another starts from. Raises ValueError if there is none with a checkpoint."""
    if not start.run:
        raise ValueError("start.run is empty: give the directory of the run to start from")
    try:
        run = runs.find_run(start.run)
        run.check_saved()
    except ValueError as error:
        needed = ", the teacher of this run" if start.distill_weight else ""
        raise ValueError(f"start.run = {shown(start.run)}{needed}: {error}") from None
    return run


def check(source_config: Config, config: Config, run: runs.Run) -> None:
    """Raises ValueError, naming both sides, unless the source's model converts into that of `config`."""
    a, b = source_config.model, config.model
    to_latent = isinstance(a.kv, HeadsKV) and isinstance(b.kv, LatentKV)
    may_differ = _MAY_DIFFER | ({"kv"} if to_latent else set())
    fields = lambda model: {
        key: value for key, value in dataclasses.asdict(model).items() if key not in may_differ
    }
    what = f"start.run = {shown(str(run.path))}"
    if isinstance(a.kv, LatentKV) and (a.kv, a.n_kv_heads, a.sharing) != (
        b.kv,
        b.n_kv_heads,
        b.sharing,
    ):
        raise ValueError(
            f"{what} has {_words(a)}, this run has {_words(b)}: a model with latents can only be trained "
            "further as it is; it cannot be converted"
        )
    if differing := difference(fields(b), fields(a)):
        key, (own, other) = next(iter(differing.items()))
        raise ValueError(
            f"{what} has model.{key} = {other}, but this run has {own}: they must be equal"
        )
    if a.n_kv_heads % b.n_kv_heads:
        raise ValueError(
            f"{what} has model.n_kv_heads = {a.n_kv_heads}: this run's model.n_kv_heads = {b.n_kv_heads} "
            "must divide it"
        )
    if to_latent:
        _check_latent(a, b, config.start, what)
    elif isinstance(config.start, FromRun) and config.start.init not in HEAD_INITS:
        raise ValueError(
            f"start.init = {config.start.init} makes latents of heads, but this run has model.kv.kind = "
            f"{b.kv.kind} and {what} has {a.kv.kind}: use one of {', '.join(HEAD_INITS)}"
        )
    changed = (a.sharing, a.n_kv_heads) != (b.sharing, b.n_kv_heads)
    for unsupported, kind in (
        (a.qk_norm, "model.qk_norm = True"),
        (a.sharing.is_split or b.sharing.is_split, "different maps for keys and values"),
    ):
        if changed and unsupported:
            raise ValueError(
                f"{what} has {_words(a)}, this run has {_words(b)}: models with {kind} cannot be converted"
            )
    producers = {kv.layer for kv in a.sharing.kv_layers}
    for kv in b.sharing.kv_layers:
        if kv.layer not in producers:
            raise ValueError(
                f"layer {kv.layer} is a producer in this run's kv_map {b.kv_map}, but not in {what} (kv_map "
                f"{a.kv_map}): a conversion can remove producers, not add them"
            )
    for field in ("tokenizer", "end_token", "begin_token"):
        own, other = getattr(config.data, field), getattr(source_config.data, field)
        # Files are compared by their content, when the data is there.
        if own != other and not (str(own).endswith(".json") and str(other).endswith(".json")):
            raise ValueError(
                f"{what} has data.{field} = {other!r}, but this run has {own!r}: they must be equal"
            )


def _words(model: ModelConfig) -> str:
    """What a conversion could change of a model."""
    heads = f"{model.n_kv_heads} KV head{'s' * (model.n_kv_heads > 1)}"
    if isinstance(model.kv, LatentKV):
        heads = f"latents of rank {model.kv.rank} with {model.kv.rope_dims} rotated dimensions"
    return f"{heads} and kv_map {model.kv_map}"


def _check_latent(
    source_model: ModelConfig, model: ModelConfig, start: FromRun | Scratch, what: str
) -> None:
    """Raises ValueError unless the heads of the source can become the latents of `model`."""
    assert isinstance(model.kv, LatentKV)
    if isinstance(start, FromRun) and start.init not in LATENT_INITS:
        raise ValueError(
            f"start.init = {start.init} joins heads, but this run has model.kv.kind = latent: use one of "
            f"{', '.join(LATENT_INITS)}"
        )
    if source_model.d_head % model.kv.rope_dims:
        raise ValueError(
            f"{what} has model.d_head = {source_model.d_head}: this run's model.kv.rope_dims = "
            f"{model.kv.rope_dims} must divide it, so that its keys have frequencies of the source"
        )
    scaling = source_model.rope_scaling
    if isinstance(scaling, YarnScaling) and model.kv.rope_dims != source_model.d_head:
        raise ValueError(
            f"{what} has model.rope_scaling.kind = {scaling.kind}, whose frequencies depend on the number of "
            f"dimensions: this run's model.kv.rope_dims must be {source_model.d_head}, not "
            f"{model.kv.rope_dims}"
        )


def check_start(config: Config) -> None:
    """Raises ValueError for a start that cannot be; reads config.json of the other run and no more."""
    if isinstance(config.start, FromRun):
        run = source(config.start)
        check(run.config(), config, run)


# ------------------------------------------------------------------- which layers keep producing


def fixed_producers(config: ModelConfig) -> set[int]:
    """The producers that no conversion can remove: of each sliding window, the first."""
    first: dict[int, int] = {}
    for layer in sorted(set(config.resolved_kv_map)):
        first.setdefault(config.resolved_windows[layer], layer)
    return set(first.values())


def random_map(config: ModelConfig, producers: int, seed: int) -> str:
    """A kv_map of so many producers, drawn among those of a model."""
    fixed = fixed_producers(config)
    others = sorted(set(config.resolved_kv_map) - fixed)
    return map_of(config, fixed.union(random.Random(seed).sample(others, producers - len(fixed))))


def least_damaged(config: ModelConfig, damage: Mapping[int, float], producers: int) -> str:
    """The kv_map of so many producers whose consumers do the least damage one by one."""
    fixed = fixed_producers(config)
    costly = sorted(damage, key=lambda layer: -damage[layer])
    return map_of(config, fixed.union(costly[: producers - len(fixed)]))


def map_of(config: ModelConfig, producers: set[int]) -> str:
    """The map where each layer reads the newest of these producers at or below what it reads now.

    It has the same sliding window.
    """
    windows = config.resolved_windows
    return ",".join(
        str(max(kept for kept in producers if kept <= read and windows[kept] == windows[read]))
        for read in config.resolved_kv_map
    )


def resolved_map(form: str, config: ModelConfig) -> tuple[str, int, int] | None:
    """`random:N`, `random:N:SEED` or `damage:N` as (kind, N, seed); None for a form of kv_map.

    Raises ValueError for a number of producers that the model cannot be left with.
    """
    kind, *rest = form.split(":")
    if kind not in ("random", "damage"):
        return None
    forms = {"random": "random:PRODUCERS[:SEED]", "damage": "damage:PRODUCERS"}
    if not (1 <= len(rest) <= (2 if kind == "random" else 1)) or not all(map(is_digits, rest)):
        raise ValueError(f"--kv-map {shown(form)} must have the form {forms[kind]}")
    if isinstance(config.kv, LatentKV):
        raise ValueError(f"--kv-map {shown(form)}: a model with latents keeps its kv_map")
    producers, least = int(rest[0]), len(fixed_producers(config))
    if not least <= producers <= config.n_kv_layers:
        kinds = f" and layers with {least} different sliding windows" if least > 1 else ""
        raise ValueError(
            f"--kv-map {shown(form)}: the source has {config.n_kv_layers} producers "
            f"(kv_map {config.kv_map}){kinds}, so the run can have {least} to {config.n_kv_layers}"
        )
    return kind, producers, int(rest[1]) if len(rest) > 1 else 0
