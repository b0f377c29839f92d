"""Stages that are checked on held-out samples, sweeps, and pruning to a drop."""

import copy
import itertools
import json
import math
import re
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import BatchSampler, DataLoader, SubsetRandomSampler, TensorDataset

import woodfisher as wf
from models import ConvNet, mlp, samples
from woodfisher.curvature.damping import _GRID, held_out_damping, positive_scale
from woodfisher.curvature.lowrank import roundoff
from woodfisher.curvature.running import PlainFisher, ShrunkFisher
from woodfisher.gradients.batches import Replay, Stream, length, rechunk, samples_in
from woodfisher.memory import parse_bytes
from woodfisher.pruning.adaptive import adaptive_run
from woodfisher.pruning.averages import MeanPlace
from woodfisher.pruning.held_out import HeldOut, floor_of
from woodfisher.pruning.method import METHODS
from woodfisher.pruning.run import AdaptiveRun, _shares
from woodfisher.pruning.schedule import through, with_rests
from woodfisher.pruning.window import Course, window_for
from woodfisher.surgeon.selection import survivors

QUICK = wf.Adaptive(stages=6, window=20, held_out=12)
METHOD = replace(METHODS["woodfisher"], stages=QUICK, curvature=wf.WoodFisher(400, None, "auto", group=2))


def learnable(n=120, seed=0):
    """Samples of two inputs' worth of structure that a small network can fit."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 6, generator=generator)
    return inputs, (inputs[:, 0] + inputs[:, 1] > 0).long() + (inputs[:, 2] > 1).long()


def trained():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    inputs, targets = learnable()
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model


def batches(n=120, size=20):
    inputs, targets = learnable(n)
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def adaptive(objective, method, held_out, stream, first_order):
    """A run on the 120 samples of `batches`."""
    method = replace(method, first_order=first_order)
    (course,) = window_for(objective, method, 120, reads_once=stream.reads_once).courses
    held_out = HeldOut.of(objective, held_out)
    return AdaptiveRun(objective, method, method.selection(objective), course, held_out, stream)


def tried(run, removed):
    """A step that is to remove as many, and isn't taken."""
    ranking = run._ranking(removed)
    return run._try(ranking, removed, run._keep(ranking, removed))


def weights_of(model):
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if n.endswith("weight")])


# --- the running Fisher


@given(
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    at_once=st.integers(1, 3),
    window=st.integers(1, 8),
    seed=st.integers(0, 10),
)
@settings(max_examples=40, deadline=None)
def test_the_running_fisher_is_that_of_the_last_rows(pieces, at_once, window, seed):
    torch.manual_seed(seed)
    d, group, damping = 12, 3, 0.1
    fisher = PlainFisher(d, window, group, dtype=torch.float32, device=torch.device("cpu"))
    rows = torch.randn(sum(pieces), d)
    parts = rows.split(pieces)
    for first in range(0, len(parts), at_once):
        fisher.add(*parts[first : first + at_once])
    stay = torch.rand(d) > 0.4
    stay[0] = True
    last = rows[-window:].double()
    for now, G in ((fisher, last), (fisher.restricted(stay), last[:, stay])):
        F = damping * torch.eye(G.shape[1], dtype=torch.float64) + G.mT @ G * group / len(G)
        finv = now.inverse(damping)
        torch.testing.assert_close(finv.dense(), F.inverse(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(finv.diag(), F.inverse().diagonal(), rtol=1e-4, atol=1e-4)
        v = torch.randn(G.shape[1], dtype=torch.float64)
        torch.testing.assert_close(now.pull(v), (F @ v) - damping * v, rtol=1e-4, atol=1e-4)
        scale = positive_scale(now.gram.diagonal(), now.size, now.group)
        assert scale == pytest.approx(float(F.diagonal().mean()) - damping, rel=1e-4)


def test_restricting_twice_is_restricting_once():
    torch.manual_seed(0)
    fisher = PlainFisher(10, 4, 1, dtype=torch.float64, device=torch.device("cpu"))
    fisher.add(torch.randn(4, 10, dtype=torch.float64))
    before = fisher.rows.clone()
    first, second = torch.arange(10) != 3, torch.arange(9) != 0
    twice = fisher.restricted(first).restricted(second)
    both = torch.arange(10) % 10 != 3
    both[0] = False
    torch.testing.assert_close(twice.inverse(0.1).dense(), fisher.restricted(both).inverse(0.1).dense())
    assert torch.equal(fisher.rows, before)


# --- damping


def test_the_held_out_damping_has_the_highest_likelihood():
    torch.manual_seed(0)
    for group in (1, 4):
        G = torch.randn(40, 3, dtype=torch.float64) @ torch.randn(3, 30, dtype=torch.float64)
        G += 0.1 * torch.randn_like(G)
        out = torch.arange(40) % 5 == 4
        scale = float(G.square().mean()) * group
        F = G[~out].mT @ G[~out] * group / 32
        surprise = {}
        for factor in _GRID:
            damped = F + factor * scale * torch.eye(30, dtype=torch.float64)
            H = G[out] * math.sqrt(group)
            surprise[factor * scale] = float(
                damped.logdet() + (H * torch.linalg.solve(damped, H.mT).mT).sum(1).mean()
            )
        assert held_out_damping(G @ G.mT, 30, group) == pytest.approx(min(surprise, key=surprise.get))


@given(scale=st.floats(1e-3, 1e3), power=st.integers(-3, 2))
@settings(max_examples=20, deadline=None)
def test_a_relative_damping_means_the_same_in_every_unit(scale, power):
    model, (inputs, targets) = mlp(torch.float64), samples(10, dtype=torch.float64)
    results = []
    for unit in (1.0, scale):
        for damping in (wf.Relative(10.0**power), "auto"):
            objective = wf.Objective(
                model, [(inputs, targets)], lambda o, t, unit=unit: unit * cross_entropy(o, t)
            )
            finv = wf.WoodFisher(10, None, damping)(objective)
            results.append(finv.diag() * unit**2)
    torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=0)
    torch.testing.assert_close(results[1], results[3], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("damping", "message"),
    [
        ("Auto", "must be a number above 0, wf.Relative.* or 'auto'; 'Auto' came"),
        (0.0, "above 0"),
        (float("nan"), "above 0"),
    ],
)
def test_wrong_dampings(damping, message):
    with pytest.raises(wf.WoodfisherError, match=message):
        wf.WoodFisher(damping=damping)
    with pytest.raises(wf.WoodfisherError, match="factor of a relative damping"):
        wf.Relative(-1)


def test_a_damping_without_rows_to_choose_from():
    objective = wf.Objective(mlp(), [samples(4)], cross_entropy)
    with pytest.raises(wf.WoodfisherError, match="holds every fifth row out, and there are 4"):
        wf.WoodFisher(4, damping="auto")(objective)
    still = wf.Objective(mlp(), [samples(8)], lambda outputs, _: (outputs * 0).sum(1))
    for damping in (wf.Relative(1), "auto"):
        with pytest.warns(wf.WoodfisherWarning, match="every gradient row is zero"):
            diagonal = wf.WoodFisher(8, damping=damping)(still).diag()
        assert torch.equal(diagonal, diagonal[:1].expand_as(diagonal))


@pytest.mark.parametrize("damping", [wf.Relative(1), "auto"])
def test_a_damping_without_weights_to_choose_from(damping):
    model = mlp()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    objective = wf.Objective(model, [samples(8)], cross_entropy)
    with pytest.raises(wf.WoodfisherError, match="every chosen weight is zero already.* give a number"):
        wf.WoodFisher(8, damping=damping)(objective)
    assert (wf.WoodFisher(8, damping=0.5)(objective).diag() == 2).all()


def test_damping_stays_near_the_curvature_where_fewer_weights_are_left_than_rows():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 6, generator=generator) @ torch.randn(6, 8, generator=generator)
    gram = (rows @ rows.T).double()
    scale = float(gram.diagonal().mean()) / 8
    assert held_out_damping(gram, 8, 1) == pytest.approx(0.01 * scale)
    with pytest.raises(wf.WoodfisherError, match="overflow"):
        held_out_damping(gram * math.inf, 8, 1)


