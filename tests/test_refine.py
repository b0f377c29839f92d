"""Swaps against the joint objective."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

import woodfisher as wf
from models import mlp, samples
from woodfisher.curvature.dense import DenseInverse
from woodfisher.surgeon.refine import joint_objective, refine
from woodfisher.surgeon.saliency import saliency
from woodfisher.surgeon.selection import survivors


def problem(seed, d=10):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(d, d, dtype=torch.float64, generator=generator)
    F = root @ root.mT + 0.1 * torch.eye(d, dtype=torch.float64)
    return F, DenseInverse(F[None], "F"), torch.randn(d, dtype=torch.float64, generator=generator)


def direct(F, w, keep):
    """½ δᵀFδ at the minimiser with the kept weights free, by one dense solve."""
    gone = torch.where(keep, 0, -w)
    step = gone.clone()
    step[keep] = -torch.linalg.solve(F[keep][:, keep], (F @ gone)[keep])
    return float(step @ F @ step / 2)


@given(seed=st.integers(0, 200), count=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_the_objective_never_rises_and_is_what_it_says(seed, count):
    F, finv, w = problem(seed)
    every = torch.ones(10, dtype=torch.bool)
    ranked = survivors(saliency(w, finv), every, count)
    keep, history = refine(w, finv, ranked, every, 8)
    assert int(keep.sum()) == count
    assert history == sorted(history, reverse=True)
    assert history[0] == pytest.approx(direct(F, w, ranked), rel=1e-9, abs=1e-12)
    assert history[-1] == pytest.approx(direct(F, w, keep), rel=1e-9, abs=1e-12)
    assert joint_objective(w, finv, keep) == pytest.approx(history[-1], rel=1e-9, abs=1e-12)
    best = min(direct(F, w, mask_of(kept)) for kept in itertools.combinations(range(10), count))
    assert history[-1] >= best * (1 - 1e-9)


def mask_of(kept):
    mask = torch.zeros(10, dtype=torch.bool)
    mask[list(kept)] = True
    return mask


def test_swaps_find_what_ranking_misses():
    better = 0
    for seed in range(30):
        _, finv, w = problem(seed, 40)
        every = torch.ones(40, dtype=torch.bool)
        ranked = survivors(saliency(w, finv), every, 12)
        _, history = refine(w, finv, ranked, every, 10)
        better += history[-1] < 0.9 * history[0]
    assert better >= 15


def test_removed_weights_stay_out():
    _, finv, w = problem(0)
    kept = torch.arange(10) < 6
    keep, _ = refine(w, finv, torch.arange(10) < 3, kept, 10)
    assert not keep[~kept].any()
    assert int(keep.sum()) == 3


def test_prune_refines_when_asked():
    model = mlp()
    objective = wf.Objective(model, [samples(12)], cross_entropy)
    finv = wf.WoodFisher(12, None, 1e-2)(objective)
    every = objective.kept
    ranked = survivors(saliency(objective.weights, finv), every, 12)
    keep, _ = refine(objective.weights, finv, ranked, every, 5)
    method = wf.Method(wf.WoodFisher(12, None, 1e-2), refine=5)
    report = wf.prune(
        model, [samples(12)], cross_entropy, 1 - 12 / 36, curvature=method.curvature, stages=1, refine=5
    )
    got = torch.cat([mask.flatten() for mask in report.masks.values()])
    assert torch.equal(got, keep)
