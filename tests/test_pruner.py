"""`Pruner`: when, how much, on which rows, and what a checkpoint restores."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.nn.functional import cross_entropy
from torch.nn.utils.prune import l1_unstructured
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import woodfisher as wf
from models import ConvNet, mlp, samples
from training import FISHER, Recorder, data, plain, pruner_of

LINEAR = wf.Polynomial(0.25, 0.75, begin=1, end=5, every=2, power=1)
CUBIC = wf.Polynomial(0.25, 0.75, begin=1, end=5, every=2)


def kept_by(pruner):
    return sum(int(mask.sum()) for mask in pruner.masks.values())


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (wf.one_shot(0.5), {0: 18}),
        (wf.one_shot(0.5, at=2), {2: 18}),
        (wf.one_shot(0.5, at=0.4).in_epochs(5), {2: 18}),
        (wf.Milestones({0: 0.25, 3: 0.75}), {0: 27, 3: 9}),
        (wf.Milestones({1.5: 0.25, 0.5: 0.0}), {2: 27}),
        (wf.Milestones({1: 0.75, 0.2: 0.25, 0.99: 0.5}).in_epochs(5), {1: 27, 5: 9}),
        (CUBIC, {1: 27, 3: 11, 5: 9}),
        (LINEAR, {1: 27, 3: 18, 5: 9}),
        (wf.Polynomial(0.25, 0.75, begin=0.2, end=1, every=0.4, power=1).in_epochs(5), {1: 27, 3: 18, 5: 9}),
        (wf.Polynomial(0.25, 0.75, begin=0.5, end=2.5, every=1, power=1), {1: 22, 2: 14, 3: 9}),
        (wf.Polynomial(0.25, 0.75, begin=0, end=5, every=1.5, power=1), {0: 27, 2: 20, 3: 16, 5: 9}),
        (wf.Polynomial(0.5, 0.75, begin=3, end=3), {3: 9}),
    ],
    ids=str,
)
def test_exactly_the_scheduled_number_is_kept(schedule, expected):
    model = mlp()
    pruner = pruner_of(model, schedule)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    kept = {}
    for step, batch in enumerate([*data(), *data()]):
        plain(model, optimizer, batch)
        report = pruner.step()
        assert pruner.steps == step + 1
        if report is not None:
            kept[step] = report.kept
            assert report.kept == kept_by(pruner) == sum(int((m.weight != 0).sum()) for m in model[::2])
            assert all(torch.equal(report.masks[name], mask) for name, mask in pruner.masks.items())
            assert pruner.sparsity == report.sparsity == 1 - report.kept / 36
    assert kept == expected
    assert [report.kept for report in pruner.history] == list(expected.values())
    assert not any(report.masks for report in pruner.history)


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_a_sparse_start_counts(when):
    """Zeros are removed from the start if they are there when the pruner is made, whatever the objective saw."""
    model, zeros = mlp(), mlp()[0].weight.detach().abs() < 0.25
    assert 9 < int(zeros.sum()) < 18

    def thin():
        with torch.no_grad():
            model[0].weight[zeros] = 0

    if when == "before":
        thin()
    objective = wf.Objective(model, data(), cross_entropy)
    if when == "between":
        thin()
    pruner = wf.Pruner(model, objective, LINEAR, curvature=FISHER)
    removed = 0 if when == "after" else int(zeros.sum())
    assert kept_by(pruner) == 36 - removed
    if when == "after":
        thin()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    counts = []
    for batch in [*data(), *data()][:6]:
        plain(model, optimizer, batch)
        pruner.step()
        counts.append(kept_by(pruner))
        assert when == "after" or not model[0].weight[zeros].any()
    assert counts == [36 - removed, *([27] * 2 if when == "after" else [36 - removed] * 2), 18, 18, 9]


def test_masks_of_torch_are_taken_over():
    model = mlp()
    l1_unstructured(model[0], "weight", 0.5)
    removed = model[0].weight_mask == 0
    assert model[0].weight_orig[removed].all()
    pruner = pruner_of(model, wf.one_shot(0.75))
    assert kept_by(pruner) == 24
    assert not model[0].weight_orig[removed].any()
    plain(model, optim.SGD(model.parameters(), lr=0.1), data()[0])
    assert pruner.step().kept == 9
    assert not model[0].weight_orig[removed].any()


def test_a_layer_of_zeros_is_warned_of():
    model = mlp()
    nn.init.zeros_(model[2].weight)
    with pytest.warns(wf.WoodfisherWarning, match="every weight of '2.weight' is zero.*exclude="):
        pruner_of(model, LINEAR)


@pytest.mark.parametrize("criterion", ["woodfisher", "woodtaylor", "obd", "magnitude"])
@pytest.mark.parametrize("stages", [1, 3])
def test_a_step_does_what_prune_does(criterion, stages):
    model, batches = mlp(), [samples(40)]
    other = copy.deepcopy(model)
    options = {"criterion": criterion, "stages": stages}
    if criterion != "magnitude":
        options["curvature"] = wf.DiagonalFisher(samples=8) if criterion == "obd" else FISHER
    pruner = wf.Pruner(model, wf.Objective(model, batches, cross_entropy), wf.one_shot(0.6), **options)
    report = pruner.step()
    expected = wf.prune(other, batches, cross_entropy, 0.6, recalibrate=0, **options)
    assert same(model.state_dict(), other.state_dict())
    assert (report.stages, report.kept) == (expected.stages, 14)
    assert len(report.stages) == stages
    assert all(stage.first_order == (criterion == "woodtaylor") for stage in report.stages)


def test_a_method_is_taken_as_it_is():
    method = wf.Method(FISHER, update="independent", stages=3)
    objective = wf.Objective(mlp(), [samples(40)], cross_entropy)
    pruner = wf.Pruner(objective.model, objective, wf.one_shot(0.6), criterion=method)
    assert pruner.method == method
    assert len(pruner.step().stages) == 3


@pytest.mark.parametrize("first_order", [True, False])
def test_stages_that_adapt_do_what_they_do_in_prune_and_go_on_to_the_same_bits(first_order):
    options = {
        "stages": wf.Adaptive(stages=6, window=20, held_out=10),
        "curvature": wf.WoodFisher(200, None, "auto", group=2),
        "first_order": first_order,
    }
    schedule = wf.Milestones({0: 0.25, 1: 0.5})

    def step(model, pruner):
        plain(model, optim.SGD(model.parameters(), lr=0.1), data()[0])
        return pruner.step()

    model = mlp()
    alone, pruner = copy.deepcopy(model), pruner_of(model, schedule, **options)
    plain(alone, optim.SGD(alone.parameters(), lr=0.1), data()[0])
    report = step(model, pruner)
    assert report.stages == wf.prune(alone, data(), cross_entropy, 0.25, **options).stages
    assert same(model.state_dict(), alone.state_dict())
    saved = copy.deepcopy((model.state_dict(), pruner.state_dict()))
    assert step(model, pruner).kept == kept_by(pruner) == 18
    resumed = mlp(seed=3)
    other = pruner_of(resumed, schedule, **options)
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    step(resumed, other)
    assert same(resumed.state_dict(), model.state_dict())


def test_stages_that_adapt_have_fewer_samples_in_training():
    model = mlp()
    objective = wf.Objective(model, data(), cross_entropy)
    methods = []
    for stages in ("auto", wf.Adaptive(stages=3)):
        pruner = wf.Pruner(model, objective, LINEAR, criterion="woodtaylor", stages=stages)
        methods.append(pruner.method)
        pruner.release()
    assert [method.staging.stages for method in methods] == [20, 3]
    assert {method.curvature.samples for method in methods} == {20_000}
    assert {method.first_order for method in methods} == {True}


class Endless:
    """Reads the same batches each time, and tells nothing of their number."""

    def __iter__(self):
        return iter(data())


ALL = TensorDataset(*samples(40))


@pytest.mark.parametrize(
    "source",
    [
        data(),
        Endless(),
        DataLoader(ALL, batch_size=7),
        DataLoader(ALL, batch_size=7, num_workers=1, persistent_workers=True),
        DataLoader(ALL, batch_size=8, sampler=DistributedSampler(ALL, 1, 0)),
    ],
    ids=["list", "iterable", "loader", "loader that keeps workers", "distributed"],
)
def test_each_time_takes_samples_that_the_last_ones_left(source):
    seen, everything = [], torch.cat([batch[0] for batch in source])
    model = mlp()
    pruner = pruner_of(
        model,
        wf.Milestones({0: 0.1, 1: 0.3, 2: 0.5, 3: 0.6}),
        source,
        curvature=Recorder(seen=seen),
        stages=2,
    )
    for _ in range(4):
        pruner.step()
    taken = torch.cat([inputs for *_, inputs in seen])
    assert torch.equal(taken, torch.cat([everything, everything[:24]]))
    assert all(rows.any() for rows, *_ in seen)


@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["global", "own"])
def test_a_loader_that_shuffles_gives_other_samples_each_time(generator):
    loader = DataLoader(ALL, batch_size=8, shuffle=True, generator=generator)
    drawn = []
    for seed in (0, 0, 1):
        seen = []
        pruner = pruner_of(
            mlp(), wf.Milestones({0: 0.1, 1: 0.3}), loader, curvature=Recorder(seen=seen), seed=seed
        )
        pruner.step()
        pruner.step()
        drawn.append([inputs for *_, inputs in seen])
    assert not torch.equal(*drawn[0])
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not torch.equal(drawn[0][0], drawn[2][0])


def noisy_run(schedule, **parts):
    """Training that draws from every generator there is; what it ended with."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, 3))
    loader = DataLoader(ALL, batch_size=8, shuffle=True)
    pruner = None if schedule is None else pruner_of(model, schedule, loader, **parts)
    optimizer = optim.AdamW(model.parameters(), lr=0.05)
    draws = []
    for _ in range(2):
        for inputs, targets in loader:
            draws += [inputs.sum() + torch.rand(()), torch.tensor([np.random.rand(), random.random()])]
            plain(model, optimizer, (inputs, targets))
            if pruner is not None:
                pruner.step()
                assert model.training
    return model.state_dict(), draws, pruner


