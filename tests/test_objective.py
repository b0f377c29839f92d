import copy
import gc
import itertools
import json
import random
import warnings
import weakref
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss, nll_loss
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import woodfisher as wf
from models import CASES, ConvNet, DictModel, Stateful, Tied, Transformer, mlp, samples
from reference import loop_rows
from woodfisher.gradients.batches import map_tensors
from woodfisher.gradients.isolation import isolated
from woodfisher.gradients.normalisation import even_size


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("build", "shape"), CASES)
def test_rows_equal_a_plain_loop(build, shape, group):
    model, (x, y) = build().eval(), samples(20, shape)
    objective = wf.Objective(model, [(x, y)], cross_entropy)
    expected = loop_rows(model, cross_entropy, x, y, list(objective.layout.shapes), group)
    rows = objective.rows(20, group=group)
    assert rows.shape == (20 // group, objective.layout.size)
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(objective.gradient(20), expected.mean(0))


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("build", "shape"), CASES)
def test_rows_in_bfloat16_are_those_of_float32_but_for_rounding(build, shape, group):
    model, (x, y) = build().eval(), samples(20, shape)
    seen = set()

    def loss(outputs, targets):
        seen.add(outputs.dtype)
        return cross_entropy(outputs, targets)

    expected = wf.Objective(model, [(x, y)], cross_entropy).rows(20, group=group)
    objective = wf.Objective(model, [(x, y)], loss, precision="bfloat16")
    rows = objective.rows(20, group=group)
    assert rows.dtype == torch.float32
    assert torch.bfloat16 not in seen
    assert 1e-5 < float((rows - expected).norm() / expected.norm()) < 0.05
    gradient = objective.gradient(20)
    assert float((gradient - expected.mean(0)).norm() / expected.mean(0).norm()) < 0.05
    assert objective.mean_loss() == wf.Objective(model, [(x, y)], cross_entropy).mean_loss()


@pytest.mark.parametrize("supported", [False, True])
def test_a_processor_without_bfloat16_is_told(supported, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    objective = wf.Objective(mlp(), [samples(8)], cross_entropy, precision="bfloat16")
    assert any("this processor" in warning for warning in objective.warnings) is not supported
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.delattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    objective = wf.Objective(mlp(), [samples(8)], cross_entropy, precision="bfloat16")
    assert any("this processor" in warning for warning in objective.warnings)


def test_bfloat16_is_for_models_in_float32():
    with pytest.raises(wf.WoodfisherError, match="autocast leaves a float64 model as it is"):
        wf.Objective(mlp().double(), [], cross_entropy, precision="bfloat16")
    with pytest.raises(wf.WoodfisherError, match="precision must be one of float32, bfloat16; 'half' came"):
        wf.Objective(mlp(), [], cross_entropy, precision="half")


def test_rows_of_a_transformer_equal_a_plain_loop():
    model = Transformer().eval()
    tokens, y = torch.randint(11, (6, 5), generator=torch.Generator().manual_seed(0)), samples(6)[1]
    left = r"1 weights of attention and recurrent layers are left dense \(layer.self_attn.in_proj_weight\)"
    with pytest.warns(wf.WoodfisherWarning, match=left):
        objective = wf.Objective(model, [(tokens, y)], cross_entropy)
    expected = loop_rows(model, cross_entropy, tokens, y, list(objective.layout.shapes))
    torch.testing.assert_close(objective.rows(6), expected)


def test_default_weights_are_those_of_linear_and_convolution_layers():
    names = list(wf.Objective(ConvNet(), [], cross_entropy).layout.shapes)
    assert names == ["conv.weight", "grouped.weight", "fc.weight"]
    assert list(wf.Objective(Tied(), [], cross_entropy).layout.shapes) == ["first.weight", "head.weight"]


@pytest.mark.parametrize(
    ("params", "exclude", "expected"),
    [
        ("fc", (), ["fc.weight", "fc.bias"]),
        (["*.weight"], ["norm"], ["conv.weight", "grouped.weight", "fc.weight"]),
        (None, ["conv*"], ["grouped.weight", "fc.weight"]),
    ],
)
def test_weights_by_pattern(params, exclude, expected):
    objective = wf.Objective(ConvNet(), [], cross_entropy, params=params, exclude=exclude)
    assert list(objective.layout.shapes) == expected


@given(cuts=st.lists(st.integers(1, 19), max_size=6, unique=True), group=st.sampled_from([1, 2, 5]))
@settings(max_examples=20, deadline=None)
def test_splitting_the_data_into_other_batches_changes_nothing(cuts, group):
    model, (x, y) = mlp(torch.float64), samples(20, dtype=torch.float64)
    edges = [0, *sorted(cuts), 20]
    batches = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(edges)]
    whole = wf.Objective(model, [(x, y)], cross_entropy).rows(20, group=group)
    torch.testing.assert_close(wf.Objective(model, batches, cross_entropy).rows(20, group=group), whole)


def test_chunks_are_bounded_by_the_workspace_and_change_nothing():
    model, (x, y) = mlp(), samples(20)
    objective = wf.Objective(model, [(x, y)], cross_entropy)
    whole = objective.rows(20, group=2)
    chunks = list(objective.within(2000).iter_rows(20, group=2))
    assert len(chunks) > 3
    torch.testing.assert_close(torch.cat(chunks), whole)


def test_model_that_looks_at_values_falls_back_once_with_equal_rows():
    model, (x, y) = Tied(), samples(6, (5,))
    model.register_forward_pre_hook(lambda module, args: args if args[0].isfinite().all() else None)
    objective = wf.Objective(model, [(x, y)], cross_entropy)
    with pytest.warns(wf.WoodfisherWarning, match="can't vectorise") as caught:
        rows = objective.rows(6)
    assert len(caught) == 1
    expected = loop_rows(model, cross_entropy, x, y, list(objective.layout.shapes))
    torch.testing.assert_close(rows, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective.rows(6)


@pytest.mark.parametrize("labels", ["data", "model"])
@pytest.mark.filterwarnings("ignore::woodfisher.WoodfisherWarning")
@pytest.mark.parametrize("build", [Stateful, mlp])
def test_sampling_leaves_nothing_behind(build, labels):
    model = nn.Sequential(build(), nn.Dropout(0.5)).train()
    model[1].eval()
    (x, y) = samples(8)
    cross_entropy(model(x), y).backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    attributes = {
        m: {k: v for k, v in vars(m).items() if k in ("training", "calls")} for m in model.modules()
    }
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    def data():
        random.random(), np.random.rand(), torch.rand(1)
        yield x, y

    with torch.no_grad():
        wf.Objective(model, data(), cross_entropy).rows(8, labels=labels)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert {m: {k: vars(m)[k] for k in kept} for m, kept in attributes.items()} == attributes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_rows_are_taken_in_evaluation_mode():
    model, (x, y) = nn.Sequential(nn.Dropout(0.9), mlp()).train(), samples(8)
    expected = loop_rows(copy.deepcopy(model).eval(), cross_entropy, x, y, ["1.0.weight", "1.2.weight"])
    torch.testing.assert_close(wf.Objective(model, [(x, y)], cross_entropy).rows(8), expected)


def test_dict_batches_of_a_model_with_its_own_loss():
    model, (x, y) = DictModel(), samples(8)
    rows = wf.Objective(model, [{"features": x, "labels": y}]).rows(8)
    torch.testing.assert_close(rows, wf.Objective(model.net, [(x, y)], cross_entropy).rows(8))
    torch.manual_seed(0)
    sampled = wf.Objective(model, [{"features": x, "labels": y}]).rows(8, labels="model")
    torch.manual_seed(0)
    torch.testing.assert_close(
        sampled, wf.Objective(model.net, [(x, y)], cross_entropy).rows(8, labels="model")
    )


def test_inputs_in_parts():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, a, b):
            return self.net(a + b)

    model, (x, y) = Two(), samples(8)
    expected = wf.Objective(model.net, [(2 * x, y)], cross_entropy).rows(8)
    for inputs in ((x, x), {"a": x, "b": x}):
        torch.testing.assert_close(wf.Objective(model, [(inputs, y)], cross_entropy).rows(8), expected)


