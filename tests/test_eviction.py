"""Policies: their text forms, what they refuse, and which tokens they choose."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from cla_jax.data import tokenizers
from cla_jax.eviction import POLICIES, check_cache, is_policy, parse, prompt_tokens
from cla_jax.eviction.classes import classes_of_tokenizer, described, token_classes
from cla_jax.eviction.policy import Budgeted, Lost, Policy, Seen
from cla_jax.eviction.rule import (
    CHOSEN,
    EMPTY,
    PUNCTUATION,
    SPECIAL,
    keeps_all,
    kept,
    make_rule,
    most_kept,
    share_of,
)


def seen_of(p_BKTS, classes_BS=None, lengths=None, observation=1, tokens_BS=None, layer=0):
    """What a policy is shown of attention [B, K, T, S] of one reader and one query head."""
    B, _, _, S = p_BKTS.shape
    lengths_B = np.full(B, S) if lengths is None else np.array(lengths)
    at = np.arange(S)
    is_last = (at >= lengths_B[:, None] - observation) & (at < lengths_B[:, None])

    def lost(dropped_CBKS, bands_CB):
        far = (at[:, None] - at) >= bands_CB[:, :, None, None]  # [C, B, T, S]
        gone = np.einsum("bkts,cbks,cbts->cbkt", p_BKTS, dropped_CBKS, far)[:, None, :, :, None]
        mean = gone.sum(-1) / lengths_B[:, None, None]
        return Lost(mean, gone.max(-1), mean)

    return Seen(
        layer=layer,
        lengths_B=lengths_B,
        tokens_BS=np.zeros((B, S), np.int32) if tokens_BS is None else tokens_BS,
        classes_BS=np.zeros((B, S), np.uint8) if classes_BS is None else classes_BS,
        received_BKS=p_BKTS.sum(2),
        observed_BKS=np.einsum("bkts,bt->bks", p_BKTS, is_last),
        lost=lost,
    )


def attention(seed, B=1, K=1, S=40, sharp=3.0):
    draw = np.random.default_rng(seed)
    s = draw.normal(size=(B, K, S, S), scale=sharp)
    s = np.where(np.tril(np.ones((S, S), bool)), s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def kept_by(policy, seen):
    choice = policy.choose(seen)
    classes = seen.classes_BKS()
    if choice.chosen_BKS is not None:
        classes = classes | (CHOSEN * choice.chosen_BKS).astype(np.uint8)
    lengths = seen.lengths_B
    return kept(choice.rule, classes, choice.scores_BKS, lengths, policy.sinks, policy.recent)


@pytest.mark.parametrize(
    "text",
    ["fastgen", "fastgen:T=0.5,over=mean", "window:keep=0.25", "h2o:format=int8,tokens=64",
     "snapkv:sinks=2,keep=0.5,window=16", "adakv:tokens=99,floor=0.2", "random:keep=0.1,seed=3"],
)  # fmt: skip
def test_text_forms_come_back(text):
    assert parse(parse(text).name) == parse(text)
    assert parse(text).kind == text.partition(":")[0]
    assert is_policy(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fastgan:T=1", "unknown eviction policy 'fastgan'; did you mean fastgen"),
        ("fastgen:t=1", "unknown setting of fastgen 't'; did you mean T"),
        ("fastgen:T=0", r"T = 0.0 must lie in \(0, 1\]"),
        ("fastgen:T=1.2", r"T = 1.2 must lie in \(0, 1\]"),
        ("fastgen:T=95", r"T = 95.0 .*; it is a fraction: did you mean 0\.95\?$"),
        ("h2o:keep=50", r"keep = 50.0 .*; it is a fraction: did you mean 0\.5\?$"),
        ("h2o:keep=1.5", r"keep = 1.5 must lie in \(0, 1\] and be a multiple of 1/10,000$"),
        ("fastgen:T=high", "T = 'high' is not a number"),
        ("fastgen:T", "'T' must have the form T=VALUE"),
        ("fastgen:T=1,T=1", "once"),
        ("fastgen:over=max", "over = 'max' must be min or mean"),
        ("fastgen:recent=0", "recent = 0 must be at least 1"),
        ("random:keep=0.5,seed=-1", "seed = -1 must lie in 0 to 2"),
        ("fastgen:format=kivi4", "kivi4 quantises tokens in groups"),
        ("fastgen:format=int9", "unknown format of evicting caches 'int9'; did you mean int8"),
        ("window", "give a budget"),
        ("window:keep=0.5,tokens=64", "keep and tokens are two budgets: give only one"),
        ("fastgen:T=0.9,keep=0.5", "fastgen has no budget: remove keep"),
        ("random:keep=0.5,seed=1.5", "seed = '1.5' is not a whole number"),
        ("window:keep=half", "keep = 'half' is not a number"),
        ("window:keep=0,5", "decimals need a point: keep=0.5"),
        ("window:keep=\u0660.\u0665", "keep = '\u0660.\u0665' is not a number"),
        ("h2o:tokens=1_0_0", "tokens = '1_0_0' is not a whole number"),
        ("window:tokens=11", "tokens = 11 is less than the 12 tokens that are always kept"),
        ("snapkv:tokens=35", "less than the 36 tokens"),
        ("snapkv:tokens=64,pool=4", "pool = 4 must be odd"),
        ("snapkv:tokens=64,window=4", "window = 4 is less than recent = 8"),
        ("adakv:tokens=64,floor=2", r"floor = 2.0 must lie in \[0, 1\]"),
        ("window:tokens=4294967311", "tokens = 4294967311 is more than the 200,000 tokens"),
        ("window:tokens=300000,sinks=200001", "sinks = 200001 is more than"),
        ("fastgen:recent=4294967311", "recent = 4294967311 is more than"),
        ("snapkv:keep=0.5,window=200001", "window = 200001 is more than"),
        ("adakv:keep=0.5,pool=200001", "pool = 200001 is more than"),
    ],
)
def test_what_is_wrong_in_a_text_is_named(text, words):
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_a_cache_is_a_format_or_a_policy():
    check_cache("int8", ["dense", "int8"])
    check_cache("h2o:keep=0.5", ["dense", "int8"])
    with pytest.raises(ValueError, match=r"did you mean int8\?$"):  # `window` is far from it
        check_cache("int9", ["dense", "int8"])
    with pytest.raises(ValueError, match=r"'int8:keep=0\.5': a cache format has no settings"):
        check_cache("int8:keep=0.5", ["dense", "int8"])
    with pytest.raises(ValueError, match="full, which means no cache, applies only to tasks"):
        check_cache("full", ["dense", "int8"])
    check_cache("full", ["full", "dense"])
    with pytest.raises(ValueError, match="unknown cache format 'h2'; did you mean h2o"):
        check_cache("h2", ["dense", "int8"])
    with pytest.raises(ValueError, match="unknown cache format 'H2O'; did you mean h2o"):
        check_cache("H2O:keep=0.5", ["dense", "int8"])
    with pytest.raises(ValueError, match="setting of h2o"):
        check_cache("h2o:keeep=0.5", ["dense", "int8"])


def test_prompts_for_which_a_share_is_too_little_are_refused():
    policy = parse("h2o:keep=0.25")
    policy.check([12, 48, 1000])  # 12 tokens are kept whole
    with pytest.raises(ValueError, match=r"0\.25 of a prompt of 40 tokens is 10, less than the 12"):
        policy.check([100, 40])


def test_shares_are_rounded_up():
    assert share_of(2500, 0, np.array([0, 1, 4, 5, 200_000])).tolist() == [0, 1, 1, 2, 50_000]
    assert share_of(2500, -3, np.array([4, 16])).tolist() == [0, 1]


def test_the_first_and_the_newest_are_always_kept_and_scores_decide_on_the_rest():
    rule = make_rule((1, 1), hitters=(0, 2), classes=SPECIAL)
    classes, scores = np.zeros((1, 1, 12), np.uint8), np.ones((1, 1, 12))
    classes[..., 3], classes[..., 4] = SPECIAL, PUNCTUATION
    scores[..., 5], scores[..., [0, 3, 10]] = 7, 100
    found = kept(rule, classes, scores, np.array([11]), sinks=1, recent=2)
    # Of equal scores the newer one stays; what is kept anyway takes no place among the two.
    assert np.flatnonzero(found).tolist() == [0, 3, 5, 8, 9, 10]


@given(
    window=st.tuples(st.sampled_from([0, 9_999, 10_000]), st.integers(-6, 6)),
    since=st.sampled_from([0, 1, EMPTY]),
    sinks=st.integers(1, 4),
    length=st.integers(1, 60),
)
def test_a_rule_that_is_said_to_keep_all_keeps_all(window, since, sinks, length):
    rule = make_rule((1, 1), window=window, since=since)
    tokens = np.zeros((1, 1, length))
    found = kept(rule, tokens.astype(np.uint8), tokens, np.array([length]), sinks, 1)
    assert found.all() or not keeps_all(rule, sinks).all()
    assert keeps_all(make_rule((1, 1), since=0), sinks).all()
    assert keeps_all(make_rule((1, 1), window=(10_000, -sinks)), sinks).all()


@pytest.mark.parametrize("kind", ["window", "h2o", "snapkv", "adakv", "random"])
@pytest.mark.parametrize("budget", ["keep=0.5", "tokens=20"])
def test_budgets_are_kept_to(kind, budget):
    seen = seen_of(attention(0, B=2, K=3), observation=8, lengths=[40, 40])
    settings = "window=8,recent=3," if kind in ("snapkv", "adakv") else ""
    policy = parse(f"{kind}:{settings}{budget}")
    found = kept_by(policy, seen)
    assert found[..., [0, 1, 2, 3, 37, 38, 39]].all()
    counts = found.sum(-1)
    if kind == "adakv":  # heads share one budget
        assert (counts.sum(1) == 60).all()
        assert len(set(counts.ravel().tolist())) > 1
        assert (counts >= 12 + 4).all()
    else:
        assert (counts == 20).all()


@pytest.mark.parametrize(
    "kind", sorted(kind for kind, of in POLICIES.items() if issubclass(of, Budgeted))
)
@pytest.mark.parametrize(
    "budget",
    ["tokens=12", "tokens=13", "tokens=16", "tokens=29", "keep=0.125", "keep=0.3001", "keep=1",
     "keep=0.25,sinks=3,recent=1", "tokens=20,sinks=9,recent=9", "tokens=9,sinks=0,recent=7"],
)  # fmt: skip
def test_every_policy_keeps_exactly_its_budget_at_every_length(kind, budget):
    window = (
        f",window={max(1, parse(f'window:{budget}').recent)}" if kind in ("snapkv", "adakv") else ""
    )
    policy = parse(f"{kind}:{budget}{window}")
    lengths = np.arange(1, 131)
    draw = np.random.default_rng(0).random((2, len(lengths), 2, lengths[-1]))
    zeros = np.zeros((len(lengths), lengths[-1]), np.uint8)
    seen = Seen(
        layer=0,
        lengths_B=lengths,
        tokens_BS=zeros,
        classes_BS=zeros,
        received_BKS=draw[0],
        observed_BKS=draw[1],
        lost=lambda *_: pytest.fail("only fastgen asks for that"),
    )
    expected = np.minimum(lengths, np.maximum(policy.budget(lengths), policy.always))
    assert kept_by(policy, seen).sum((1, 2)).tolist() == (2 * expected).tolist()
    if kind != "adakv":  # its heads share one budget
        assert (kept_by(policy, seen).sum(2) == expected[:, None]).all()


def test_policies_with_scores_of_their_own_share_no_programs():
    """Scores are computed in the compiled step, so a step of another policy would rank by the wrong ones."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Even(Policy):
        kind = "even"
        scoring = "first"
        every: int = 2

        def first_scores(self, positions, tokens, heads, layer):  # noqa: ARG002
            return (positions % np.uint32(self.every) == 0).astype(np.float32)

        def choose(self, seen):
            raise NotImplementedError

    class Odd(Even):
        kind = "odd"

    programs = {policy.programs for policy in (Even(), Even(every=3), Odd(), parse("h2o:keep=0.5"))}
    assert len(programs) == 4
    assert Even().programs == Even().programs
    # A budget or a threshold is data.
    assert parse("h2o:keep=0.5").programs == parse("fastgen:T=0.9").programs
    assert parse("random:keep=0.5").programs == parse("random:keep=0.25").programs
    assert parse("random:keep=0.5").programs != parse("random:keep=0.5,seed=1").programs


