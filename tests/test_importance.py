"""Samples that are chosen by how large their gradients are, and their weights."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax, mse_loss, nll_loss

import woodfisher as wf
from models import ConvNet, Recurrent, Tied, mlp, samples
from woodfisher.gradients.batches import Stream, samples_in, take
from woodfisher.gradients.importance import Important, chosen

NORMS = st.lists(st.floats(0, 1e6), min_size=2, max_size=40)


def own_loss(outputs, targets):
    return cross_entropy(outputs, targets)


def sequences(n):
    torch.manual_seed(1)
    return torch.randn(n, 5, 3), torch.randint(0, 3, (n,))


def images(n):
    torch.manual_seed(1)
    return torch.randn(n, 2, 5, 5), torch.randint(0, 3, (n,))


# --- the choice


@given(norms=NORMS, data=st.data(), seed=st.integers(0, 1000))
def test_exactly_as_many_are_chosen_each_once(norms, data, seed):
    count = data.draw(st.integers(1, len(norms)))
    index, weights = chosen(torch.tensor(norms, dtype=torch.float64), count, seeded(seed))
    assert len(index.unique()) == len(index) == count
    assert 0 <= int(index.min()) and int(index.max()) < len(norms)
    assert (weights > 0).all() and (weights <= 5 + 1e-9).all()


@pytest.mark.parametrize(
    "norms", [[1.0, 0, 2, 30], [0.0, 0, 0, 0, 0, 1e-9], [1.0] * 5, [3.0, 1, 4, 1, 5, 9, 2, 6] * 2]
)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_mean_is_that_of_all_on_average(norms, count):
    random, each = seeded(0), torch.zeros(len(norms), dtype=torch.float64)
    for _ in range(4000):
        index, weights = chosen(torch.tensor(norms, dtype=torch.float64), count, random)
        each[index] += weights / count * len(norms) / 4000
    largest_deviation = (len(norms) * 5 / count / 4000) ** 0.5
    assert torch.allclose(each, torch.ones_like(each), atol=5 * largest_deviation)


def test_those_with_large_gradients_come_more_often_and_count_less():
    norms = torch.tensor([1.0, 1, 1, 9] * 10, dtype=torch.float64)
    taken = 0
    for seed in range(20):
        index, weights = chosen(norms, 10, seeded(seed))
        large = norms[index] == 9
        taken += int(large.sum())
        assert torch.allclose(weights, torch.where(large, 1 / 2.6, 1 / (0.2 + 0.8 / 3)).double())
    assert 120 < taken < 140


@pytest.mark.parametrize("norm", [0.0, 3.0])
def test_equal_gradients_count_as_without_a_choice(norm):
    _, weights = chosen(torch.full((12,), norm, dtype=torch.float64), 3, seeded(0))
    assert torch.allclose(weights, torch.ones(3, dtype=torch.float64))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# --- norms and rows with weights


@pytest.mark.parametrize(
    ("model", "data"), [(mlp, samples), (ConvNet, images), (Recurrent, sequences)], ids=["mlp", "conv", "gru"]
)
@pytest.mark.parametrize("loss", [cross_entropy, own_loss])
@pytest.mark.filterwarnings("ignore:torch.func can't vectorise")
def test_norms_and_weighted_rows_are_those_of_single_samples(model, data, loss):
    torch.manual_seed(0)
    network, (inputs, targets) = model().double(), data(12)
    inputs, weights = inputs.double(), torch.rand(12).double()
    objective = wf.Objective(network, [(inputs, targets)], loss, params="*weight*")
    alone = objective.rows(12)
    last = alone[:, list(objective.layout.slices.values())[-1]]
    if model is ConvNet:
        assert list(objective.layout.shapes)[-1] == "fc.weight"
    assert torch.allclose(objective.gradient_norms((inputs, targets)), last.norm(dim=1))

    weighted = objective.on_weighted(
        [(inputs[:7], (targets[:7], weights[:7])), (inputs[7:], (targets[7:], weights[7:]))]
    )
    expected = (alone * weights[:, None]).unflatten(0, (4, 3)).mean(1)
    assert torch.allclose(weighted.rows(12, group=3), expected)
    assert torch.allclose(weighted.gradient(12), expected.mean(0))


def test_the_gradient_has_less_noise_than_that_of_samples_as_they_come():
    torch.manual_seed(0)
    inputs = torch.randn(1200, 6)
    targets = (inputs[:, 0] > 0).long()
    model = nn.Linear(6, 2)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2, 6).mul(4).roll(1, 0))
    objective = wf.Objective(model, [(inputs, targets)], cross_entropy)
    whole, errors = objective.gradient(1200), {}
    data = list(zip(inputs.split(60), targets.split(60), strict=True))
    for among in (2, 1):
        important = Important(Stream(data), among)
        drawn = [important.draw(objective, 40).gradient(40) for _ in range(7)]
        errors[among] = float((torch.stack(drawn) - whole).square().sum(1).mean())
    assert errors[2] < errors[1] / 1.5


# --- where nothing can be told, samples are taken as they come


class OwnLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x, labels):
        return {"loss": cross_entropy(self.fc(x), labels)}


def some_ignored(n):
    inputs, targets = samples(n)
    return inputs, targets.index_fill(0, torch.tensor([3]), -100)


def contrast(outputs, targets):
    return (outputs - outputs.mean(0)).square().mean()


@pytest.mark.parametrize(
    ("loss", "make"),
    [
        (cross_entropy, some_ignored),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3])), samples),
        (partial(cross_entropy, weight=torch.tensor([1.0, 2, 3])), samples),
        (contrast, samples),
        (lambda outputs, targets: cross_entropy(outputs, targets, reduction="sum"), samples),
    ],
    ids=["ignored", "class weights", "class weights, partial", "contrast", "sum"],
)
@pytest.mark.filterwarnings("ignore:class weights cancel")
def test_losses_that_do_not_add_up_are_not_weighed(loss, make):
    batch = make(30)
    objective = wf.Objective(mlp(), [batch], loss)
    assert objective.gradient_norms(batch) is None
    _same_as_drawn(objective, [batch])


def test_a_models_own_loss_is_not_weighed():
    inputs, targets = samples(30)
    batch = {"x": inputs, "labels": targets}
    _same_as_drawn(wf.Objective(OwnLoss(), [batch], None), [batch])


def test_without_a_layer_in_factor_form_nothing_is_chosen():
    batch = samples(30, (5,))
    _same_as_drawn(wf.Objective(Tied(), [batch], cross_entropy, params="first*"), [batch])


def test_samples_of_several_shapes_are_not_chosen():
    torch.manual_seed(0)
    data = [(torch.randn(3, length, 3), torch.randint(0, 3, (3,))) for length in (5, 6, 5, 6)]
    _same_as_drawn(wf.Objective(Recurrent(), data, cross_entropy, params="*weight*"), data)


def _same_as_drawn(objective, data):
    important = Important(Stream(data), 3)
    plain = Stream(data)
    first, again = important.draw(objective, 3), important.draw(objective, 2)
    expected = _tensors(take(plain.draw(3 * 3), 3))
    assert all(map(torch.equal, _tensors(first.data), expected))
    assert first.forward is again.forward is objective.forward
    assert all(map(torch.equal, _tensors(again.data), _tensors(plain.draw(2))))


def _tensors(batches):
    parts = [list(b.values()) if isinstance(b, dict) else b for b in batches]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def test_fewer_samples_than_are_asked_for_come_as_they_are():
    inputs, targets = samples(6)
    objective = wf.Objective(mlp(), [(inputs, targets)], cross_entropy)
    drawn = Important(Stream([(inputs, targets)]), 2).draw(objective, 8)
    assert torch.equal(_tensors(drawn.data)[0], inputs) and drawn.forward is objective.forward


def test_bad_samples_are_told_of_by_the_rows():
    inputs, targets = samples(40)
    inputs[3, 2] = float("nan")
    objective = wf.Objective(mlp(), [(inputs, targets)], cross_entropy)
    with pytest.raises(wf.WoodfisherError, match="row itself holds NaN"):
        Important(Stream([(inputs, targets)]), 2).draw(objective, 10).rows(10)


# --- in a run


@pytest.mark.parametrize(
    ("labels", "among", "once", "asked_for", "chooses"),
    [
        ("data", 2, False, 400, True),
        ("data", 1, False, 400, False),
        ("model", 2, False, 400, False),
        ("data", 2, True, 400, False),
        ("data", 2, False, 2000, False),
    ],
)
def test_a_run_with_the_gradient_chooses_the_samples_by_which_weights_move(
    labels, among, once, asked_for, chooses, monkeypatch
):
    asked, norms = [], wf.Objective.gradient_norms

    def noted(objective, batch):
        asked.append(samples_in(batch))
        return norms(objective, batch)

    monkeypatch.setattr(wf.Objective, "gradient_norms", noted)
    inputs, targets = samples(120)
    curvature = wf.WoodFisher(asked_for, None, "auto", group=2, labels=labels)
    stages = wf.Adaptive(stages=6, window=20, held_out=12, among=among)
    data = list(zip(inputs.split(20), targets.split(20), strict=True))
    parts = {"curvature": curvature, "stages": stages, "first_order": "auto"}
    wf.prune(mlp(), iter(5 * data) if once else data, cross_entropy, 0.5, **parts)
    assert bool(asked) == chooses


@pytest.mark.parametrize("log", [True, False])
def test_other_losses_of_single_samples(log):
    inputs, targets = samples(30)
    if log:
        model, loss = nn.Sequential(mlp(), nn.LogSoftmax(1)), nll_loss
        assert torch.allclose(model(inputs), log_softmax(model[0](inputs), 1))
    else:
        model, loss, targets = mlp(), mse_loss, torch.randn(30, 3)
    objective = wf.Objective(model, [(inputs, targets)], loss)
    expected = objective.rows(30)[:, -12:].norm(dim=1).double()
    assert torch.allclose(objective.gradient_norms((inputs, targets)), expected)
    index, weights = chosen(expected, 10, seeded(0))
    drawn = Important(Stream([(inputs, targets)]), 2)
    assert len(drawn.draw(objective, 7).rows(7)) == 7
    weighted = objective.on_weighted([(inputs[index], (targets[index], weights.float()))])
    assert torch.allclose(weighted.rows(10), objective.rows(30)[index] * weights.float()[:, None], atol=1e-6)