def gauss_newton(model, x, names, output_hessian):
    """Mean of JᵀHJ by its definition."""
    total = 0
    for sample in x:
        output = model(sample[None])[0]
        parameters = [dict(model.named_parameters())[n] for n in names]
        J = torch.stack(
            [
                torch.cat([g.reshape(-1) for g in torch.autograd.grad(o, parameters, retain_graph=True)])
                for o in output
            ]
        )
        total = total + J.T @ output_hessian(output.detach()) @ J
    return total / len(x)


@pytest.mark.parametrize(
    ("loss", "output_hessian", "targets"),
    [
        (
            cross_entropy,
            lambda o: torch.diag(o.softmax(0)) - torch.outer(o.softmax(0), o.softmax(0)),
            "class",
        ),
        (mse_loss, lambda o: 2 * torch.eye(3, dtype=o.dtype) / 3, "real"),
    ],
)
def test_labels_from_the_model_give_the_gauss_newton_matrix(loss, output_hessian, targets):
    model, (x, y) = mlp(torch.float64), samples(2, dtype=torch.float64)
    repeat = 20000
    many = x.repeat(repeat, 1)
    y = y.repeat(repeat) if targets == "class" else torch.zeros(len(many), 3, dtype=torch.float64)
    objective = wf.Objective(model, [(many, y)], loss)
    torch.manual_seed(0)
    G = objective.rows(len(many), labels="model")
    expected = gauss_newton(model, x, objective.layout.shapes, output_hessian)
    assert (G.T @ G / len(G) - expected).norm() < 0.03 * expected.norm()


def test_labels_from_the_model_for_the_logistic_loss_and_a_sampler_of_ones_own():
    model, (x, _) = mlp(), samples(8)
    y = torch.zeros(8, 3)
    assert wf.Objective(model, [(x, y)], binary_cross_entropy_with_logits).rows(8, labels="model").any()
    one = wf.Objective(model, [(x, y)], lambda o, t: (o - t).square().mean(), sampler=lambda o: o)
    assert not one.rows(8, labels="model").any()
    unknown = wf.Objective(model, [(x, y)], lambda o, t: (o - t).square().mean())
    with pytest.raises(wf.WoodfisherError, match="sampler="):
        unknown.rows(8, labels="model")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_float32_rows(dtype):
    model, (x, y) = mlp(), samples(8)
    exact = wf.Objective(model, [(x, y)], cross_entropy).rows(8)
    objective = wf.Objective(model.to(dtype), [(x.to(dtype), y)], cross_entropy)
    rows = objective.rows(8)
    assert rows.dtype == torch.float32
    assert (rows - exact).norm() < 0.02 * exact.norm()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_on_cuda_equal_those_on_the_cpu():
    model, (x, y) = mlp(), samples(8)
    expected = wf.Objective(model, [(x, y)], cross_entropy).rows(8)
    rows = wf.Objective(copy.deepcopy(model).cuda(), [(x, y)], cross_entropy).rows(8)
    torch.testing.assert_close(rows.cpu(), expected)


def test_removed_weights_have_no_gradient():
    model, (x, y) = mlp(), samples(8)
    with torch.no_grad():
        model[0].weight[1] = 0
    objective = wf.Objective(model, [(x, y)], cross_entropy)
    assert objective.kept.sum() == objective.layout.size - 6
    assert not objective.rows(8)[:, ~objective.kept].any()
    assert not objective.gradient(8)[~objective.kept].any()


def test_masks_of_torch_prune_count():
    model, (x, y) = mlp(), samples(8)
    prune.l1_unstructured(model[0], "weight", 5)
    objective = wf.Objective(model, [(x, y)], cross_entropy)
    assert list(objective.layout.shapes) == ["0.weight_orig", "2.weight"]
    assert (~objective.kept).sum() == 5
    assert objective.rows(8).isfinite().all()
    torch.testing.assert_close(model(x), mlp_with_zeros(model)(x))


def mlp_with_zeros(pruned):
    plain = mlp()
    with torch.no_grad():
        plain[0].weight *= pruned[0].weight_mask
    return plain


def test_data_that_ends_early_says_so_and_n_is_what_came():
    model, (x, y) = mlp(), samples(7)
    with pytest.warns(wf.WoodfisherWarning, match="10 samples were asked for and the data ended after 7"):
        rows = wf.Objective(model, [(x, y)], cross_entropy).rows(10, group=2)
    assert len(rows) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x, y: ([], cross_entropy, mlp()), "no batch"),
        (
            lambda x, y: ([(x[:, :5], y)], cross_entropy, mlp()),
            r"fails on a batch of \(1, 5\) float32, \(1,\)",
        ),
        (lambda x, y: ([(x, y[:3])], cross_entropy, mlp()), "samples as their first dimension"),
        (lambda x, y: ([(x, "cat")], cross_entropy, mlp()), "holds a str"),
        (lambda x, y: ([(x, y, y)], cross_entropy, mlp()), r"must be \(inputs, targets\)"),
        (lambda x, y: ([{"features": x}], None, DictModel()), "model must return an object with .loss"),
        (
            lambda x, y: ([(x, y)], lambda o, t: o.detach().sum(), mlp()),
            "does not depend on any chosen weight",
        ),
        (lambda x, y: ([(x, y + 7)], cross_entropy, mlp()), "fails on a batch.*IndexError"),
        (lambda x, y: ([(x, y + torch.arange(8) // 7 * 9)], cross_entropy, mlp()), "fails on a batch"),
        (lambda x, y: ([{"features": x, "labels": y}], cross_entropy, DictModel()), "without loss="),
        (lambda x, y: ([(x, y)], lambda o, t: 1.0, mlp()), "must return a real tensor.*a float came"),
        (lambda x, y: ([(x, y)], "cross_entropy", mlp()), "loss must be a function.*; a str came"),
    ],
)
def test_bad_data_is_explained(make, message):
    data, loss, model = make(*samples(8))
    with pytest.raises(wf.WoodfisherError, match=message):
        wf.Objective(model, data, loss).rows(8)


class Graph(nn.Module):
    """Linear layers over the nodes of a graph, whose adjacency is the same for all samples."""

    def __init__(self, adjacency):
        super().__init__()
        self.register_buffer("adjacency", adjacency)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second((self.adjacency @ self.first(x).mT).mT.relu())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_rows_of_a_model_with_a_sparse_buffer(sparse):
    x, y = torch.randn(20, 8), torch.randint(3, (20,))
    dense = Graph(torch.randn(8, 8) * (torch.rand(8, 8) < 0.3))
    model = copy.deepcopy(dense)
    model.adjacency = sparse(dense.adjacency)
    rows = [wf.Objective(one, [(x, y)], cross_entropy).rows(20) for one in (model, dense)]
    torch.testing.assert_close(*rows)
    assert wf.prune(model, [(x, y)], cross_entropy, 0.5, curvature=wf.WoodFisher(20), stages=1).kept == 44
    with pytest.raises(wf.WoodfisherError, match="holds one of layout torch.sparse.*to_dense"):
        wf.Objective(nn.Linear(8, 3), [(sparse(x.relu()), y)], cross_entropy).rows(20)


@pytest.mark.parametrize("loss", [cross_entropy, nn.CrossEntropyLoss(), None])
@pytest.mark.parametrize("parts", [1, 3])
def test_batches_of_other_than_two_parts_are_refused_before_they_are_looked_into(loss, parts):
    data = [(samples(8)[0],) * parts]
    message = rf"must be \(inputs, targets\), .*; a tuple of {parts} came"
    with pytest.raises(wf.WoodfisherError, match=message):
        wf.Objective(mlp(), data, loss).mean_loss()
    with pytest.raises(wf.WoodfisherError, match=message):
        wf.prune(mlp(), data, loss, 0.5)


def test_nan_is_found_in_rows_that_are_smaller_than_what_flows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    x, y = torch.randn(16, 2, 6, 6), torch.randint(4, (16,))
    x[11, 0, 1, 1] = float("nan")
    objective = wf.Objective(model, [(x, y)], cross_entropy, params="0.weight")
    assert objective.factors(4)["0.weight"].floats > objective.layout.size
    with pytest.raises(wf.WoodfisherError, match=r"'0.weight' in row 2 is nan. The data of that row"):
        objective.rows(16, group=4)


def test_nan_names_the_parameter_and_the_row():
    model, (x, y) = mlp(), samples(8)
    x[5, 2] = float("nan")
    with pytest.raises(wf.WoodfisherError, match=r"'0.weight' in row 5 is nan. The data of that row"):
        wf.Objective(model, [(x[:4], y[:4]), (x[4:], y[4:])], cross_entropy).rows(8)
    with pytest.raises(wf.WoodfisherError, match="'0.weight' in row 5 is nan"):
        wf.Objective(model, [(x, y)], cross_entropy).within(0).gradient(8)

    def loss(outputs, targets):
        return nll_loss((0 * outputs).log(), targets)

    with pytest.raises(wf.WoodfisherError, match=r"in row 0 is .*logarithm"):
        wf.Objective(model, [(-x[:2].abs(), y[:2])], loss).rows(2)


def test_rows_of_batches_of_other_shapes():
    model = nn.Sequential(nn.AdaptiveAvgPool1d(6), mlp(torch.float64))
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(4, n, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))
        for n in (6, 9, 12)
    ]
    objective = wf.Objective(model, batches, cross_entropy)
    assert len(objective.rows(12)) == 12
    assert len(objective.rows(12, group=4)) == 3
    with pytest.warns(wf.WoodfisherWarning, match="some that fill no row are left out.*multiple of 3"):
        rows = objective.rows(12, group=3)
    expected = [
        wf.Objective(model, [map_tensors(lambda t: t[:3], b)], cross_entropy).gradient(3) for b in batches
    ]
    torch.testing.assert_close(rows, torch.stack(expected))
    with (
        pytest.warns(wf.WoodfisherWarning, match="some that fill no row"),
        pytest.raises(wf.WoodfisherError, match="not as many of one shape in succession.*multiple of 5"),
    ):
        objective.rows(12, group=5)