# --- held-out samples and schedules


@pytest.mark.parametrize("kind", ["list", "shuffled", "iterator"])
def test_held_out_samples_never_come_again(kind):
    inputs = torch.arange(30.0)[:, None]
    data = [(part, part) for part in inputs.split(4)]
    if kind == "shuffled":
        data = DataLoader(TensorDataset(inputs, inputs), batch_size=4, shuffle=True)
    stream = Stream(iter(data) if kind == "iterator" else data)
    held_out = {float(x) for x, _ in stream.hold_out(7) for x in x}
    assert len(held_out) == 7
    drawn = [float(x) for _ in range(9) for part, _ in stream.draw(11) for x in part]
    assert not held_out & set(drawn)
    if kind != "iterator":
        assert set(drawn) == set(range(30)) - held_out
        assert not held_out & {float(x) for part, _ in stream.fork().draw(23) for x in part}


def test_a_fork_reads_data_once_and_not_before_it_is_asked():
    begun = []

    class Data:
        def __iter__(self):
            begun.append(1)
            return iter([samples(8, (6,))])

    stream = Stream(Data())
    fork = stream.fork()
    assert not begun
    assert sum(map(samples_in, fork.draw(5))) == 5
    assert len(begun) == 1
    stream.hold_out(4)
    assert len(begun) == 2
    assert sum(map(samples_in, stream.fork().draw(4))) == 4
    assert len(begun) == 3


def test_counting_ahead_loses_nothing():
    data = [(torch.arange(4 * i, 4 * i + 4.0),) * 2 for i in range(5)]
    for source in (data, iter(data)):
        stream = Stream(source)
        assert stream.count(100) == 20
        assert not stream.reads_once
        assert sum(map(samples_in, stream.draw(20))) == 20
    stream = Stream(iter(data))
    assert stream.count(6) == 6
    assert torch.cat([x for x, _ in stream.draw(20)]).tolist() == list(range(20))


def test_less_data_than_asked_for_comes_once():
    inputs = torch.arange(30.0)[:, None]
    stream = Stream([(part, part) for part in inputs.split(4)])
    for _ in range(2):
        assert sorted(float(x) for part, _ in stream.draw(45) for x in part) == list(range(30))
    assert len({float(x) for part, _ in stream.draw(20) for x in part}) == 20
    assert sum(map(samples_in, stream.draw(25))) == 25


@pytest.mark.parametrize("wrap", [lambda data: data, Replay])
def test_loaders_over_a_part_of_their_data_tell_its_length(wrap):
    data = TensorDataset(*learnable(90))
    part = SubsetRandomSampler(range(40))
    assert length(wrap(DataLoader(data, 7, sampler=part))) == 40
    assert length(wrap(DataLoader(data, batch_sampler=BatchSampler(part, 7, drop_last=False)))) == 40
    assert (
        length(wrap(DataLoader(data, batch_size=None, sampler=BatchSampler(part, 7, drop_last=False)))) == 40
    )
    assert length(wrap(DataLoader(data, batch_sampler=[[0, 1], [2]]))) is None
    assert length(wrap(DataLoader(batches(), batch_size=None))) is None
    assert length(wrap(DataLoader(data, 7))) == 90
    assert length(wrap(DataLoader(data, 50, drop_last=True))) == 50
    assert length(wrap(DataLoader(data, batch_sampler=BatchSampler(part, 7, drop_last=True)))) == 35
    assert length(wrap(DataLoader(data, 30, drop_last=True))) == 90
    held_out = Stream(DataLoader(data, 7, sampler=part))
    held_out.hold_out(40)
    with pytest.raises(wf.WoodfisherError, match="the 40 different samples that are held out"):
        held_out.draw(5)


@given(
    now=st.integers(10, 5000),
    shares=st.lists(st.floats(0.01, 1), min_size=1, max_size=7),
    stages=st.integers(1, 40),
    pace=st.floats(0.5, 3),
)
def test_a_path_goes_down_through_every_target(now, shares, stages, pace):
    targets = [max(round(share * now), 1) for share in shares]
    path = through(now, targets, stages, pace)
    assert set(targets) <= set(path)
    assert path == sorted(set(path), reverse=True)
    assert path[-1] == min(targets)
    assert len(path) <= max(stages, len(set(targets)))


@given(
    amounts=st.lists(st.integers(1, 99), min_size=1, max_size=12, unique=True),
    chosen=st.sets(st.integers(0, 11), min_size=1),
    before=st.integers(0, 9),
    after=st.integers(0, 9),
)
def test_rests_come_first_and_after_targets(amounts, chosen, before, after):
    path = sorted(amounts, reverse=True)
    targets = [path[i % len(path)] for i in chosen]
    rested = with_rests(path, 100, targets, before, after)
    assert rested == sorted(rested, reverse=True)
    assert set(rested) - {100} == set(path)
    assert rested.count(100) == before
    assert len(rested) == len(path) + before + after
    more = [rested.count(amount) - 1 for amount in path if amount in targets]
    assert more == sorted(more)
    assert more[-1] - more[0] <= 1


# --- runs