@pytest.mark.parametrize("scope", ["global", "flops"])
def test_a_pruner_whose_time_has_not_come_changes_nothing(scope):
    dense, draws, _ = noisy_run(None)
    with_pruner, same_draws, _ = noisy_run(wf.one_shot(0.5, at=1000), scope=scope)
    assert same(dense, with_pruner)
    assert all(torch.equal(a, b) for a, b in zip(draws, same_draws, strict=True))


def test_removing_weights_draws_from_no_generator_of_the_training():
    _, draws, _ = noisy_run(None)
    _, same_draws, pruner = noisy_run(wf.Polynomial(0.2, 0.8, begin=1, end=8, every=2))
    assert len(pruner.history) == 4
    assert all(torch.equal(a, b) for a, b in zip(draws, same_draws, strict=True))


class Run:
    """A training run whose whole state goes into a checkpoint."""

    def __init__(self, shuffled, seed, checkpoint=None, *, loaded_first=False):
        self.model = mlp(seed=seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.loader = DataLoader(ALL, 8, shuffle=True, generator=self.generator) if shuffled else data()
        if checkpoint is not None and loaded_first:
            self.model.load_state_dict(checkpoint["model"])
        schedule = wf.Polynomial(0.2, 0.8, begin=2, end=16, every=4)
        self.pruner = pruner_of(self.model, schedule, self.loader, stages=2)
        self.optimizer = optim.AdamW(self.model.parameters(), lr=0.05)
        if checkpoint is not None:
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.pruner.load_state_dict(checkpoint["pruner"])
            self.generator.set_state(checkpoint["generator"])

    def train(self, epochs):
        for _ in range(epochs):
            for batch in self.loader:
                plain(self.model, self.optimizer, batch)
                self.pruner.step()
        return self

    def checkpoint(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pruner": self.pruner.state_dict(),
            "generator": self.generator.get_state(),
        }


@pytest.mark.parametrize("shuffled", [False, True], ids=["list", "shuffled"])
@pytest.mark.parametrize("loaded_first", [False, True])
def test_a_resumed_run_is_the_same_to_the_last_bit(shuffled, loaded_first, tmp_path):
    whole = Run(shuffled, 0).train(4)
    torch.save(Run(shuffled, 0).train(2).checkpoint(), tmp_path / "run.pt")
    checkpoint = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed = Run(shuffled, 1, checkpoint, loaded_first=loaded_first).train(2)
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert same(whole.pruner.masks, resumed.pruner.masks)
    assert (resumed.pruner.steps, kept_by(resumed.pruner)) == (20, 7)
    assert len(resumed.pruner.history) == 2
    for a, b in zip(whole.optimizer.state.values(), resumed.optimizer.state.values(), strict=True):
        assert same(a, b)


def test_a_state_dict_is_not_changed_by_what_follows():
    pruner = pruner_of(mlp(), wf.Milestones({0: 0.2, 1: 0.8}))
    pruner.step()
    state = pruner.state_dict()
    pruner.step()
    assert sum(int(mask.sum()) for mask in state["masks"].values()) == 29
    pruner.load_state_dict(state)
    assert (pruner.steps, kept_by(pruner)) == (1, 29)


@pytest.mark.parametrize("build", [mlp, ConvNet])
def test_a_failure_leaves_everything_as_it_was(build):
    shape = (6,) if build is mlp else (2, 6, 6)
    batches = [samples(8, shape), samples(8, shape, seed=2)]
    model = build().train()
    pruner = pruner_of(model, wf.Milestones({0: 0.3, 1: 0.6}), batches)
    pruner.step()
    before, masks = state_of(model), pruner.masks
    batches[1][0][3].fill_(torch.nan)
    generators = torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(wf.WoodfisherError, match="in row 3 is nan.*holds NaN or infinity: clean it"):
            pruner.step()
    assert model.training
    assert same(before, model.state_dict())
    assert same(masks, pruner.masks)
    assert torch.equal(generators, torch.get_rng_state())
    assert (pruner.steps, len(pruner.history)) == (1, 1)
    batches[1][0][3].fill_(1.0)
    assert pruner.step().sparsity == pytest.approx(0.6, abs=0.02)


def test_statistics_of_batch_normalisation_are_taken_anew_where_asked_for():
    batches = [samples(40, (2, 6, 6))]
    for recalibrate in (0, 40):
        model = ConvNet().train()
        before = state_of(model)["norm.running_mean"]
        pruner_of(model, wf.one_shot(0.5), batches, recalibrate=recalibrate).step()
        assert torch.equal(model.norm.running_mean, before) == (recalibrate == 0)


def test_autocast_around_a_step_changes_nothing():
    states = []
    for enabled in (False, True):
        model = mlp()
        pruner = pruner_of(model, wf.one_shot(0.5))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            pruner.step()
        states.append(model.state_dict())
    assert same(*states)


def test_the_model_may_change_its_dtype_on_the_way():
    model, batches, seen = mlp(), data(), []
    pruner = pruner_of(model, wf.Milestones({0: 0.3, 1: 0.6}), batches, curvature=Recorder(seen=seen))
    pruner.step()
    model.double()
    batches[:] = [(inputs.double(), targets) for inputs, targets in batches]
    assert pruner.step().kept == 14
    assert [rows.dtype for rows, *_ in seen] == [torch.float32, torch.float64]


def test_progress_is_told():
    seen = []
    pruner = pruner_of(mlp(), wf.one_shot(0.5), progress=lambda *event: seen.append(event))
    pruner.step()
    assert ("gradients", 8, 8) in seen
    count = len(seen)
    pruner.step()
    assert len(seen) == count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": wf.Objective(mlp(), data(), cross_entropy)}, "the objective is that of another model"),
        ({"data": iter(data())}, "can be read only once: give a list of batches or a DataLoader"),
        ({"schedule": 0.9}, r"schedule must be wf.Polynomial\(...\), .*; 0.9 came"),
        (
            {"schedule": lambda: wf.Polynomial(0.5, 0.9, begin=20, end=10)},
            "ends at 10, before it begins at 20",
        ),
        ({"schedule": lambda: wf.Polynomial(0.9, 0.5, begin=0, end=10)}, "can't fall from 0.9 to 0.5"),
        ({"schedule": lambda: wf.Polynomial(0.5, 0.9, begin=0, end=math.nan)}, "end must be a finite number"),
        ({"schedule": lambda: wf.Milestones({})}, "needs one at least"),
        ({"schedule": lambda: wf.Milestones([(0, 0.5)])}, "a dict of sparsities by step"),
        ({"schedule": lambda: wf.Milestones({0: 0.5, 5: 0.2})}, "can't fall from 0.5 at 0 to 0.2 at 5"),
        (
            {"schedule": wf.one_shot(0.5), "pattern": wf.NM(2, 4)},
            "does not divide '0.weight', which has 4 outputs and 6 inputs",
        ),
        ({"schedule": wf.one_shot(0.99)}, "keeps none of 36 weights"),
        ({"stages": 0}, "stages must be a whole number"),
        ({"seed": 2**70}, r"seed must be a whole number below 2\^63"),
        ({"criterion": "fisher"}, "criterion must be one of"),
        ({"stage": 3}, "there is no argument 'stage'"),
        ({"params": "0.*"}, "there is no argument 'params'; an Objective takes params, exclude, sampler"),
    ],
)
def test_wrong_uses_are_explained(arguments, message):
    model = mlp()
    options = {"objective": None, "data": data(), "schedule": LINEAR, **arguments}
    with pytest.raises(wf.WoodfisherError, match=message):
        schedule = options.pop("schedule")
        schedule = schedule() if callable(schedule) else schedule
        given, batches = options.pop("objective"), options.pop("data")
        wf.Pruner(model, given or wf.Objective(model, batches, cross_entropy), schedule, **options)
    assert not any(p._backward_hooks for p in model.parameters())
    pruner_of(model, LINEAR)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("times"), "this lacks times: load what state_dict"),
        (
            lambda s: s["masks"].update({"0.weight": torch.ones(4, 5)}),
            r"mask of shape \(4, 5\) for '0.weight'.*\(4, 6\)",
        ),
        (lambda s: s["masks"].pop("2.weight"), "has no mask for '2.weight', and the pruner a mask of shape"),
        (lambda s: s["masks"].update(other=torch.ones(1)), "for 'other', and the pruner no mask"),
        (lambda s: s["masks"].update({"2.weight": s["masks"]["2.weight"].to("meta")}), "on meta came"),
        (
            lambda s: s["masks"].update({"2.weight": s["masks"]["2.weight"].float()}),
            "a bool tensor with values",
        ),
    ],
)
def test_a_state_of_other_weights_is_refused(change, message):
    pruner = pruner_of(mlp(), LINEAR)
    other = pruner_of(mlp(), wf.one_shot(0.5))
    other.step()
    state = other.state_dict()
    change(state)
    with pytest.raises(wf.WoodfisherError, match=message):
        pruner.load_state_dict(state)
    assert (pruner.steps, kept_by(pruner)) == (0, 36)


