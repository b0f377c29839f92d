"""Channels that go together, and the smaller network without the silent ones."""

import copy
import io
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import woodfisher as wf
from models import ConvNet, Tied, mlp, samples
from woodfisher.gradients.layout import Layout
from woodfisher.surgeon.selection import Selection
from woodfisher.tasks.cifar import ResNet20

CURVATURE = wf.WoodFisher(samples=20, block_size=None, damping=1e-2)


class Concatenated(nn.Module):
    """Two convolutions side by side, normalised together, as in dense networks."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 6, 3)
        self.norm, self.fc = nn.BatchNorm2d(10), nn.Linear(10, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(torch.cat([self.left(x), self.right(x)], 1))).mean((2, 3)))


class Gated(nn.Module):
    """Halves of one layer multiply each other, so that its channels don't go one by one."""

    def __init__(self):
        super().__init__()
        self.first, self.both, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(4, 3)

    def forward(self, x):
        left, right = self.both(torch.relu(self.first(x))).chunk(2, 1)
        return self.last(left * torch.tanh(right))


class Mobile(nn.Module):
    """An expansion, a depthwise convolution and a projection, with biases."""

    def __init__(self):
        super().__init__()
        self.wide, self.deep = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.norm, self.narrow, self.fc = nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 2), nn.Linear(100, 3)

    def forward(self, x):
        inner = torch.relu(self.norm(self.deep(torch.relu(self.wide(x)))))
        return self.fc(torch.relu(self.narrow(inner)).flatten(1))


class Attention(nn.Module):
    """Heads of two channels each, of which as many are made as there are channels for; the outputs are a tuple."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = (f(x).unflatten(2, (-1, 2)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = torch.softmax(q @ k.mT, -1) @ v
        return self.fc(mixed.transpose(1, 2).flatten(2).mean(1)), "cache"


class Encoder(nn.Module):
    """A transformer's layer over four positions."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.layer(x).mean(1))