@pytest.mark.parametrize("first_order", [True, False, "auto"])
@pytest.mark.parametrize("damping", ["auto", 0.3, wf.Relative(2.0)])
def test_runs_keep_exactly_the_asked_number(first_order, damping):
    model = trained()
    before = weights_of(model)
    method = replace(METHOD, first_order=first_order, curvature=wf.WoodFisher(400, None, damping, group=2))
    report = wf.prune(
        model,
        batches(),
        cross_entropy,
        0.6,
        curvature=method.curvature,
        stages=replace(QUICK, stages=12),
        first_order=first_order,
    )
    assert report.kept == int(weights_of(model).count_nonzero()) == 14
    assert not torch.equal(weights_of(model)[weights_of(model) != 0], before[weights_of(model) != 0])
    assert all(stage.measured is not None for stage in report.stages)


def test_data_that_does_not_tell_its_length_gives_the_same_run():
    class Untold:
        def __iter__(self):
            return iter(batches())

    def pruned(data, among):
        few = replace(QUICK, held_out=3, window=12, among=among)
        model = trained()
        wf.prune(
            model, data, cross_entropy, 0.6, curvature=wf.WoodFisher(80, None, "auto", group=3), stages=few
        )
        return weights_of(model)

    for among in (1, 2):
        assert torch.equal(pruned(Untold(), among), pruned(batches(), among))
        assert torch.equal(pruned(iter(batches()), among), pruned(batches(), 1))


def test_stages_measure_what_they_did_on_the_held_out_samples():
    objective = wf.Objective(trained(), batches(), cross_entropy)
    stream = Stream(objective.data)
    held_out = stream.hold_out(12)
    run = adaptive(objective, METHOD, held_out, stream, True)
    dense = run.loss
    inputs, targets = (torch.cat(part) for part in zip(*held_out, strict=True))
    assert dense == pytest.approx(cross_entropy(objective.model(inputs), targets).item(), rel=1e-5)
    (*_, last) = run.passing([30, 10])
    assert last.stages[-1].sparsity == pytest.approx(1 - 10 / 36)
    assert sum(s.measured for s in last.stages if s.accepted) + dense == pytest.approx(run.loss, rel=1e-5)
    last.objective.write()
    again = cross_entropy(objective.model(inputs), targets).item()
    assert again == pytest.approx(last.loss, rel=1e-4)


def test_a_stage_trusted_too_far_is_taken_back_and_split():
    objective = wf.Objective(trained(), batches(), cross_entropy)
    stream = Stream(objective.data)
    method = replace(METHOD, stages=replace(QUICK, stages=2))
    run = adaptive(objective, method, stream.hold_out(12), stream, False)
    (passed,) = run.passing([4])
    taken_back = [i for i, stage in enumerate(passed.stages) if not stage.accepted]
    assert taken_back == [1, 2, 3, 5]
    for i in taken_back:
        again = passed.stages[i + 1]
        assert again.sparsity < passed.stages[i].sparsity
        assert passed.stages[i].measured > 2 * max(passed.stages[i].predicted, 0)
    assert int(passed.objective.kept.sum()) == 4


def test_groups_that_cannot_be_split_are_not_tried_again(monkeypatch):
    objective = wf.Objective(trained(), batches(), cross_entropy)
    stream = Stream(objective.data)
    method = replace(METHOD, pattern=wf.Channels())
    run = adaptive(objective, method, stream.hold_out(12), stream, False)
    masks, tries = [], run._try

    def noting(ranking, removed, keep):
        masks.append(keep)
        return tries(ranking, removed, keep)

    run._renew(run.course.rows)
    monkeypatch.setattr(run, "_try", noting)
    monkeypatch.setattr(run, "_loss_at", lambda weights, keep, turn=None: 100.0 * (not keep.all()))
    step = run._stage(24, True, [])
    assert step.strain > 1
    assert len(masks) > 2
    assert not any(mask.equal(following) for mask, following in itertools.pairwise(masks))
    assert step.keep.equal(run._keep(run._ranking(1), 1))
    assert step.keep.sum() in (36 - 6, 36 - 4)


def test_with_the_gradient_stages_that_are_split_take_no_more_of_the_data(monkeypatch):
    method = replace(METHOD, stages=replace(QUICK, stages=16))

    def run_through(rise):
        monkeypatch.setattr("woodfisher.pruning.held_out._RISE", {True: rise})
        objective = wf.Objective(trained(), batches(), cross_entropy)
        stream, drawn = Stream(objective.data), []
        run = adaptive(objective, method, stream.hold_out(12), stream, True)
        gathered, group = run._gathered, run.course.group
        monkeypatch.setattr(
            run, "_gathered", lambda count, **how: drawn.append(count * group) or gathered(count, **how)
        )
        (last,) = run.passing([20])
        assert int(last.objective.kept.sum()) == 20
        return sum(stage.accepted for stage in last.stages), sum(drawn), run.course

    stages, drawn, course = run_through(math.inf)
    assert stages == course.stages
    assert drawn == course.samples
    more, drawn, _ = run_through(1e-3)
    assert more > stages
    assert course.samples - course.group * more < drawn <= course.samples


@pytest.mark.parametrize("first_order", [True, False])
def test_rows_that_are_still_to_come_are_shared(first_order):
    course = Course(first_order=first_order, stages=9, rows=20, group=2, renewed=10, among=1, shrinks=False)
    shares = [course.share(*left) for left in ((80, 8), (70, 8), (40, 8), (20, 8), (0, 1))]
    assert shares == ([10, 8, 5, 3, 3] if first_order else [10] * 5)


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=12), st.lists(st.integers(-9, 9), max_size=3))
def test_later_places_count_more_in_an_average_and_those_of_more_weights_not_at_all(places, before):
    average = MeanPlace()
    for place in before:
        average.add(torch.tensor([place, 7.0, 1.0], dtype=torch.float64))
    for place in places:
        average.add(torch.tensor([place, -place], dtype=torch.float64))
    shares = [k * (k + 1) * (k + 2) for k in range(1, len(places) + 1)]
    mean = sum(share * place for share, place in zip(shares, places, strict=True)) / sum(shares)
    assert average.value.tolist() == pytest.approx([mean, -mean])


@pytest.mark.parametrize("better", [True, False])
def test_a_target_is_left_at_the_average_if_that_has_the_lower_loss(better, monkeypatch):
    run = after_a_stage()
    there = run.weights * (1 if better else 3)
    loss = run._loss_at(there, run.objective.kept)
    monkeypatch.setattr(run._places, "value", there)
    if better:
        run.weights, run.loss = run.weights * 3, run._loss_at(run.weights * 3, run.objective.kept)
        run.objective = run._objective_at(run.weights, run.objective.kept)
    assert (loss < run.loss) == better
    passed = run._finished(())
    assert torch.equal(passed.objective.weights[run.objective.kept], there if better else run.weights)
    assert passed.loss == min(loss, run.loss)