def test_a_state_from_behind_the_end_of_the_schedule_warns():
    first = pruner_of(mlp(), wf.Polynomial(0.25, 0.5, begin=0, end=2))
    for _ in range(4):
        first.step()
    state = first.state_dict()
    pruner_of(mlp(), wf.one_shot(0.9, at=4)).load_state_dict(state)
    pruner_of(mlp(), wf.Milestones({0: 0.5, 9: 0.5})).load_state_dict(state)
    with pytest.warns(wf.WoodfisherWarning, match=r"of step 4, at .* 50.00%, .* ends at step 3 with 75.00%"):
        pruner_of(mlp(), wf.Polynomial(0.5, 0.75, begin=0, end=3)).load_state_dict(state)


def test_the_wrapped_model_does_as_well():
    model = mlp()
    wrapped = nn.DataParallel(model)
    pruner = wf.Pruner(
        wrapped, wf.Objective(model, data(), cross_entropy), wf.one_shot(0.5), curvature=FISHER
    )
    pruner.step()
    assert set(pruner.masks) == {"0.weight", "2.weight"}
    pruner.apply(wrapped)


@pytest.mark.parametrize(
    ("changes", "message"),
    [(None, "a dict with tensors for masks"), ({"masks": {"0.weight": [1, 0]}}, "a dict with tensors for masks"),
     ({"steps": -4}, "steps of a pruner's state must be a whole number of at least 0; -4 came")],
)  # fmt: skip
def test_what_is_no_state_is_refused(changes, message):
    pruner = pruner_of(mlp(), wf.one_shot(0.5))
    state = None if changes is None else {**pruner.state_dict(), **changes}
    with pytest.raises(wf.WoodfisherError, match=message):
        pruner.load_state_dict(state)


def test_an_objective_of_layers_that_are_gone_is_refused():
    model, batches = mlp(), data()
    objective = wf.Objective(model, batches, cross_entropy)
    model[2] = torch.nn.Linear(4, 3)
    pruner = wf.Pruner(model, objective, wf.one_shot(0.5), criterion="magnitude")
    with pytest.raises(wf.WoodfisherError, match="another tensor than when the pruner was made"):
        pruner.step()
    assert pruner.missing_in(model) == "2.weight"


def test_weights_of_another_shape_than_their_masks_are_refused():
    model = mlp()
    pruner = pruner_of(model, wf.one_shot(0.5))
    model[2].weight.data = torch.randn(5, 4)
    with pytest.raises(wf.WoodfisherError, match=r"'2\.weight' is another tensor .* resized embeddings"):
        pruner.step()
