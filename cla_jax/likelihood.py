"""Log-likelihoods of continuations, what texts have in common being computed once.

The options of a question have a common prefix. Such texts are a prefix group: the prefix, and the suffix
of each text. The prefix goes through the model once,

    by full forward       prefix and suffixes side by side in a row, kept apart by what a token may see
    through a KV cache    the prefix's cache is copied for each suffix, which then decodes on; for a group in
                          the group, its prefix decodes on, and is copied for what follows
    through one that      the context's tokens except the last are the prompt, which the policy sees; what
    evicts tokens         it keeps is copied for each continuation, which then decodes on

and a token's scores over the vocabulary exist only where a continuation is predicted.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from cla_jax.cache import Cache, CacheFormat, CacheSpec, cache_spec, round_up
from cla_jax.cache.evicting import evicting_spec
from cla_jax.compressor import Compressor
from cla_jax.config import ModelConfig
from cla_jax.decode import Weights, decode
from cla_jax.eviction import Policy
from cla_jax.mesh import AxisRules, row_shards
from cla_jax.model.attention import PrefixMask
from cla_jax.model.native.matmul import Packed
from cla_jax.model.transformer import ForwardOptions, Transformer, project
from cla_jax.prefix_groups import PrefixGroup, Rows, Text, doubled, pack, prefix_groups

Progress = Callable[[int, int], None]  # (texts done, texts in all)

ROWS = (128, 192, 256, 384, 512, 1024, 2048)  # tokens of a packed row, if no text is longer
STEP = 1024  # tokens of a batch of such rows on a CPU; accelerators take 16 times as many
CACHED = 8192  # tokens that the rows of a cache have room for, all together
SHORTEST = 128  # and one row
SLICE = 256  # tokens whose scores over the vocabulary exist at once


class Likelihood(NamedTuple):
    logprob: float  # of all targets, natural logarithm
    is_greedy: bool  # whether each target is the likeliest token


class _Place(NamedTuple):
    """Where in a batch a target is predicted, and for which text."""

    text: int
    row: int
    column: int
    target: int


# ------------------------------------------------------------------------------- by full forward


@functools.partial(jax.jit, static_argnames="options")
def _hidden(
    model: Transformer, tokens_BT, mask: PrefixMask, *, options: ForwardOptions
) -> jax.Array:
    return model(tokens_BT, options, mask=mask)


def by_forward(
    model: Transformer,
    options: ForwardOptions,
    texts: Sequence[Text],
    progress: Progress = lambda done, total: None,
) -> list[Likelihood]:
    """The likelihood of each text's targets, groups packed into rows of a full forward pass."""
    tally = _Tally(len(texts), progress)
    packed = _packed(texts, model.config.d_model)
    for tokens_BT, mask, places in _batches(texts, packed, rows_of(options.rules)):
        arrays = jax.device_put((tokens_BT, mask), options.rules.spec("batch", None))
        x_BTD = _hidden(model, *arrays, options=options)
        tally.add(_scores(model.head_VD, x_BTD, places, options.rules), places)
    return tally.result()


def _packed(texts: Sequence[Text], width: int) -> Rows:
    """Rows of the length that costs least: long ones leave little room unused, short ones attend to less.

    In rows as long as the model is wide, attention takes about as long as everything else (on a CPU).
    """
    groups = prefix_groups(texts)

    def cost(rows: Rows) -> int:
        return sum(len(same) * length * (length + width) for length, same in rows.items())

    return min((pack(texts, groups, shortest) for shortest in ROWS), key=cost)


