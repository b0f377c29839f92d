"""`prune` from end to end."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

import woodfisher as wf
from models import ConvNet, DictModel, Recurrent, Transformer, mlp, samples
from woodfisher.curvature.base import DiagonalInverse, Estimator
from woodfisher.gradients.batches import Stream
from woodfisher.pruning.method import METHODS, method_asked, method_for
from woodfisher.tasks import load_task

SMALL = {"samples": 12, "damping": 1e-2}


def curvature_of(name):
    method = METHODS[name].curvature
    if isinstance(method, wf.Identity):
        return method
    if isinstance(method, (wf.ExactHessian, wf.DiagonalHessian)):
        return type(method)(12, 1.0)
    return type(method)(**SMALL)


def weights_of(model):
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if n.endswith("weight")])


@pytest.mark.filterwarnings("ignore:K-FAC's factors take removed weights")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75])
def test_every_method_keeps_exactly_the_asked_number(name, sparsity):
    model, data = mlp(), [samples(12)]
    before = copy.deepcopy(model.state_dict())
    report = wf.prune(
        model, data, cross_entropy, sparsity, criterion=name, curvature=curvature_of(name), stages=2
    )
    kept = round((1 - sparsity) * 36)
    assert int(weights_of(model).count_nonzero()) == report.kept == kept
    assert report.sparsity == 1 - kept / 36
    assert sum(layer.kept for layer in report.layers) == kept
    for layer, (key, mask) in zip(report.layers, report.masks.items(), strict=True):
        assert layer.name == key
        assert torch.equal(mask, model.get_parameter(key) != 0)
    for key in ("0.bias", "2.bias"):
        assert torch.equal(model.get_parameter(key), before[key])
    assert report.seconds["total"] >= report.seconds["gradients"] >= 0
    assert str(kept) in str(report)


def test_magnitude_keeps_the_largest_as_they_are():
    model = mlp()
    before = weights_of(model)
    wf.prune(model, [], sparsity=0.5, criterion="magnitude")
    largest = torch.zeros(36, dtype=torch.bool)
    largest[before.abs().topk(18).indices] = True
    assert torch.equal(weights_of(model), torch.where(largest, before, 0))
    model = mlp()
    report = wf.prune(model, [], sparsity=0.5, criterion="magnitude-layer")
    assert [layer.kept for layer in report.layers] == [12, 6]


@pytest.mark.filterwarnings("ignore:every weight of")
@given(first=st.floats(0, 0.95), second=st.floats(0, 0.95))
@settings(max_examples=15, deadline=None)
def test_a_removed_weight_never_returns(first, second):
    model, data = mlp(), [samples(12)]
    one = wf.prune(model, data, cross_entropy, first, criterion="magnitude")
    removed = weights_of(model) == 0
    if round((1 - second) * 36) <= one.kept:
        two = wf.prune(model, data, cross_entropy, second, curvature=wf.WoodFisher(**SMALL), stages=3)
        assert two.kept == round((1 - second) * 36)
    assert not weights_of(model)[removed].any()


def test_more_zeros_than_asked_for_are_left_as_they_are():
    model = mlp()
    wf.prune(model, [], sparsity=0.8, criterion="magnitude")
    before = weights_of(model)
    with pytest.warns(wf.WoodfisherWarning, match="80.56% of the chosen weights are zero already"):
        report = wf.prune(model, [], sparsity=0.5, criterion="magnitude")
    assert report.sparsity == 1 - 7 / 36
    assert torch.equal(weights_of(model), before)
    with pytest.warns(wf.WoodfisherWarning, match="nothing is removed"):
        assert wf.prune(model, None, sparsity=0.5, criterion="magnitude-layer").kept == 7
    assert torch.equal(weights_of(model), before)


def test_data_for_one_run_is_not_taken_for_several():
    options = {"curvature": wf.WoodFisher(**SMALL), "stages": 2}
    with pytest.raises(wf.WoodfisherError, match="a run for each sparsity that is tried"):
        wf.sweep(mlp(), iter([samples(12)] * 9), cross_entropy, [0.2, 0.5], **options)
    with pytest.raises(wf.WoodfisherError, match="a run for each sparsity that is tried"):
        wf.prune(mlp(), iter([samples(12)] * 9), cross_entropy, max_drop=0.1, metric=lambda _: 1.0, **options)
    (point,) = wf.sweep(mlp(), iter([samples(12)] * 9), cross_entropy, [0.5], **options)
    assert point.report.kept == 18


def test_progress_is_a_function():
    with pytest.raises(wf.WoodfisherError, match="progress is a function of phase, done and total; 3 came"):
        wf.prune(mlp(), None, sparsity=0.5, criterion="magnitude", progress=3)


def test_each_report_of_a_sweep_has_its_own_warnings():
    model = mlp()
    wf.prune(model, [], sparsity=0.5, criterion="magnitude")
    with pytest.warns(wf.WoodfisherWarning, match="zero already"):
        points = wf.sweep(model, [], None, [0.1, 0.2, 0.8], criterion="magnitude")
    said = [[text for text in point.report.warnings if "zero already" in text] for point in points]
    assert [len(each) for each in said] == [1, 1, 0]
    assert "10.00%" in said[0][0] and "20.00%" in said[1][0]


@pytest.mark.parametrize("there", [0.0, 0.5])
def test_where_nothing_is_to_go_nothing_moves(there):
    model, data = mlp(), [samples(12), samples(12)]
    wf.prune(model, None, sparsity=there, criterion="magnitude")
    before = weights_of(model)
    for name in ("woodfisher", "woodfisher-block"):
        report = wf.prune(model, data, cross_entropy, there, criterion=name)
        assert torch.equal(weights_of(model), before)
        assert (report.sparsity, report.stages) == (there, [])


def test_layers_with_zeros_leave_their_share_to_the_others():
    model = mlp()
    with torch.no_grad():
        model[0].weight[1:] = 0
    report = wf.prune(model, None, sparsity=0.5, criterion="magnitude-layer")
    assert [layer.kept for layer in report.layers] == [6, 12]
    report = wf.prune(model, None, sparsity=0.6, criterion="magnitude-layer")
    assert [layer.kept for layer in report.layers] == [6, 8]


def test_a_layer_removed_whole_is_reported():
    model = mlp()
    with torch.no_grad():
        model[0].weight *= 1e-6
    with pytest.warns(wf.WoodfisherWarning, match="every weight of '0.weight' is removed"):
        report = wf.prune(model, [], sparsity=0.9, criterion="magnitude")
    assert len(report.warnings) == 1


def test_biases_removed_whole_are_no_lost_layer():
    model = mlp()
    for name, p in model.named_parameters():
        if "bias" in name:
            torch.nn.init.zeros_(p)
    report = wf.prune(model, [], sparsity=0.5, criterion="magnitude", params="*")
    assert [layer.kept for layer in report.layers if "bias" in layer.name] == [0, 0]
    assert not report.warnings
    attention = torch.nn.MultiheadAttention(8, 2)  # whose biases begin as zeros
    report = wf.prune(attention, [], sparsity=0.5, criterion="magnitude", params="*")
    assert {layer.name for layer in report.layers if not layer.kept} == {"in_proj_bias", "out_proj.bias"}
    assert not report.warnings


@pytest.mark.parametrize(
    ("build", "batch", "params"),
    [
        (ConvNet, lambda: samples(12, (2, 6, 6)), None),
        (Transformer, lambda: (torch.arange(60).reshape(12, 5) % 11, samples(12)[1]), None),
        (DictModel, lambda: dict(zip(("features", "labels"), samples(12), strict=True)), None),
        (Recurrent, lambda: samples(12, (5, 3)), ["gru.weight*", "fc.weight"]),
        (lambda: mlp(torch.bfloat16), lambda: samples(12, dtype=torch.bfloat16), None),
        (lambda: mlp(torch.float64), lambda: samples(12, dtype=torch.float64), None),
    ],
    ids=["convolution", "transformer", "dict", "recurrent", "bfloat16", "float64"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_models_of_every_kind(build, batch, params):
    model, batch = build(), batch()
    loss = None if isinstance(batch, dict) else cross_entropy
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    report = wf.prune(model, [batch], loss, 0.5, curvature=wf.WoodFisher(**SMALL), stages=2, params=params)
    assert report.sparsity == pytest.approx(0.5, abs=0.5 / report.size)
    assert {name: p.dtype for name, p in model.named_parameters()} == dtypes
    assert all(p.isfinite().all() for p in model.parameters())


@dataclass(frozen=True)
class Failing(Estimator):
    """Fails, or gives a curvature without a usable inverse, the second time it is asked."""

    samples: int = 4
    how: str = "raise"
    calls: list = None

    def estimate(self, objective):
        self.calls.append(1)
        ones = torch.ones(objective.layout.size)
        if len(self.calls) == 1:
            return DiagonalInverse(ones)
        if self.how == "raise":
            raise wf.WoodfisherError("second time")
        return DiagonalInverse(ones * float("nan"))


@pytest.mark.parametrize("how", ["raise", "nan"])
def test_a_late_failure_leaves_the_model_as_it_was(how):
    model = mlp().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(wf.WoodfisherError):
        wf.prune(model, [samples(12)], cross_entropy, 0.5, curvature=Failing(how=how, calls=[]), stages=2)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"in \[0, 1\): 0.9 for 90 %; 1.0 came"),
        ({"sparsity": -0.1}, r"in \[0, 1\)"),
        ({"sparsity": float("nan")}, r"in \[0, 1\)"),
        ({"sparsity": 90}, "90 came"),
        ({"criterion": "fisher"}, "criterion must be one of woodfisher, .*'fisher' came"),
        ({"preset": "papers"}, "preset must be one of paper"),
        ({"update": "all"}, "update must be one of independent, joint, none"),
        ({"scope": "channel"}, "scope must be one of global, layer"),
        ({"stages": 0}, "stages must be a whole number"),
        (
            {"stages": "auto", "criterion": "woodfisher-block"},
            "stages that adapt carry the rows of one block",
        ),
        ({"params": "3.*"}, "matches no parameter"),
        ({"data": []}, "the data holds no batch"),
        ({"data": samples(4)}, "one batch came: put it into a list"),
        ({"data": 3}, "data must be an iterable of batches; a int came"),
        ({"data": torch.utils.data.TensorDataset(*samples(4))}, "DataLoader"),
        ({"sparsity": 0.999}, "keeps none of 36 weights"),
        ({"curvature": "woodfisher"}, "curvature must be an estimator"),
        ({"criterion": METHODS["obd"], "preset": "paper"}, "leave out preset=, or name the method"),
        (
            {"block_size": 50},
            r"'block_size' is an option of the curvature: .*wf.WoodFisher\(block_size=...\)",
        ),
        (
            {"sample": 12},
            "there is no argument 'sample'; an Objective takes params, exclude, sampler, precision, and the parts of a "
            "method are curvature, first_order, update, scope, pattern, floor, stages, refine, recalibrate.",
        ),
    ],
)
def test_bad_input_is_explained_and_changes_nothing(options, message):
    model = mlp()
    before = weights_of(model)
    arguments = {"data": [samples(12)], "loss": cross_entropy, "sparsity": 0.5, **options}
    with pytest.raises(wf.WoodfisherError, match=message):
        wf.prune(model, **arguments)
    assert torch.equal(weights_of(model), before)


def test_stages_draw_new_samples_until_the_data_ends():
    data = [torch.arange(4) + 4 * i for i in range(5)]
    stream, once = Stream(data), Stream(iter(data))
    assert [[int(t[0]) for t in stream.draw(8)] for _ in range(3)] == [[0, 4], [8, 12], [16, 0]]
    assert [[int(t[0]) for t in once.draw(8)] for _ in range(4)] == [[0, 4], [8, 12], [16], [16]]
    assert stream.draw(0) == []


def test_data_of_one_pass_serves_all_stages():
    report = wf.prune(
        mlp(), iter([samples(12)]), cross_entropy, 0.5, curvature=wf.WoodFisher(**SMALL), stages=3
    )
    assert len(report.stages) == 3
    assert report.stages[-1].sparsity == 0.5
    assert all(stage.predicted >= 0 for stage in report.stages)


def test_progress_is_told():
    seen = []
    wf.prune(
        mlp(),
        [samples(12)],
        cross_entropy,
        0.5,
        curvature=wf.WoodFisher(**SMALL),
        stages=2,
        progress=lambda *event: seen.append(event),
    )
    assert seen[0] == ("stages", 0, 2)
    assert seen[-1] == ("stages", 2, 2)
    assert ("gradients", 12, 12) in seen


@pytest.mark.parametrize("parts", [{}, {"update": "independent", "exclude": "2"}])
def test_a_method_is_taken_as_it_is(parts):
    own = {"curvature": wf.WoodFisher(**SMALL), "stages": 2}
    method, data = replace(METHODS["woodfisher-block"], **own), [samples(24)]
    named, given, swept = mlp(), mlp(), mlp()
    report = wf.prune(named, data, cross_entropy, 0.5, criterion="woodfisher-block", **own, **parts)
    assert wf.prune(given, data, cross_entropy, 0.5, criterion=method, **parts).method == report.method
    (point,) = wf.sweep(swept, data, cross_entropy, 0.5, criterion=method, **parts)
    point.write()
    assert torch.equal(weights_of(given), weights_of(named))
    assert torch.equal(weights_of(swept), weights_of(named))
    # Where a name would stand for another curvature, since the number of stages is fixed.
    assert method_asked(METHODS["woodfisher"], {"stages": 2}).curvature == METHODS["woodfisher"].curvature


def test_the_paper_preset_is_the_papers_protocol():
    method = method_for("woodfisher", "paper")
    assert method.curvature == wf.WoodFisher(samples=100, block_size=2000, damping=1e-5)
    assert (method.first_order, method.update, method.scope, method.stages) == (
        False,
        "independent",
        "global",
        1,
    )
    assert method_for("kfac", "paper").curvature == wf.KFAC(samples=100, damping=1e-5)
    assert method_for("woodtaylor", "paper").first_order
    assert method_for("magnitude", "paper") == replace(METHODS["magnitude"], recalibrate=0)
    assert method.recalibrate == 0


@pytest.mark.data
def test_the_paper_is_reproduced(data_root):
    """The authors' log says 84.18 for this checkpoint at 95 %, dense 93.97."""
    accuracies = []
    for seed in range(5):
        task = load_task("mlpnet-mnist", data_root=data_root, seed=seed)
        if seed == 0:
            assert task.metric(task.model, task.test) == pytest.approx(93.97, abs=0.005)
        report = wf.prune(task.model, task.train, task.loss, 0.95, preset="paper")
        assert report.kept == 1618
        accuracies.append(task.metric(task.model, task.test))
    assert sum(accuracies) / 5 == pytest.approx(84.2, abs=0.6)


