"""Scores, selection and updates against their definitions."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import woodfisher as wf
from reference import kkt, pair_saliency
from test_curvature import OPERATORS, random, spd
from woodfisher.curvature.base import DiagonalInverse
from woodfisher.curvature.dense import DenseInverse
from woodfisher.gradients.layout import Layout
from woodfisher.pruning.schedule import through
from woodfisher.surgeon.refine import refine
from woodfisher.surgeon.saliency import group_saliency, newton_point, saliency
from woodfisher.surgeon.selection import Selection, survivors
from woodfisher.surgeon.update import independent_update, joint_update, no_update, quadratic_change


def mask(d, kept, seed=0):
    keep = torch.zeros(d, dtype=torch.bool)
    keep[torch.randperm(d, generator=torch.Generator().manual_seed(seed))[:kept]] = True
    return keep


@pytest.mark.parametrize("make", OPERATORS)
def test_single_saliency_is_the_least_rise_of_the_quadratic(make):
    finv, F = make()
    w = random(len(F))
    for q, score in enumerate(saliency(w, finv).tolist()):
        removed = torch.arange(len(F)) == q
        delta = kkt(F, w, torch.zeros_like(w), removed)
        assert score == pytest.approx(float(delta @ F @ delta / 2), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("make", OPERATORS)
def test_pair_saliency_is_the_written_out_formula(make):
    finv, F = make()
    w, inverse = random(len(F)), finv.dense()
    pairs = torch.tensor(list(itertools.combinations(range(len(F)), 2)))
    scores = group_saliency(w, finv, pairs)
    for (i, j), score in zip(pairs.tolist(), scores.tolist(), strict=True):
        expected = pair_saliency(
            *(float(x) for x in (w[i], w[j], inverse[i, i], inverse[j, j], inverse[i, j]))
        )
        assert score == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("make", OPERATORS)
@pytest.mark.parametrize("k", [1, 4])
def test_group_saliency_is_the_least_rise_of_the_quadratic(make, k):
    finv, F = make()
    d, w = len(F), random(len(F))
    groups = torch.arange(d - d % k).reshape(-1, k)
    for group, score in zip(groups, group_saliency(w, finv, groups).tolist(), strict=True):
        removed = torch.zeros(d, dtype=torch.bool)
        removed[group] = True
        delta = kkt(F, w, torch.zeros_like(w), removed)
        assert score == pytest.approx(float(delta @ F @ delta / 2), rel=1e-4, abs=1e-9)


def test_a_weight_twice_in_a_group_is_refused():
    with pytest.raises(wf.WoodfisherError, match=r"1 of 2 groups, the first with weights \[1, 1\]: a weight"):
        group_saliency(random(4), DenseInverse(spd(4)[None], "F"), torch.tensor([[0, 2], [1, 1]]))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda w, finv, keep: saliency(w[:, None], finv), r"point must be .* \(3,\); .* \(3, 1\) came"),
        (lambda w, finv, keep: newton_point(w, w[:1], finv), r"gradient must be .* \(1,\) came"),
        (lambda w, finv, keep: group_saliency(w[:2], finv, torch.tensor([[0, 1]])), "point must be"),
        (lambda w, finv, keep: group_saliency(w, finv, [[0, 1]]), "int64 tensor .* a list came"),
        (lambda w, finv, keep: joint_update(w[:1], finv, keep), "point must be"),
        (lambda w, finv, keep: independent_update(w, finv, keep.float()), "keep must be a bool tensor"),
        (lambda w, finv, keep: no_update(w, finv, keep[0]), r"keep must be .* \(\) came"),
        (lambda w, finv, keep: quadratic_change(w, finv, w[:1]), "gradient must be"),
        (lambda w, finv, keep: refine(w, finv, keep, ~keep, 1), "not in kept"),
        (lambda w, finv, keep: refine(w, finv, keep, keep, -1), "rounds must be a whole number"),
    ],
)
def test_what_does_not_fit_together_is_refused(call, says):
    with pytest.raises(wf.WoodfisherError, match=says):
        call(torch.ones(3), DiagonalInverse(torch.ones(3)), torch.tensor([True, False, True]))


def test_scores_by_hand():
    finv = DiagonalInverse(torch.tensor([1.0, 2.0, 4.0]))
    w = torch.tensor([2.0, -2.0, 1.0])
    assert saliency(w, finv).tolist() == [2.0, 4.0, 2.0]
    assert newton_point(w, torch.tensor([1.0, 1.0, 1.0]), finv).tolist() == [1.0, -2.5, 0.75]


@pytest.mark.parametrize("make", OPERATORS)
@pytest.mark.parametrize("gradient", [False, True])
def test_joint_update_is_the_kkt_solution(make, gradient):
    finv, F = make()
    d = len(F)
    w, g = random(d), random(d, seed=1) if gradient else torch.zeros(d, dtype=torch.float64)
    keep = mask(d, d // 2)
    point = newton_point(w, g, finv) if gradient else w
    new = joint_update(point, finv, keep)
    torch.testing.assert_close(new - w, kkt(F, w, g, ~keep), rtol=1e-4, atol=1e-6)
    assert not new[~keep].any()


@pytest.mark.parametrize("make", OPERATORS)
def test_woodtaylor_of_one_weight_is_the_published_formula(make):
    """ρ and δ* of §5, up to the term that is the same for every weight."""
    finv, F = make()
    d = len(F)
    w, g, inverse = random(d), random(d, seed=1), finv.dense()
    natural = inverse @ g
    point = newton_point(w, g, finv)
    scores = saliency(point, finv)
    for q in range(d):
        left = w[q] - natural[q]
        rho = left**2 / (2 * inverse[q, q])
        delta = -natural - left * inverse[:, q] / inverse[q, q]
        keep = torch.arange(d) != q
        for update in (independent_update, joint_update):
            step = update(point, finv, keep) - w
            torch.testing.assert_close(step[keep], delta[keep], rtol=1e-4, atol=1e-6)
        total = rho - g @ natural / 2
        assert float(scores[q]) == pytest.approx(float(rho), rel=1e-4, abs=1e-9)
        assert quadratic_change(delta, finv, g) == pytest.approx(float(total), rel=1e-4, abs=1e-6)


def test_independent_update_is_the_sum_of_single_ones():
    F = spd(8)
    finv, inverse, w, keep = DenseInverse(F[None], "F"), F.inverse(), random(8), mask(8, 5)
    total = sum(-w[q] * inverse[:, q] / inverse[q, q] for q in range(8) if not keep[q])
    torch.testing.assert_close(independent_update(w, finv, keep), torch.where(keep, w + total, 0))
    assert torch.equal(no_update(w, finv, keep), torch.where(keep, w, 0))


@pytest.mark.parametrize("make", OPERATORS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), fraction=st.floats(0.1, 0.9), gradient=st.booleans())
def test_joint_is_never_worse_than_any_other_update(make, seed, fraction, gradient):
    finv, F = make()
    d = len(F)
    w, keep = random(d, seed=seed), mask(d, max(1, round(fraction * d)), seed)
    g = random(d, seed=seed + 1) if gradient else None
    point = newton_point(w, g, finv) if gradient else w
    change = quadratic_change(joint_update(point, finv, keep) - w, finv, g)
    for update, start in ((independent_update, point), (no_update, w)):
        other = quadratic_change(update(start, finv, keep) - w, finv, g)
        assert change <= other + 1e-6 * abs(other) + 1e-9


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, float("inf")]), min_size=1, max_size=30),
    seed=st.integers(0, 1000),
    fraction=st.floats(0, 1),
)
def test_exactly_that_many_survive_and_they_are_the_best(scores, seed, fraction):
    values = torch.tensor(scores)
    kept = mask(len(scores), max(1, len(scores) // 2), seed)
    count = round(fraction * len(scores))
    keep = survivors(values, kept, count)
    assert int(keep.sum()) == min(count, int(kept.sum()))
    assert not (keep & ~kept).any()
    if 0 < count < int(kept.sum()):
        worst, best = values[keep].min(), values[kept & ~keep].max()
        assert worst >= best
        ties = (values == worst) & kept
        if worst == best:
            assert int((keep & ties).nonzero().max()) < int((~keep & ties).nonzero().min())


def chosen(scores, kept, amount, selection):
    """What stays where removing weight q alone costs `scores[q]`."""
    return selection((2 * scores).sqrt(), DiagonalInverse(torch.ones_like(scores)), kept, amount)


def test_ranking_in_each_layer():
    layout = Layout({"a": (4,), "b": (3,), "c": (3,)})
    scores = torch.tensor([1.0, 2, 3, 4, 100, 200, 300, 7, 5, 6])
    everything = torch.ones(10, dtype=torch.bool)
    over_all, in_each = Selection(layout), Selection(layout, scope="layer")
    assert chosen(scores, everything, 3, over_all).nonzero().flatten().tolist() == [4, 5, 6]
    keep = chosen(scores, everything, 5, in_each)
    assert keep.nonzero().flatten().tolist() == [2, 3, 5, 6, 7]
    for count in range(11):
        assert int(chosen(scores, everything, count, in_each).sum()) == count


def test_a_nan_score_names_the_layer():
    layout = Layout({"a": (2,), "b": (2,)})
    scores = torch.tensor([1.0, 2.0, float("nan"), 1.0])
    with pytest.raises(wf.WoodfisherError, match="'b' is NaN"):
        chosen(scores, torch.ones(4, dtype=torch.bool), 2, Selection(layout))


@given(now=st.integers(1, 10**6), final=st.integers(0, 10**6), stages=st.integers(1, 30))
def test_stages_go_down_to_the_goal(now, final, stages):
    counts = through(now, [final], stages)
    assert counts[-1] == min(now, final)
    assert all(a >= b for a, b in itertools.pairwise([now, *counts]))
