"""Training and pruning together: the Lightning callback, `train`, and runs that are killed."""

import copy
import csv
import io
import json
import multiprocessing
import random
import resource
import signal
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

import resumable
import woodfisher as wf
import woodfisher.pruning.pruner
from test_hf import bert, sentences
from woodfisher import WoodfisherError
from woodfisher.cli import main
from woodfisher.gradients.parameters import unwrapped
from woodfisher.integrations.lightning import PruningCallback
from woodfisher.saving.saved import read
from woodfisher.tasks import Task, accuracy, load_task
from woodfisher.tasks.images import flipped_and_shifted
from woodfisher.training import Training, train
from woodfisher.training.finetuning import WholeFiles, distillation_loss, read_checkpoint

CURVATURE = wf.WoodFisher(samples=20, block_size=None, damping=1e-2)
QUICK = ["--epochs", "2", "--samples", "20"]


class Small(LightningModule):
    """A small convolutional network, of 116 weights to choose."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3),
            torch.nn.BatchNorm2d(4),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(4 * 4, 5),
        )

    def training_step(self, batch, _index):
        return cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.model.parameters(), lr=1e-2)


def batches(count=6, size=10):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 1, 4, 4, generator=generator), torch.randint(5, (size,), generator=generator))
        for _ in range(count)
    ]


def make_pruner(module):
    objective = wf.Objective(module.model, batches(), cross_entropy)
    return wf.Pruner(
        module.model, objective, wf.Polynomial(0.2, 0.75, begin=1, end=9, every=2), curvature=CURVATURE
    )


def fit(module, callbacks, epochs, checkpoint=None, **options):
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    loader = torch.utils.data.DataLoader(batches(), batch_size=None)
    trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
    return trainer


class Late(SingleDeviceStrategy):
    """A strategy that reads a checkpoint when all else is set up, as `ModelParallelStrategy` does."""

    @property
    def restore_checkpoint_after_setup(self):
        return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_callback_steps_once_for_each_step_of_the_optimizer(accumulate, tmp_path):
    module, pruned = Small(), []
    callback = PruningCallback(make_pruner, lambda step, report: pruned.append((step, report.sparsity)))
    trainer = fit(
        module, [callback], 2 * accumulate, accumulate_grad_batches=accumulate, enable_checkpointing=False
    )
    assert callback.pruner.steps == trainer.global_step == 12
    assert [step for step, _ in pruned] == [2, 4, 6, 8, 10]
    assert callback.pruner.sparsity == pytest.approx(0.75, abs=1 / 116)
    for name, mask in callback.pruner.masks.items():
        assert torch.equal(module.model.get_parameter(name) != 0, mask)


class Manual(Small):
    """Three steps of its optimizer in each batch."""

    def __init__(self, returned=True):
        super().__init__()
        self.automatic_optimization, self.returned = False, returned
        self.own = super().configure_optimizers()

    def configure_optimizers(self):
        return self.own if self.returned else None

    def training_step(self, batch, index):
        optimizer = self.optimizers() if self.returned else self.own
        for _ in range(3):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()


@pytest.mark.filterwarnings("ignore")
def test_manual_optimization_counts_every_step_that_lightning_counts(tmp_path):
    pruned, options = [], {"limit_train_batches": 2, "enable_checkpointing": False}
    whole, half, rest = Manual(), Manual(), Manual()
    callback = PruningCallback(make_pruner, lambda step, report: pruned.append(step))
    trainer = fit(whole, [callback], 2, **options)
    assert callback.pruner.steps == trainer.global_step == 12
    assert pruned == [2, 4, 6, 8, 10]
    assert callback.pruner.sparsity == pytest.approx(0.75, abs=1 / 116)
    fit(half, [PruningCallback(make_pruner), ModelCheckpoint(tmp_path, "half")], 1, limit_train_batches=2)
    resumed = PruningCallback(make_pruner)
    fit(rest, [resumed], 2, checkpoint=tmp_path / "half.ckpt", **options)
    assert resumed.pruner.steps == 12
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, rest.state_dict()[name])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            lambda: Manual(returned=False),
            r"after 0 steps of the optimizers that configure_optimizers returned, .* 0.75 \(0 by then",
        ),
        (Small, r"after 6 steps .*, before the schedule reached its sparsity 0.75 \(0.68125 by then\)"),
    ],
)
def test_training_that_ends_before_the_schedule_warns(module, message):
    with pytest.warns(wf.WoodfisherWarning, match=message):
        fit(module(), [PruningCallback(make_pruner)], 1, enable_checkpointing=False)


class Sentences(LightningModule):
    """A BERT, which returns its own loss."""

    def __init__(self):
        super().__init__()
        self.model = bert()

    def training_step(self, batch, _index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_the_callback_prunes_a_bert_whose_sentences_are_padded():
    whole = sentences()
    padded = [{key: value[i : i + 8] for key, value in whole.items()} for i in range(0, 24, 8)]

    def make(module):
        objective = wf.Objective(module.model, padded, exclude="classifier")
        return wf.Pruner(
            module.model, objective, wf.one_shot(0.5, at=1), pattern=wf.NM(2, 4), curvature=CURVATURE
        )

    module, callback = Sentences(), PruningCallback(make)
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(padded, batch_size=None))
    assert callback.pruner.sparsity == 0.5
    for name, mask in callback.pruner.masks.items():
        assert torch.equal(module.model.get_parameter(name) != 0, mask)
        assert (mask.reshape(-1, 4).sum(1) == 2).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("made", "strategy"), [(False, None), (True, None), (False, Late)])
def test_a_lightning_checkpoint_resumes_the_pruner(made, strategy, tmp_path):
    def callback(module):
        return PruningCallback(make_pruner(module) if made else make_pruner)

    whole = Small()
    fit(whole, [callback(whole)], 2, enable_checkpointing=False)
    half, rest = Small(), Small()
    fit(half, [callback(half), ModelCheckpoint(tmp_path, "half")], 1)
    resumed = callback(rest)
    options = {} if strategy is None else {"strategy": strategy()}
    fit(rest, [resumed], 2, checkpoint=tmp_path / "half.ckpt", enable_checkpointing=False, **options)
    assert resumed.pruner.steps == 12
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, rest.state_dict()[name])


class Untouched:
    """Test data that nobody may look at."""

    def __iter__(self):
        raise AssertionError


def small_task(metric=accuracy, wrap=lambda model: model, **fields):
    model = wrap(Small().model.eval())
    return Task("small", model, batches(), batches(2), Untouched(), cross_entropy, metric, **fields)


def masked(model):
    """With a weight that is no parameter, since `torch.nn.utils.prune` makes it of two others."""
    torch.nn.utils.prune.l1_unstructured(model[-1], "weight", 0.3)
    return model


@pytest.mark.parametrize(
    "wrap", [lambda model: torch.compile(model, backend="eager"), torch.nn.DataParallel, masked]
)
def test_wrapped_models_are_trained(wrap):
    task = small_task(wrap=wrap)
    trained = train(task, 0.5, Training(epochs=1), criterion="magnitude")
    for name, mask in trained.masks.items():
        assert torch.equal(unwrapped(task.model).get_parameter(name) != 0, mask)
    assert trained.sparsity == 0.5


def test_options_of_the_objective_and_a_whole_method():
    method = wf.Method(replace(CURVATURE, labels="model"), update="independent", stages=2)
    drawn = []

    def sampler(outputs):
        drawn.append(len(outputs))
        return outputs.argmax(1)

    def loss(outputs, targets):
        return (outputs.softmax(1) - torch.eye(5)[targets]).square().sum(1).mean()

    task = replace(small_task(), loss=loss)
    with pytest.raises(WoodfisherError, match="pass sampler="):
        train(task, 0.5, Training(epochs=1), criterion=method)
    trained = train(
        task, wf.one_shot(0.5), Training(epochs=1), criterion=method, sampler=sampler, exclude=":last"
    )
    assert trained.method == method.to_dict()
    assert list(trained.masks) == ["0.weight"]
    assert sum(drawn) >= 2 * 20
    with pytest.raises(
        WoodfisherError, match="no argument 'sampl'; an Objective takes params, exclude, samp"
    ):
        train(task, 0.5, Training(epochs=1), sampl=sampler)


def test_the_best_epoch_is_chosen_on_validation_data_at_the_final_sparsity(tmp_path):
    scores, states = iter([50.0, 99.0, 10.0, 30.0, 30.0, 20.0]), []

    def metric(model, data):
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        assert data is task.validation
        return next(scores)

    task = small_task(metric)
    schedule = wf.Polynomial(0.2, 0.5, 0, 1, 0.5)
    trained = train(task, schedule, Training(epochs=5), curvature=CURVATURE, out=tmp_path)
    assert trained.dense == 50
    assert [epoch.eligible for epoch in trained.epochs] == [False, True, True, True, True]
    assert (trained.best.epoch, trained.best.validation) == (4, 30)
    number, weights = read_checkpoint(tmp_path / "checkpoint.ckpt")["woodfisher"]["best_epoch"]
    assert number == 4
    for name, tensor in task.model.state_dict().items():
        assert torch.equal(tensor, states[4][name])
        assert torch.equal(tensor, weights[name])
    for name, mask in trained.masks.items():
        assert torch.equal(task.model.get_parameter(name) != 0, mask)
    assert not any(module.training for module in task.model.modules())


def test_a_run_without_a_folder_knows_its_time_too():
    trained = train(small_task(), 0.5, Training(epochs=2), curvature=CURVATURE)
    assert 0 < trained.seconds["pruning"] < trained.seconds["total"]
    assert 0 < trained.to_dict()["pruning_share"] < 1


def test_equal_seeds_give_equal_runs_and_leave_no_trace():
    weights = []
    for seed in (0, 0, 1):
        task = small_task(augment=lambda inputs: inputs + 0.1 * torch.randn_like(inputs))
        before = torch.get_rng_state(), random.getstate()
        train(task, 0.5, Training(epochs=2), seed=seed, criterion="magnitude")
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1] == random.getstate()
        weights.append(task.model[0].weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


class Changing(torch.nn.Module):
    """Changes its inputs in place, makes a buffer as it first runs, and keeps a cache as an attribute."""

    def __init__(self):
        super().__init__()
        self.net, self.cache = Small().model, None

    def forward(self, x):
        if not hasattr(self, "shift"):
            self.register_buffer("shift", torch.full((1, 1, 4, 4), 0.5))
        if self.cache is None or len(self.cache) < len(x):
            self.cache = torch.ones(len(x), 1, 1, 1)
        x -= self.shift
        return self.net(x * self.cache[: len(x)])


class Shifted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Small().model

    def forward(self, x):
        return self.net(x - 0.5)


def accuracy_of_copies(model, data):
    return accuracy(model, [(inputs.clone(), targets) for inputs, targets in data])


def test_models_may_change_their_inputs_and_make_buffers_as_they_run(tmp_path):
    losses = []
    for model in (Shifted(), Changing()):
        task = replace(small_task(accuracy_of_copies), model=model.eval(), validation=batches(1, 30))
        before = [inputs.clone() for inputs, _ in task.train]
        out = str(tmp_path / type(model).__name__)
        trained = train(task, 0.5, Training(epochs=3, distil=0.5), curvature=CURVATURE, out=out)
        losses.append([epoch.loss for epoch in trained.epochs])
        assert all(torch.equal(a, b) for a, (b, _) in zip(before, task.train, strict=True))
    assert losses[0] == pytest.approx(losses[1])
    assert model.shift.shape == (1, 1, 4, 4)
    task = replace(task, model=Changing().eval())
    again = train(task, 0.5, Training(epochs=3, distil=0.5), curvature=CURVATURE, out=out, resume=True)
    assert [epoch.loss for epoch in again.epochs] == losses[1]


class Centred(torch.nn.Module):
    """A loss with a temperature that is learnt, and a centre of outputs that follows them in training."""

    def __init__(self):
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.tensor(1.5))
        self.register_buffer("centre", torch.zeros(5))

    def forward(self, outputs, targets):
        if self.training:
            with torch.no_grad():
                self.centre.mul_(0.9).add_(0.1 * outputs.mean(0))
        return cross_entropy(outputs / self.temperature, targets) + (outputs - self.centre).square().mean()


def test_what_a_loss_learns_and_keeps_is_part_of_the_run(tmp_path):
    loss = Centred()

    def run(loss, **options):
        task = replace(small_task(), loss=loss)
        schedule, how = wf.Polynomial(0.2, 0.5, 0, 2, 0.5), Training(epochs=4, rate=0.05)
        trained = train(task, schedule, how, curvature=CURVATURE, **options)
        return [epoch.loss for epoch in trained.epochs]

    whole = run(loss)
    assert run(loss) == whole
    assert loss.temperature == 1.5 and loss.temperature.grad is None and not loss.centre.any()

    class Stopped(Exception):
        pass

    def stop(epoch):
        if epoch.epoch == 2:
            raise Stopped

    with pytest.raises(Stopped):
        run(loss, out=tmp_path, on_epoch=stop)
    state = read_checkpoint(tmp_path / "checkpoint.ckpt")["state_dict"]
    assert state["loss.temperature"] != 1.5 and state["loss.centre"].any()
    assert run(loss, out=tmp_path, resume=True) == whole


class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return 60

    def __getitem__(self, index):
        return torch.randn(1, 4, 4), index % 5


def test_workers_that_are_kept_draw_the_same_in_a_run_that_is_resumed(tmp_path):
    loader = torch.utils.data.DataLoader(Noisy(), 10, num_workers=1, persistent_workers=True)

    def run(**options):
        task = replace(small_task(), train=loader)
        trained = train(task, 0.5, Training(epochs=3), criterion="magnitude", **options)
        return [epoch.loss for epoch in trained.epochs]

    whole = run()

    class Stopped(Exception):
        pass

    def stop(epoch):
        raise Stopped

    with pytest.raises(Stopped):
        run(out=tmp_path, on_epoch=stop)
    assert run(out=tmp_path, resume=True) == whole


def test_the_model_is_as_it_was_after_a_failure():
    task = small_task()
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    with pytest.raises(WoodfisherError, match="the training loss is (nan|inf) in epoch 1: lower the rate"):
        train(task, wf.one_shot(0.5, at=1.5), Training(epochs=2, rate=1e30), criterion="magnitude")
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())


def test_batches_without_targets_are_refused_before_they_are_augmented():
    task = replace(small_task(augment=lambda inputs: inputs), train=[(inputs,) for inputs, _ in batches()])
    with pytest.raises(WoodfisherError, match="a tuple of 1 came"):
        train(task, 0.5, Training(epochs=2), criterion="magnitude")


def test_rows_and_validation_see_no_augmentation():
    seen = []

    def augment(inputs):
        seen.append(len(inputs))
        return torch.full_like(inputs, 1.0)

    train(small_task(augment=augment), 0.5, Training(epochs=2), curvature=CURVATURE)
    assert seen == [10] * 12


def test_passes_in_bfloat16_give_losses_and_weights_in_float32(monkeypatch):
    inside, outside = set(), set()
    record = torch.nn.Conv2d.forward

    def forward(module, inputs):
        output = record(module, inputs)
        if module.training:
            inside.add(output.dtype)
        return output

    def loss(outputs, targets):
        outside.add(outputs.dtype)
        return cross_entropy(outputs, targets)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    task = replace(small_task(), loss=loss)
    training = Training(epochs=2, distil=0.5)
    trained = train(task, 0.5, training, precision="bfloat16", curvature=CURVATURE)
    assert inside == {torch.bfloat16}
    assert torch.bfloat16 not in outside
    assert {tensor.dtype for tensor in task.model.parameters()} == {torch.float32}
    assert trained.sparsity == pytest.approx(0.5, abs=1 / 116)
    with pytest.raises(WoodfisherError, match="precision must be one of float32, bfloat16; 'half' came"):
        train(task, 0.5, training, precision="half")


def test_images_are_flipped_and_shifted():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    shifted = torch.nn.functional.pad(image, (2, 2, 2, 2), value=-1.0)
    windows = [shifted[0, 0, i : i + 4, j : j + 4] for i in range(5) for j in range(5)]
    expected = {tuple(w.flatten().tolist()) for window in windows for w in (window, window.flip(1))}
    torch.manual_seed(0)
    found = flipped_and_shifted(image.expand(2000, 1, 4, 4), pixels=2, fill=-1.0)
    assert {tuple(one.flatten().tolist()) for one in found} == expected
    coloured = flipped_and_shifted(torch.cat([image, image + 100], 1).expand(50, 2, 4, 4), 2, -1.0)
    inside = coloured[:, 0] >= 0
    assert torch.equal(coloured[:, 1][inside], coloured[:, 0][inside] + 100)


def test_distance_is_the_divergence_of_softened_outputs():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 4, dtype=torch.float64)
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    expected = 9 * (p * (p / q).log()).sum(-1).mean()
    assert distillation_loss(student, teacher, 3.0).item() == pytest.approx(expected.item(), rel=1e-12)
    assert distillation_loss(teacher, teacher, 3.0).item() == pytest.approx(0, abs=1e-15)
    with pytest.raises(WoodfisherError, match="returned a tuple"):
        distillation_loss((student,), teacher, 3.0)
    for outputs in (
        torch.randn(5),
        torch.randn(5, 1),
    ):  # over samples, or one class alone, it would mean nothing
        with pytest.raises(
            WoodfisherError, match=r"two classes at least, and the model returned a tensor \(5,"
        ):
            distillation_loss(outputs, outputs, 3.0)


def test_distillation_keeps_the_outputs_of_the_dense_network():
    far = {}
    for share in (0.0, 1.0):
        task = small_task()
        with torch.no_grad():
            dense = [task.model(inputs) for inputs, _ in task.train]
        train(task, 0.3, Training(epochs=10, distil=share), criterion="magnitude")
        with torch.no_grad():
            pairs = zip(dense, (task.model(inputs) for inputs, _ in task.train), strict=True)
            far[share] = sum(float(distillation_loss(now, before, 1.0)) for before, now in pairs)
    assert far[1.0] < 0.5 * far[0.0]
    with pytest.raises(WoodfisherError, match="this one has none"):
        train(replace(small_task(), loss=None), 0.5, Training(distil=0.5))


@pytest.fixture(scope="module")
def digits_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    save_file(load_task("digits").model.state_dict(), path)
    return path


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["checkpoint", "pruning", "replacing"])
def test_what_dies_at_a_bad_moment_resumes_exactly(moment, digits_weights, tmp_path, monkeypatch):
    expected = resumable.run(digits_weights, tmp_path / "whole")
    owner, name, last = {
        "checkpoint": (torch, "save", 3),
        "pruning": (woodfisher.pruning.pruner, "pruned_through", 7),
        "replacing": (WholeFiles, "save_checkpoint", 2),
    }[moment]
    original = getattr(owner, name)
    count = 0

    def dying(*arguments, **named):
        nonlocal count
        count += 1
        if count < last:
            return original(*arguments, **named)
        if moment == "checkpoint":
            arguments[1].write(b"half of a checkpoint")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Killed):
            resumable.run(digits_weights, tmp_path / "out")
    assert_same(resumable.run(digits_weights, tmp_path / "out", resume=True), expected)


def assert_same(found, expected):
    for kind in ("state", "masks"):
        assert found[kind].keys() == expected[kind].keys()
        for name, tensor in expected[kind].items():
            assert torch.equal(found[kind][name], tensor), name
    for kind in ("best", "epochs", "history", "metrics"):
        assert found[kind] == expected[kind]


def test_runs_killed_at_twenty_random_moments_resume_exactly(digits_weights, tmp_path, monkeypatch):
    # Not every version of Python gives the server its path before it preloads.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resumable"])
    ready = context.Event()
    file = tmp_path / "reference.pt"

    def start(function, *arguments):
        ready.clear()
        child = context.Process(target=function, args=arguments)
        child.start()
        assert ready.wait(120)
        return child, time.perf_counter()

    child, since = start(resumable.reference, digits_weights, tmp_path / "whole", ready, file)
    child.join()
    length = time.perf_counter() - since
    assert child.exitcode == 0
    expected = torch.load(file, weights_only=True)
    killed = 0
    for number in range(20):
        out = tmp_path / str(number)
        child, _ = start(resumable.run, digits_weights, out, False, ready)
        time.sleep(random.uniform(0, length))
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        assert_same(resumable.run(digits_weights, out, resume=True), expected)
    assert killed


def test_a_finished_run_resumes_to_the_same_and_other_arguments_are_refused(digits_weights, tmp_path):
    first = resumable.run(digits_weights, tmp_path / "out")
    assert_same(resumable.run(digits_weights, tmp_path / "out", resume=True), first)
    task = load_task("digits", weights=digits_weights)
    with pytest.raises(WoodfisherError, match="other arguments \\(schedule: Polynomial.*initial=0.3"):
        train(task, 0.5, Training(epochs=5, distil=0.3), out=tmp_path / "out", resume=True)
    with pytest.raises(WoodfisherError, match="needs a folder"):
        train(task, 0.5, resume=True)


def flipped(whole):
    """The first tensor's bytes in a checkpoint, and the same with one bit changed."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        content = next(archive.read(name) for name in archive.namelist() if name.endswith("/data/0"))
    return content, bytes([content[0] ^ 1]) + content[1:]