class Rotary(nn.Module):
    """Attention whose queries and keys are turned by their places, and two layers after it."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)
        self.wide, self.fc = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        places = torch.arange(x.shape[1])[:, None] / torch.arange(1, 9)
        q, k = (f(x) for f in (self.query, self.key))
        q, k = (
            each * places.cos() + torch.cat([-each[..., 4:], each[..., :4]], -1) * places.sin()
            for each in (q, k)
        )
        return self.fc(torch.relu(self.wide(torch.softmax(q @ k.mT, -1) @ x))).mean(1)


def trained(make):
    """A model whose norms and biases are as after training: neither at zero nor alike."""
    torch.manual_seed(0)
    model = make().eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.ndim == 1:
            tensor.data = torch.rand_like(tensor) + (0.5 if "var" in name or "weight" in name else -0.5)
    return model


def silenced(model, pattern, channels):
    """The model with these groups of the pattern, counted in its own order, at zero."""
    objective = wf.Objective(model, None, params=pattern.params)
    flat = objective.weights.clone()
    for entry, members in zip(pattern.coupled, channels, strict=True):
        (groups,) = wf.Channels((entry,)).groups(objective.layout)[:1]
        flat[groups[members].flatten()] = 0
    objective.at(flat, flat != 0).write()
    return model


def outputs(model, inputs):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(inputs)


def sizes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim > 1}


def batches(shape, classes=3):
    inputs, targets = samples(40, shape, classes)
    return [(inputs[i : i + 10], targets[i : i + 10]) for i in range(0, 40, 10)]


MODELS = [
    # model, inputs, what is coupled, channels at zero, sizes that are left
    pytest.param(
        mlp, (6,), (("0.weight", "0.bias"),), [[0, 2]], {"0.weight": (2, 6), "2.weight": (3, 2)}, id="mlp"
    ),
    pytest.param(
        Concatenated,
        (2, 6, 6),
        (
            ("left.weight", "left.bias", "norm.weight[0:4]", "norm.bias[0:4]"),
            ("right.weight", "right.bias", "norm.weight[4:10]", "norm.bias[4:10]"),
        ),
        [[3], [0, 5]],
        {"left.weight": (3, 2, 3, 3), "right.weight": (4, 2, 3, 3), "fc.weight": (3, 7)},
        id="concatenated",
    ),
    pytest.param(
        Mobile,
        (2, 6, 6),
        (
            ("wide.weight", "wide.bias", "deep.weight", "norm.weight", "norm.bias"),
            ("narrow.weight", "narrow.bias"),
        ),
        [[1, 2, 6], [0]],
        {
            "wide.weight": (5, 2, 1, 1),
            "deep.weight": (5, 1, 3, 3),
            "narrow.weight": (5, 3, 2, 2),
            "fc.weight": (3, 75),
        },
        id="mobile",
    ),
    pytest.param(
        Gated,
        (6,),
        (("first.weight", "first.bias"),),
        [[0, 7]],
        {"first.weight": (6, 6), "both.weight": (8, 6), "last.weight": (3, 4)},
        id="gated",
    ),
    pytest.param(
        Rotary,
        (4, 8),
        (("wide.weight", "wide.bias"),),
        [[1, 4]],
        {"query.weight": (8, 8), "key.weight": (8, 8), "wide.weight": (4, 8), "fc.weight": (3, 4)},
        id="rotary",
    ),
    pytest.param(
        Encoder,
        (4, 8),
        (("layer.linear1.weight", "layer.linear1.bias"),),
        [list(range(10))],
        {
            "layer.self_attn.in_proj_weight": (24, 8),
            "layer.self_attn.out_proj.weight": (8, 8),
            "layer.linear1.weight": (2, 8),
            "layer.linear2.weight": (8, 2),
            "fc.weight": (3, 8),
        },
        id="encoder",
    ),
]


@pytest.mark.parametrize(("make", "shape", "coupled", "silent", "left"), MODELS)
def test_silent_channels_are_cut_out(make, shape, coupled, silent, left):
    model, (inputs, _) = trained(make), samples(5, shape)
    pattern = wf.Channels.of(model, inputs)
    assert pattern == wf.Channels(coupled)
    silenced(model, pattern, silent)
    before = outputs(model, inputs)
    small = wf.shrink(model, inputs)
    assert sizes(small) == left
    torch.testing.assert_close(outputs(small, inputs), before, rtol=1e-5, atol=1e-6)


GROUPS = [
    # coupled, shapes, groups as flat indexes
    ((("w", "b"),), {"w": (2, 2), "b": (2,)}, [[0, 1, 4], [2, 3, 5]]),
    ((("w", "b[1:3]"),), {"w": (2, 1), "b": (3,)}, [[0, 3], [1, 4], [2]]),
    ((("w",),), {"w": (2, 1), "v": (1, 3)}, [[0], [1], [2, 3, 4]]),
    ((), {"w": (2, 1), "b": (2,)}, [[0], [1], [2], [3]]),
]


@pytest.mark.parametrize(("coupled", "shapes", "expected"), GROUPS)
def test_the_ith_channels_are_one_group(coupled, shapes, expected):
    groups = [group for same in wf.Channels(coupled).groups(Layout(shapes)) for group in same.tolist()]
    assert sorted(groups) == expected


WRONG = [
    (
        (("w", "b"),),
        {"w": (2, 2)},
        "couples 'b', which is not among the chosen parameters: .* params=pattern.params",
    ),
    ((("w", "b"),), {"w": (2, 2), "b": (3,)}, "the same number of channels, and these have not: w 2, b 3"),
    ((("w", "b"), ("b",)), {"w": (2, 2), "b": (2,)}, "names channels of 'b' twice"),
]


@pytest.mark.parametrize(("coupled", "shapes", "message"), WRONG)
def test_wrong_couplings_are_refused(coupled, shapes, message):
    with pytest.raises(wf.WoodfisherError, match=message):
        wf.Channels(coupled).groups(Layout(shapes))


def test_no_layer_can_rank_what_spans_layers():
    with pytest.raises(wf.WoodfisherError, match="coupled-channels has groups that span several tensors"):
        Selection(Layout({"w": (2, 2), "b": (2,)}), wf.Channels((("w", "b"),)), "layer")


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        pytest.param(ConvNet, (2, 6, 6), id="grouped"),
        pytest.param(Tied, (5,), id="tied"),
        pytest.param(Attention, (4, 8), id="heads"),
        pytest.param(lambda: nn.Linear(6, 3), (6,), id="outputs alone"),
        pytest.param(
            lambda: nn.Sequential(nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 3)), (6,), id="not silent at zero"
        ),
        pytest.param(
            lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)), (6,), id="norm over channels"
        ),
        pytest.param(
            lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 4), nn.Flatten()),
            (2, 6, 6), id="norm over groups",
        ),
    ],
)  # fmt: skip
def test_channels_that_cannot_be_cut_are_left_out(make, shape):
    model, (inputs, _) = trained(make), samples(5, shape)
    with pytest.raises(wf.WoodfisherError, match="no channel of the model can be cut out"):
        wf.Channels.of(model, inputs)


def expected_cost(masks):
    """Parameters and FLOPs of a ResNet-20 with the output channels that the masks leave."""

    def kept(layer):
        return int(masks[f"{layer}.weight"].flatten(1).any(1).sum())

    channels = kept("conv1")
    parameters, flops = 27 * channels + 2 * channels, 2 * 27 * channels * 16**2
    for stage, width in ((1, 16), (2, 8), (3, 4)):
        for block in range(3):
            inner, out = (kept(f"layer{stage}.{block}.conv{number}") for number in (1, 2))
            weights, norms = 9 * inner * (channels + out), 2 * (inner + out)
            if stage > 1 and block == 0:
                weights, norms = weights + channels * out, norms + 2 * out
            parameters, flops = parameters + weights + norms, flops + 2 * weights * width**2
            channels = out
    return wf.Cost(parameters + 10 * channels + 10, flops + 2 * 10 * channels)


def test_attention_and_recurrent_layers_cost_what_their_products_do():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    products = 5 * (4 * 8 * 8 + 2 * 8 * 12) + 2 * 5 * 5 * 8
    assert wf.cost_of(layer, torch.randn(1, 5, 8)).flops == 2 * products
    recurrent = nn.LSTM(6, 4, batch_first=True)
    assert wf.cost_of(recurrent, torch.randn(1, 5, 6)).flops == 2 * 5 * 16 * (6 + 4)
    assert torch.backends.mkldnn.enabled == torch.backends.mkldnn.is_available()
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_residual_network_pruned_to_half_of_its_flops():
    model, data = trained(ResNet20), batches((3, 16, 16), 10)
    inputs = data[0][0][:2]
    dense = wf.cost_of(model, inputs[:1])
    pattern = wf.Channels.of(model, inputs)
    report = wf.prune(model, data, cross_entropy, 0.5, pattern=pattern, params=pattern.params, scope="flops",
                      criterion="magnitude", floor=0.1, recalibrate=20)  # fmt: skip
    assert 0.5 <= report.flops_removed < 0.52
    before = outputs(model, inputs)
    small = wf.shrink(model, inputs)
    torch.testing.assert_close(outputs(small, inputs), before, rtol=1e-5, atol=1e-5)
    now = wf.cost_of(small, inputs[:1])
    assert now == expected_cost(report.masks)
    assert now.flops < 0.5 * dense.flops and now.parameters < dense.parameters == 272474

    torch.testing.assert_close(outputs(pickle.loads(pickle.dumps(small)), inputs), outputs(small, inputs))
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    again = copy.deepcopy(small)
    nn.init.zeros_(again.fc.weight)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again.fc.weight, small.fc.weight)


def test_a_network_pruned_while_it_is_trained():
    model, data = trained(Mobile), batches((2, 6, 6))
    inputs = data[0][0]
    pattern = wf.Channels.of(model, inputs)
    objective = wf.Objective(model, data, cross_entropy, params=pattern.params)
    pruner = wf.Pruner(model, objective, wf.Polynomial(0.2, 0.5, begin=0, end=4, every=2), pattern=pattern,
                       curvature=CURVATURE, floor=0.2)  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.train()
    for step in range(6):
        optimizer.zero_grad()
        cross_entropy(model(data[step % 4][0]), data[step % 4][1]).backward()
        optimizer.step()
        pruner.step()
    masks = pruner.masks
    kept = [int(masks["wide.weight"].any((1, 2, 3)).sum()), int(masks["narrow.weight"].any((0, 2, 3)).sum())]
    assert sum(kept) < 12
    before = outputs(model, inputs)
    small = wf.shrink(model, inputs)
    assert [small.wide.out_channels, small.narrow.out_channels] == kept
    torch.testing.assert_close(outputs(small, inputs), before, rtol=1e-5, atol=1e-6)


def test_the_model_stays_and_its_copy_is_as_it_was():
    model = trained(Mobile)
    inputs, targets = samples(5, (2, 6, 6))
    pattern = wf.Channels.of(model, inputs)
    silenced(model, pattern, [[0], [1]])
    model.train()
    model.norm.eval()
    model.fc.bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    small = wf.shrink(model, inputs)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    for one in (model, small):
        assert [m.training for m in one.modules()] == [True, True, True, False, True, True]
        assert [name for name, p in one.named_parameters() if not p.requires_grad] == ["fc.bias"]
    cross_entropy(small(inputs), targets).backward()
    assert small.wide.weight.grad.any() and model.wide.weight.grad is None


def test_a_channel_stays_while_any_of_its_parameters_does():
    model, (inputs, _) = trained(mlp), samples()
    with torch.no_grad():
        model[0].weight[1:] = 0
        model[0].bias[2] = 0
    assert wf.shrink(model, inputs)[0].out_features == 3


def test_one_channel_stays_of_a_layer_that_has_no_other():
    model, (inputs, _) = trained(mlp), samples()
    silenced(model, wf.Channels.of(model, inputs), [[0, 1, 2, 3]])
    small = wf.shrink(model, inputs)
    assert small[0].out_features == 1
    torch.testing.assert_close(outputs(small, inputs), outputs(model, inputs))


def test_it_is_said_when_nothing_is_cut():
    model, (inputs, _) = trained(mlp), samples()
    with pytest.warns(wf.WoodfisherWarning, match="no channels to cut out"):
        same = wf.shrink(model, inputs)
    assert sizes(same) == sizes(model) and same is not model


def test_channels_that_are_zero_and_heard_stay():
    model = nn.Sequential(nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    inputs, _ = samples()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[0] = layer.bias[0] = 0
    with pytest.warns(wf.WoodfisherWarning, match="1 channels of '0' are zero and can't be cut out"):
        small = wf.shrink(model, inputs)
    assert sizes(small) == {"0.weight": (4, 6), "2.weight": (3, 4), "4.weight": (3, 3)}


def test_what_the_network_cannot_be_traced_for_is_said(monkeypatch):
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            return self.fc(x).detach()

    inputs, _ = samples()
    with pytest.raises(wf.WoodfisherError, match="no output of the model depends on its parameters"):
        wf.Channels.of(Detached(), inputs)
    with pytest.raises(wf.WoodfisherError, match="fails on a batch"):
        wf.Channels.of(mlp(), inputs[:, :5])
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(wf.WoodfisherError, match=r"pip install 'woodfisher\[channels\]'"):
        wf.Channels.of(mlp(), inputs)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4)])
def test_norms_have_gradient_rows(norm):
    model = trained(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Flatten(), nn.Linear(64, 3)))
    inputs, targets = samples(4, (2, 6, 6))
    rows = wf.Objective(model, [(inputs, targets)], cross_entropy, params="1").rows(4)
    for row, x, y in zip(rows, inputs, targets, strict=True):
        loss = cross_entropy(model(x[None]), y[None])
        expected = torch.autograd.grad(loss, [norm.weight, norm.bias])
        torch.testing.assert_close(row, torch.cat([g.flatten() for g in expected]))


def test_vectors_take_no_flops_and_stay_where_flops_are_ranked():
    model = trained(mlp)
    data = batches((6,))
    flops = wf.Objective(model, data, cross_entropy, params="*").flops()
    assert flops.tolist() == [2] * 24 + [0] * 4 + [2] * 12 + [0] * 3
    report = wf.prune(model, data, cross_entropy, 0.5, params="*", scope="flops", criterion="magnitude")
    assert report.kept == 18 + 7 and report.masks["0.bias"].all() and report.masks["2.bias"].all()


def test_channels_that_are_silent_on_the_example_are_not_taken_for_such_that_can_be_cut():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 3))
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0] = 0, -1
    with pytest.raises(wf.WoodfisherError):
        wf.Channels.of(model, torch.randn(2, 8))
    plain = nn.Sequential(model[0], nn.ReLU(), nn.Linear(16, 3))
    assert wf.Channels.of(plain, torch.randn(2, 8)).coupled == (("0.weight", "0.bias"),)


class Recurrent(nn.Module):
    """Channels before, into and after a layer that torch-pruning doesn't know."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 6, 3, padding=1)
        self.recurrent = nn.GRU(6, 10, batch_first=True)
        self.third, self.last = nn.Linear(10, 7), nn.Linear(7, 4)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x)))).transpose(1, 2)
        return self.last(torch.relu(self.third(self.recurrent(x)[0][:, -1])))


def test_channels_that_can_not_be_followed_stay():
    pytest.importorskip("torch_pruning")
    model, example = Recurrent(), torch.randn(2, 3, 12)
    pattern = wf.Channels.of(model, example)
    assert pattern.coupled == (("first.weight", "first.bias"), ("third.weight", "third.bias"))
    wf.prune(model, None, None, 0.5, criterion="magnitude", pattern=pattern, params=pattern.params)
    small = wf.shrink(model, example)
    assert small.first.out_channels + small.third.out_features < 15 and small.second.out_channels == 6
    torch.testing.assert_close(small.eval()(example), model.eval()(example))


def test_a_model_with_no_channels_that_can_be_cut_ends_in_one_error():
    pytest.importorskip("torch_pruning")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.recurrent, self.last = nn.Linear(6, 12), nn.GRU(12, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.last(self.recurrent(torch.relu(self.first(x)))[0])

    with pytest.raises(wf.WoodfisherError, match=r"goes into a layer .* \(as a GRU\)"):
        wf.Channels.of(Net(), torch.randn(4, 5, 6))