def test_random_tokens_differ_between_layers_heads_texts_and_seeds():
    tokens = np.random.default_rng(0).integers(0, 90, (2, 400))
    tokens[1, :200] = tokens[0, :200]
    of = lambda layer, seed: kept_by(
        parse(f"random:keep=0.5,seed={seed}"),
        seen_of(attention(0, B=2, K=2, S=400), tokens_BS=tokens, layer=layer),
    )
    first = of(0, 0)
    independent = lambda one, other: 0.4 < (one == other).mean() < 0.6
    assert independent(first[0, 0], first[0, 1])
    assert independent(first[0, 0, 200:], first[1, 0, 200:])
    assert (first[0, :, :200] == first[1, :, :200]).mean() > 0.9  # the same text
    assert independent(first, of(1, 0))
    assert independent(first, of(0, 1))


def test_snapkv_keeps_what_the_last_queries_look_at_and_its_neighbours():
    p = np.full((1, 1, 40, 40), 1e-3)
    p[..., 36:, 20] = 0.9
    p[..., :30, 10] = 0.9  # earlier queries do not count
    policy = parse("snapkv:tokens=11,window=4,recent=4,pool=3")
    found = kept_by(policy, seen_of(p, observation=4))
    assert np.flatnonzero(found).tolist() == [0, 1, 2, 3, 19, 20, 21, 36, 37, 38, 39]