def test_the_gradient_is_that_of_the_data_where_rows_are_of_drawn_targets():
    objective = wf.Objective(trained(), batches(), cross_entropy)
    method = replace(METHOD, curvature=replace(METHOD.curvature, labels="model", group=1))
    stream = Stream(objective.data)
    held_out = stream.hold_out(12)
    run = adaptive(objective, method, held_out, stream, True)
    seen = stream.fork().draw(20)
    run._renew(run.course.rows)
    torch.testing.assert_close(run.gradient.value.float(), objective.on(seen).gradient(20))


def test_damping_below_the_rounding_of_the_gram_matrix_is_raised():
    torch.manual_seed(0)
    inputs, targets = 1 + 1e-5 * torch.randn(300, 40), torch.randn(300, 1)  # rows of nearly one direction
    model = torch.nn.Linear(40, 1, bias=False)
    report = wf.prune(model, [(inputs, targets)], torch.nn.functional.mse_loss, 0.5, stages=QUICK)
    assert report.kept == 20
    with pytest.raises(wf.WoodfisherError, match="not positive definite"):
        curvature = wf.WoodFisher(400, None, 1e-12)
        wf.prune(
            model, [(inputs, targets)], torch.nn.functional.mse_loss, 0.75, stages=QUICK, curvature=curvature
        )


def test_the_result_is_never_worse_than_magnitude_on_the_held_out_samples_and_on_more_of_them():
    objective = wf.Objective(trained(), batches(), cross_entropy)
    held_out = Stream(objective.data).hold_out(24)
    dense, everywhere = objective.on(held_out).mean_loss(), objective.mean_loss()
    counts = [25, 12, 5]
    there, more = {}, {}
    for count in counts:
        keep = survivors(objective.weights.abs(), objective.kept, count)
        pruned = objective.at(objective.weights, keep)
        there[count] = pruned.on(held_out).mean_loss()
        more[count] = dense + pruned.mean_loss() - everywhere
    method = replace(METHOD, stages=replace(QUICK, held_out=24))
    losses = {
        int(passed.objective.kept.sum()): passed.loss
        for passed in adaptive_run(objective, counts, method, method.selection(objective))
    }
    for count, loss in losses.items():
        assert loss <= max(there[count], more[count]) * (1 + 1e-5)
    assert there[25] < losses[25] < more[25]  # lower on the 24, higher on all


def test_endless_data_of_few_samples_is_refused():
    endless = itertools.cycle(batches(20, 10))
    with pytest.raises(wf.WoodfisherError, match="the 20 different samples .* are all of the data"):
        wf.prune(trained(), endless, cross_entropy, 0.5, stages=replace(QUICK, held_out=24))


def test_equal_data_gives_equal_results():
    results = [wf.sweep(trained(), batches(), cross_entropy, [0.5], stages=QUICK) for _ in range(2)]
    assert torch.equal(results[0][0].objective.weights, results[1][0].objective.weights)


def test_a_sweep_is_one_run_through_all_sparsities():
    model = trained()
    before = copy.deepcopy(model.state_dict())
    asked = [0.8, 0.3, 0.6]
    points = wf.sweep(
        model, batches(360), cross_entropy, asked, criterion="woodtaylor", stages=replace(QUICK, stages=24)
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.report.kept for p in points] == [round((1 - s) * 36) for s in asked]
    assert len(points[0].report.stages) > len(points[2].report.stages) > len(points[1].report.stages)
    other = mlp()
    other.load_state_dict(before)
    points[1].write(other)
    assert int(weights_of(other).count_nonzero()) == 25
    for name, mask in points[1].report.masks.items():
        assert torch.equal(other.get_parameter(name) != 0, mask)
    with pytest.raises(wf.WoodfisherError, match="no parameter '0.weight' of shape"):
        points[1].write(ConvNet())


@pytest.mark.filterwarnings("ignore:400 samples were asked for")
@pytest.mark.filterwarnings("ignore:every gradient row is zero", "ignore:every weight of")
def test_a_sweep_by_a_fixed_number_of_stages_is_a_prune_each():
    for criterion, stages in (("magnitude", None), ("obd", 2), ("woodfisher-block", 2)):
        points = wf.sweep(trained(), batches(), cross_entropy, [0.8, 0.5], criterion=criterion, stages=stages)
        for point, sparsity in zip(points, (0.8, 0.5), strict=True):
            model = trained()
            wf.prune(model, batches(), cross_entropy, sparsity, criterion=criterion, stages=stages)
            torch.testing.assert_close(
                torch.cat(
                    [w.flatten() for w in point.objective.layout.split(point.objective.weights).values()]
                ),
                weights_of(model),
            )


