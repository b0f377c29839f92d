import warnings
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, relu_
from torch.utils._pytree import register_pytree_node

import woodfisher as wf
from models import ConvNet, DictModel, Output, Tied, Unpadded, mlp, samples
from reference import loop_rows
from woodfisher.gradients.layer_rows import LayerRows

TIGHT = {"rtol": 1e-12, "atol": 1e-14}


class Through(nn.Module):
    """One layer of any kind between two nonlinearities, and the mean over its places."""

    def __init__(self, layer, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer.to(dtype)
        for p in self.layer.parameters():
            nn.init.normal_(p)

    def forward(self, x):
        y = torch.sin(self.layer(x))
        return y.movedim(1, -1).flatten(1)[:, :3] if y.ndim > 2 else y


class Conv1D(nn.Module):
    """The transposed Linear of GPT-2, as Hugging Face defines it."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return (x.flatten(0, -2) @ self.weight + self.bias).unflatten(0, x.shape[:-1])


LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "sequence": (lambda: nn.Linear(5, 3), (4, 5)),
    "two-places": (lambda: nn.Linear(5, 3, bias=False), (2, 3, 5)),
    "gpt2": (lambda: Conv1D(3, 5), (4, 5)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, padding=1), (2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3), (2, 5, 6)),
    "few-places": (lambda: nn.Conv2d(2, 40, 3), (2, 5, 6)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (4, 2, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 3, 4, 3)),
    "strided": (lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 3), padding=(1, 0)), (2, 6, 8)),
    "dilated": (lambda: nn.Conv2d(2, 4, 3, padding=2, dilation=(2, 1)), (2, 6, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 5, 5)),
    "few-places-grouped": (lambda: nn.Conv2d(4, 40, 3, groups=2), (4, 4, 4)),
    "depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3), (3, 5, 5)),
    "same": (lambda: nn.Conv2d(2, 4, (2, 3), padding="same"), (2, 5, 5)),
    "valid": (lambda: nn.Conv2d(2, 4, 3, padding="valid"), (2, 5, 5)),
    "reflect": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), (2, 5, 5)),
    "circular": (lambda: nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular"), (2, 6)),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (4, 3, 4),
    ),
    "transposed-wide": (lambda: nn.ConvTranspose1d(40, 3, 2, dilation=3, output_padding=2), (40, 4)),
}


def case(kind, group=1, rows=5):
    build, shape = LAYERS[kind]
    model, (x, y) = Through(build()), samples(rows * group, shape, dtype=torch.float64)
    objective = wf.Objective(model, [(x, y)], cross_entropy, params="layer")
    expected = loop_rows(model, cross_entropy, x, y, list(objective.layout.shapes), group)
    return objective, expected


def taken_together(objective, group=1):
    """All names have factors, so that rows don't come from torch.func."""
    return objective.factors(group).keys() == objective.layout.shapes.keys()


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("kind", LAYERS)
def test_rows_of_every_layer_equal_a_plain_loop(kind, group):
    objective, expected = case(kind, group)
    torch.testing.assert_close(objective.rows(5 * group, group=group), expected, **TIGHT)
    assert taken_together(objective, group)


@pytest.mark.parametrize(
    "kind",
    [kind for kind, (build, _) in LAYERS.items() if hasattr(build(), "stride") and build().weight.ndim == 4],
)
def test_images_may_lie_channels_last(kind):
    objective, expected = case(kind, group=3)
    (rows,) = (part["layer.weight"] for part in objective.iter_layer_rows(15, group=3))
    inputs, outputs = (
        t.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (5, 3))
        for t in (rows.inputs, rows.outputs)
    )
    lying = replace(rows, inputs=inputs, outputs=outputs)
    torch.testing.assert_close(lying.dense(), expected[:, objective.layout.slices["layer.weight"]], **TIGHT)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_factor_form_gives_what_dense_rows_do(kind, group, monkeypatch):
    objective, expected = case(kind, group)
    name = "layer.weight"
    expected = expected[:, objective.layout.slices[name]]
    parts = list(objective.within(1).iter_layer_rows(5 * group, group=group))
    assert [list(part) for part in parts] == [list(objective.layout.shapes)] * 5
    rows = LayerRows.joined([part[name] for part in parts])
    assert (rows.count, rows.size, rows.channels) == (*expected.shape, objective.layout.shapes[name][0])
    assert rows.inputs.numel() + rows.outputs.numel() == 5 * objective.factors(group)[name].floats
    torch.testing.assert_close(rows.dense(), expected, **TIGHT)
    assert (expected.norm(dim=1) <= rows.most_norms() * (1 + 1e-12)).all()
    some = slice(1, rows.channels - 1)
    columns = slice(some.start * rows.width, some.stop * rows.width)
    torch.testing.assert_close(rows.dense(some), expected[:, columns], **TIGHT)
    buffer = torch.zeros(5, rows.size + 2, dtype=torch.float64)
    rows.dense(out=buffer[:, 1:-1])
    torch.testing.assert_close(buffer, nn.functional.pad(expected, (1, 1)), **TIGHT)
    S, A = rows.terms()
    assert S.shape == (5, rows.groups, rows.channels // rows.groups, rows.positions)
    torch.testing.assert_close((S @ A.mT).flatten(1), expected, **TIGHT)
    for workspace in (1, 30_000, 10**9):
        monkeypatch.setattr("woodfisher.gradients.layer_rows._WORKSPACE", workspace)
        torch.testing.assert_close(rows.gram(), expected @ expected.T, **TIGHT)
        torch.testing.assert_close(rows.squares(), expected.square().sum(0), **TIGHT)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_rows_of_convolutions_of_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    groups, size = draw(1, 2), [draw(5, 8), draw(5, 8)]
    kernel, stride, dilation = ([draw(1, 3), draw(1, 3)] for _ in range(3))
    layer = nn.Conv2d(
        groups * draw(1, 2),
        groups * draw(1, 4),
        kernel,
        stride,
        [draw(0, k // 2) for k in kernel],
        [min(d, (n - 1) // k) for d, n, k in zip(dilation, size, kernel, strict=True)],
        groups,
    )
    group = draw(1, 2)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
    x, y = samples(3 * group, (layer.in_channels, *size), dtype=torch.float64)
    model(x)
    objective = wf.Objective(model, [(x, y)], cross_entropy)
    expected = loop_rows(model, cross_entropy, x, y, list(objective.layout.shapes), group)
    torch.testing.assert_close(objective.rows(3 * group, group=group), expected, rtol=1e-11, atol=1e-13)
    assert taken_together(objective, group)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_no_row_is_larger_than_what_flows_tells(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    made = data.draw(
        st.sampled_from([nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear])
    )
    places = [draw(6, 8), draw(6, 8)]
    if made is nn.Linear:
        layer, shape = made(5, 3), (*places, 5)
    else:
        modes = ["zeros"] if "Transpose" in made.__name__ else ["zeros", "reflect", "replicate", "circular"]
        mode, groups = data.draw(st.sampled_from(modes)), draw(1, 2)
        layer = made(
            2 * groups, 3 * groups, draw(1, 4), draw(1, 3), draw(0, 2), groups=groups, padding_mode=mode
        )
        shape = (2 * groups, *places[: layer.weight.ndim - 2])
    layer = layer.double()
    fill = data.draw(st.sampled_from([torch.ones_like, torch.randn_like]))
    x = fill(torch.empty(6, *shape, dtype=torch.float64))
    s = fill(layer(x).detach())
    for weight in layer.parameters():
        rows = LayerRows.of(layer, weight, x.unflatten(0, (3, 2)), s.unflatten(0, (3, 2)))
        assert (rows.dense().norm(dim=1) <= rows.most_norms() * (1 + 1e-12)).all()


def test_an_input_counts_in_each_patch_that_it_is_in():
    images, layer = torch.ones(1, 1, 1, 8, 8), nn.Conv2d(1, 1, 3, padding=1)
    rows = LayerRows.of(layer, layer.weight, images, images)
    assert (rows.dense().norm().item(), rows.most_norms().item()) == (162, 192)
    layer = nn.Conv1d(1, 1, 1, padding=2, padding_mode="replicate")
    first, s = torch.tensor([[[[1.0, 0, 0, 0]]]]), torch.tensor([[[[1.0, 1, 1, 0, 0, 0, 0, 0]]]])
    rows = LayerRows.of(layer, layer.weight, first, s)
    assert rows.dense().item() == 3
    torch.testing.assert_close(rows.most_norms(), torch.tensor([3.0]))


def test_sequences_of_other_lengths_are_joined():
    model = Through(nn.Linear(5, 3))
    batches = [samples(2, (t, 5), seed=t, dtype=torch.float64) for t in (2, 4)]
    objective = wf.Objective(model, batches, cross_entropy, params="layer.weight")
    parts = [part["layer.weight"] for part in objective.iter_layer_rows(4)]
    torch.testing.assert_close(LayerRows.joined(parts).dense(), objective.rows(4), **TIGHT)


def test_half_precision_factors_make_float32_rows_beyond_the_range_of_half():
    model = nn.Linear(6, 3, bias=False).half()
    x, y = torch.full((4, 6), 300.0).half(), torch.zeros(4, 3).half()
    rows = wf.Objective(model, [(x, y)], lambda o, t: (o * 300).mean()).rows(4)
    torch.testing.assert_close(rows, torch.full((4, 18), 3e4))


class Windows(nn.Module):
    """Makes several inputs of a layer out of each sample, as windowed attention does."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return torch.tanh(self.fc(x.reshape(-1, 3))).reshape(len(x), -1, 3).mean(1)


class InPlace(nn.Module):
    """Changes what a layer returned in place, and has a hook that returns something else."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)
        self.second.register_forward_hook(lambda module, inputs, output: 3 * output)

    def forward(self, x):
        return self.second(input=relu_(self.first(x)))


@pytest.mark.parametrize("build", [Windows, InPlace])
def test_rows_whatever_is_done_around_layers(build):
    model, (x, y) = build().double(), samples(6, dtype=torch.float64)
    hooks = {m: dict(m._forward_hooks) for m in model.modules()}
    objective = wf.Objective(model, [(x, y)], cross_entropy)
    expected = loop_rows(model, cross_entropy, x, y, list(objective.layout.shapes), 2)
    torch.testing.assert_close(objective.rows(6, group=2), expected, **TIGHT)
    assert taken_together(objective, 2)
    assert {m: dict(m._forward_hooks) for m in model.modules()} == hooks


def test_an_unused_layer_has_zero_rows():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.idle = mlp(), nn.Linear(6, 2)

        def forward(self, x):
            self.idle(x)
            return self.net(x)

    model, (x, y) = Unused(), samples(4)
    objective = wf.Objective(model, [(x, y)], cross_entropy)
    rows = objective.rows(4)
    where = objective.layout.slices["idle.weight"]
    assert not rows[:, where].any() and rows.any()
    assert taken_together(objective)


class Mixing(nn.Module):
    """Subtracts the mean of the batch."""

    def __init__(self):
        super().__init__()
        self.net = mlp(torch.float64)

    def forward(self, x):
        return self.net(x - x.mean(0))


class Elsewhere(nn.Module):
    """Uses a weight outside of its layer too."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(x) * self.fc.weight.square().mean()


@pytest.mark.parametrize("build", [Mixing, Elsewhere])
def test_layers_that_do_not_give_the_rows_are_noticed(build):
    model, (x, y) = build().double(), samples(12, dtype=torch.float64)
    objective = wf.Objective(model, [(x, y)], cross_entropy)
    expected = loop_rows(model, cross_entropy, x, y, list(objective.layout.shapes), 3)
    with pytest.warns(wf.WoodfisherWarning, match="taken together are not those of each alone") as caught:
        rows = objective.rows(12, group=3)
    assert len(caught) == 1
    torch.testing.assert_close(rows, expected, **TIGHT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective.rows(12, group=3)


def test_mixing_is_noticed_behind_a_first_chunk_of_one_row():
    model, (x, y) = Mixing(), samples(5, dtype=torch.float64)
    objective = wf.Objective(model, [(x, y)], cross_entropy)
    objective.rows(1)
    with pytest.warns(wf.WoodfisherWarning, match="mixes"):
        rows = objective.rows(5)
    assert not rows[:, objective.layout.slices["net.0.weight"]].any()


@pytest.mark.parametrize(
    "model", [Tied(), nn.Sequential(*[layer := nn.Linear(5, 5), nn.Tanh(), layer, nn.Linear(5, 3)])]
)
def test_weights_that_are_used_twice_are_taken_another_way(model):
    x, y = samples(6, (5,))
    objective = wf.Objective(model, [(x, y)], cross_entropy)
    names, parameters = list(objective.layout.shapes), list(model.parameters())
    torch.testing.assert_close(objective.rows(6), loop_rows(model, cross_entropy, x, y, names))
    assert list(objective.factors()) == names[1:]
    assert all(now is p for now, p in zip(model.parameters(), parameters, strict=True))


def test_weights_that_others_are_tied_to_need_not_be_chosen():
    model, (x, y) = Tied(), samples(6, (5,))
    objective = wf.Objective(model, [(x, y)], cross_entropy, params="head")
    torch.testing.assert_close(objective.rows(6), loop_rows(model, cross_entropy, x, y, ["head.weight"]))
    assert taken_together(objective)


def test_images_of_other_sizes_are_not_joined_in_factor_form():
    model = Through(nn.Conv2d(2, 4, 3))
    batches = [samples(2, (2, n, n), dtype=torch.float64) for n in (4, 5)]
    parts = list(wf.Objective(model, batches, cross_entropy, params="layer.weight").iter_layer_rows(4))
    with pytest.raises(wf.WoodfisherError, match="several sizes"):
        LayerRows.joined([part["layer.weight"] for part in parts])


def test_looking_for_factors_leaves_no_trace():
    def data():
        torch.rand(1)
        yield from [samples(6)]

    class Drawn(list):
        def __iter__(self):
            return data()

    objective = wf.Objective(mlp(), Drawn(), cross_entropy)
    before = torch.get_rng_state()
    assert taken_together(objective)
    assert list(objective.iter_layer_rows(6))
    assert torch.equal(torch.get_rng_state(), before)


def test_factor_form_of_a_layer_that_is_called_twice_is_refused():
    layer = nn.Linear(5, 5)
    objective = wf.Objective(nn.Sequential(layer, nn.Tanh(), layer), [samples(6, (5,))], cross_entropy)
    with pytest.raises(wf.WoodfisherError, match="called more than once"):
        next(objective.iter_layer_rows(6))


class Steep(nn.Module):
    """Whose gradients the last bits of its inputs decide, as of a deep network of rectifiers near their kinks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(300, 4, bias=False)

    def forward(self, x):
        return torch.sin(1e6 * self.layer(x)) * 1e-6


def test_rows_that_rounding_alone_tells_apart_have_factor_form():
    (x, y), model = samples(64, (300,)), Steep()
    objective = wf.Objective(model, [(x, y)], cross_entropy)
    assert objective.rows(64).any()  # a warning would be an error
    assert objective.factors()


@pytest.mark.parametrize("lengths", [[3, 3, 2, 4], [3, 3, 2, 3], [1, 1, 0, 2], [3, 3, 3, 3]])
def test_layers_that_see_more_of_some_samples_than_of_others(lengths):
    there = torch.arange(4)[None] < torch.tensor(lengths)[:, None]
    (x, y), model = samples(4, (4, 5)), Unpadded()
    objective = wf.Objective(model, [((x, there), y)], cross_entropy)
    expected = torch.zeros(4, objective.layout.size)
    for i in range(4):
        model.zero_grad()
        cross_entropy(model(x[i : i + 1], there[i : i + 1]), y[i : i + 1]).backward()
        for name, part in objective.layout.split(expected[i]).items():
            if (gradient := model.get_parameter(name).grad) is not None:
                part.copy_(gradient)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(objective.rows(4), expected)
        again = wf.Objective(model, [((x, there), y)], cross_entropy)
        diagonal = wf.DiagonalFisher(4, 1e-3)(again).diag()
    torch.testing.assert_close(1 / diagonal - 1e-3, expected.double().square().mean(0))
    uneven = len(set(lengths)) > 1
    assert any("'layer.weight' does not see as much" in str(each.message) for each in caught) == uneven
    assert bool(objective.factors()) != uneven
    if uneven:
        with pytest.raises(wf.WoodfisherError, match='keep="memory"'):
            list(wf.Objective(model, [((x, there), y)], cross_entropy).iter_layer_rows(4))


class Aside(nn.Module):
    """Multiplies with the weight of a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 8)

    def forward(self, x):
        return x @ self.fc.weight.mT


def test_layers_without_factors_are_named():
    for model, params, message in (
        (ConvNet(), "norm", "'norm.weight' belongs to a BatchNorm2d"),
        (Aside(), "fc.weight", "not called as a module"),
    ):
        x, y = samples(4, (2, 6, 6) if params == "norm" else (3, 6))
        objective = wf.Objective(model, [(x, y)], lambda o, t: o.square().mean(), params=params)
        with pytest.raises(wf.WoodfisherError, match=message):
            next(objective.iter_layer_rows(4))


def test_removed_weights_have_no_gradient_in_rows_from_signals():
    model, (x, y) = ConvNet(), samples(6, (2, 6, 6))
    objective = wf.Objective(model, [(x, y)], cross_entropy)
    kept = torch.rand(objective.layout.size, generator=torch.Generator().manual_seed(0)) > 0.5
    pruned = objective.at(objective.weights, kept)
    pruned.write()
    expected = loop_rows(model.eval(), cross_entropy, x, y, list(objective.layout.shapes)) * kept
    torch.testing.assert_close(pruned.rows(6), expected)
    columns = kept.nonzero().squeeze(1)
    torch.testing.assert_close(pruned.rows(6, columns=columns), expected[:, columns])


def test_only_the_layers_of_the_wanted_columns_take_part(monkeypatch):
    model, (x, y) = mlp(), samples(6)
    objective = wf.Objective(model, [(x, y)], cross_entropy)
    whole, made = [objective.rows(6) for _ in range(2)][-1], []
    original = LayerRows.dense
    monkeypatch.setattr(
        LayerRows, "dense", lambda self, *a, **k: (made.append(self.size), original(self, *a, **k))[1]
    )
    columns = torch.arange(24, 36)
    torch.testing.assert_close(objective.rows(6, columns=columns), whole[:, columns])
    assert made == [12]


def test_rows_are_written_to_memory_that_is_given():
    objective = wf.Objective(mlp(), [samples(6)], cross_entropy)
    out = torch.full((7, 36), 5.0)
    rows = objective.rows(6, out=out)
    assert rows.data_ptr() == out.data_ptr()
    torch.testing.assert_close(rows, objective.rows(6))
    assert (out[6] == 5).all()
    for shape in ((5, 36), (6, 35), (6,)):
        with pytest.raises(wf.WoodfisherError, match="room for 6 rows of 36 weights"):
            objective.rows(6, out=torch.empty(shape))


LOSSES = {
    "cross-entropy": cross_entropy,
    "module": nn.CrossEntropyLoss(),
    "weighted": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)),
    "smoothed": lambda o, t: cross_entropy(o, t, label_smoothing=0.1),
    "one by one": lambda o, t: cross_entropy(o, t, reduction="none"),
    "sum": lambda o, t: cross_entropy(o, t, reduction="sum"),
}


@pytest.mark.filterwarnings("ignore:the loss seems to sum", "ignore:class weights cancel")
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_rows_under_any_loss(loss, group):
    model, (x, y) = mlp(torch.float64), samples(12, dtype=torch.float64)
    objective = wf.Objective(model, [(x, y)], loss)
    expected = loop_rows(model, lambda o, t: loss(o, t).mean(), x, y, list(objective.layout.shapes), group)
    torch.testing.assert_close(objective.rows(12, group=group), expected, **TIGHT)
    assert taken_together(objective, group)


def test_rows_under_a_loss_that_ignores_labels_or_broadcasts():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(torch.float64)

        def forward(self, x):
            return self.net(x).mT

    model, x = Tokens(), samples(6, (4, 6), dtype=torch.float64)[0]
    y = torch.arange(24).reshape(6, 4) % 3
    y[1, 1:], y[4, 2] = -100, -100
    for group in (1, 2):
        rows = wf.Objective(model, [(x, y)], cross_entropy).rows(6, group=group)
        expected = loop_rows(model, cross_entropy, x, y, ["net.0.weight", "net.2.weight"], group)
        torch.testing.assert_close(rows, expected, **TIGHT)
    one = nn.Linear(4, 1).double()
    x, y = x.mean(2), torch.arange(6.0, dtype=torch.float64)
    loss = lambda o, t: mse_loss(o, t[:, None])
    rows = wf.Objective(one, [(x, y)], loss).rows(6)
    torch.testing.assert_close(rows, loop_rows(one, loss, x, y, ["weight"]), **TIGHT)


class Language(nn.Module):
    """Computes its own loss, a mean over the tokens that have labels."""

    def __init__(self):
        super().__init__()
        self.net = mlp(torch.float64)

    def forward(self, features, labels):
        return Output(loss=cross_entropy(self.net(features).flatten(0, 1), labels.flatten()))


def own_rows(model, batch, group=1):
    parameters = [p for name, p in model.named_parameters() if p.ndim > 1]
    rows = []
    for first in range(0, len(batch["features"]), group):
        loss = model(**{key: value[first : first + group] for key, value in batch.items()}).loss
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("name", ["labels", "targets"])
def test_rows_of_a_models_own_mean_over_labelled_tokens(name, even, group):
    class Named(Language):
        def forward(self, features, **named):
            return super().forward(features, named[name])

    model, x = Named(), samples(8, (4, 6), dtype=torch.float64)[0]
    labels = torch.arange(32).reshape(8, 4) % 3
    labels[:, 0] = -100
    if not even:
        labels[5, 1:3] = -100
    batch = {"features": x, name: labels}
    objective = wf.Objective(model, [batch])
    torch.testing.assert_close(objective.rows(8, group=group), own_rows(model, batch, group), **TIGHT)
    assert taken_together(objective, group)


def test_a_models_own_loss_that_weighs_samples_is_noticed():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(torch.float64)

        def forward(self, features, labels):
            weight = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
            return Output(loss=cross_entropy(self.net(features), labels, weight=weight))

    model, (x, y) = Weighted(), samples(8, dtype=torch.float64)
    batch = {"features": x, "labels": y}
    with pytest.warns(wf.WoodfisherWarning, match="not those of each alone"):
        rows = wf.Objective(model, [batch]).rows(8)
    torch.testing.assert_close(rows, own_rows(model, batch), **TIGHT)


def test_labels_from_the_model_are_the_same_draws_whichever_way_rows_are_taken():
    model, (x, y) = DictModel(), samples(8)
    plain = wf.Objective(model.net, [(x, y)], cross_entropy)
    with_sampler = wf.Objective(model, [{"features": x, "labels": y}])
    torch.manual_seed(3)
    rows = plain.rows(8, labels="model")
    torch.manual_seed(3)
    torch.testing.assert_close(with_sampler.rows(8, labels="model"), rows)
    torch.manual_seed(3)
    parts = list(plain.within(1).iter_layer_rows(8, labels="model"))
    joined = [LayerRows.joined([part[name] for part in parts]).dense() for name in plain.layout.shapes]
    assert torch.cat(joined, 1).shape == rows.shape


def test_rows_of_a_network_that_fits_well_raise_no_false_alarm():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)), samples(30)[0]
    y = x[:, :3].argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        model[2].weight.mul_(4)
    assert cross_entropy(model(x), y) < 1e-4
    objective = wf.Objective(model, [(x, y)], cross_entropy)
    objective.rows(30)
    assert taken_together(objective)


def test_falling_back_to_slow_rows_is_told_of(monkeypatch):
    def refuse(*_):
        raise RuntimeError("no hooks here")

    model, data = mlp(), [samples(6)]
    expected = wf.Objective(model, data, cross_entropy).rows(6)
    monkeypatch.setattr("woodfisher.gradients.signals.Signals._same_as_alone", refuse)
    with pytest.warns(wf.WoodfisherWarning, match=r"taken in a slower way. \(RuntimeError: no hooks here\)"):
        rows = wf.Objective(model, data, cross_entropy).rows(6)
    torch.testing.assert_close(rows, expected)


class Described(OrderedDict):
    """Outputs as Hugging Face's models return them."""

    @property
    def logits(self):
        return self["logits"]


register_pytree_node(
    Described,
    lambda made: (list(made.values()), list(made)),
    lambda values, keys: Described(zip(keys, values, strict=True)),
)


def test_rows_of_models_that_return_more_than_a_tensor():
    """Outputs with fields, a number, and a tensor of no sample's own have rows in factor form too."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return Described(logits=self.layer(x), scale=self.scale, count=3)

    def loss(outputs, targets):
        return cross_entropy(outputs.logits * outputs["scale"], targets)

    model, batch = Model(), samples(8)
    objective = wf.Objective(model, [batch], loss)
    assert set(objective.factors()) == {"layer.weight"}
    torch.testing.assert_close(objective.rows(8), loop_rows(model, loss, *batch, ["layer.weight"]))
    rounded = wf.Objective(model, [batch], loss, precision="bfloat16")
    assert set(rounded.factors()) == {"layer.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_that_are_zero_but_for_rounding_are_no_mixture(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).to(dtype)
    objective = wf.Objective(model, [samples(20, (1, 6, 6), dtype=dtype)], cross_entropy, params="*")
    assert len(objective.rows(20)) == 20
    assert set(objective.factors()) == {"0.weight", "0.bias", "4.weight", "4.bias"}