@pytest.mark.parametrize("loader", ["two views", "documents"])
def test_data_that_tells_too_few_samples_is_noticed(loader):
    x, y = samples(20)

    def two_views(items):
        inputs, targets = (torch.stack(part) for part in zip(*items, strict=True))
        return torch.cat([inputs, -inputs]), torch.cat([targets, targets])

    class Documents:
        dataset = range(4)

        def __iter__(self):
            return iter([(x, y)])

    if loader == "documents":
        assert len(wf.Objective(mlp(), Documents(), cross_entropy).rows(20)) == 20
    else:
        data = DataLoader(TensorDataset(x, y), batch_size=10, collate_fn=two_views)
        assert len(wf.Objective(mlp(), data, cross_entropy).rows(20)) == 20
        with pytest.raises(wf.WoodfisherError, match="tells that it has 20 samples, and gives more"):
            wf.Objective(mlp(), data, cross_entropy).rows(40)


class Checkpointed(nn.Module):
    """A network that runs its middle again in the backward pass."""

    def __init__(self, checkpointed):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.checkpointed = checkpointed

    def forward(self, x):
        h = torch.tanh(self.first(x))
        inner = lambda h: torch.tanh(self.middle(h))
        return self.last(checkpoint(inner, h, use_reentrant=False) if self.checkpointed else inner(h))


def test_gradients_at_other_weights_are_right_with_activation_checkpointing():
    found = []
    for checkpointed in (False, True):
        objective = wf.Objective(Checkpointed(checkpointed), [samples(8)], cross_entropy)
        there = objective.at(0.3 * objective.weights + 0.05, objective.kept)
        found.append(
            (there.rows(8), there.gradient(8), there.hessian_columns(8, slice(0, 5)), there.mean_loss())
        )
    torch.testing.assert_close(found[1], found[0])


def test_a_loss_may_read_the_models_weights():
    model, (x, y) = mlp(), samples(8)

    def loss(outputs, targets):
        return cross_entropy(outputs, targets) + 0.1 * sum(p.square().sum() for p in model.parameters())

    objective = wf.Objective(model, [(x, y)], loss)
    own = torch.autograd.grad(loss(model(x), y), list(objective.parameters.values()))
    flat = torch.cat([g.flatten() for g in own])
    torch.testing.assert_close(objective.gradient(8), flat)
    with pytest.warns(wf.WoodfisherWarning, match="uses the weight outside of its layer too"):
        rows = objective.rows(8)
    torch.testing.assert_close(rows.mean(0), flat)
    zero, plain = (
        wf.Objective(model, [(x, y)], each).at(0 * objective.weights, objective.kept)
        for each in (loss, cross_entropy)
    )
    biases = sum(float(layer.bias.square().sum()) for layer in model[::2])
    assert zero.mean_loss() == pytest.approx(plain.mean_loss() + 0.1 * biases)


def test_frozen_and_parametrized_weights_are_left_dense_unless_named():
    model = mlp()
    model[0].requires_grad_(False)
    with pytest.warns(wf.WoodfisherWarning, match=r"1 weights are frozen and left dense \(0.weight\)"):
        assert list(wf.Objective(model, []).layout.shapes) == ["2.weight"]
    with pytest.warns(wf.WoodfisherWarning) as caught:
        report = wf.prune(model, None, sparsity=0.5, criterion="magnitude")
    assert report.warnings == [str(one.message) for one in caught]
    assert "frozen" in report.warnings[0]
    assert list(wf.Objective(model, [], params="*.weight").layout.shapes) == ["0.weight", "2.weight"]
    assert list(wf.Objective(model.requires_grad_(False), []).layout.shapes) == ["0.weight", "2.weight"]
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.warns(wf.WoodfisherWarning, match="the weights of 0 are parametrized"):
        assert list(wf.Objective(model, []).layout.shapes) == ["2.weight"]
    assert len(wf.Objective(model, [], params="0").layout.shapes) == 3
    model = mlp()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[0])
    with pytest.warns(wf.WoodfisherWarning, match="the weights of 0 are parametrized"):
        assert list(wf.Objective(model, []).layout.shapes) == ["2.weight"]


def test_embeddings_with_sparse_gradients_and_lazy_layers_are_refused():
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3))
    assert list(wf.Objective(model, []).layout.shapes) == ["1.weight"]
    with pytest.raises(wf.WoodfisherError, match="'0.weight' is an embedding with sparse gradients"):
        wf.Objective(model, [], params="*.weight")
    with pytest.raises(wf.WoodfisherError, match=r"'0.weight' has no shape before the model has run"):
        wf.Objective(nn.Sequential(nn.LazyLinear(3)), [])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("decoder.*", "'decoder.\\*' matches no parameter. The model has 0.weight"),
        ([], "no weights are left"),
        (torch.ones(2), "names of parameters or modules.*a Tensor came"),
    ],
)
def test_patterns_that_match_nothing(params, message):
    with pytest.raises(wf.WoodfisherError, match=message):
        wf.Objective(mlp(), [], cross_entropy, params=params)


