"""What the Fisher of few rows is shrunk to, against its definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

import woodfisher as wf
from models import ConvNet, Recurrent, Tied, mlp, samples
from woodfisher.curvature import base, prior
from woodfisher.curvature.damping import positive_scale
from woodfisher.curvature.prior import KroneckerFactors, Prior, RestrictedPrior
from woodfisher.curvature.running import ShrunkFisher
from woodfisher.errors import NoFactorsError
from woodfisher.gradients.layer_rows import LayerRows


def more(rows, kept):
    """What P has on the diagonal besides the prior, where so many weights are left."""
    return (1e-3 + 0.1 * (rows / kept) ** 2) * torch.eye(kept, dtype=torch.float64)


def some_prior(seed=0):
    """Twelve weights: three outputs of three inputs, in places of their own, and three without factors; dense too."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    A, s = A.mT @ A, torch.rand(3, generator=generator, dtype=torch.float64)
    index = torch.randperm(12, generator=generator)[:9].view(3, 3)
    P = torch.eye(12, dtype=torch.float64)
    P[index.flatten()[:, None], index.flatten()] = torch.kron(torch.diag(s), A)
    return Prior(12, [KroneckerFactors(index, A, s)], A.device), P


@pytest.mark.parametrize("workspace", [None, 1])
@given(seed=st.integers(0, 1000), share=st.floats(0.2, 1))
@settings(max_examples=25, deadline=None)
def test_a_prior_of_the_weights_that_are_left(workspace, seed, share):
    whole, P = some_prior(seed)
    torch.manual_seed(seed)
    kept = torch.rand(12) < share
    kept[0] = True
    size = int(kept.sum())
    P = P[kept][:, kept] + more(4, size)
    exact = torch.linalg.inv(P)
    with pytest.MonkeyPatch.context() as patch:
        if workspace:
            patch.setattr(base, "WORKSPACE", workspace)
        left = RestrictedPrior(whole, torch.ones(12, dtype=torch.bool), torch.float64, 4).restricted(kept)
    V, G = torch.randn(size, 2, dtype=torch.float64), torch.randn(4, size, dtype=torch.float64)
    torch.testing.assert_close(left.product(V), P @ V)
    torch.testing.assert_close(left.curvature(), P.diagonal())
    torch.testing.assert_close(left.solve(V), exact @ V)
    for found, expected in zip(left.through(G), (G @ exact, G @ exact @ G.mT), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(left.diagonal(), exact.diagonal())
    index = torch.randint(size, (3, 2))
    expected = torch.stack([exact[q[:, None], q] for q in index])
    torch.testing.assert_close(left.submatrices(index), expected)


def test_what_is_added_to_a_prior_is_not_rounded():
    index = torch.arange(4)[:, None]
    nothing = KroneckerFactors(
        index, torch.zeros(1, 1, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    )
    left = RestrictedPrior(
        Prior(4, [nothing], index.device), torch.ones(4, dtype=torch.bool), torch.float64, 4
    )
    torch.testing.assert_close(left.diagonal() * left.curvature(), torch.ones(4).double(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    window=st.integers(1, 8),
    seed=st.integers(0, 10),
)
@settings(max_examples=20, deadline=None)
def test_the_shrunk_fisher_is_that_of_the_last_rows(dtype, pieces, window, seed):
    whole, P = some_prior(seed)
    torch.manual_seed(seed)
    group, damping = 3, 0.1
    everything = RestrictedPrior(whole, torch.ones(12, dtype=torch.bool), dtype, window)
    fisher = ShrunkFisher(everything, window, group, dtype=dtype, device=torch.device("cpu"))
    rows = torch.randn(sum(pieces), 12, dtype=dtype)
    for part in rows.split(pieces):
        fisher.add(part)
    stay = torch.rand(12) > 0.4
    stay[0] = True
    last = rows[-window:].double()
    close = {"rtol": 1e-7, "atol": 1e-7} if dtype == torch.float64 else {"rtol": 2e-3, "atol": 2e-2}
    for now, kept in ((fisher, torch.ones_like(stay)), (fisher.restricted(stay), stay)):
        G, own = last[:, kept], P[kept][:, kept] + more(window, int(kept.sum()))
        F = damping * own + G.mT @ G * group / len(G)
        finv, exact = now.inverse(damping), F.inverse()
        torch.testing.assert_close(finv.dense(), exact, **close)
        torch.testing.assert_close(finv.diag(), exact.diagonal(), **close)
        v = torch.randn(len(F), dtype=torch.float64)
        torch.testing.assert_close(now.pull(v) + damping * now.damped(v), F @ v, **close)
        scale = float((torch.linalg.solve(own, G.mT @ G).trace() * group / len(G)) / len(F))
        assert positive_scale(now.gram.diagonal(), now.size, group) == pytest.approx(scale, rel=1e-3)
    torch.testing.assert_close(fisher.rows.double().sort(0).values, last.sort(0).values)


def linear_factors(model, inputs, targets):
    """A and s of `mlp`'s two layers, one sample after the other."""
    hidden = torch.tanh(model[0](inputs))
    found = []
    for layer, came in ((model[0], inputs), (model[2], hidden)):
        s = torch.zeros(layer.out_features, dtype=torch.float64)
        for x, y in zip(inputs, targets, strict=True):
            (gradient,) = torch.autograd.grad(cross_entropy(model(x[None]), y[None]), layer.bias)
            s += gradient.square() / len(inputs)
        found.append((came.mT @ came / len(inputs), s))
    return found


def test_the_prior_of_a_network_follows_its_definition(monkeypatch):
    model, (inputs, targets) = mlp(torch.float64), samples(30, dtype=torch.float64)
    objective = wf.Objective(model, [(inputs, targets)], cross_entropy)
    factors = linear_factors(model, inputs, targets)
    blocks = [torch.kron(torch.diag(s), A).detach() for A, s in factors]
    K = torch.block_diag(*blocks)
    expected = K / K.diagonal().mean()
    eye = torch.eye(36, dtype=torch.float64)
    found = Prior.of(objective, 30, "data")
    torch.testing.assert_close(found.product(eye), expected)
    torch.testing.assert_close(found.diagonal(), expected.diagonal())
    monkeypatch.setattr(prior, "MOST_OPERATIONS", 36 * 4**2)
    inputs_of = torch.cat([torch.arange(6).repeat(4), torch.arange(4).repeat(3) + 100])
    near = (inputs_of[:, None] // 4 == inputs_of // 4).double()
    torch.testing.assert_close(Prior.of(objective, 30, "data").product(eye), expected * near)


class OverPositions(nn.Module):
    """Convolutions, of which one is in groups and one transposed, and a layer of each position of what they return."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, stride=(1, 2))
        self.grouped = nn.Conv2d(4, 4, (3, 2), groups=2, dilation=(2, 1))
        self.back = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.last = nn.Linear(3, 4)

    def forward(self, x):
        flat = self.back(torch.tanh(self.grouped(torch.tanh(self.first(x))))).flatten(2).mT
        return torch.tanh(self.last(flat)).mean(1)


@pytest.mark.parametrize("limit", ["workspace", "chunk"])
@pytest.mark.parametrize("bound", [1, 2000, 20_000])
def test_moments_take_bounded_memory_and_are_those_of_all_terms(bound, limit, monkeypatch):
    torch.manual_seed(0)
    data = [(torch.randn(4, 2, 9, 8), torch.randint(4, (4,)))]
    objective = wf.Objective(OverPositions(), data, cross_entropy)
    (layers,) = objective.iter_layer_rows(4)
    expected = []
    for name, rows in layers.items():
        s, a = (t.double().movedim(1, 0).mT.flatten(1, 2) for t in rows.terms())
        if name in objective.layout.transposed:
            s, a = a, s
        expected.append([a.mT @ a, s.square().sum(1) / rows.positions])
    line = 8 * 12 * (3 * 2 * 2 + 4)  # of the transposed convolution, whose lines take the most
    if limit == "workspace":
        close = {"rtol": 1e-12, "atol": 1e-14}
        monkeypatch.setattr("woodfisher.gradients.layer_rows._WORKSPACE", bound)
    else:
        close = {"rtol": 1e-3, "atol": 1e-6}  # gradients of other chunks, in float32
        objective = objective.within(2 * bound)
    sizes, all_terms = [], LayerRows.all_terms

    def noted(self, most):
        for terms in all_terms(self, most):
            sizes.append(sum(t.untyped_storage().nbytes() for t in terms))
            yield terms

    monkeypatch.setattr(LayerRows, "all_terms", noted)
    found = prior._moments(objective, 4, "data", 100)
    assert 2 * max(sizes) <= max(bound, 2 * line)
    for now, then in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(now, then, **close)


def test_the_prior_of_a_transposed_layer_has_blocks_over_its_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ConvTranspose1d(3, 2, 1, bias=False), nn.Flatten(), nn.Linear(8, 3, bias=False)
    ).double()
    same = nn.Sequential(nn.Conv1d(3, 2, 1, bias=False), nn.Flatten(), nn.Linear(8, 3, bias=False)).double()
    with torch.no_grad():
        same[0].weight.copy_(model[0].weight.transpose(0, 1))
        same[2].weight.copy_(model[2].weight)
    data = [(torch.randn(20, 3, 4, dtype=torch.float64), torch.randint(3, (20,)))]
    one, other = (wf.Objective(each, data, cross_entropy) for each in (model, same))
    products = []
    for objective in (one, other):
        P = Prior.of(objective, 20, "data").product(torch.eye(30, dtype=torch.float64))
        order = objective.layout.index("0.weight").flatten()
        products.append(P[order[:, None], order])
    torch.testing.assert_close(*products)
    narrow = wf.Objective(nn.Sequential(nn.ConvTranspose1d(30, 1, 1), nn.Flatten()), data, cross_entropy)
    assert prior.widest(narrow.layout) == 30


@pytest.mark.parametrize(
    ("model", "inputs", "params", "covered"),
    [
        (ConvNet(), torch.randn(12, 2, 5, 5), None, {"conv.weight", "grouped.weight", "fc.weight"}),
        (
            Recurrent(),
            torch.randn(12, 5, 3),
            ["*weight*"],
            {"gru.weight_ih_l0", "gru.weight_hh_l0", "fc.weight"},
        ),
        (Tied(), torch.randn(12, 5), None, {"head.weight"}),
        (mlp(), torch.randn(12, 6), ["*"], {"0.weight", "2.weight"}),
        (Recurrent(), torch.randn(12, 5, 3), ["gru.weight_ih*"], {"gru.weight_ih_l0"}),
        (Tied(), torch.randn(12, 5), ["first*"], set()),
    ],
)
def test_what_has_no_factors_is_on_the_diagonal_alone(model, inputs, params, covered):
    objective = wf.Objective(model, [(inputs, torch.randint(3, (12,)))], cross_entropy, params=params)
    found = Prior.of(objective, 12, "data")
    diagonal = objective.layout.split(found.diagonal())
    assert {
        name for name, part in diagonal.items() if not torch.equal(part, torch.ones_like(part))
    } == covered
    if covered:
        mean = torch.cat([diagonal[name].flatten() for name in covered]).mean()
        assert float(mean) == pytest.approx(1, rel=1e-4)


def test_layers_that_turn_out_to_have_no_factors_are_told(monkeypatch):
    objective = wf.Objective(mlp(), [samples(12)], cross_entropy)

    def uneven(*_, **__):
        raise NoFactorsError("the layer of '0.weight' does not see as much of each sample as of others")

    monkeypatch.setattr(objective, "iter_layer_rows", uneven)
    with pytest.warns(wf.WoodfisherWarning, match=r"a multiple of the identity.* the layer of '0.weight'"):
        found = Prior.of(objective, 12, "data")
    assert torch.equal(found.diagonal(), torch.ones(36, dtype=torch.float64))


def test_gradients_that_are_all_zero_make_no_prior():
    model = mlp()
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.copy_(torch.tensor([200.0, 0, 0]))
    inputs = torch.randn(9, 6)
    objective = wf.Objective(model, [(inputs, torch.zeros(9, dtype=torch.long))], cross_entropy)
    found = Prior.of(objective, 9, "data")
    assert torch.equal(found.diagonal(), torch.ones(36, dtype=torch.float64))