def test_h2o_keeps_half_newest_half_most_attended():
    p = np.full((1, 1, 40, 40), 1e-3)
    p[..., [9, 17, 25]] = 0.3
    found = kept_by(parse("h2o:tokens=10,recent=1"), seen_of(p))
    assert np.flatnonzero(found).tolist() == [0, 1, 2, 3, 9, 17, 25, 37, 38, 39]


def fastgen_case(which):
    """Attention [1, 1, 40, 40] that one of FastGen's policies keeps, and the classes of the tokens."""
    classes = np.zeros((1, 40), np.uint8)
    classes[0, [0, 12, 30]], classes[0, [5, 19]] = SPECIAL, PUNCTUATION
    p = np.zeros((1, 1, 40, 40))
    at = np.arange(40)
    target = {
        "special": 0 * at,
        "+punctuation": np.where(at >= 19, 19, np.where(at >= 5, 5, 0)),
        "+frequent": np.where(at >= 8, 8, at),
        "+local": np.maximum(at - 9, 0),
        "full": at // 2,
    }[which]
    p[0, 0, at, target] = 1
    return p, classes


@pytest.mark.parametrize("which", POLICIES["fastgen"].names)
def test_fastgen_takes_the_cheapest_policy_that_keeps_the_attention(which):
    p, classes = fastgen_case(which)
    policy = parse("fastgen:T=0.97,r_l=0.25,r_f=0.1,sinks=1,recent=1")
    choice = policy.choose(seen_of(p, classes))
    assert policy.names[choice.policy_BK[0, 0]] == which
    assert choice.recovery["min"][0, 0] >= 0.97