def test_the_default_beats_magnitude_on_the_embedded_task():
    task, baseline = load_task("digits"), load_task("digits")
    wf.prune(baseline.model, [], sparsity=0.9, criterion="magnitude")
    wf.prune(task.model, task.train, task.loss, 0.9)
    assert (
        task.metric(task.model, task.validation) > baseline.metric(baseline.model, baseline.validation) + 10
    )


def test_statistics_of_batch_normalisation_are_taken_anew():
    model, (x, y) = ConvNet().double().train(), samples(500, (2, 6, 6), dtype=torch.float64)
    x = x * 3 + 1
    batches = [(x[:300], y[:300]), (x[300:], y[300:])]
    report = wf.prune(
        model, batches, cross_entropy, 0.5, curvature=wf.WoodFisher(**SMALL), stages=1, recalibrate=500
    )
    assert report.seconds["recalibration"] > 0
    assert model.training
    assert model.norm.momentum == 0.1
    values = model.conv(x).detach()
    torch.testing.assert_close(model.norm.running_mean, values.mean((0, 2, 3)))
    values = values.roll(-SMALL["samples"], 0)  # the stage took the first ones
    halves = [part.var((0, 2, 3)) for part in (values[:250], values[250:])]
    torch.testing.assert_close(model.norm.running_var, sum(halves) / 2)