def _batches(
    texts: Sequence[Text], packed: Rows, rows_of: Callable[[int], int]
) -> Iterator[tuple[np.ndarray, PrefixMask, list[_Place]]]:
    """Rows of groups, as many at once as `rows_of(length)` says: tokens, what sees what, targets."""
    tokens = STEP if jax.default_backend() == "cpu" else 16 * STEP
    for length, rows in packed.items():
        size = rows_of(tokens // length)
        for begin in range(0, len(rows), size):
            tokens_BT = np.zeros((size, length), np.int32)
            padding: Any = [np.full((size, length), value, np.int32) for value in (0, -1, 0)]
            mask = PrefixMask(*padding)
            places: list[_Place] = []
            for r, row in enumerate(rows[begin : begin + size]):
                column = 0
                for group in row:
                    column = _lay(group, texts, tokens_BT, mask, places, r, column)
            yield tokens_BT, mask, places


def _lay(
    group: PrefixGroup,
    texts: Sequence[Text],
    tokens_BT: np.ndarray,
    mask: Any,
    places: list[_Place],
    r: int,
    column: int,
) -> int:
    """Puts a group into row r from a column on; returns the column after it."""

    def put(member: int | PrefixGroup, start: int, column: int) -> int:
        """The tokens of a member from `start` on, and the members in it."""
        first, end = _span(texts, member)
        part = slice(column, column + end - start)
        tokens_BT[r, part] = texts[first].tokens[start:end]
        mask.positions_BT[r, part] = np.arange(start, end)
        mask.parts_BT[r, part] = column
        column = part.stop
        if isinstance(member, PrefixGroup):
            for inner in member.members:
                column = put(inner, end, column)
        else:
            places.extend(_places(texts, member, r, column - end))
        mask.ends_BT[r, part] = column
        return column

    return put(group, 0, column)


def _span(texts: Sequence[Text], member: int | PrefixGroup) -> tuple[int, int]:
    """A text that has the tokens of a member, and where they end in it."""
    if isinstance(member, PrefixGroup):
        return next(member.texts), member.prefix
    return member, len(texts[member].tokens)


def _places(texts: Sequence[Text], i: int, row: int, column: int) -> list[_Place]:
    """Where the targets of text i are predicted, whose first token is, or would be, in this column."""
    text = texts[i]
    return [
        _Place(i, row, column + text.given + t, target) for t, target in enumerate(text.targets)
    ]


# ---------------------------------------------------------------------------- through a KV cache


@functools.partial(jax.jit, static_argnames="spec", donate_argnames="cache")
def _chunk(weights: Weights, cache: Cache, tokens_BT, counts_B, *, spec: CacheSpec):
    return decode(weights, spec, cache, tokens_BT, counts_B)


@jax.jit
def _gather_rows(cache: Cache, rows_B: jax.Array) -> Cache:
    """A cache whose rows are copies of the named rows of another."""
    return jax.tree.map(lambda a: a.at[rows_B].get(out_sharding=_layout(a)), cache)


def _layout(array: jax.Array) -> PartitionSpec | None:
    return None if jax.sharding.get_abstract_mesh().empty else jax.typeof(array).sharding.spec


def through_cache(
    weights: Weights,
    config: ModelConfig,
    format: str | CacheFormat,
    texts: Sequence[Text],
    *,
    chunk: int,
    attention: str = "xla",
    rules: AxisRules = AxisRules(),
    progress: Progress = lambda done, total: None,
) -> list[Likelihood]:
    """The likelihood of each text's targets, decoded through a cache in steps of `chunk` tokens.

    `attention` reads the cache, as in `cache_spec`.

    A suffix starts from a copy of its prefix's cache, as decoding the prefix left it. For formats that store
    each token separately, the result is that of decoding the whole text. (KIVI's is too, but for where its
    steps begin: see cache/kivi.py.)
    """
    tally = _Tally(len(texts), progress)
    by_capacity: dict[int, list[PrefixGroup]] = {}
    for group in prefix_groups(texts):
        longest = max(len(texts[i].tokens) for i in group.texts)
        capacity = doubled(SHORTEST, longest)
        by_capacity.setdefault(capacity, []).append(group)
    for capacity, groups in sorted(by_capacity.items()):
        batch = rows_of(rules)(CACHED // capacity)
        spec = cache_spec(
            config,
            format,
            batch=batch,
            capacity=capacity,
            chunk=chunk,
            rules=rules,
            attention=attention,
        )
        groups.sort(key=lambda group: group.prefix)
        members = [_Member(0, 0, group) for group in groups]
        _decode_members(weights, spec, None, texts, members, tally)
    return tally.result()


class _Member(NamedTuple):
    """What follows the first `start` tokens, which a row of a cache has."""

    row: int
    start: int
    member: int | PrefixGroup  # a text, or a group of which the prefix follows

    def length(self, texts: Sequence[Text]) -> int:
        return _span(texts, self.member)[1] - self.start


def _decode_members(
    weights: Weights,
    spec: CacheSpec,
    cache: Cache | None,
    texts: Sequence[Text],
    members: Sequence[_Member],
    tally: "_Tally",
) -> None:
    """Decodes and scores members of groups, as many at once as the cache has rows, and what is in them.

    Each starts from a copy of its group's row of `cache`; without one, from an empty cache.
    """
    for begin in range(0, len(members), spec.batch):
        batch = members[begin : begin + spec.batch]
        if cache is None:
            copies = spec.allocate()
        else:
            rows = np.zeros(spec.batch, np.int32)
            rows[: len(batch)] = [each.row for each in batch]
            copies = _gather_rows(cache, jax.device_put(rows, spec.rules.spec("batch")))
        copies = _decode_rows(weights, spec, copies, texts, batch, tally)
        inner = [
            _Member(r, each.member.prefix, member)
            for r, each in enumerate(batch)
            if isinstance(each.member, PrefixGroup)
            for member in each.member.members
        ]
        inner.sort(key=lambda each: each.length(texts))  # those of like length together
        _decode_members(weights, spec, copies, texts, inner, tally)
        del copies  # before there are others


def _decode_rows(
    weights: Weights,
    spec: CacheSpec,
    cache: Cache,
    texts: Sequence[Text],
    rows: Sequence[_Member | None],
    tally: "_Tally",
) -> Cache:
    """Decodes a member in each row, and scores those that are texts; None is no member."""
    places: list[_Place] = []
    tokens: list[Sequence[int]] = []
    for r, each in enumerate(rows):
        if each is None:
            tokens.append(())
            continue
        first, end = _span(texts, each.member)
        tokens.append(texts[first].tokens[each.start : end])
        if isinstance(each.member, int):
            places += _places(texts, each.member, r, -each.start)

    def score(first: int, x_BTD: jax.Array) -> None:
        here = [p for p in places if first <= p.column < first + spec.chunk]
        moved = [p._replace(column=p.column - first) for p in here]
        tally.add(_scores(weights.head, x_BTD, moved, spec.rules), moved)

    return _feed(weights, spec, cache, tokens, score)


def _feed(
    weights: Weights,
    spec: CacheSpec,
    cache: Cache,
    texts: Sequence[Sequence[int]],
    visit: Callable[[int, jax.Array], None] = lambda first, x_BTD: None,
) -> Cache:
    """Appends a text to each row; `visit` is shown each chunk's first column and hidden states [B, T, D]."""
    T = spec.chunk
    tokens_BT = np.zeros((spec.batch, round_up(max(map(len, texts)), T)), np.int32)
    lengths_B = np.zeros(spec.batch, np.int32)
    for row, tokens in enumerate(texts):
        tokens_BT[row, : len(tokens)] = tokens
        lengths_B[row] = len(tokens)
    rules = spec.rules
    for first in range(0, tokens_BT.shape[1], T):
        arrays = jax.device_put(
            (tokens_BT[:, first : first + T], np.clip(lengths_B - first, 0, T)),
            (rules.spec("batch", None), rules.spec("batch")),
        )
        x_BTD, cache = _chunk(weights, cache, *arrays, spec=spec)
        visit(first, x_BTD)
    return cache


# --------------------------------------------------------------- through a cache that evicts tokens


def through_policy(
    weights: Weights,
    config: ModelConfig,
    policy: Policy,
    classes: bytes,
    texts: Sequence[Text],
    *,
    chunk: int,
    progress: Progress = lambda done, total: None,
) -> tuple[list[Likelihood], list[float]]:
    """The likelihood of each text's targets, decoded through what a policy keeps of its context.

    Also the share of each prompt that is kept, over all KV layers and heads, in no order.

    The prompt is the context without its last token, so all targets are predicted by tokens that are decoded.
    (Of a context of one token, the prompt is that token.) It is encoded whole, once for all texts that have
    it. `weights` are on one device; `classes` are those of `evicting_spec`. Raises ValueError for prompts
    that the policy does not take, and as `evicting_spec` does.
    """
    tally, kept = _Tally(len(texts), progress), []
    members: dict[tuple[int, ...], list[int]] = {}
    for i, one in enumerate(texts):
        members.setdefault(one.tokens[: max(one.given, 1)], []).append(i)
    policy.check([len(prompt) for prompt in members])
    by_capacity: dict[int, list[tuple[int, ...]]] = {}
    for prompt, indices in members.items():
        longest = max(len(texts[i].tokens) for i in indices)
        by_capacity.setdefault(doubled(SHORTEST, longest), []).append(prompt)
    for capacity, prompts in sorted(by_capacity.items()):
        batch = min(max(CACHED // capacity, 1), len(prompts))
        spec = evicting_spec(
            config, policy, classes=classes, batch=batch, capacity=capacity, chunk=chunk
        )
        compressor, cache = Compressor(weights, spec), spec.allocate()
        prompts.sort(key=len)
        for begin in range(0, len(prompts), batch):
            contexts = prompts[begin : begin + batch]
            # Always the same number of prompts: programs are compiled for it.
            filled = dict(enumerate(contexts + contexts[-1:] * (batch - len(contexts))))
            most = {
                row: max(len(texts[i].tokens) for i in members[prompt]) - len(prompt)
                for row, prompt in filled.items()
            }
            x_BTD, cache = compressor.fill(cache, filled, most)
            kept += compressor.kept_of_prompts()[: len(contexts)]
            # What the prompt itself predicts: of a context of one token, the first target.
            places = [
                _Place(i, row, texts[i].given + t, target)
                for row, prompt in enumerate(contexts)
                for i in members[prompt]
                for t, target in enumerate(texts[i].targets[: len(prompt) - texts[i].given])
            ]
            tally.add(_scores(weights.head, x_BTD, places, compressor.spec.rules), places)
            texts_of = [
                sorted(members[prompt], key=lambda i: len(texts[i].tokens)) for prompt in contexts
            ]
            for turn in range(max(map(len, texts_of))):
                here = [
                    _Member(r, len(prompt), of[turn]) if turn < len(of) else None
                    for r, (of, prompt) in enumerate(zip(texts_of, contexts, strict=True))
                ]
                copies = jax.tree.map(jnp.copy, cache)
                _decode_rows(weights, compressor.spec, copies, texts, here, tally)
    return tally.result(), kept


# ---------------------------------------------------------------------------------------- scores


@functools.partial(jax.jit, static_argnames="rules")
def _slice_scores(head_VD, x_BTD, rows_N, columns_N, targets_N, *, rules):
    """The log-probability of each target, and whether it is the likeliest token."""
    whole = rules.spec(None, None)
    x_ND = x_BTD.at[rows_N, columns_N].get(out_sharding=whole)
    # One row of N positions, which no mesh axis splits.
    here = dataclasses.replace(rules, batch=None)
    logits_NV = project(x_ND[None], head_VD, here)[0]
    if whole is not None:
        logits_NV = jax.reshard(logits_NV, whole)
    is_target_NV = jnp.arange(logits_NV.shape[-1]) == targets_N[:, None]
    chosen_N = jnp.sum(jnp.where(is_target_NV, logits_NV, 0), axis=-1)
    logprob_N = chosen_N - jax.nn.logsumexp(logits_NV, axis=-1)
    return logprob_N, jnp.argmax(logits_NV, axis=-1) == targets_N


def _scores(
    head_VD: jax.Array | Packed, x_BTD: jax.Array, places: Sequence[_Place], rules: AxisRules
) -> Iterable[tuple[jax.Array, jax.Array]]:
    """(log-probability, is likeliest) of the targets at some places, in slices of one size."""
    scores = []
    for begin in range(0, len(places), SLICE):
        padded = np.zeros((3, SLICE), np.int32)
        part = places[begin : begin + SLICE]
        padded[:, : len(part)] = np.array([place[1:] for place in part]).T
        arrays = jax.device_put(tuple(padded), rules.spec(None))
        scores.append(_slice_scores(head_VD, x_BTD, *arrays, rules=rules))
    return scores


class _Tally:
    """Sums over the targets of each text. The host looks at a batch when the next is under way."""

    def __init__(self, texts: int, progress: Progress):
        self._logprobs = np.zeros(texts)
        self._greedy = np.ones(texts, bool)
        self._seen: set[int] = set()
        self._progress = progress
        self._waiting: tuple[Iterable, Sequence[_Place]] = ((), ())

    def add(self, slices: Iterable[tuple[jax.Array, jax.Array]], places: Sequence[_Place]) -> None:
        waiting, self._waiting = self._waiting, (slices, places)
        self._collect(*waiting)

    def result(self) -> list[Likelihood]:
        self.add((), ())
        return [
            Likelihood(float(p), bool(g)) for p, g in zip(self._logprobs, self._greedy, strict=True)
        ]

    def _collect(self, slices: Iterable, places: Sequence[_Place]) -> None:
        for n, (logprob_N, is_likeliest_N) in enumerate(slices):
            texts = [place.text for place in places[n * SLICE : (n + 1) * SLICE]]
            np.add.at(self._logprobs, texts, np.asarray(logprob_N)[: len(texts)])
            np.logical_and.at(self._greedy, texts, np.asarray(is_likeliest_N)[: len(texts)])
            self._seen.update(texts)
        self._progress(len(self._seen), len(self._logprobs))


def rows_of(rules: AxisRules) -> Callable[[int], int]:
    """Rows of a batch: at least so many, and as many as the devices can share evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty or rules.batch is None else row_shards(mesh)
    return lambda wanted: round_up(max(wanted, 1), shards)