def test_one_reader_decides_by_min_and_the_mean_by_mean():
    """Two readers: one needs everything, the other nothing but special tokens."""
    (p, classes), (q, _) = fastgen_case("special"), fastgen_case("full")
    one, other = seen_of(p, classes), seen_of(q, classes)
    both = seen_of((p + q) / 2, classes)

    def lost(*candidates):
        pairs = zip(one.lost(*candidates), other.lost(*candidates), strict=True)
        return Lost(*(np.concatenate(pair, axis=1) for pair in pairs))

    object.__setattr__(both, "lost", lost)
    of = lambda text: parse(text).choose(both).policy_BK[0, 0]
    settings = "T=0.6,r_l=0.1,r_f=0.1,sinks=1,recent=1"
    assert of(f"fastgen:{settings},over=min") == 4
    assert of(f"fastgen:{settings},over=mean") < 4


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 6), st.integers(20, 40))
def test_the_kept_set_of_fastgen_grows_with_its_threshold(seed, sharp, length):
    classes = np.random.default_rng(seed).choice([0, 0, 0, SPECIAL, PUNCTUATION], (1, 40))
    seen = seen_of(attention(seed, K=2, sharp=sharp), classes.astype(np.uint8), [length])
    before = np.zeros((1, 2, 40), bool)
    for T in (0.1, 0.4, 0.7, 0.9, 0.99, 1.0):
        found = kept_by(parse(f"fastgen:T={T},r_l=0.2,r_f=0.2,recent=2"), seen)
        assert not (before & ~found).any()
        before = found
    assert (before == (np.arange(40) < length)).all()  # T = 1 keeps all


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.integers(0, 400), st.integers(1, 5), st.sampled_from([0, 1, 3333]))
def test_no_head_needs_more_room_than_it_is_given(prompt, new, chunk, share):
    """Whatever the scores are: a head that is simulated by its rule never holds more than `most_kept`."""
    rule = make_rule((1, 1), window=(share, 3), hitters=(share, 2))
    held = lambda n: int(
        min(n, 4 + max(8, share_of(share, 3, np.array(n))) + share_of(share, 2, np.array(n)))
    )
    room = most_kept(
        rule, np.array([[held(prompt)]]), np.array([prompt]), new, sinks=4, recent=8, chunk=chunk
    )[0, 0]
    for length in range(prompt, prompt + new, chunk):
        written = min(chunk, prompt + new - length)
        assert held(length) + written <= room