def test_statistics_pass_over_single_samples_and_need_no_counter():
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool1d(6), torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5))
    model[2].num_batches_tracked = None
    x, y = samples(8)
    wf.prune(model, [(x, y), (torch.ones(1, 9), y[:1])], cross_entropy, 0.5, criterion="magnitude")
    torch.testing.assert_close(model[2].running_mean, model[1](x).detach().mean(0))


def test_statistics_stay_where_they_should():
    before = ConvNet().state_dict()["norm.running_mean"]
    for options in ({"preset": "paper"}, {"recalibrate": 0, "stages": 2}):
        model = ConvNet()
        with pytest.warns(wf.WoodfisherWarning, match="data ended after 12"):
            wf.prune(model, [samples(12, (2, 6, 6))], cross_entropy, 0.5, **options)
        assert torch.equal(model.norm.running_mean, before)
    with pytest.warns(wf.WoodfisherWarning, match="no two samples of one shape come"):
        wf.prune(model, None, sparsity=0.5, criterion="magnitude", params="*.weight", recalibrate=10)
    assert torch.equal(model.norm.running_mean, before)


@pytest.mark.filterwarnings("ignore:every weight of")
def test_models_with_masks_of_torch_are_copied():
    model = mlp()
    prune.l1_unstructured(model[0], "weight", 0.3)
    report = wf.prune(
        model,
        [samples(20)],
        cross_entropy,
        max_drop=0.5,
        metric=lambda m: 1 + 1e-3 * float((m[2].weight == 0).sum()),
        criterion="magnitude",
    )
    assert report.sparsity > 0.3
    assert wf.cost_of(model, samples(2)[0]).flops > 0


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        (lambda m: int((m[0].weight == 0).sum()), "0 before"),
        (lambda m: 1 + int((m[0].weight == 0).sum()), "negative of"),
    ],
)
def test_metrics_that_a_drop_makes_no_sense_of_are_told(metric, says):
    with pytest.warns(wf.WoodfisherWarning, match=says):
        wf.prune(mlp(), None, max_drop=0.1, metric=metric, criterion="magnitude", floor=0.5)