def test_write_refuses_values_that_overflow_the_models_dtype():
    model = mlp(torch.float16)
    before = copy.deepcopy(model.state_dict())
    objective = wf.Objective(model, [], cross_entropy)
    with pytest.raises(wf.WoodfisherError, match="not finite in torch.float16; the model is unchanged"):
        objective.at(objective.weights * 1e9, objective.kept).write()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_write_refuses_a_model_with_other_buffers_before_the_first_change():
    objective = wf.Objective(mlp(), [], cross_entropy)
    other = mlp()
    other.append(nn.BatchNorm1d(3))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(wf.WoodfisherError, match=r"no buffer '3.running_mean' of shape \(3,\)"):
        objective.at(objective.weights * 2, objective.kept).write(other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_write_refuses_a_model_whose_other_parameters_differ_before_the_first_change():
    model = mlp()
    objective = wf.Objective(model, [], cross_entropy)
    halved = objective.at(objective.weights / 2, objective.kept)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[2].bias += 1
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        wf.WoodfisherError, match="'2.bias' of this model differs.*load the state dict of the dense"
    ):
        halved.write(other)
    other.append(nn.Linear(3, 3))
    with pytest.raises(
        wf.WoodfisherError, match=r"'3.weight' is a parameter of shape None .* and of shape \(3, 3\)"
    ):
        halved.write(other)
    assert all(
        torch.equal(value, before[name]) for name, value in other.state_dict().items() if name in before
    )
    del other[3]
    other.load_state_dict(model.state_dict())
    halved.write(other)
    assert torch.equal(other[2].weight, model[2].weight / 2)
    lower = copy.deepcopy(model).bfloat16()
    halved.write(lower)
    assert torch.equal(lower[2].weight, other[2].weight.bfloat16())


def test_write_takes_a_copy_of_a_model_with_nan_in_what_it_never_uses():
    model = mlp()
    model.register_parameter("unused", nn.Parameter(torch.full((3,), float("nan"))))
    objective = wf.Objective(model, [], cross_entropy)
    other = copy.deepcopy(model)
    objective.at(objective.weights / 2, objective.kept).write(other)
    assert torch.equal(other[2].weight, model[2].weight / 2)
    model[2].bias.data += 1  # as training does
    objective.at(objective.weights / 2, objective.kept).write()
    assert torch.equal(other[2].weight, model[2].weight)


def test_float64_weights_beside_others_keep_their_digits():
    model = mlp()
    model[2].double()
    objective = wf.Objective(model, [], cross_entropy)
    assert objective.dtype == torch.float64
    before = model[2].weight.clone()
    objective.write()
    assert torch.equal(model[2].weight, before)


def test_looking_at_data_leaves_a_loaders_own_generator_alone():
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(*samples(30)), batch_size=5, shuffle=True, generator=generator)
    objective, before = wf.Objective(mlp(), loader, cross_entropy), generator.get_state()
    objective.factors()
    objective.flops()
    wf.plan(objective, wf.WoodFisher(20))
    assert torch.equal(generator.get_state(), before)


def test_flops_do_not_take_from_data_that_can_be_read_once():
    data = iter([samples(8)])
    with pytest.raises(wf.WoodfisherError, match="would lose its first batch"):
        wf.Objective(mlp(), data, cross_entropy).flops()
    assert len(list(data)) == 1


@pytest.mark.parametrize("columns", [[0, 3], torch.tensor([5, 3]), torch.tensor([36]), torch.tensor([0.5])])
def test_columns_that_are_none_are_explained(columns):
    with pytest.raises(wf.WoodfisherError, match="flat indexes below 36, an int64 tensor"):
        wf.Objective(mlp(), [samples(8)], cross_entropy).rows(8, columns=columns)


def test_an_autocast_around_it_changes_nothing():
    model, (x, y) = ConvNet().eval(), samples(8, (2, 6, 6))
    objective = wf.Objective(model, [(x, y)], cross_entropy)
    expected = objective.rows(8), objective.mean_loss()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(objective.rows(8), expected[0])
        assert objective.mean_loss() == expected[1]


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_losses_of_several_outputs_are_in_full_precision_too(kind):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            y = self.layer(x)
            return {"a": y, "b": (y, 3)} if kind is dict else kind([y, y])

    def loss(outputs, targets):
        first = outputs["b"][0] if kind is dict else outputs[1]
        assert first.dtype == torch.float32
        return cross_entropy(first, targets)

    assert wf.Objective(Two(), [samples(8)], loss, precision="bfloat16").rows(8).isfinite().all()


def test_a_generator_that_ends_late_brings_nothing_back():
    model = mlp().train()

    def chunks():
        with isolated(model):
            torch.rand(1)
            yield 1

    late = chunks()
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), isolated(model):
        next(late)
        raise ZeroDivisionError
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    model.eval()
    after = torch.get_rng_state()
    late.close()
    assert not model.training
    assert torch.equal(torch.get_rng_state(), after)


TAKEN = {
    "rows": lambda objective: objective.iter_rows(6, labels="model"),
    "layer rows": lambda objective: objective.iter_layer_rows(6, labels="model"),
    "Fisher": lambda objective: objective.iter_fisher_rows(6),
}


@pytest.mark.parametrize("taken", TAKEN.values(), ids=TAKEN)
def test_whoever_takes_rows_is_in_modes_and_random_numbers_of_his_own(taken):
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(), nn.Linear(4, 3))
    objective = wf.Objective(model, [samples(6)], cross_entropy).within(1)
    torch.manual_seed(0)
    expected, alone = list(taken(objective)), [float(torch.rand(())) for _ in range(6)]
    torch.manual_seed(0)
    parts, drawn = [], []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for part in taken(objective):
            assert model.training
            assert not torch.is_grad_enabled()
            assert torch.is_autocast_enabled("cpu")
            parts.append(part)
            drawn.append(float(torch.rand(())))
    assert drawn[:6] == alone
    for part, other in zip(parts, expected, strict=True):
        if isinstance(part, dict):
            part, other = (torch.cat([rows.dense() for rows in each.values()], 1) for each in (part, other))
        assert torch.equal(part, other)


@pytest.mark.parametrize("taken", TAKEN.values(), ids=TAKEN)
def test_rows_that_are_let_go_of_change_no_mode(taken):
    model = mlp().train()
    parts = taken(wf.Objective(model, [samples(6)], cross_entropy).within(1))
    with torch.no_grad():
        next(parts)
    assert torch.is_grad_enabled()
    assert model.training
    with torch.no_grad():
        del parts
        gc.collect()
        assert not torch.is_grad_enabled()


def test_data_that_turns_gradients_off_is_read_too():
    x, y = samples(6)

    class Without:
        def __iter__(self):
            with torch.no_grad():
                yield from zip(x.split(2), y.split(2), strict=True)

    plain, without = (wf.Objective(mlp(), data, cross_entropy) for data in ([(x, y)], Without()))
    assert torch.equal(without.rows(6), plain.rows(6))
    torch.testing.assert_close(without.gradient(6), plain.gradient(6))
    torch.testing.assert_close(without.squares(6), plain.squares(6))
    torch.testing.assert_close(without.hessian_columns(6, slice(2)), plain.hessian_columns(6, slice(2)))


@given(samples=st.integers(1, 3000))
def test_chunks_for_statistics_leave_no_small_rest(samples):
    size = even_size(samples)
    assert min(samples, 250) <= size <= max(500, min(samples, 250))
    assert samples % size == 0 or samples % size >= size // 2
    chunks = -(-samples // size)
    assert size * chunks - samples < chunks


@pytest.mark.parametrize("count", [2, 250, 251, 501])
def test_recalibration_takes_any_number_of_samples(count):
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    x, y = samples(count)
    fresh = wf.Objective(model, [(x, y)], cross_entropy).recalibrated(count)
    expected = model[0](x).mean(0)
    torch.testing.assert_close(fresh.buffers["1.running_mean"], expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("counts", [True, False])
def test_a_model_that_is_a_batch_norm_itself_is_recalibrated(counts):
    model = nn.BatchNorm1d(6)
    model.num_batches_tracked = model.num_batches_tracked if counts else None
    x, _ = samples(20)
    objective = wf.Objective(model, [(x, x)], mse_loss, params="weight")
    fresh = objective.recalibrated(20)
    torch.testing.assert_close(fresh.buffers["running_mean"], x.mean(0))
    torch.testing.assert_close(fresh.buffers["running_var"], x.var(0))


def test_tied_weights_answer_to_all_their_names():
    for pattern in ("first", "second"):
        assert list(wf.Objective(Tied(), [], params=pattern).layout.shapes) == ["first.weight"]


@pytest.mark.parametrize("experts", [1, 5])
def test_weights_that_no_layer_has_are_warned_of_where_they_are_most(experts):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    model.register_parameter("experts", nn.Parameter(torch.randn(experts, 6, 6)))
    if experts == 1:
        wf.Objective(model, [])
        return
    with pytest.warns(wf.WoodfisherWarning, match=r"1 weights of other modules, .* left dense \(experts\)"):
        wf.Objective(model, [])


def test_weights_that_layers_share_with_embeddings_stay_dense_unless_they_are_named():
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7))
    model[2].weight = model[0].weight
    with pytest.warns(wf.WoodfisherWarning, match=r"share with embeddings are left dense \(0.weight\)"):
        assert list(wf.Objective(model, [], cross_entropy).layout.shapes) == ["1.weight"]
    assert list(wf.Objective(model, [], params="2.weight").layout.shapes) == ["0.weight"]
    assert list(wf.Objective(nn.Sequential(model[0], model[2]), []).layout.shapes) == ["0.weight"]