def test_each_point_of_a_sweep_by_fixed_stages_has_its_own_seconds(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("woodfisher.watch.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    options = {"criterion": "woodfisher-block", "stages": 1, "curvature": wf.WoodFisher(20, 4, 0.1)}
    alone = wf.sweep(trained(), batches(), cross_entropy, [0.5], **options)
    points = wf.sweep(trained(), batches(), cross_entropy, [0.4, 0.5, 0.6], **options)
    assert [point.report.seconds for point in points[1:]] == [alone[0].report.seconds] * 2


@pytest.mark.filterwarnings("ignore:K-FAC's factors take removed weights")
def test_auto_stages_suit_the_method():
    report = wf.prune(trained(), batches(), cross_entropy, 0.5, curvature=wf.KFAC(40, 0.1), update="none")
    assert len(report.stages) == 15  # 16, two of which would keep equally many
    with pytest.raises(wf.WoodfisherError, match="stages that adapt carry the rows of one block"):
        wf.prune(mlp(), batches(), cross_entropy, 0.5, curvature=wf.KFAC(), stages=QUICK)
    with pytest.raises(wf.WoodfisherError, match="and update='none' came"):
        wf.prune(mlp(), batches(), cross_entropy, 0.5, update="none", stages=QUICK)


@pytest.mark.filterwarnings("ignore:every weight of")
@pytest.mark.parametrize("criterion", ["woodtaylor", "magnitude"])
def test_prune_to_a_drop(criterion):
    model, (inputs, targets) = trained(), learnable(200, seed=1)

    def metric(model):
        return float((model(inputs).argmax(1) == targets).float().mean())

    dense = metric(model)
    stages = QUICK if criterion == "woodtaylor" else None
    report = wf.prune(
        model, batches(), cross_entropy, max_drop=0.1, metric=metric, criterion=criterion, stages=stages
    )
    assert metric(model) >= 0.9 * dense
    assert 0 < report.sparsity < 1
    strict = trained()
    loose = wf.prune(
        strict, batches(), cross_entropy, max_drop=0.6, metric=metric, criterion=criterion, stages=stages
    )
    assert loose.sparsity >= report.sparsity


@pytest.mark.parametrize("stages", [1, QUICK])
def test_a_floor_bounds_the_search_for_a_drop(stages):
    model = trained()
    rows = wf.WoodFisher(100, None, "auto")
    report = wf.prune(
        model,
        batches(),
        cross_entropy,
        max_drop=0.9,
        metric=lambda m: 1 + 1e-3 * float((m[0].weight == 0).sum()),
        stages=stages,
        floor=0.3,
        curvature=rows,
    )
    assert 11 <= report.kept <= 13
    assert all(layer.kept >= 0.3 * layer.size for layer in report.layers)


def test_a_drop_that_nothing_meets_leaves_the_model():
    model = trained()
    before = weights_of(model)

    def metric(model):
        return float((weights_of(model) != 0).float().mean())

    with pytest.warns(wf.WoodfisherWarning, match="already costs more than the drop"):
        report = wf.prune(model, None, criterion="magnitude", max_drop=0.0, metric=metric)
    assert report.sparsity == 0
    assert torch.equal(weights_of(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": 0.1}, "max_drop needs metric="),
        ({"max_drop": 0.1, "sparsity": 0.5}, "not both"),
        ({"max_drop": 1.5, "metric": lambda _: 1.0}, r"max_drop must be a number in \[0, 1\); 1.5 came"),
        ({"max_drop": 0.1, "metric": "accuracy"}, "max_drop needs metric=.*'accuracy' came"),
        ({"max_drop": 0.1, "metric": lambda _: torch.tensor(math.inf)}, r"finite number; tensor\(inf\) came"),
        ({"max_drop": 0.1, "metric": lambda _: float("nan")}, "finite number; nan came"),
        ({"stages": "many"}, "stages must be a whole number"),
        ({"first_order": "maybe"}, "first_order must be True, False or 'auto'; 'maybe' came"),
        ({"first_order": "False"}, "first_order must be True, False or 'auto'; 'False' came"),
        ({"refine": 2, "stages": QUICK}, "refine swaps"),
    ],
)
def test_wrong_options(options, message):
    model = trained()
    before = weights_of(model)
    with pytest.raises((wf.WoodfisherError, TypeError), match=message):
        wf.prune(model, batches(), cross_entropy, **options)
    assert torch.equal(weights_of(model), before)


def test_data_too_small_to_hold_anything_out():
    with pytest.raises(wf.WoodfisherError, match="hold out samples to check on, and the data has 1"):
        wf.prune(mlp(), [samples(1)], cross_entropy, 0.5)
    with pytest.raises(wf.WoodfisherError, match="the data holds no batch"):
        wf.prune(mlp(), [], cross_entropy, 0.5)


def test_a_model_that_is_broken_from_the_start():
    def broken(outputs, targets):
        return cross_entropy(outputs, targets) + float("inf")

    with pytest.raises(wf.WoodfisherError, match="the mean loss of the model as it came is inf"):
        wf.prune(mlp(), [samples(20)], broken, 0.5)


@pytest.mark.parametrize(("field", "value"), [("stages", 0), ("window", 1.5), ("momentum", 1.0), ("pace", 0)])
def test_wrong_plans(field, value):
    with pytest.raises(wf.WoodfisherError, match=field):
        wf.Adaptive(**{field: value})


@pytest.mark.parametrize("workspace", [0, 3000, 2**29])
@pytest.mark.parametrize(("first_order", "fewest"), [("auto", 10), (True, 5)])
def test_the_window_fits_the_memory_that_is_given(first_order, fewest, workspace, monkeypatch):
    monkeypatch.setattr("woodfisher.memory.resident_memory", lambda _: 100)
    objective = wf.Objective(mlp(), [samples(60)], cross_entropy).within(workspace)
    method = replace(wf.METHODS["woodfisher"], first_order=first_order, stages=wf.Adaptive(stages=2))

    def window(memory):
        curvature = replace(method.curvature, samples=2000, group=1, memory=memory)
        return window_for(objective, replace(method, curvature=curvature), 60)

    assert {course.rows for course in window(None).courses} == {48}
    for memory in (20, 200, 5000):
        refusal = rf"memory=.* {fewest} gradient rows of 36 weights with"
        with pytest.raises(wf.WoodfisherError, match=refusal) as said:
            window(memory)
    least = parse_bytes(re.search(r"Give (\S+ \S*B) or more", str(said.value))[1])
    assert min(course.rows for course in window(least).courses) == 5
    for memory in range(least, 2**21, 7919):
        assert window(memory).peak <= memory
    assert window(2**31).courses == window(None).courses


def test_what_has_no_prior_plans_none():
    objective = wf.Objective(mlp(), batches(), cross_entropy)
    named = {}
    cases = {
        "gradient": ({"first_order": True}, False),
        "stream": ({}, True),
        "channels": ({"pattern": wf.Channels()}, False),
        "heads": ({"pattern": wf.Heads(1)}, False),
        "none": ({}, False),
    }
    for case, (options, reads_once) in cases.items():
        method = replace(METHOD, **{"first_order": False, **options})
        window = window_for(objective, method, 120, reads_once=reads_once)
        named[case] = [(name, size) for name, size in window.bill if "rows" in name or "prior" in name]
    rows = "20 gradient rows of 36 weights"
    assert named["gradient"] == named["stream"] == named["channels"] == [(rows, 20 * 36 * 4)]
    assert named["heads"] == named["none"]
    (doubled, prior) = named["none"]
    assert doubled == (f"{rows} with their copies", 2 * 20 * 36 * 4)
    assert prior == (
        "the prior that F shrinks to, before a stage and after it",
        8 * (6**2 + 4**2) + 2 * 4 * 36 * 6,
    )


def test_few_rows_where_little_memory_is_free(monkeypatch):
    monkeypatch.setattr("woodfisher.memory.available_memory", lambda _: 800_000)
    with pytest.warns(wf.WoodfisherWarning, match=r"room for \d+ gradient rows of 36 weights, and 800 were"):
        report = wf.prune(trained(), batches(), cross_entropy, 0.5, stages=wf.Adaptive(stages=2))
    assert report.sparsity == 0.5


def test_damping_follows_the_curvature_where_a_network_fits_its_samples():
    inputs, targets = learnable(240)
    inputs = inputs.double()  # in float32 the rounding of another processor decides stages otherwise
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.ReLU(), torch.nn.Linear(40, 3)).double()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(800):
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    assert cross_entropy(model(inputs), targets).item() < 1e-3
    data = list(zip(inputs.split(40), targets.split(40), strict=True))
    stages = wf.Adaptive(stages=12, window=150, held_out=48)
    dense = copy.deepcopy(model)
    report = wf.prune(model, data, cross_entropy, 0.9, first_order=False, stages=stages)
    dampings = [stage.damping for stage in report.stages if stage.damping is not None]
    assert max(dampings) > 1000 * dampings[0]
    assert sum(stage.damping is not None for stage in report.stages) > 0.8 * len(report.stages)
    by_size = copy.deepcopy(dense)
    wf.prune(by_size, data, cross_entropy, 0.9, criterion="magnitude")
    rise, magnitudes = (cross_entropy(net(inputs), targets).item() for net in (model, by_size))
    assert rise < 0.75 * magnitudes


@pytest.mark.filterwarnings("ignore:40.10%")
def test_each_point_of_a_sweep_has_its_own_statistics_in_whatever_order_they_are_written():
    torch.manual_seed(0)
    model = ConvNet().train()
    x, y = samples(60, (2, 6, 6))
    model(x)
    model.eval()
    wf.prune(model, [(x, y)], cross_entropy, 0.4, criterion="magnitude")
    points = wf.sweep(model, [(x + 1, y)], cross_entropy, [0.3, 0.8], criterion="magnitude")
    first = copy.deepcopy(model)
    points[0].write(first)
    points[1].write()
    points[0].write()
    assert torch.equal(model.norm.running_mean, first.norm.running_mean)


@pytest.mark.parametrize("batch", [4, 7])
def test_held_out_samples_that_the_data_repeats_never_come_again(batch):
    x = torch.arange(10.0)[torch.randint(10, (60,), generator=torch.Generator().manual_seed(0))]
    stream = Stream([(part[:, None], part) for part in x.split(batch)])
    held_out = {float(x) for _, part in stream.hold_out(5) for x in part}
    drawn = [float(x) for _ in range(3) for _, part in stream.draw(11) for x in part]
    assert len(drawn) == 33
    assert not held_out & set(drawn)


@pytest.mark.parametrize("first_order", [False, True])
def test_the_prediction_is_the_quadratic_model_without_damping(first_order):
    objective = wf.Objective(trained(), batches(), cross_entropy)
    stream = Stream(objective.data)
    run = adaptive(objective, METHOD, stream.hold_out(12), stream, first_order)
    run._renew(run.course.rows)
    step = tried(run, 6)
    moved = run._full(step.candidate.weights, step.keep) - run.weights
    curvature = run.fisher.inverse(1.0).forward(moved) - run.fisher.damped(moved)
    expected = float(moved @ curvature) / 2 + first_order * float(run.gradient.value @ moved)
    assert step.stage.predicted == pytest.approx(expected, rel=1e-5)


def after_a_stage():
    """A run with the gradient, in float64, after its first stage."""
    data = [(inputs.double(), targets) for inputs, targets in batches()]
    objective = wf.Objective(trained().double(), data, cross_entropy)
    stream = Stream(objective.data)
    run = adaptive(objective, METHOD, stream.hold_out(12), stream, True)
    run._renew(run.course.rows)
    run._accept(run._stage(6, False, []))
    return run


def test_weights_move_while_the_rows_of_a_stage_come(monkeypatch):
    monkeypatch.setattr("woodfisher.pruning.held_out._RISE", {True: math.inf})
    run, drawn = after_a_stage(), []
    draw = run._important.draw
    monkeypatch.setattr(run._important, "draw", lambda *of: drawn.append(draw(*of)) or drawn[-1])
    course, kept, before = run.course, run.objective.kept, run.loss
    finv = run.fisher.inverse(run._damping.now(run.fisher)).dense()
    curvature = run.fisher.rows.mT @ run.fisher.rows / run.fisher.divisor
    weights, gradient, seen, predicted = (
        run.weights.clone(),
        run.gradient.value.clone(),
        run.gradient.weight,
        0.0,
    )
    run._renew(run.course.renewed)
    parts = _shares(course.renewed, 8)
    for part, new in zip(parts, drawn, strict=True):
        at = run.objective.at(run._full(weights, kept), kept)
        fresh = at.on_weighted(new.data).gradient(part * course.group)[kept]
        seen += part
        gradient += (fresh - gradient) * part / seen
        step = -finv @ gradient / 8
        predicted += float(gradient @ step + step @ curvature @ step / 2)
        weights += step
        seen *= QUICK.momentum**0.125
    torch.testing.assert_close(run.weights, weights)
    torch.testing.assert_close(run.gradient.value, gradient)
    assert run.loss == pytest.approx(run._loss_at(weights, kept))
    assert run._foreseen == pytest.approx(predicted)
    assert run.loss - run._began == pytest.approx(run.loss - before)
    step = run._stage(0, False, [])
    assert step.stage.measured == pytest.approx(step.candidate.loss - before)


def test_what_is_predicted_excuses_a_rise_up_to_the_loss(monkeypatch):
    run = after_a_stage()
    run._renew(run.course.renewed)
    largest = max(run.loss, run.held_out.first)
    for predicted, foreseen in ((-1.0, 0.0), (largest / 4, largest / 2), (1e3, largest)):
        monkeypatch.setattr(run, "_predicted", lambda step, predicted=predicted: predicted)
        step = tried(run, 26)
        rise = step.candidate.loss - run.loss
        assert rise > 0
        assert step.strain == pytest.approx(rise / (foreseen + 0.4 * largest))


def test_moves_that_raise_the_loss_are_undone():
    run = after_a_stage()
    weights, loss = run.weights, run.loss
    run.gradient.value = 1e3 * run.weights
    run._renew(run.course.renewed)
    assert torch.equal(run.weights, weights)
    assert run.loss == loss
    assert run.loss - run._began == 0


def test_moves_are_checked_on_a_batch_in_turn_and_where_they_lead_on_all(monkeypatch):
    run = after_a_stage()
    start, loss, seen = run.weights, run.loss, []
    rise = run.held_out.rise(loss, True)
    halves = list(rechunk(run.held_out.batches, 6, 1))
    assert len(halves) == 2

    class Told(HeldOut):
        def quick_loss(self, objective, turn=None):
            seen.append(None if turn is None else self.batches[turn % 2])
            return loss + (2 * rise if bad else -0.1) if turn is None else 0.0

    run.held_out = Told(halves, run.held_out.dense, run.held_out.first, run.held_out.floor)
    for turn, bad in enumerate((True, False, True)):
        before = run.weights
        seen.clear()
        run._renew(run.course.renewed)
        assert seen == [halves[turn % 2]] * 9 + [None]
        assert torch.equal(run.weights, before) == bad
        assert run.loss == (loss if not turn else loss - 0.1)
        assert (run._foreseen == 0) == bad
        if bad:
            assert torch.equal(run._places.value, before)
    assert not torch.equal(run.weights, start)


@pytest.mark.parametrize(("fall", "before"), [(math.inf, 6), (-math.inf, 8)])
def test_stages_before_removals_end_where_they_bring_nothing(fall, before, monkeypatch):
    monkeypatch.setattr("woodfisher.pruning.held_out._RISE", {True: math.inf})
    monkeypatch.setattr("woodfisher.pruning.run._FALL", fall)
    objective = wf.Objective(trained(), batches(), cross_entropy)
    stream = Stream(objective.data)
    method = replace(METHOD, stages=replace(QUICK, stages=48))
    run = adaptive(objective, method, stream.hold_out(12), stream, True)
    (last,) = run.passing([4])
    kept = [round(36 * (1 - stage.sparsity)) for stage in last.stages if stage.accepted]
    assert kept[: before + 1] == [36] * before + [kept[before]]
    assert kept[before] < 36
    assert kept[-25:] == [4] * 25


def test_the_gradient_moves_weights_before_and_between_removals():
    report = wf.prune(
        trained(), batches(), cross_entropy, 0.6, first_order=True, stages=replace(QUICK, stages=18)
    )
    accepted = [round(36 * (1 - stage.sparsity)) for stage in report.stages if stage.accepted]
    assert accepted[:3] == [36] * 3
    assert accepted[-4:] == [14] * 4
    plain = wf.prune(
        trained(), batches(), cross_entropy, 0.6, first_order=False, stages=replace(QUICK, stages=18)
    )
    kept = [stage.sparsity for stage in plain.stages if stage.accepted]
    assert len(set(kept)) == len(kept)


def test_stages_after_a_target_that_groups_undercut_remove_nothing():
    stages = replace(QUICK, stages=9)
    report = wf.prune(
        trained(), batches(), cross_entropy, 17 / 36, first_order=True, stages=stages, pattern=wf.Block(2)
    )
    kept = [round(36 * (1 - stage.sparsity)) for stage in report.stages if stage.accepted]
    assert report.kept == 18
    assert kept[-4:] == [18] * 4


def test_with_the_gradient_damping_stays_within_its_bound_where_weights_stay(monkeypatch):
    run = after_a_stage()

    def relative() -> float:
        fisher = run.fisher
        return run._damping.now(fisher) / positive_scale(fisher.gram.diagonal(), fisher.size, fisher.group)

    most = 27 * relative()
    monkeypatch.setattr(
        run, "_loss_at", lambda weights, keep, batches=None: float(not torch.equal(weights, run.weights))
    )
    for _ in range(5):
        run._renew(run.course.renewed)
        step = run._stage(0, False, [])
        assert not step.candidate.moved
        run._accept(step)
        assert relative() <= most * (1 + 1e-9)


def test_a_gradient_that_misleads_the_ranking_is_left_out_of_it():
    """Here it would have a step bring the largest weights to zero, as noise may."""
    objective = wf.Objective(trained(), batches(), cross_entropy)
    stream = Stream(objective.data)
    run = adaptive(objective, METHOD, stream.hold_out(12), stream, True)
    run._renew(run.course.rows)
    ranking = run._ranking(6)
    largest = run.weights.abs() >= run.weights.abs().topk(6).values[-1]
    run.gradient.value = run.fisher.inverse(ranking.damping).forward(run.weights * largest)
    done = []
    step = run._stage(6, False, done)
    assert [stage.accepted for stage in done] == [False, True]
    assert done[1].measured < done[0].measured
    assert not tried(run, 6).keep[largest].any()
    assert step.keep[largest].sum() > 3


@pytest.mark.filterwarnings("ignore:400 samples were asked for")
def test_data_whose_samples_are_all_held_out_is_explained():
    x = torch.tensor([[0.0] * 6, [1.0] * 6]).repeat(100, 1)
    data = list(zip(x.split(20), x[:, 0].long().split(20), strict=True))
    with pytest.raises(wf.WoodfisherError, match="the 2 different samples that are held out"):
        wf.prune(mlp(), data, cross_entropy, 0.5)
    wf.prune(mlp(), data, cross_entropy, 0.5, stages=2)


@pytest.mark.parametrize("options", [{"stages": 1}, {"criterion": "magnitude"}, {"stages": QUICK}])
@pytest.mark.filterwarnings("ignore:400 samples were asked for")
def test_points_of_a_sweep_are_on_the_data_that_came(options):
    data = batches()
    (point,) = wf.sweep(trained(), data, cross_entropy, [0.5], **options)
    assert point.objective.data is data
    assert math.isfinite(point.objective.mean_loss())


def test_few_samples_that_come_once_are_pruned_as_those_in_a_list():
    whole, once = trained(), trained()
    wf.prune(whole, batches(), cross_entropy, 0.6, stages=QUICK)
    wf.prune(once, iter(batches()), cross_entropy, 0.6, stages=QUICK)
    assert torch.equal(weights_of(once), weights_of(whole))


def test_samples_that_come_once_make_no_prior_and_none_is_lost():
    inputs, targets = learnable(60)
    read = []

    def once():
        for batch in zip(inputs.split(10), targets.split(10), strict=True):
            read.append(len(batch[0]))
            yield batch

    model = trained()
    report = wf.prune(model, once(), cross_entropy, 0.5, first_order=False, stages=QUICK)
    assert report.kept == 18
    assert sum(read) == 60
    stream = Stream(iter(batches()))
    objective = wf.Objective(trained(), batches(), cross_entropy)
    for source, kind in ((stream, PlainFisher), (Stream(batches()), ShrunkFisher)):
        run = adaptive(objective, METHOD, source.hold_out(12), source, False)
        assert type(run.fisher) is kind


def test_sparsities_and_stages_may_be_numpys():
    points = wf.sweep(mlp(), batches(), cross_entropy, np.array([0.5, 0.75]), criterion="magnitude")
    assert [point.report.sparsity for point in points] == [0.5, 0.75]
    (point,) = wf.sweep(mlp(), None, None, 0.5, criterion="magnitude")
    wrapped = torch.nn.DataParallel(mlp())
    point.write(wrapped)
    assert int((weights_of(wrapped) != 0).sum()) == point.report.kept == 18
    curvature = wf.WoodFisher(20, 6, 1e-2)
    report = wf.prune(
        mlp(), batches(), cross_entropy, 0.5, curvature=curvature, stages=np.int64(2), floor=np.float32(0.1)
    )
    assert report.kept == 18
    written = json.loads(json.dumps(report.to_dict()))
    assert written["method"]["floor"] == pytest.approx(0.1)


@pytest.mark.parametrize("first_order", [True, False])
def test_what_a_loss_is_counted_from_makes_no_difference_below_zero(first_order):
    results = []
    for shift in (0.0, -1.0, -64.0):
        model = trained()
        wf.prune(
            model,
            batches(),
            lambda outputs, targets, shift=shift: (
                cross_entropy(outputs.double(), targets, reduction="none") + shift
            ),
            0.75,
            stages=QUICK,
            first_order=first_order,
            curvature=replace(METHOD.curvature, samples=200),
        )
        results.append(weights_of(model))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-3, atol=1e-4)