def without(name):
    def written(whole):
        state, file = torch.load(io.BytesIO(whole), weights_only=True), io.BytesIO()
        del state["woodfisher"][name]
        torch.save(state, file)
        return file.getvalue()

    return written


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: whole[: len(whole) // 2], "can't be read as a checkpoint"),
        (lambda _: b"", "can't be read as a checkpoint"),
        (lambda _: b"cos\nsystem\n(S'true'\ntR.", "can't be read as a checkpoint"),
        (lambda _: b"\x80\x02}q", "can't be read as a checkpoint"),
        (lambda whole: whole.replace(b"epochs", b"epoch5"), "can't be read as a checkpoint .*data.pkl"),
        (
            lambda whole: whole.replace(*flipped(whole)),
            "can't be read as a checkpoint .*/data/0 in it is damaged",
        ),
        (without("epochs"), "can't be read as a checkpoint .*epochs"),
        ("foreign", "is no checkpoint of a run of `train`"),
        ("half", "is no checkpoint of a run of `train`"),
    ],
)
def test_a_checkpoint_that_is_none_is_refused(content, message, tmp_path):
    out = tmp_path / "out"
    train(small_task(), 0.5, Training(epochs=2), criterion="magnitude", out=out)
    path = out / "checkpoint.ckpt"
    if content in ("foreign", "half"):
        torch.save({"state_dict": {}, **({"woodfisher": {"options": 3}} if content == "half" else {})}, path)
    else:
        path.write_bytes(content(path.read_bytes()))
    with pytest.raises(WoodfisherError, match=message):
        train(small_task(), 0.5, Training(epochs=2), criterion="magnitude", out=out, resume=True)
    train(small_task(), 0.5, Training(epochs=2), criterion="magnitude", out=out)


