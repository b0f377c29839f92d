"""The training loop of `train`: a LightningModule, and checkpoints that are whole. Needs the extra `train`."""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from woodfisher.errors import WoodfisherError
from woodfisher.files import save_csv, write_whole
from woodfisher.gradients.batches import map_tensors
from woodfisher.gradients.forward import (
    arguments_of,
    check_form,
    explained,
    full_precision,
    inputs_and_targets,
    mean_loss,
)
from woodfisher.gradients.isolation import adopt_buffers
from woodfisher.gradients.randomness import reseed
from woodfisher.training.gradual import Epoch, Removal
from woodfisher.watch import logging_from

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

    from woodfisher.pruning.pruner import Pruner
    from woodfisher.pruning.report import Report
    from woodfisher.tasks import Task
    from woodfisher.training.gradual import Training

CHECKPOINT, METRICS = "checkpoint.ckpt", "metrics.csv"


class Finetuning(LightningModule):
    """Trains a model on a task, epoch by epoch, and remembers the best epoch of those after the last removal.

    All random numbers of an epoch follow from the seed and the epoch's number.

    Parameters
    ----------
    task:
        Its model is the teacher, where there is one, and stays as it is.
    pruner:
        Of the model that is trained; someone else steps it. Its `seed` orders the batches, and its `progress` is told
        the steps of training.
    training, on_epoch:
        As for `train`.
    steps:
        Steps of the optimizer in an epoch.
    last:
        The step after which the last weights are removed, counted from 0.
    folder:
        Where a checkpoint and metrics.csv are written after every epoch; None for neither.
    options:
        What a run must have in common with the one that it resumes.

    Attributes
    ----------
    best:
        Number of the best epoch, and the model's state at its end; None before the last removal.
    """

    def __init__(
        self,
        task: Task,
        pruner: Pruner,
        training: Training,
        *,
        steps: int,
        last: int,
        folder: Path | None,
        options: Mapping[str, Any],
        on_epoch: Callable[[Epoch], None] | None,
    ) -> None:
        super().__init__()
        self.model = pruner.objective.source
        self.task, self.pruner, self.training_options = task, pruner, training
        self.loss = pruner.objective.loss
        self.steps, self.last, self.folder = steps, last, folder
        self.options = dict(options)
        self._forwards = [torch.compile(net) if training.compile else net for net in (self.model, task.model)]
        self._on_epoch = on_epoch
        self.epochs: list[Epoch] = []
        self.removals: list[Removal] = []
        self.warned: list[str] = []
        self.best: tuple[int, dict[str, Tensor]] | None = None
        self.seconds = 0.0
        self._since = time.perf_counter()
        self._loss: Tensor | float = 0.0

    def train_dataloader(self) -> Epochs:
        return Epochs(self)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        options = self.training_options
        optimizer = torch.optim.SGD(
            self.parameters(),  # those of a loss that has some, too
            lr=options.rate,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            nesterov=options.momentum > 0,
        )
        total, warm_up = options.epochs * self.steps, round(options.warm_up * self.steps)

        def share(step: int) -> float:
            if step < warm_up:
                return (step + 1) / (warm_up + 1)
            return (1 + math.cos(math.pi * (step - warm_up) / max(total - warm_up, 1))) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        self._since = time.perf_counter()

    def training_step(self, batch: Any, _index: int) -> Tensor:
        student, teacher = self._forwards
        check_form(self.loss, batch)
        if self.training_options.augment:
            batch = self._augmented(batch)
        own = map_tensors(torch.clone, batch)  # to be changed in place, as some models and losses do
        arguments, named = arguments_of(own)
        with explained(batch):
            outputs = full_precision(student(*arguments, **named))
            loss = mean_loss(self.loss, outputs, own)
        share = self.training_options.distil
        if share:
            arguments, named = arguments_of(map_tensors(torch.clone, batch))
            with torch.no_grad():
                wanted = full_precision(teacher(*arguments, **named))
            loss = (1 - share) * loss + share * distillation_loss(
                outputs, wanted, self.training_options.temperature
            )
        self._loss = self._loss + loss.detach()
        return loss

    def on_train_batch_end(self, _outputs: Any, _batch: Any, _index: int) -> None:
        if self.pruner.progress is not None:
            self.pruner.progress("steps", self.pruner.steps, self.training_options.epochs * self.steps)

    def on_train_epoch_end(self) -> None:
        """Measure, remember the best, and save."""
        number = len(self.epochs) + 1
        came = self.pruner.steps - len(self.epochs) * self.steps
        if came != self.steps:
            raise WoodfisherError(
                f"epoch {number} had {came} batches, and the data {self.steps} before training, by which schedule and "
                "rate are laid out: give data that has the same number each time."
            )
        loss = float(self._loss) / self.steps
        self._loss = 0.0
        if not math.isfinite(loss):
            raise WoodfisherError(
                f"the training loss is {loss} in epoch {number}: lower the rate, or remove weights more slowly."
            )
        value = self.task.validate(self.model)
        pruned = self.pruner.steps > self.last
        if pruned and (self.best is None or value >= self.epochs[self.best[0] - 1].validation):
            state = self.model.state_dict()
            self.best = number, {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        epoch = Epoch(
            number,
            self.pruner.steps,
            self.trainer.optimizers[0].param_groups[0]["lr"],
            loss,
            value,
            self.pruner.sparsity,
            pruned,
        )
        self.epochs.append(epoch)
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now
        self.log_dict({"loss": loss, "validation": value, "sparsity": epoch.sparsity, "rate": epoch.rate})
        if self.folder is not None:
            rows = [asdict(row) for row in self.epochs]
            write_whole(self.folder / METRICS, lambda path: save_csv(rows, path))
            self.trainer.save_checkpoint(self.folder / CHECKPOINT)
        if self._on_epoch is not None:
            self._on_epoch(epoch)

    def note_removal(self, step: int, report: Report) -> None:
        """Remember that weights were removed."""
        last = asdict(report.stages[-1])
        self.removals.append(Removal(**last, step=step, seconds=report.seconds["total"]))
        self.warned += [message for message in report.warnings if message not in self.warned]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["woodfisher"] = {
            "options": self.options,
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "removals": [asdict(removal) for removal in self.removals],
            "warned": self.warned,
            "best_epoch": self.best,
            "seconds": self.seconds,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["woodfisher"]
        adopt_buffers(self, checkpoint["state_dict"])
        try:
            self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
            self.removals = [Removal(**removal) for removal in state["removals"]]
            self.warned, self.best, self.seconds = state["warned"], state["best_epoch"], state["seconds"]
        except (KeyError, TypeError) as error:
            assert self.folder is not None
            raise _unreadable(self.folder / CHECKPOINT, error) from error

    def _augmented(self, batch: Any) -> Any:
        augment = self.task.augment
        if augment is None:
            return batch
        if isinstance(batch, Mapping):
            return augment(batch)
        inputs, targets = inputs_and_targets(batch)
        return augment(inputs), targets


class Epochs:
    """The task's training batches; every iteration has the random numbers of the epoch that is about to run."""

    def __init__(self, module: Finetuning) -> None:
        self._module = module

    def __len__(self) -> int:
        return self._module.steps

    def __iter__(self) -> Iterator[Any]:
        module = self._module
        epoch = module.global_step // module.steps
        seed = np.random.SeedSequence([module.pruner.seed, epoch]).generate_state(1)[0]
        data = module.pruner.objective.data
        reseed(data, int(seed))
        yield from data


def distillation_loss(outputs: Any, wanted: Any, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) of logits `N × … × classes` at temperature T, the mean over samples."""
    if not isinstance(outputs, Tensor) or outputs.ndim < 2 or outputs.shape[-1] < 2:
        came = f"tensor {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise WoodfisherError(
            "distillation compares logits, a tensor (samples, …, classes) of two classes at least, and the model "
            f"returned a {came}: give a task whose model returns such, or distil=0."
        )
    student, teacher = (log_softmax(logits / temperature, dim=-1) for logits in (outputs, wanted))
    return kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean() * temperature**2


class WholeFiles(CheckpointIO):
    """Checkpoints that appear whole or not at all, and that execute nothing when they are read."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        def write(draft: Path) -> None:
            with draft.open("wb") as file:
                try:
                    torch.save(checkpoint, file)
                except RuntimeError as error:  # what torch makes of a disk that is full
                    raise OSError(str(error).partition("\n")[0]) from error
                file.flush()
                os.fsync(file.fileno())

        write_whole(Path(path), write)

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint that `Finetuning` wrote; raise on any other file."""
    try:
        _check_whole(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # readers fail in many ways on foreign bytes
        raise _unreadable(path, error) from error
    own = state.get("woodfisher") if isinstance(state, dict) else None
    if not isinstance(own, dict) or not isinstance(own.get("options"), dict):
        raise WoodfisherError(
            f"{path} is no checkpoint of a run of `train`: remove it, or choose another folder."
        )
    return state


def _check_whole(path: Path) -> None:
    """Raise unless all that a checkpoint holds has its checksum, which torch doesn't look at."""
    with ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} in it is damaged")


def _unreadable(path: Path, error: Exception) -> WoodfisherError:
    reason = " ".join(str(error).split("\n", 1)[0].split()) or type(error).__name__
    return WoodfisherError(
        f"{path} can't be read as a checkpoint ({reason}): remove it, or train without resume to start anew."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's notes about itself, and its advice on loops that are its own, to itself."""
    with logging_from(logging.ERROR, "lightning.pytorch", "lightning.fabric"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        yield
