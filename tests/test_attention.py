import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cla_jax.model import attention
from cla_jax.model.attention import (
    EMPTY,
    KV,
    Segment,
    StepPositions,
    attend_segments,
    causal_attention,
    choose_backend,
    cudnn_refusal,
    merge,
    normalized,
    partial_attention,
    window_starts,
)
from tests.conftest import MODEL, replace

B, T, K, G, H, BLOCK = 2, 13, 2, 3, 6, 4


def inputs(S=16):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (B, T, K, G, H))
    k, v = (jax.random.normal(key, (B, S, K, H)) for key in keys[1:])
    return q, KV(k, v)


def segment(kv, n):
    """A cache of n tokens in blocks; what lies beyond them is marked empty."""

    def read(i):
        return KV(*(jax.lax.dynamic_slice_in_dim(a, i * BLOCK, BLOCK, 1) for a in kv))

    def positions(i):
        entries = i * BLOCK + jnp.arange(BLOCK)[None]
        return jnp.where(entries < n, entries, EMPTY)

    return Segment(read, positions, jnp.int32(0), jnp.int32(-(-n // BLOCK)), tuple(kv))


def at_once(kv, positions):
    """A segment of one block."""
    return Segment(lambda _: kv, lambda _: positions, 0, 1, tuple(kv))


def blockwise(q, kv, first_query, starts):
    n = first_query + q.shape[1]
    positions = jnp.broadcast_to(first_query + jnp.arange(q.shape[1]), starts.shape)
    return attend_segments(q, [segment(kv, n)], StepPositions(positions, starts, jnp.full(B, n)))


@pytest.mark.parametrize("starts", [[0, 0], [3, 9]])
def test_block_by_block_equals_the_whole(starts):
    q, kv = inputs()
    starts = jnp.broadcast_to(jnp.array(starts)[:, None], (B, T))
    whole = causal_attention(q, KV(*(a[:, :T] for a in kv)), starts_BT=starts)
    blocks = blockwise(q, kv, 0, starts)
    # A query before its start sees nothing and gives zeros.
    seen = (jnp.arange(T) >= starts)[:, :, None, None, None]
    assert jnp.abs(jnp.where(seen, blocks - whole, 0)).max() < 1e-6
    assert (jnp.where(seen, 0, blocks) == 0).all()
    # Later queries over the same cache, as decoding has them.
    tail = blockwise(q[:, 9:], kv, 9, starts[:, 9:])
    assert jnp.abs(tail - blocks[:, 9:]).max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["causal", "starts", "seen"])
def test_queries_in_blocks_give_the_same_output_and_gradients(monkeypatch, mask):
    q, kv = inputs()
    kv = KV(*(a[:, :T] for a in kv))
    starts = jnp.maximum(jnp.arange(T) - jnp.array([[3], [6]]), 0)
    seen = jax.random.bernoulli(jax.random.key(3), 0.5, (B, T, T)) | jnp.eye(T, dtype=bool)
    masks = {"causal": {}, "starts": {"starts_BT": starts}, "seen": {"seen_BTS": jnp.tril(seen)}}
    weight = jax.random.normal(jax.random.key(4), q.shape)

    def outputs(block):
        monkeypatch.setattr(attention, "query_block", lambda queries: block)
        loss = lambda q, kv: (causal_attention(q, kv, **masks[mask]) * weight).sum()
        return jax.tree.leaves(jax.value_and_grad(loss, (0, 1))(q, kv))

    for whole, blocks in zip(outputs(T), outputs(5), strict=True):
        assert jnp.abs(blocks - whole).max() < 1e-5


def test_a_block_of_queries_has_no_scores_of_later_keys(monkeypatch):
    q, kv = inputs()
    monkeypatch.setattr(attention, "query_block", lambda queries: 5)
    program = str(jax.make_jaxpr(causal_attention)(q, KV(*(a[:, :T] for a in kv))))
    for queries, keys in ((5, 5), (5, 10), (3, 13)):
        assert f"f32[{B},{K},{queries * G},{keys}]" in program
    assert f"f32[{B},{K},{5 * G},{T}]" not in program


def test_parts_of_a_cache_in_any_order_give_the_whole():
    """Two segments, one of them read without a loop, the newest tokens first."""
    q, kv = inputs()
    starts = jnp.zeros((B, T), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    old, new = KV(*(a[:, :8] for a in kv)), KV(*(a[:, 8:T] for a in kv))
    parts = [at_once(new, 8 + jnp.arange(T - 8)[None]), segment(old, 8)]
    found = attend_segments(q, parts, StepPositions(positions, starts, jnp.full(B, T)))
    assert jnp.abs(found - blockwise(q, kv, 0, starts)).max() < 1e-6


def partial(seed, keys):
    """Attention of a few queries to keys of their own at positions 0 to `keys`, in one block."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-2, 2)  # peaks far apart
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    k, v = scale * draw(B, keys, K, H), draw(B, keys, K, H)
    positions = jnp.broadcast_to(jnp.arange(keys), (B, keys))
    part = partial_attention(
        QUERIES,
        [at_once(KV(k, v), positions)],
        positions_B1N1=jnp.full((B, 1, G, 1), keys),
        starts_B1N1=jnp.zeros((B, 1, G, 1), jnp.int32),
    )
    return part, k, v


QUERIES = jax.random.normal(jax.random.key(7), (B, K, G, H))


@pytest.mark.parametrize("seed", range(4))
def test_parts_merge_in_any_order_to_the_softmax_over_all_keys(seed):
    """Independent of the code: one softmax in float64 over the keys of all parts."""
    made = [partial(10 * seed + i, keys) for i, keys in enumerate((3, 1, 8, 5))]
    none = partial(0, 4)[0]._replace(
        sum_BKNH=jnp.zeros((B, K, G, H)), peak_BKN1=jnp.full((B, K, G, 1), attention.MASKED)
    )
    k, v = (np.concatenate([np.asarray(m[i], np.float64) for m in made], axis=1) for i in (1, 2))
    scores = np.einsum("bknh,bskh->bkns", np.asarray(QUERIES, np.float64), k)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bkns,bskh->bknh", weights / weights.sum(-1, keepdims=True), v)
    a, b, c, d = (m[0] for m in made)
    for whole in (
        merge(merge(merge(a, b), c), d),
        merge(a, merge(b, merge(c, d))),
        merge(merge(d, none), merge(merge(none, b), merge(c, a))),
    ):
        assert np.abs(normalized(whole) - expected).max() < 2e-6
    assert (normalized(merge(none, none)) == 0).all()


def test_a_merge_wants_float32():
    part = partial(0, 4)[0]
    with pytest.raises(AssertionError, match="bfloat16"):
        merge(part, part._replace(total_BKN1=part.total_BKN1.astype(jnp.bfloat16)))


def test_kv_heads_of_a_row_may_hold_different_tokens():
    """As an eviction policy leaves them: each head has its own tokens, in an order of its own."""
    q, kv = inputs(T)
    q = q[:, -1:]
    rng = np.random.default_rng(0)
    kept = np.stack([[rng.permutation(T)[:6] for _ in range(K)] for _ in range(B)])  # [B, K, 6]
    take = lambda a: jnp.stack(
        [jnp.stack([a[b, kept[b, h], h] for h in range(K)], axis=1) for b in range(B)]
    )
    held = KV(take(kv.k_BSKH), take(kv.v_BSKH))
    newest = jnp.full((B, 1), T - 1)
    step = StepPositions(newest, jnp.full((B, 1), 2), jnp.full(B, T))
    found = attend_segments(q, [at_once(held, jnp.asarray(kept))], step)
    for b in range(B):
        for h in range(K):
            seen = [t for t in range(T) if t in kept[b, h] and t >= 2]
            alone = KV(*(a[b : b + 1, jnp.array(seen), h : h + 1] for a in kv))
            positions = jnp.arange(len(seen))[None]
            one = StepPositions(positions[:, -1:], jnp.zeros((1, 1), jnp.int32), jnp.ones(1))
            expected = attend_segments(
                q[b : b + 1, :, h : h + 1],
                [at_once(alone, positions)],
                one,
            )
            assert jnp.abs(found[b, 0, h] - expected[0, 0, 0]).max() < 1e-6


@pytest.mark.parametrize("window", [1, 4, 100])
def test_a_window_is_the_newest_tokens(window):
    q, kv = inputs(T)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    zeros = jnp.zeros((B, T), jnp.int32)
    starts = window_starts(positions, window, zeros)
    windowed = causal_attention(q, kv, starts_BT=starts)
    for t in (0, 5, T - 1):
        first = max(t + 1 - window, 0)
        alone = causal_attention(q[:, t : t + 1], KV(*(a[:, t : t + 1] for a in kv)))
        if window == 1:
            assert jnp.abs(windowed[:, t] - alone[:, 0]).max() < 1e-6
        shown = KV(*(jnp.where(jnp.arange(T)[:, None, None] >= first, a, 7.0) for a in kv))
        again = causal_attention(q, shown, starts_BT=starts)
        assert jnp.abs(windowed[:, t] - again[:, t]).max() == 0
    assert (window_starts(positions, 0, zeros) == 0).all()


def test_entries_beyond_the_query_are_never_used():
    q, kv = inputs()
    starts = jnp.zeros((B, T), jnp.int32)
    clean = blockwise(q, kv, 0, starts)
    # NaN times weight zero is NaN: what lies in the last block but beyond must be finite ...
    finite = KV(*(a.at[:, T:].set(1e30) for a in kv))
    assert (blockwise(q, finite, 0, starts) == clean).all()
    # ... and blocks beyond the last query are not read at all.
    poisoned = KV(*(a.at[:, T:].set(jnp.nan) for a in kv))
    assert (blockwise(q[:, :11], poisoned, 0, starts[:, :11]) == clean[:, :11]).all()


@pytest.mark.parametrize(
    ("d_head", "dtype", "capability", "platform", "reason"),
    [
        (128, "bfloat16", 9.0, "gpu", None),
        (256, "bfloat16", 9.0, "gpu", None),
        (64, "bfloat16", 8.0, "gpu", None),
        (256, "bfloat16", 8.0, "gpu", "up to 128"),
        (512, "bfloat16", 9.0, "gpu", "up to 256"),
        (46, "bfloat16", 9.0, "gpu", None),
        (90, "bfloat16", 8.0, "gpu", None),
        (128, "float32", 9.0, "gpu", "bfloat16"),
        (128, "bfloat16", 7.5, "gpu", "capability"),
        (128, "bfloat16", 9.0, "cpu", "cuDNN is not available on cpu"),
    ],
)
def test_what_cudnn_takes(d_head, dtype, capability, platform, reason):
    config = replace(MODEL, d_head=d_head, compute_dtype=dtype)
    refusal = cudnn_refusal(config, platform, capability)
    assert (refusal is None) if reason is None else (reason in refusal)


class Gpu:
    platform = "gpu"
    compute_capability = "9.0"
    device_kind = "NVIDIA H200"


def test_choice_of_backend_warns_once_of_a_slow_one(caplog):
    attention.warn_once.cache_clear()
    fast = replace(MODEL, d_head=64, compute_dtype="bfloat16")
    assert choose_backend("auto", fast, 128, Gpu()) == "cudnn"
    with caplog.at_level(logging.WARNING):
        assert choose_backend("xla", fast, 128, Gpu()) == "xla"
        for _ in range(2):
            assert choose_backend("auto", replace(fast, d_head=512), 128, Gpu()) == "xla"
    messages = [record.message for record in caplog.records]
    assert sum("up to 256" in message for message in messages) == 1
    assert sum("'xla', although cudnn" in message for message in messages) == 1
    with pytest.raises(ValueError, match=r"'cudnn' cannot be used.*up to 256"):
        choose_backend("cudnn", replace(fast, d_head=512), 128, Gpu())


def test_on_this_machine_cudnn_is_refused_by_name():
    with pytest.raises(ValueError, match=r"placement.attention = 'cudnn'.*cpu"):
        choose_backend("cudnn", MODEL, 32, jax.devices()[0])
    for asked in ("auto", "xla"):
        assert choose_backend(asked, MODEL, 32, jax.devices()[0]) == "xla"


def test_cudnn_gets_the_heads_and_mask_that_xla_uses(monkeypatch):
    """The kernel itself needs a GPU; its call is checked with jax's own XLA implementation in its place."""
    real = jax.nn.dot_product_attention

    def stand_in(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        assert all(array.shape[-1] % 8 == 0 for array in args)
        return real(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    wide = inputs(T)
    narrow = lambda a: a[..., :6]  # heads of the paper are 46 and 90 wide
    starts = jnp.broadcast_to(jnp.array([0, 5])[:, None], (B, T))
    seen = jnp.minimum(starts, jnp.arange(T))
    for given, (q, kv) in ((None, wide), (seen, jax.tree.map(narrow, wide))):
        xla = causal_attention(q, kv, starts_BT=given)
        cudnn = causal_attention(q, kv, starts_BT=given, backend="cudnn")
        assert jnp.abs(xla - cudnn).max() < 1e-5