def in_one_memory(first, second):
    model = mlp()
    model[0].weight.data, model[2].weight.data = first, second
    return model


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            lambda t: t[:24].view(4, 6),
            lambda t: t[23:35].view(3, 4),
            "'0.weight' and '2.weight' are two parameters in",
        ),
        (lambda t: t[:24].view(4, 6), lambda t: t[8:20].view(4, 3).T, "two parameters in the same memory"),
        (
            lambda t: t[:24].view(torch.float64).view(2, 6),
            lambda t: t[20:32].view(3, 4),
            "two parameters in the same",
        ),
        (
            lambda t: t[:6].expand(4, 6),
            lambda t: t[24:36].view(3, 4),
            "several entries of '0.weight' are one number",
        ),
        (
            lambda t: t.as_strided((4, 6), (4, 1)),
            lambda t: t[28:40].view(3, 4),
            "several entries of '0.weight'",
        ),
    ],
)
def test_weights_in_one_memory_are_refused(first, second, message):
    memory = torch.randn(40)
    model = in_one_memory(first(memory), second(memory))
    with pytest.raises(wf.WoodfisherError, match=message):
        wf.Objective(model, [])
    with pytest.raises(wf.WoodfisherError, match=f"{message}|no parameter '0.weight' of shape"):
        wf.Objective(mlp(), []).write(model)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda t: t[:24].view(4, 6), lambda t: t[24:36].view(3, 4)),
        (lambda t: t[:24].view(6, 4).T, lambda t: t[24:36].view(4, 3).T),
        (lambda t: t.view(4, 10)[:, :6], lambda t: t.view(4, 10)[:, 6:9].T),
    ],
)
def test_weights_may_be_parts_of_one_buffer(first, second):
    memory = torch.randn(40)
    model = in_one_memory(first(memory), second(memory))
    report = wf.prune(model, None, sparsity=0.5, criterion="magnitude")
    assert report.kept == sum(int(p.count_nonzero()) for p in (model[0].weight, model[2].weight)) == 18


def test_names_of_what_is_no_real_number_are_refused():
    model = mlp()
    model.phase, model.none = (
        nn.Parameter(torch.ones(3, dtype=torch.complex64)),
        nn.Parameter(torch.ones(0, 2)),
    )
    for name, what in (("phase", r"complex64 of shape \(3,\)"), ("none", r"float32 of shape \(0, 2\)")):
        with pytest.raises(wf.WoodfisherError, match=f"'{name}' matches '{name}', {what}"):
            wf.Objective(model, [], params=["0.weight", name])


def test_a_loss_that_sums_is_warned_of_where_it_matters():
    def total(outputs, targets):
        return cross_entropy(outputs, targets, reduction="sum")

    objective = wf.Objective(mlp(), [samples(8)], total)
    objective.rows(8)
    for call in (lambda: objective.gradient(8), lambda: objective.rows(8, group=4)):
        with pytest.warns(wf.WoodfisherWarning, match="seems to sum"):
            call()


def test_models_that_cannot_be_used_are_explained():
    broken = mlp()
    with torch.no_grad():
        broken[2].weight[0, 0] = float("nan")
    with pytest.raises(wf.WoodfisherError, match="own weight '2.weight' holds NaN"):
        wf.Objective(broken, [])
    with torch.inference_mode():
        made_inside = mlp()
        objective = wf.Objective(mlp(), [samples(4)], cross_entropy)
        with pytest.raises(wf.WoodfisherError, match="inference_mode"):
            objective.rows(4)
    with pytest.raises(wf.WoodfisherError, match="can't be changed"):
        wf.prune(made_inside, None, sparsity=0.5, criterion="magnitude")


def test_targets_of_a_summed_square():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4), torch.randn(4000, 3)
    objective = wf.Objective(model, [(x, torch.zeros(4000, 4))], nn.MSELoss(reduction="sum"))
    gauss_newton = 2 * 4 * x.square().sum() / 4000
    trace = sum(rows.square().sum() for rows in objective.iter_fisher_rows(4000)) / 4000
    torch.testing.assert_close(trace, gauss_newton, rtol=1e-4, atol=0)
    drawn = objective.rows(4000, labels="model").square().sum() / 4000
    torch.testing.assert_close(drawn, gauss_newton, rtol=0.1, atol=0)


@pytest.mark.parametrize(
    "loss",
    [
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([5.0] * 4)),
        nn.BCEWithLogitsLoss(weight=torch.tensor([5.0] * 4)),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.ones(4), reduction="none"),
        partial(partial(nn.functional.huber_loss, delta=2.0), reduction="sum"),
    ],
)
def test_losses_that_are_no_likelihoods_need_a_sampler(loss):
    objective = wf.Objective(nn.Linear(3, 4), [(torch.randn(9, 3), torch.zeros(9, 4))], loss)
    name = "huber_loss" if isinstance(loss, partial) else type(loss).__name__
    with pytest.raises(wf.WoodfisherError, match=f"for the loss {name}: pass sampler="):
        objective.rows(8, labels="model")