def test_a_negative_metric_that_rises_is_no_reason_to_warn():
    wf.prune(
        mlp(),
        None,
        max_drop=0.1,
        metric=lambda m: -1 / (1 + int((m[0].weight == 0).sum())),
        criterion="magnitude",
        floor=0.5,
    )


def test_a_drop_of_a_network_that_is_sparser_than_the_search_goes_says_so():
    model = torch.nn.Linear(400, 4)
    wf.prune(model, None, sparsity=0.997, criterion="magnitude")
    with pytest.warns(wf.WoodfisherWarning, match="5 of 1600 are left already"):
        wf.prune(model, None, max_drop=0.5, metric=lambda _: 1.0, criterion="magnitude")


@pytest.mark.parametrize("criterion", ["magnitude", "woodfisher"])
def test_a_metric_that_never_changes_is_refused(criterion):
    model = mlp()
    before = weights_of(model)
    data = [samples(12), samples(12)]
    with pytest.raises(wf.WoodfisherError, match="has to measure the model that it is called with"):
        wf.prune(
            model,
            data,
            cross_entropy,
            max_drop=0.1,
            metric=lambda _: float(weights_of(model).sum()),
            criterion=criterion,
            **(
                {"stages": wf.Adaptive(stages=2), "curvature": wf.WoodFisher(16, None, "auto")}
                if criterion == "woodfisher"
                else {}
            ),
        )
    assert torch.equal(weights_of(model), before)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [("magnitude", "what '2' computes of '2.parametrizations"), ("woodfisher-block", "the loss is nan")],
)
def test_a_network_that_gives_nan_is_not_written(criterion, message):
    """A row of zeros has no direction for weight_norm."""
    model, (x, y) = mlp(), samples(12)
    torch.nn.utils.parametrizations.weight_norm(model[2])
    before, outputs = copy.deepcopy(model.state_dict()), model(x)
    name = "2.parametrizations.weight.original1"
    parts = {} if criterion == "magnitude" else {"curvature": wf.WoodFisher(**SMALL), "stages": 1}
    with pytest.raises(wf.WoodfisherError, match=message):
        wf.prune(model, [(x, y)], cross_entropy, 0.8, params=name, criterion=criterion, **parts)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    wf.prune(model, [(x, y)], cross_entropy, 0.1, params=name, criterion=criterion, **parts)
    assert not torch.equal(model(x), outputs)


def test_what_a_metric_does_to_its_model_stays_there():
    def metric(model):
        with torch.no_grad():
            model[0].bias += 1
        return float((model[0].weight != 0).sum())

    report = wf.prune(mlp(), None, max_drop=0.5, metric=metric, criterion="magnitude")
    assert report.sparsity > 0
    with pytest.raises(wf.WoodfisherError, match="metric= is what max_drop= is about"):
        wf.prune(mlp(), None, None, 0.5, metric=metric, criterion="magnitude")