def test_losses_are_counted_from_the_smallest_of_a_sample_where_there_are_negative_ones():
    def at(values):
        values = torch.tensor(values)
        data = [(torch.zeros(2, 1), part) for part in values.split(2)]
        objective = wf.Objective(
            torch.nn.Linear(1, 1), data, lambda outputs, targets: 0 * outputs[:, 0] + targets
        )
        return floor_of(objective, float(values.mean()))

    assert at([3.0, 1.0, 2.0, 4.0]) == 0.0
    assert at([3.0, -1.0, -2.0, 4.0]) == -2.0
    assert at([-3.0, -3.0]) == -6.0


def test_products_that_overflow_end_a_run_of_few_rows():
    """However large the damping, which nobody chose, the Gram matrix stays infinite."""
    model, data = mlp(), [samples(5)]
    before = weights_of(model)
    with pytest.raises(
        wf.WoodfisherError, match="holds NaN or infinity: gradients are not finite, or their products"
    ):
        wf.prune(model, data, lambda o, t: 1e20 * cross_entropy(o, t), 0.5)
    assert torch.equal(weights_of(model), before)


def test_a_relative_damping_of_no_curvature_is_warned_of():
    with pytest.warns(wf.WoodfisherWarning, match="every gradient row is zero"):
        wf.prune(
            mlp(),
            batches(),
            lambda outputs, targets: 0 * outputs.sum(1),
            0.5,
            stages=QUICK,
            curvature=replace(METHOD.curvature, damping=wf.Relative(1)),
        )


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_products_of_fewer_digits_are_told(setting):
    torch.set_float32_matmul_precision(setting)
    try:
        lowered = roundoff(torch.device("cpu")) > torch.finfo(torch.float32).eps
        assert lowered == (setting == "medium")
        assert roundoff(torch.device("cuda")) == 2.0**-10
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            PlainFisher(3, 2, 1, dtype=torch.float32, device=torch.device("cpu"))
        assert [("fewer digits" in str(each.message)) for each in told] == [True] * lowered
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_point_of_a_sweep_is_not_mixed_with_what_training_made_of_the_rest():
    model, other = mlp(), mlp()
    dense = copy.deepcopy(model.state_dict())
    points = wf.sweep(model, batches(), cross_entropy, (0.5, 0.75), criterion="magnitude")
    points[0].write()
    with torch.no_grad():
        model[0].bias += 0.1
    pruned = weights_of(model)
    with pytest.raises(
        wf.WoodfisherError,
        match=r"'0.bias' of this model differs from that of the model that was pruned, as it was then",
    ):
        points[1].write()
    assert torch.equal(weights_of(model), pruned)
    points[1].write(other)
    model.load_state_dict(dense)
    points[1].write()
    assert torch.equal(weights_of(model), weights_of(other))
    rounded = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        model[0].bias += 0.1
    points[1].write(rounded)
    assert torch.equal(weights_of(rounded), weights_of(other).bfloat16())
    with pytest.raises(wf.WoodfisherError, match=r"'0.bias' of this model differs"):
        points[1].write(copy.deepcopy(model))
    model.double().load_state_dict(dense)
    points[1].write()
    assert torch.equal(weights_of(model), weights_of(other).double())