@pytest.mark.parametrize(
    ("share", "seq_len", "chunk", "tokens"),
    [
        (0.5, 256, 1, 128),
        (0.75, 1024, 8, 768),
        (0.55, 200, 2, 110),
        (0.07, 100, 1, 7),
        (1 / 3, 100, 2, 34),
    ],
)
def test_the_prompt_of_a_window_is_rounded_up(share, seq_len, chunk, tokens):
    assert prompt_tokens(share, seq_len, chunk) == tokens


def test_classes_of_tokens():
    texts = ["<|end|>", "a", ".", " ?!", " ", "\n", "«", "a.", "+"]
    assert token_classes(texts, {0}).tolist() == [
        SPECIAL, 0, PUNCTUATION, PUNCTUATION, 0, 0, PUNCTUATION, 0, 0
    ]  # fmt: skip


def test_classes_of_a_tokenizer_are_described():
    tokenizer = tokenizers.byte_tokenizer()
    found = described(tokenizer, classes_of_tokenizer(tokenizer))
    assert found["special"] >= 1
    assert found["punctuation"] == len(found["marks"]) == 23  # of ASCII; "$+<=>^`|~" are symbols
    assert {".", ",", "!"} <= set(found["marks"])


@pytest.mark.parametrize("strips", [True, False])
def test_a_space_without_a_text_is_not_special(strips):
    """As in Llama's tokenizers, whose decoder strips the first space of a text."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "▁▁": 4, "▁a": 5, "a": 6, "▁.": 8}
    merges = [("▁", "▁"), ("▁", "a")]
    inner = hf.Tokenizer(hf.models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    inner.decoder = hf.decoders.Metaspace()
    if strips:
        steps = [hf.decoders.Replace("▁", " "), hf.decoders.Fuse(), hf.decoders.Strip(" ", 1, 0)]
        inner.decoder = hf.decoders.Sequence(steps)
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = tokenizers.Tokenizer(inner, "</s>")
    assert tokenizer.decode([3]) == ""
    assert list(classes_of_tokenizer(tokenizer, "<s>")) == [
        *(SPECIAL, SPECIAL, SPECIAL, 0, 0, 0, 0), SPECIAL, PUNCTUATION
    ]  # fmt: skip


def test_the_page_lists_every_setting_with_its_default():
    page = (Path(__file__).parents[1] / "docs" / "eviction.md").read_text()
    table = page.split("| setting |")[1].split("\n\n")[0]
    lines = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| [^|]+ \| `?([^|`]+)`? \|", table, re.MULTILINE)
    listed = {name: default for names, default in lines for name in re.findall(r"\w+", names)}
    fields = {one.name: one.default for cls in POLICIES.values() for one in dataclasses.fields(cls)}
    budget = {"keep": "none", "tokens": "none"}
    assert listed == {name: str(default) for name, default in fields.items()} | budget


def test_the_least_budget_of_the_page_is_that_of_the_demo():
    parse("snapkv:keep=0.2735").check([128])
    with pytest.raises(ValueError, match="of a prompt of 128 tokens is 35, less than the 36"):
        parse("snapkv:keep=0.2734").check([128])
