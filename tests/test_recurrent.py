"""Rows of recurrent layers, from what flows through their products."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence

import woodfisher as wf
from models import samples
from reference import loop_rows
from woodfisher.gradients.plain import in_plain_products

LAYERS = [
    lambda: nn.RNN(3, 4),
    lambda: nn.RNN(3, 4, nonlinearity="relu", batch_first=True),
    lambda: nn.GRU(3, 4, batch_first=True),
    lambda: nn.GRU(3, 4, num_layers=2, bidirectional=True),
    lambda: nn.GRU(3, 4, bias=False, batch_first=True, bidirectional=True),
    lambda: nn.LSTM(3, 4),
    lambda: nn.LSTM(3, 4, num_layers=2, batch_first=True, dropout=0.5),
    lambda: nn.LSTM(3, 4, proj_size=2, batch_first=True),
    lambda: nn.LSTM(3, 4, num_layers=2, proj_size=2, bidirectional=True),
]
CELLS = [lambda: nn.RNNCell(3, 4), lambda: nn.GRUCell(3, 4, bias=False), lambda: nn.LSTMCell(3, 4)]


class Reader(nn.Module):
    """What a recurrent layer returns, and the states that it ends with, as logits; maybe from states of its own."""

    def __init__(self, layer, *, given=False, alone=False):
        super().__init__()
        self.layer, self.alone = layer, alone
        self.lstm = isinstance(layer, nn.LSTM)
        ways = layer.num_layers * (1 + layer.bidirectional)
        sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 1 + self.lstm]
        self.first = nn.ParameterList([torch.randn(ways, 1, size) for size in sizes] if given else [])
        self.fc = nn.LazyLinear(3)

    def forward(self, x):
        if self.alone:
            return self.fc(torch.stack([self.layer(each, self.states())[0].sum(0) for each in x]))
        output, ends = self.layer(x if self.layer.batch_first else x.transpose(0, 1), self.states(len(x)))
        ends = ends if self.lstm else (ends,)
        summed = output.sum(1 if self.layer.batch_first else 0)
        return self.fc(torch.cat([summed, *(end.movedim(1, 0).flatten(1) for end in ends)], 1))

    def states(self, samples=None):
        if not self.first:
            return None
        states = [s[:, 0] if samples is None else s.expand(-1, samples, -1).contiguous() for s in self.first]
        return tuple(states) if self.lstm else states[0]


class Steps(nn.Module):
    """A cell that goes through a sequence."""

    def __init__(self, cell):
        super().__init__()
        self.cell, self.fc = cell, nn.Linear(4, 3)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.fc(state[0] if isinstance(state, tuple) else state)


def ready(model):
    """In float64 and evaluation mode, with sizes known; and data for it."""
    torch.manual_seed(0)
    x, y = samples(8, (5, 3), dtype=torch.float64)
    model = model.double().eval()
    model(x)
    return model, x, y


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_plain_products_give_what_torch_gives(layer, given, alone):
    model, x, _ = ready(Reader(layer(), given=given, alone=alone))
    expected = model(x)
    with in_plain_products(model.modules()):
        torch.testing.assert_close(model(x), expected)
    assert "forward" not in vars(model.layer)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_plain_products_of_cells_give_what_torch_gives(cell):
    model, x, _ = ready(Steps(cell()))
    expected = model(x)
    with in_plain_products(model.modules()):
        torch.testing.assert_close(model(x), expected)
        alone = model.cell(x[0, 0])
    torch.testing.assert_close(alone, model.cell(x[0, 0]))


def test_packed_sequences_and_other_forwards_go_their_own_way():
    class Doubled(nn.GRU):
        def forward(self, x):
            return super().forward(2 * x)

    x = torch.randn(2, 5, 3)
    packed = pack_padded_sequence(x, [5, 3], batch_first=True)
    plain, doubled = nn.GRU(3, 4, batch_first=True), Doubled(3, 4, batch_first=True)
    expected = plain(packed)[0].data, doubled(x)[0]
    with in_plain_products([plain, doubled]):
        found = plain(packed)[0].data, doubled(x)[0]
        assert "forward" not in vars(doubled)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_rows_of_layers_follow_from_what_flows(layer, given, group):
    model, x, y = ready(Reader(layer(), given=given))
    objective = wf.Objective(model, [(x, y)], cross_entropy, params=["layer.*", "fc.*"])
    names = list(objective.layout.shapes)
    assert set(objective.factors(group)) == set(names)
    expected = loop_rows(model, cross_entropy, x, y, names, group)
    torch.testing.assert_close(objective.rows(8, group=group), expected)
    (rows,) = objective.iter_layer_rows(8, group=group)
    torch.testing.assert_close(torch.cat([rows[name].dense() for name in names], 1), expected)


@pytest.mark.parametrize(
    "model",
    [
        *(lambda cell=cell: Steps(cell()) for cell in CELLS),
        *(lambda layer=layer: Reader(layer(), given=True, alone=True) for layer in LAYERS),
    ],
)
def test_rows_without_factor_form_are_vectorised(model):
    model, x, y = ready(model())
    names = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    objective = wf.Objective(model, [(x, y)], cross_entropy, params=names)
    assert set(objective.factors()) <= {"fc.weight"}
    torch.testing.assert_close(objective.rows(8), loop_rows(model, cross_entropy, x, y, names))
    assert objective.forward._vectorised


def test_weights_that_are_shared_have_no_factor_form():
    model = Reader(nn.GRU(3, 3, num_layers=2, batch_first=True))
    model.layer.weight_hh_l1 = model.layer.weight_hh_l0
    model, x, y = ready(model)
    objective = wf.Objective(model, [(x, y)], cross_entropy, params=["layer.weight*"])
    assert "layer.weight_hh_l0" not in objective.factors()
    names = list(objective.layout.shapes)
    torch.testing.assert_close(objective.rows(8), loop_rows(model, cross_entropy, x, y, names))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_the_hessian_of_recurrent_layers(kind):
    model, x, y = ready(Reader(kind(3, 2, batch_first=True)))
    objective = wf.Objective(model, [(x, y)], cross_entropy, params="layer.weight_hh_l0")
    found = objective.hessian_columns(8, slice(0, 3))
    weight, gradients = model.layer.weight_hh_l0, []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight[1, 0] += step
        gradients.append(torch.autograd.grad(cross_entropy(model(x), y), weight)[0].flatten())
        with torch.no_grad():
            weight[1, 0] -= step
    torch.testing.assert_close(found[:, 2], (gradients[0] - gradients[1]) / 2e-5, rtol=1e-4, atol=1e-8)


def test_kfac_takes_recurrent_layers():
    model, x, y = ready(Reader(nn.LSTM(3, 4, batch_first=True)))
    objective = wf.Objective(model, [(x, y)], cross_entropy, params="layer.weight_hh_l0")
    finv = wf.KFAC(samples=8, damping=0.1)(objective)
    (rows,) = objective.iter_layer_rows(8)
    s, a = next(rows["layer.weight_hh_l0"].all_terms(2**20))
    A, S = a[0] @ a[0].mT / 8, s[0] @ s[0].mT / 8 / 5
    expected = torch.kron(S, A) + 0.1 * torch.eye(64, dtype=torch.float64)
    torch.testing.assert_close(finv.diag(), expected.inverse().diagonal())


def test_wide_states_without_factor_form_are_gone_through_one_by_one(monkeypatch):
    """Vectorised, the gradients of all rows are gone through at every step: several times as slow on a CPU."""

    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr("woodfisher.gradients.forward.vmap", refuse)
    model = Steps(nn.GRUCell(3, 65))
    model.fc = nn.Linear(65, 3)
    model, x, y = ready(model)
    objective = wf.Objective(model, [(x, y)], cross_entropy, params="cell.weight*")
    expected = loop_rows(model, cross_entropy, x, y, ["cell.weight_ih", "cell.weight_hh"])
    torch.testing.assert_close(objective.rows(8), expected)