def test_tensorboard_events_stand_beside_the_csv(tmp_path):
    train(small_task(), 0.5, Training(epochs=2), criterion="magnitude", out=tmp_path, log="tensorboard")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.ckpt", "metrics.csv", "tensorboard"}
    assert list((tmp_path / "tensorboard").glob("events.*"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_train_prints_one_object_and_writes_its_results(folder, capsys):
    assert main(["train", "--sparsity", "0.9", "--out", "out", "--json", *QUICK]) == 0
    shown = capsys.readouterr()
    content = json.loads(shown.out)
    assert content["task"] == "digits"
    assert content["sparsity"] == pytest.approx(0.9, abs=1e-4)
    assert {"metric"} <= content["dense"].keys() & content["pruned"].keys() & content["validation"].keys()
    assert {"name", "size", "kept"} <= content["layers"][0].keys()
    assert content["seconds"]["total"] == pytest.approx(
        content["seconds"]["pruning"] + content["seconds"]["training"]
    )
    assert [row["sparsity"] for row in content["history"]][-1] == content["sparsity"]
    assert {"step", "predicted"} <= content["history"][0].keys()
    assert "epoch 2 of 2" in shown.err
    assert "GPU" not in shown.err
    names = [
        "checkpoint.ckpt",
        "metrics.csv",
        "model.safetensors",
        "report.html",
        "report.json",
        "training.png",
    ]
    assert sorted(path.name for path in (folder / "out").iterdir()) == names
    assert {"measured", "damping"} <= content["history"][0].keys()
    assert "of the weights removed in training" in (folder / "out" / "report.html").read_text()
    with (folder / "out" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["validation"]) for row in rows] == [row["validation"] for row in content["epochs"]]
    saved = read(folder / "out" / "model.safetensors")
    kept = sum(int(saved.kept[layer["name"]].sum()) for layer in content["layers"])
    assert content["bytes"]["stored"] == saved.size
    assert kept == content["kept"] == sum(layer["kept"] for layer in content["layers"])
    again = load_task("digits", weights=folder / "out" / "model.safetensors")
    assert again.evaluate(again.model) == pytest.approx(content["pruned"]["metric"])
    assert main(["train", "--sparsity", "0.9", "--out", "out", "--resume", *QUICK]) == 0
    assert "validation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "epochs must be a whole number of at least 1; 0 came"),
        (["--rate", "0"], "rate must be a finite number above 0"),
        (["--epochs", "2", "--warm-up", "2"], "the rate rises in 2 of 2 epochs"),
        (["--distil", "1.5"], "distil is a share of the loss, in [0, 1]; 1.5 came"),
        (["--begin", "3", "--end", "2"], "ends at 2, before it begins at 3"),
        (["--epochs", "5", "--end", "5"], "after the training's last step (5 epochs of"),
        (["--sparsity", "1.5"], "in [0, 1)"),
        (["--sparsity", "0.5", "--initial", "0.6"], "can't fall from 0.6 to 0.5"),
        (["--task", "cifar100"], "there is no task"),
        (["--criterion", "fisher"], "criterion must be one of"),
        (["--stages", "0"], "stages must be a whole number"),
        (["--out", "file"], "is not a folder"),
        (["--out", "damaged", "--resume"], "can't be read as a checkpoint"),
    ],
)
def test_bad_input_is_one_message_and_code_2(arguments, message, folder, capsys):
    (folder / "file").touch()
    (folder / "damaged").mkdir()
    (folder / "damaged" / "checkpoint.ckpt").write_bytes(b"PK\x03\x04")
    assert main(["train", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err.replace("\n", " ")
    assert "Traceback" not in shown.err


class Shortening(list):
    """Batches, two fewer from the second time in an epoch on."""

    times = 0

    def __iter__(self):
        self.times += 1
        return iter(list(super().__iter__())[: len(self) - 2 * (self.times > 4)])


@pytest.mark.filterwarnings("ignore")
def test_an_epoch_of_fewer_batches_is_told():
    model = Small().model
    task = Task("shortening", model, Shortening(batches()), batches(), batches(), cross_entropy, accuracy)
    with pytest.raises(WoodfisherError, match=r"epoch \d had 4 batches, and the data 6 before training"):
        train(task, 0.5, Training(epochs=6), curvature=CURVATURE)


def test_a_checkpoint_that_the_disk_has_no_room_for_is_one_message(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        with pytest.raises(WoodfisherError, match="checkpoint.ckpt could not be written"):
            WholeFiles().save_checkpoint({"weights": torch.ones(100_000)}, tmp_path / "checkpoint.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.iterdir())


def test_an_interruption_says_how_to_go_on(folder, capsys, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("woodfisher.pruning.pruner.pruned_through", interrupt)
    assert main(["train", *QUICK]) == 130
    assert "--resume goes on" in capsys.readouterr().err.splitlines()[-1]
    assert signal.getsignal(signal.SIGINT) is handler


def test_without_lightning_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(WoodfisherError, match=r"pip install 'woodfisher\[train\]'"):
        train(small_task(), 0.5)


def test_a_metric_that_switches_to_evaluation_mode_leaves_training_as_it_is():
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x):
            if torch.is_grad_enabled():
                seen.append(self.training)
            return x

    def metric(model, data):
        model.eval()
        return 1.0

    task = small_task(metric)
    task.model.append(Spy())
    train(task, 0.5, Training(epochs=2), criterion="magnitude")
    assert seen
    assert all(seen)


@pytest.mark.filterwarnings("ignore")
def test_a_callback_that_makes_pruners_makes_one_for_each_module():
    callback = PruningCallback(make_pruner)
    for module in (Small(), Small()):
        fit(module, [callback], 2, enable_checkpointing=False)
        assert float((module.model[0].weight == 0).float().mean()) > 0
    with pytest.raises(WoodfisherError, match="that of another model: .* doesn't have its '0.weight'"):
        fit(Small(), [PruningCallback(make_pruner(Small()))], 1, enable_checkpointing=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "averaging", [StochasticWeightAveraging(1e-2, 1), EMAWeightAveraging(decay=0.9)], ids=["swa", "ema"]
)
def test_masks_hold_where_weights_are_averaged(averaging):
    module, callback = Small(), PruningCallback(make_pruner)
    fit(module, [averaging, callback], 3, enable_checkpointing=False)
    for name, mask in callback.pruner.masks.items():
        assert torch.equal(module.model.get_parameter(name) != 0, mask)


class Validated(Small):
    """Notes the sparsity of what it is validated with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def val_dataloader(self):
        return torch.utils.data.DataLoader(batches(1), batch_size=None)

    def validation_step(self, _batch, _index):
        self.seen.append(zeros(self.state_dict()))


def zeros(state):
    return sum(int((state[name] == 0).sum()) for name in ("model.0.weight", "model.4.weight"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [True, False], ids=["averaging first", "averaging last"])
@pytest.mark.parametrize(
    "make",
    [lambda: EMAWeightAveraging(decay=0.9), lambda: StochasticWeightAveraging(1e-2, 1)],
    ids=["ema", "swa"],
)
def test_averages_are_validated_and_saved_with_the_zeros(make, first, tmp_path):
    module, sparsities = Validated(), []
    callbacks = [PruningCallback(make_pruner, lambda _, report: sparsities.append(report.sparsity))]
    callbacks.insert(0 if first else 1, make())
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=6)
    fit(module, [*callbacks, saving], 3, num_sanity_val_steps=0)
    removed = [round(116 * sparsity) for sparsity in (sparsities[2], sparsities[-1], sparsities[-1])]
    assert module.seen[:3] == removed
    saved = {path.stem: torch.load(path, weights_only=True) for path in tmp_path.glob("*.ckpt")}
    for (_, state), expected in zip(sorted(saved.items()), removed, strict=True):
        assert zeros(state["state_dict"]) == expected
    averaged = [each.get("average_model_state") for each in state["callbacks"].values()]
    assert all(zeros(average) == removed[-1] for average in averaged if average is not None)


@pytest.mark.filterwarnings("ignore")
def test_two_callbacks_keep_their_states_apart(tmp_path):
    module = Small()
    module.other = copy.deepcopy(module.model)

    def other(module):
        return wf.Pruner(
            module.other,
            wf.Objective(module.other, batches(), cross_entropy),
            wf.one_shot(0.5),
            criterion="magnitude",
        )

    fit(
        module,
        [PruningCallback(make_pruner, name="first"), PruningCallback(other, name="other")],
        2,
        default_root_dir=tmp_path,
    )
    saved = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)["callbacks"]
    assert sum("PruningCallback" in key for key in saved) == 2


@pytest.mark.filterwarnings("ignore")
def test_a_callback_that_can_make_no_pruner_is_explained():
    with pytest.raises(WoodfisherError, match="a function that makes one; 3 came"):
        PruningCallback(3)
    with pytest.raises(WoodfisherError, match="must return the Pruner that it makes; None came"):
        fit(Small(), [PruningCallback(lambda module: None)], 1, enable_checkpointing=False)


def test_training_that_diverges_is_told_as_that():
    task = small_task()
    with pytest.raises(
        WoodfisherError, match=r"holds NaN or infinity after \d+ steps of training: lower the"
    ):
        train(task, wf.Milestones({0: 0.2, 0.7: 0.5}), Training(epochs=3, rate=1e12), criterion="magnitude")


def test_other_data_and_frozen_networks_are_refused(tmp_path):
    task = small_task()
    train(task, 0.5, Training(epochs=2), criterion="magnitude", out=tmp_path)
    x, y = task.train[-1]
    fewer = replace(small_task(), train=[*task.train[:-1], (x[:-1], y[:-1])])
    with pytest.raises(WoodfisherError, match="other arguments \\(samples: "):
        train(fewer, 0.5, Training(epochs=2), criterion="magnitude", out=tmp_path, resume=True)
    frozen = small_task()
    frozen.model.requires_grad_(False)
    with pytest.raises(WoodfisherError, match="every parameter of the model is frozen"):
        train(frozen, 0.5, Training(epochs=2), criterion="magnitude")


def test_batches_without_a_length_are_counted():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            for x, y in batches():
                yield from zip(x, y, strict=True)

    loader = torch.utils.data.DataLoader(Endless(), batch_size=20)
    task = replace(small_task(), train=loader)
    assert train(task, 0.5, Training(epochs=1), criterion="magnitude").epochs[-1].step == 3
    with pytest.raises(WoodfisherError, match="seed must be"):
        train(task, 0.5, Training(epochs=1), criterion="magnitude", seed=-1)
