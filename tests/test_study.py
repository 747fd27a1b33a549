"""Declared studies: what is refused, and the four verdicts."""

import dataclasses
import math

import numpy as np
import pytest

from cla_jax.study import Claim, Study, decide

A = Study(rows={"mqa": 8, "half": 8, "cla2": 8, "gqa": 3}, claims=(Claim("cla2", "half"),))


def scores(**means: float) -> dict[tuple[str, int], float]:
    """Eight seeds of each row: noise that rows of a seed share, and a little of their own."""
    draw = np.random.default_rng(2)
    shared = draw.normal(0, 0.05, 8)
    return {
        (row, seed): mean + shared[seed] + draw.normal(0, 0.001)
        for row, mean in means.items()
        for seed in range(8)
    }


def with_claims(*claims: Claim, **changes) -> Study:
    return dataclasses.replace(A, claims=claims, **changes)


def test_claims_are_supported_contradicted_or_inconclusive():
    study = with_claims(
        Claim("cla2", "half"),
        Claim("mqa", "cla2"),
        Claim("cla2", "mqa", margin=0.01),
        Claim("half", "mqa"),
        Claim("half", "mqa", margin=0.02),
    )
    verdicts = decide(study, scores(mqa=2.100, cla2=2.1001, half=2.15))
    assert [v.status for v in verdicts] == [
        "supported",
        "inconclusive",  # not the same as "no worse": that is the next claim
        "supported",
        "contradicted",
        "contradicted",
    ]
    first = verdicts[0]
    assert (first.n, first.mean) == (8, pytest.approx(-0.05, abs=0.002))
    assert first.low < first.mean < first.high < 0
    assert first.p == 5 / 256  # the least p of eight pairs, for five claims
    assert first.opposite_p == 1
    assert verdicts[3].p == 1  # of a contradicted claim, its opposite has the small one
    assert verdicts[3].opposite_p == 5 / 256
    unpaired = np.std([value for (row, _), value in scores(half=2.15).items()])
    assert first.high - first.low < unpaired / 5  # pairs cancel what seeds have in common


def test_the_order_of_claims_changes_no_verdict():
    claims = (Claim("cla2", "half"), Claim("cla2", "mqa", margin=0.01), Claim("half", "mqa"))
    data = scores(mqa=2.1, cla2=2.1, half=2.15)
    forward = decide(with_claims(*claims), data)
    assert decide(with_claims(*claims[::-1]), data) == forward[::-1]


def test_missing_runs_are_not_tested_and_still_count_as_claims():
    data = scores(mqa=2.1, cla2=2.1, half=2.15)
    study = with_claims(Claim("cla2", "half"), Claim("half", "mqa", margin=0.1))
    alone = decide(study, data)[0].p
    del data["mqa", 3]
    first, second = decide(study, data)
    assert (second.status, second.n) == ("not tested", 0)
    assert second.reason == "1 of 16 runs are missing: mqa seed 3"
    assert (first.status, first.p) == ("supported", alone)
    assert decide(study, {})[0].reason.endswith("cla2 seed 2 and others")


def test_only_pairs_that_are_not_finite_are_left_out():
    data = scores(cla2=2.1, half=2.15) | {("half", 2): math.inf}
    (verdict,) = decide(A, data)
    assert (verdict.status, verdict.n, verdict.excluded) == ("supported", 7, (2,))
    data |= {("cla2", seed): math.nan for seed in range(3, 7)}
    (verdict,) = decide(A, data)
    assert verdict.status == "not tested"
    assert verdict.reason == "only 3 pairs have finite scores; the test needs 5"
    assert verdict.excluded == (2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    ("claims", "changes", "message"),
    [
        ((Claim("cla3", "half"),), {}, "unknown row in the claim .*'cla3'; did you mean cla2"),
        ((Claim("cla2", "cla2"),), {}, "compares a row with itself"),
        ((Claim("cla2", "mqa", margin=-1),), {}, "must be 0 or a positive number"),
        ((Claim("cla2", "mqa", margin=math.nan),), {}, "must be 0 or a positive number"),
        ((Claim("gqa", "mqa"),), {}, "has 3 paired seeds; the sign-flip test needs 5"),
        ((Claim("cla2", "mqa"),), {"alpha": 0.001}, "has 8 paired seeds; .* needs 10 to decide 1"),
        ((Claim("cla2", "mqa"),), {"alpha": 0}, "alpha = 0 must lie between 0 and 1"),
    ],
)
def test_declarations_that_cannot_be_decided_are_refused(claims, changes, message):
    with pytest.raises(ValueError, match=message):
        with_claims(*claims, **changes)


def test_a_study_never_asks_for_fewer_pairs_than_can_decide():
    for n_claims in range(1, 6):
        claims = tuple(Claim("cla2", "half", margin=0.1 * i) for i in range(n_claims))
        study = with_claims(*claims)
        enough = with_claims(*claims, rows={"cla2": study.needed, "half": study.needed, "mqa": 2})
        data = {("cla2", s): 2.0 for s in range(9)} | {("half", s): 2.1 for s in range(9)}
        assert {v.status for v in decide(enough, data)} == {"supported"}
        with pytest.raises(ValueError, match="paired seeds"):
            with_claims(*claims, rows={"cla2": study.needed - 1, "half": 8, "mqa": 2})


def test_the_digest_names_the_declaration():
    digests = {
        A.digest,
        with_claims(Claim("cla2", "half", margin=0.01)).digest,
        with_claims(Claim("half", "cla2")).digest,
        dataclasses.replace(A, alpha=0.01).digest,
        dataclasses.replace(A, test="t").digest,
        dataclasses.replace(A, metric="perplexity").digest,
        dataclasses.replace(A, rows={**A.rows, "gqa": 4}).digest,
    }
    assert len(digests) == 7
    same = dataclasses.replace(A, rows=dict(reversed(A.rows.items())))
    assert same.digest == A.digest


def test_a_row_that_diverges_does_not_win_by_the_seeds_it_survived():
    data = scores(cla2=2.1, half=2.15) | {("cla2", 2): math.inf, ("cla2", 5): math.nan}
    (verdict,) = decide(A, data)
    assert (verdict.status, verdict.n, verdict.excluded) == ("inconclusive", 6, (2, 5))
    assert verdict.reason == "cla2 diverged with 2 seeds, half with 0"
    (other,) = decide(with_claims(Claim("half", "cla2")), data)
    assert other.status == "inconclusive"
    (both,) = decide(A, data | {("half", 3): math.inf, ("half", 5): math.inf})
    assert both.status == "supported"


def test_many_seeds_need_the_t_test():
    rows = {"cla2": 25, "half": 25}
    with pytest.raises(ValueError, match="25 seeds: the sign-flip test supports at most 20"):
        Study(rows=rows, claims=(Claim("cla2", "half"),))
    study = Study(rows=rows, claims=(Claim("cla2", "half"),), test="t")
    data = {
        (row, s): value + s % 3 for row, value in (("cla2", 2.0), ("half", 2.1)) for s in range(25)
    }
    (verdict,) = decide(study, data)
    assert (verdict.status, verdict.n) == ("supported", 25)


def test_the_t_test_decides_with_few_seeds():
    study = Study(rows={"cla2": 3, "half": 3}, claims=(Claim("cla2", "half"),), test="t")
    data = scores(cla2=2.1, half=2.15)
    (verdict,) = decide(study, data)
    assert (verdict.status, verdict.n) == ("supported", 3)