class Positions(nn.Module):
    """Classes at each of five positions."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4 * 5)

    def forward(self, x):
        return self.layer(x).unflatten(1, (4, 5))


@pytest.mark.parametrize(
    "loss", [cross_entropy, *(nn.CrossEntropyLoss(reduction=r) for r in ("mean", "none", "sum"))]
)
def test_the_fisher_of_classes_at_positions_is_the_gauss_newton_matrix_of_those_that_count(loss):
    torch.manual_seed(0)
    model, x, y = Positions(), torch.randn(6000, 3), torch.randint(4, (6000, 5))
    y[::3, 2:] = -100
    objective = wf.Objective(model, [(x, y)], loss)
    logits = model(x)
    p = logits.softmax(1)
    curvature = (p * (1 - p)).sum(1) * (y != -100)  # trace of the Hessian by the logits of a position
    reduction = getattr(loss, "reduction", "mean")
    if reduction != "sum":
        curvature = curvature / ((y != -100).sum(1, keepdim=True) if reduction == "mean" else 5)
    expected = (curvature.sum(1) * x.square().sum(1)).mean()
    drawn = objective.rows(6000, labels="model").square().sum() / 6000
    torch.testing.assert_close(drawn, expected.detach(), rtol=0.05, atol=0)


def test_classes_at_positions_that_no_targets_stand_for_are_refused():
    data = [(torch.randn(9, 3), torch.randint(4, (9, 5)))]
    for loss, name in ((nll_loss, "nll_loss"), (nn.CrossEntropyLoss(ignore_index=9), "ignore_index=9")):
        with pytest.raises(wf.WoodfisherError, match=f"{name}.*several positions: pass sampler="):
            wf.Objective(Positions(), data, loss).rows(8, labels="model")
    with pytest.raises(wf.WoodfisherError, match="ignore_index=2, one of the classes: pass sampler="):
        wf.Objective(mlp(), [samples(9)], nn.CrossEntropyLoss(ignore_index=2)).rows(8, labels="model")
    with pytest.raises(wf.WoodfisherError, match="ignore_index=2, one of the classes: pass sampler="):
        list(
            wf.Objective(nn.Linear(6, 3), [samples(9)], nn.CrossEntropyLoss(ignore_index=2)).iter_fisher_rows(
                8
            )
        )


@pytest.mark.parametrize(
    ("loss", "ignored"), [(cross_entropy, -100), (nn.CrossEntropyLoss(ignore_index=7), 7)]
)
def test_samples_that_the_loss_ignores_have_no_rows_of_drawn_targets(loss, ignored):
    x, y = samples(30)
    y[:10] = ignored
    objective = wf.Objective(mlp(), [(x, y)], loss)
    norms = objective.rows(30, labels="model").norm(dim=1)
    assert (norms[:10] == 0).all() and (norms[y != ignored] > 0).all()
    every = torch.cat(list(objective.iter_fisher_rows(30)))
    alone = wf.Objective(mlp(), [(x[y != ignored], y[y != ignored])], loss)
    expected = torch.cat(list(alone.iter_fisher_rows(int((y != ignored).sum()))))
    torch.testing.assert_close(every.square().sum(), expected.square().sum())


@pytest.mark.parametrize("size", [251, 250, 7])
def test_the_mean_loss_is_over_the_targets_that_count(size):
    x, y = samples(251)
    y[[3, 4, 100, 250]] = -100
    model = mlp()
    objective = wf.Objective(model, list(zip(x.split(size), y.split(size), strict=True)), cross_entropy)
    assert objective.mean_loss() == pytest.approx(cross_entropy(model(x), y).item(), rel=1e-5)
    assert objective.on([(x, torch.full_like(y, -100))]).mean_loss() != objective.mean_loss()  # NaN
    whole = copy.deepcopy(model)
    cross_entropy(whole(x), y).backward()
    expected = torch.cat([whole.get_parameter(name).grad.flatten() for name in objective.parameters])
    for workspace in (0, 20_000, 2**29):
        torch.testing.assert_close(objective.within(workspace).gradient(251), expected)
    columns = [objective.within(w).hessian_columns(251, slice(0, 3)) for w in (20_000, 2**29)]
    torch.testing.assert_close(*columns, rtol=1e-4, atol=1e-6)
    each = wf.Objective(model, [(x, y)], nn.CrossEntropyLoss(reduction="none"))
    assert each.mean_loss() == pytest.approx(cross_entropy(model(x), y, reduction="none").mean().item())


@pytest.mark.parametrize("ignored", [-100, 7])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "form",
    [
        lambda **options: partial(cross_entropy, **options),
        lambda **options: partial(partial(cross_entropy, reduction="sum"), **options),
        nn.CrossEntropyLoss,
    ],
    ids=["partial", "partial of a partial", "module"],
)
def test_a_loss_is_the_same_in_every_form(form, reduction, ignored):
    x, y = samples(60)
    y[[3, 4, *range(10, 30)]] = ignored
    model, loss = mlp(), form(label_smoothing=0.1, reduction=reduction, ignore_index=ignored)
    objective = wf.Objective(model, list(zip(x.split(10), y.split(10), strict=True)), loss)
    assert objective.mean_loss() == pytest.approx(float(loss(model(x), y).mean()), rel=1e-5)
    loss(model(x), y).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in objective.parameters.values()])
    for workspace in (0, 2**29):
        torch.testing.assert_close(objective.within(workspace).gradient(60), expected)
    counted = [i for i in range(60) if y[i] != ignored]
    rows = wf.Objective(model, [(x[counted], y[counted])], loss).rows(len(counted))
    alone = partial(cross_entropy, label_smoothing=0.1)
    torch.testing.assert_close(
        rows, loop_rows(model, alone, x[counted], y[counted], list(objective.layout.shapes))
    )


@pytest.mark.parametrize("loss", [mse_loss, nn.functional.binary_cross_entropy_with_logits])
def test_rows_of_a_sum_are_not_those_of_a_mean(loss):
    x, y = samples(8)
    targets = nn.functional.one_hot(y, 3).float()
    summed = wf.Objective(mlp(), [(x, targets)], partial(loss, reduction="sum"))
    module = {mse_loss: nn.MSELoss}.get(loss, nn.BCEWithLogitsLoss)(reduction="sum")
    expected = 3 * wf.Objective(mlp(), [(x, targets)], loss).rows(8)
    torch.testing.assert_close(summed.rows(8), expected)
    fisher = [
        torch.cat(list(wf.Objective(mlp(), [(x, targets)], form).iter_fisher_rows(8)))
        for form in (partial(loss, reduction="sum"), module)
    ]
    torch.testing.assert_close(*fisher)


class Halved(nn.CrossEntropyLoss):
    """Does more than the loss that it is made of."""

    def forward(self, outputs, targets):
        return super().forward(outputs, targets) / 2


def test_a_loss_that_does_more_than_torchs_is_called():
    x, y = samples(20)
    y[:5] = -100
    half, whole = (wf.Objective(mlp(), [(x, y)], loss) for loss in (Halved(), cross_entropy))
    assert half.mean_loss() == pytest.approx(whole.mean_loss() / 2)
    half, whole = (wf.Objective(mlp(), [(x[5:], y[5:])], loss) for loss in (Halved(), cross_entropy))
    torch.testing.assert_close(half.rows(15), whole.rows(15) / 2)


def test_a_loss_of_unknown_form_is_taken_for_a_mean_over_all_samples():
    x, y = samples(20)
    objective = wf.Objective(mlp(), [(x, y)], lambda o, t: cross_entropy(o, t))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective.gradient(20)
    ignoring = objective.on([(x, y.index_fill(0, torch.tensor([3]), -100))])
    with pytest.warns(wf.WoodfisherWarning, match="labels of -100 came.*a mean over all samples") as caught:
        ignoring.mean_loss()
        ignoring.gradient(20)
    assert len(caught) == 1


@pytest.mark.filterwarnings("ignore:every gradient row is zero")
def test_a_stage_may_have_only_samples_that_do_not_count():
    x, y = samples(400)
    y[:110] = -100
    report = wf.prune(mlp(), [(x, y)], cross_entropy, 0.5, preset="paper")
    assert report.sparsity == 0.5 and report.stages[0].measured is None


@pytest.mark.parametrize("params", [None, "*"])
@pytest.mark.filterwarnings(
    "ignore:400 samples", "ignore:torch.func can't vectorise", "ignore:every weight of"
)
def test_embeddings_that_scale_their_weights_stay_as_they_are(params):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8, max_norm=0.5), nn.Flatten(), nn.Linear(24, 3))
    before = copy.deepcopy(model.state_dict())
    x, y = torch.randint(20, (30, 3)), torch.randint(3, (30,))
    expected = copy.deepcopy(model)
    cross_entropy(expected(x), y).backward()
    objective = wf.Objective(model, [(x, y)], cross_entropy, params=params)
    flat = torch.cat([expected.get_parameter(name).grad.flatten() for name in objective.parameters])
    torch.testing.assert_close(objective.gradient(30), flat)
    wf.sweep(model, [(x, y)], cross_entropy, [0.5], params=params, stages=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(objective.weights, objective.current().weights)


def test_tied_embeddings_that_scale_their_weights_do_so_everywhere():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.max_norm = 1.0  # of no embedding
            self.embedding, self.head = nn.Embedding(10, 4, max_norm=0.5), nn.Linear(4, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x).mean(1).clamp(-self.max_norm, self.max_norm))

    torch.manual_seed(0)
    model, x, y = Net(), torch.randint(10, (30, 3)), torch.randint(10, (30,))
    for params in (None, "*"):
        loss = wf.Objective(model, [(x, y)], cross_entropy, params=params).mean_loss()
        assert loss == pytest.approx(cross_entropy(copy.deepcopy(model)(x), y).item(), rel=1e-5)


def test_linear_layers_of_transformers_are_pruned_by_default():
    class Conv1D(nn.Module):
        def __init__(self, outputs, inputs):
            super().__init__()
            self.nf = outputs
            self.weight = nn.Parameter(torch.randn(inputs, outputs))
            self.bias = nn.Parameter(torch.zeros(outputs))

        def forward(self, x):
            return x @ self.weight + self.bias

    model = nn.Sequential(Conv1D(5, 6), nn.Tanh(), nn.Linear(5, 3))
    objective = wf.Objective(model, [samples(8)], cross_entropy)
    assert list(objective.parameters) == ["0.weight", "2.weight"]
    assert list(wf.Objective(model, [], cross_entropy, exclude=":first").parameters) == ["2.weight"]


def test_tied_weights_take_part_in_the_flops_of_each_place():
    model, (x, y) = Tied(), samples(8, (5,))
    flops = wf.Objective(model, [(x, y)], cross_entropy).flops()
    assert flops.tolist() == [4] * 25 + [2] * 15


def test_operations_of_a_forward_pass_are_counted_once():
    nested = nn.Sequential(nn.Sequential(nn.Linear(6, 4)), nn.Linear(4, 3))
    x, y = samples(8, (6,))
    assert wf.Objective(nested, [(x, y)], cross_entropy).forward_flops() == 2 * (24 + 12)
    assert wf.Objective(nested, [], cross_entropy).forward_flops() == 0


def test_ends_of_a_model_without_layers_are_explained():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

    with pytest.raises(wf.WoodfisherError, match="the model has none"):
        wf.Objective(Product(), [], params="*", exclude=":first")


def test_flops_of_modules_that_do_more_than_multiply_with_a_weight_are_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(6, 6)) for _ in range(2))

        def forward(self, x):
            return (x @ self.first @ self.second)[:, :3]

    objective = wf.Objective(Twice(), [samples(8)], cross_entropy, params="*")
    with pytest.raises(wf.WoodfisherError, match="FLOPs of 'first' can't be counted"):
        objective.flops()


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])),
        partial(cross_entropy, weight=torch.tensor([1.0, 2.0, 3.0])),
    ],
)
def test_class_weights_that_cancel_are_warned_of(loss):
    model, (x, y) = mlp(), samples(8)
    with pytest.warns(wf.WoodfisherWarning, match="class weights cancel.*reduction='none'"):
        wf.Objective(model, [(x, y)], loss).rows(8)
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), reduction="none")
    objective = wf.Objective(model, [(x, y)], weighted)
    plain = wf.Objective(model, [(x, y)], cross_entropy).rows(8)
    torch.testing.assert_close(objective.rows(8), plain * (1.0 + y)[:, None])
    torch.testing.assert_close(objective.gradient(8), objective.rows(8).mean(0))


def test_the_fisher_of_a_mean_over_labels_is_its_gauss_newton_matrix():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4), torch.randn(4000, 3)
    p = model(x).detach().sigmoid()
    variances = (p * (1 - p)).sum(1) @ x.square().sum(1) / 4000
    for loss, expected in (
        (nn.BCEWithLogitsLoss(), variances / 4),
        (nn.BCEWithLogitsLoss(reduction="sum"), variances),
    ):
        objective = wf.Objective(model, [(x, torch.zeros(4000, 4))], loss)
        trace = sum(rows.square().sum() for rows in objective.iter_fisher_rows(4000)) / 4000
        torch.testing.assert_close(trace, expected, rtol=1e-4, atol=0)
        drawn = objective.rows(4000, labels="model").square().sum() / 4000
        torch.testing.assert_close(drawn, expected, rtol=0.05, atol=0)


def test_buffers_that_a_model_registers_as_it_runs_leave_with_the_pass():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            if not hasattr(self, "places"):
                self.register_buffer("places", torch.arange(6.0))
            return self.layer(x + self.places)

    model, data = Positions(), [samples(20)]
    wf.prune(model, data, cross_entropy, 0.5, curvature=wf.WoodFisher(20, 6), stages=1)
    assert int((model.layer.weight != 0).sum()) == 9
    assert list(model.state_dict()) == ["layer.weight", "layer.bias"]


def test_arguments_of_a_wrong_kind_are_explained():
    model, data = mlp(), [samples(8)]
    objective = wf.Objective(model, data, cross_entropy)
    for call, message in (
        (lambda: wf.Pruner(model, data, wf.one_shot(0.5)), "second argument is an Objective"),
        (
            lambda: wf.Pruner(model, objective, wf.one_shot(0.5), seed=None),
            "seed must be a whole number of at least 0",
        ),
        (lambda: wf.plan(model, wf.WoodFisher()), "a plan is for an Objective"),
        (lambda: wf.WoodFisher()(model), "a curvature is estimated of an Objective.*; a Sequential came"),
        (lambda: objective.at([1.0], objective.kept), "weights must be a tensor of 36 entries"),
        (lambda: wf.Objective(nn.Linear(2, 2, device="meta"), data), "on the device meta"),
        (
            lambda: wf.prune(model, data, cross_entropy, 0.5, criterion="magnitude", first_order=True),
            "Identity has none",
        ),
        (lambda: wf.WoodFisher().of_rows(torch.full((4, 6), torch.nan)).diag(), "holds NaN or infinity"),
    ):
        with pytest.raises(wf.WoodfisherError, match=message):
            call()


def test_numbers_of_numpy_are_plain_in_reports():
    curvature = wf.WoodFisher(samples=np.int64(20), damping=np.float64(0.1))
    report = wf.prune(mlp(), [samples(20)], cross_entropy, 0.5, curvature=curvature, stages=1)
    assert json.loads(json.dumps(report.to_dict()))["method"]["curvature"]["samples"] == 20


def test_prune_takes_a_sampler():
    curvature = wf.WoodFisher(20, 6, 0.1, labels="model")
    loss = lambda o, t: (o - t).square().mean()
    data = [(samples(20)[0], torch.zeros(20, 3))]
    with pytest.raises(wf.WoodfisherError, match="pass sampler="):
        wf.prune(mlp(), data, loss, 0.5, curvature=curvature, stages=1)
    report = wf.prune(
        mlp(), data, loss, 0.5, curvature=curvature, stages=1, sampler=lambda o: o + torch.randn_like(o)
    )
    assert report.kept == 18


def test_stages_draw_other_targets_each():
    drawn = []

    def sampler(outputs):
        drawn.append(torch.rand(len(outputs)))
        return torch.zeros(len(outputs), dtype=torch.long)

    data = [samples(40)]
    curvature = wf.WoodFisher(10, 6, 0.1, labels="model")
    for _ in range(2):
        model = mlp()  # seeds the global generator
        state = torch.get_rng_state()
        wf.prune(model, data, cross_entropy, 0.5, curvature=curvature, stages=3, sampler=sampler)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.stack(drawn[:3]), torch.stack(drawn[3:]))
    assert len(torch.stack(drawn[:3]).unique(dim=0)) == 3


def test_class_weights_count_where_a_sample_has_labels_of_several_classes():
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 50.0, 0.1]))
    model, x, y = nn.Conv2d(2, 3, 1), torch.randn(6, 2, 4, 4), torch.randint(3, (6, 4, 4))
    rows = wf.Objective(model, [(x, y)], loss).rows(6)  # a warning would be an error
    torch.testing.assert_close(rows, loop_rows(model, loss, x, y, ["weight"]), check_dtype=False)


class Changing(nn.Module):
    """Changes its inputs in place, as fresh batches of a training loop may be."""

    def __init__(self):
        super().__init__()
        self.net = mlp(torch.float64)

    def forward(self, x):
        x -= 0.5
        x *= 2
        return self.net(x)


def test_inputs_and_targets_may_be_changed_in_place():
    def loss(outputs, targets):
        targets += 1
        return cross_entropy(outputs, targets - 1)

    x, y = samples(24, dtype=torch.float64)
    before = x.clone(), y.clone()
    model = Changing()
    objective = wf.Objective(model, [(x, y)], loss)
    expected = loop_rows(model.net, cross_entropy, (x - 0.5) * 2, y, ["0.weight", "2.weight"])
    for _ in range(2):
        torch.testing.assert_close(objective.rows(24), expected)
        torch.testing.assert_close(objective.gradient(24), expected.mean(0))
    wf.prune(model, [(x, y)], loss, 0.5)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


class Centred(nn.Module):
    """A loss that keeps a running centre of outputs, in a new tensor or in place."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("centre", torch.ones(3, dtype=torch.float64))

    def forward(self, outputs, targets):
        if self.training:
            raise AssertionError("a loss is in evaluation mode, as the model is")
        loss = mse_loss(outputs - self.centre, nn.functional.one_hot(targets, 3).double())
        with torch.no_grad():
            moved = 0.9 * self.centre + outputs.mean(0)
            if self.in_place:
                self.centre.copy_(moved)
            else:
                self.centre = moved
        return loss