class Remembering(torch.nn.Module):
    """Makes a buffer that isn't saved as it first runs."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        self.register_buffer("seen", torch.zeros(len(x)), persistent=False)
        return self.net(x)


def test_buffers_that_pass_are_no_other_architecture():
    model = Remembering()
    (point,) = wf.sweep(model, batches(), cross_entropy, 0.5, criterion="magnitude")
    model(torch.randn(3, 6))
    point.write()
    assert int((weights_of(model) != 0).sum()) == 18 and model.seen.shape == (3,)


class Reshaped(torch.nn.Module):
    """Outputs whose first dimension is not, or not only, that of the samples."""

    def __init__(self, outputs):
        super().__init__()
        self.net, self.outputs = mlp(), outputs

    def forward(self, x):
        return self.outputs(self.net(x))


@pytest.mark.parametrize("length", [5, 16])
@pytest.mark.parametrize(
    ("outputs", "loss"),
    [
        (lambda z: z.flatten(0, 1), lambda o, y: cross_entropy(o, y.flatten())),
        (
            lambda z: z.transpose(0, 1),
            lambda o, y: cross_entropy(o.transpose(0, 1).flatten(0, 1), y.flatten()),
        ),
        (
            lambda z: SimpleNamespace(logits=z),
            lambda o, y: cross_entropy(o.logits.flatten(0, 1), y.flatten()),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::woodfisher.WoodfisherWarning")
def test_outputs_need_not_begin_with_the_samples(outputs, loss, length):
    torch.manual_seed(0)
    x, y = torch.randn(96, length, 6), torch.randint(3, (96, length))
    stages = wf.Adaptive(stages=4, window=32, held_out=16)
    report = wf.prune(Reshaped(outputs), [(x, y)], loss, 0.5, stages=stages)
    assert report.kept == 18


def test_a_last_batch_of_one_sample_may_be_a_column_of_a_table():
    torch.manual_seed(0)
    data = [(rows[:, :6], rows[:, 6]) for rows in torch.randn(43, 7).split(7)]
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1), torch.nn.Flatten(0)
    )
    assert wf.prune(model, data, mse_loss, 0.5).kept == 14


def test_a_loader_that_keeps_its_workers_is_read_beside_itself():
    torch.manual_seed(0)
    table = TensorDataset(*samples(120))
    models = []
    for options in ({}, {"num_workers": 1, "persistent_workers": True}):
        model = mlp()
        loader = DataLoader(table, 10, **options)
        inside = iter(loader)
        next(inside)
        stages = wf.Adaptive(stages=4, window=30, held_out=20)
        wf.prune(model, loader, cross_entropy, 0.5, stages=stages)
        assert torch.equal(next(inside)[0], table.tensors[0][10:20])
        models.append(weights_of(model))
    assert torch.equal(*models)