@pytest.mark.filterwarnings("ignore:torch.func can't vectorise this model or its loss")
@pytest.mark.parametrize("in_place", [False, True])
def test_what_a_loss_keeps_is_as_before_each_row(in_place):
    model, (x, y), loss = mlp(torch.float64), samples(8, dtype=torch.float64), Centred(in_place)

    def alone(outputs, targets):
        return mse_loss(outputs - 1, nn.functional.one_hot(targets, 3).double())

    rows = wf.Objective(model, [(x, y)], loss).rows(8)
    torch.testing.assert_close(rows, loop_rows(model, alone, x, y, ["0.weight", "2.weight"]))
    assert loss.training and torch.equal(loss.centre, torch.ones(3, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_is_refused():
    with pytest.raises(wf.WoodfisherError, match="TorchScript made can't be pruned"):
        wf.Objective(torch.jit.trace(mlp(), torch.randn(2, 6)), [samples(8)], cross_entropy)


def test_a_model_of_which_a_part_has_no_values_is_refused():
    model = mlp()
    model[0].to("meta")
    with pytest.raises(wf.WoodfisherError, match=r"'0.weight' is on the device meta"):
        wf.Objective(model, [samples(8)], cross_entropy, exclude="0")


def test_batches_may_hold_named_tuples():
    class Target(NamedTuple):
        label: torch.Tensor
        weight: torch.Tensor

    x, y = samples(8)

    def loss(outputs, target):
        return (cross_entropy(outputs, target.label, reduction="none") * target.weight).mean()

    objective = wf.Objective(mlp(), [(x, Target(y, 1.0 + y))], loss)
    plain = wf.Objective(mlp(), [(x, y)], cross_entropy).rows(8)
    torch.testing.assert_close(objective.rows(8), plain * (1.0 + y)[:, None])


class WithBuffer(nn.Module):
    def __init__(self, buffer):
        super().__init__()
        self.net, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)
        self.register_buffer("buffer", buffer(self.net.weight))

    def forward(self, x):
        return self.norm(self.net(x))[:, :3] * self.buffer.flatten()[0]


def test_a_buffer_in_the_memory_of_a_weight_is_refused():
    with pytest.raises(wf.WoodfisherError, match="the buffer 'buffer' lies in the memory of 'net.weight'"):
        wf.Objective(WithBuffer(lambda weight: weight.detach()[1:3]), [samples(8)], cross_entropy)


def test_buffers_that_nothing_changed_are_not_written():
    model = WithBuffer(lambda _: torch.ones(1).expand(4))
    wf.prune(model, [samples(20)], cross_entropy, 0.5, criterion="magnitude")
    assert int((model.net.weight != 0).sum()) == 12 and bool((model.norm.running_mean != 0).any())


def test_buffers_that_can_not_be_written_are_found_before_the_first_change():
    model = WithBuffer(lambda _: torch.ones(4))
    model.norm.running_mean = torch.zeros(1).expand(4)
    before = model.net.weight.detach().clone()
    with pytest.raises(wf.WoodfisherError, match=r"entries of the buffer 'norm.running_mean' are one number"):
        wf.prune(model, [samples(20)], cross_entropy, 0.5, criterion="magnitude")
    assert torch.equal(model.net.weight, before)


def test_buffers_may_be_sparse_or_hold_nan():
    model = WithBuffer(lambda _: torch.full((1,), torch.nan).expand(4))
    model.register_buffer("adjacency", torch.eye(3).to_sparse())
    model.forward = lambda x: model.norm(model.net(x))[:, :3] @ model.adjacency
    wf.prune(model, [samples(20)], cross_entropy, 0.5, criterion="magnitude")
    assert int((model.net.weight != 0).sum()) == 12 and torch.equal(model.adjacency.to_dense(), torch.eye(3))
    with pytest.raises(wf.WoodfisherError, match="'adjacency' is sparse or nested"):
        wf.save_weights(model, "model.safetensors")


class Token:
    """What a graph holds for as long as it lives."""


ALIVE = weakref.WeakSet()


class Marked(torch.autograd.Function):
    """The identity, with a token in every graph that it is part of."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.token = Token()
        ALIVE.add(ctx.token)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_no_graph_outlives_its_gradients():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.second(torch.relu(Marked.apply(self.first(x))))

    objective = wf.Objective(Model(), [samples(8)], cross_entropy)
    objective.gradient(8)
    objective.rows(8)
    gc.collect()
    assert not ALIVE


def test_rows_of_weights_in_several_dtypes():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3).double()

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)).double())

    objective = wf.Objective(Model(), [samples(8)], cross_entropy)
    some = torch.arange(0, objective.layout.size, 2)
    torch.testing.assert_close(objective.rows(8, columns=some), objective.rows(8)[:, some])
    report = wf.prune(Model(), [samples(20)], cross_entropy, 0.5, curvature=wf.WoodFisher(20, 6, 1e-2))
    assert report.kept == 18


def test_rows_of_more_samples_than_a_batch_has_come_in_factor_form():
    x, y = samples(40)
    short = wf.Objective(
        mlp(), [(x[:3], y[:3]), *zip(x[3:].split(5), y[3:].split(5), strict=True)], cross_entropy
    )
    assert list(short.factors(8)) == ["0.weight", "2.weight"]
    assert short.row_bytes(8) == wf.Objective(mlp(), [(x, y)], cross_entropy).row_bytes(8)
    kept = wf.WoodFisher(40, None, 1e-2, group=8, keep="factors")(short)
    whole = wf.WoodFisher(40, None, 1e-2, group=8, keep="memory")(short)
    torch.testing.assert_close(kept.dense(), whole.dense())


@pytest.mark.parametrize("name", ["0.bias", "1.running_var"])
def test_what_of_the_model_is_not_finite_is_named(name):
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    model.state_dict()[name][1] = torch.nan
    objective = wf.Objective(model, [samples(8)], cross_entropy, params=["2.weight"])
    with pytest.raises(wf.WoodfisherError, match=f"The model's '{name}' itself holds NaN"):
        objective.rows(8)


def test_columns_of_a_hessian_are_a_slice_of_them():
    objective = wf.Objective(mlp(torch.float64), [samples(8, dtype=torch.float64)], cross_entropy)
    H = objective.hessian_columns(8, slice(None))
    assert H.shape == (36, 36)
    for columns in (slice(0, 10, 3), slice(-3, None), slice(30, 50)):
        torch.testing.assert_close(objective.hessian_columns(8, columns), H[:, columns])


@pytest.mark.parametrize("out", [torch.empty(4, 36, dtype=torch.int64), torch.empty(3, 36), [1]])
def test_rows_are_written_to_what_can_hold_them(out):
    with pytest.raises(
        wf.WoodfisherError, match="out must have room for 4 rows of 36 weights, in torch.float32"
    ):
        wf.Objective(mlp(), [samples(4)], cross_entropy).rows(4, out=out)
