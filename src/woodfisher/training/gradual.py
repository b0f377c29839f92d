"""`train`: gradual pruning while a task's model is trained on. Needs the extra `train`."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Sized
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from woodfisher._version import __version__
from woodfisher.checks import (
    check_choice,
    check_count,
    check_fraction,
    check_not_negative,
    check_positive,
    check_seed,
)
from woodfisher.errors import WoodfisherError, extra
from woodfisher.files import remove
from woodfisher.gradients.batches import bytes_of, length, read_apart
from woodfisher.gradients.isolation import adopt_buffers, copied, isolated
from woodfisher.gradients.objective import Objective
from woodfisher.gradients.parameters import unwrapped
from woodfisher.gradients.randomness import reseeded
from woodfisher.pruning.method import apart
from woodfisher.pruning.pruner import Pruner
from woodfisher.pruning.report import Stage, layers_of
from woodfisher.pruning.schedule import Polynomial, Schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor
    from typing_extensions import Unpack

    from woodfisher.gradients.forward import Precision
    from woodfisher.pruning.method import Method, PruningOptions
    from woodfisher.pruning.report import Layer
    from woodfisher.tasks import Task
    from woodfisher.training.finetuning import Finetuning
    from woodfisher.watch import Progress

LOGS = ("csv", "tensorboard")
"""Where `train` can log to."""

_OF_LIGHTNING: dict[Precision, Literal["32-true", "bf16-mixed"]] = {
    "float32": "32-true",
    "bfloat16": "bf16-mixed",
}


@dataclass(frozen=True)
class Training:
    """How a network is trained while it is pruned: SGD with Nesterov momentum, and a rate that falls as a cosine."""

    epochs: int = 10
    """Passes over the training data."""

    rate: float = 0.02
    """Learning rate at its peak; it falls to 0 at the end as half a cosine."""

    warm_up: float = 0.0
    """Epochs in which the rate first rises from 0, linearly."""

    momentum: float = 0.9
    """Of SGD, in Nesterov's form."""

    weight_decay: float = 1e-4
    """Of SGD: factor of the weights that is added to their gradients."""

    distil: float = 0.0
    """Share of the loss, in [0, 1], that is the distance to the dense network's outputs: T² · KL(dense ‖ pruned)."""

    temperature: float = 2.0
    """T, which the logits are divided by for that."""

    augment: bool = True
    """Whether inputs are augmented in training as the task does; networks with few weights may do better without."""

    compile: bool = False
    """Run the network through torch.compile, which takes a minute to begin with and needs a C++ compiler on a CPU."""

    def check(self) -> None:
        """Raise on values that make no sense."""
        check_count("epochs", self.epochs)
        check_positive("rate", self.rate, "the learning rate at its peak")
        check_not_negative("warm_up", self.warm_up)
        if self.warm_up >= self.epochs:
            raise WoodfisherError(
                f"the rate rises in {self.warm_up:g} of {self.epochs} epochs, and would never be at its peak: give a "
                "shorter warm_up."
            )
        check_fraction("momentum", self.momentum)
        check_not_negative("weight_decay", self.weight_decay)
        check_not_negative("distil", self.distil)
        if self.distil > 1:
            raise WoodfisherError(f"distil is a share of the loss, in [0, 1]; {self.distil!r} came.")
        check_positive("temperature", self.temperature, "which logits are divided by")


def gradually(sparsity: float, epochs: int) -> Polynomial:
    """The usual schedule, in epochs: cubic, in ten steps over the first 60 % of the training."""
    return Polynomial(0.0, sparsity, begin=0.0, end=0.6 * epochs, every=0.06 * epochs)


@dataclass(frozen=True)
class Epoch:
    """The state after an epoch.

    Attributes
    ----------
    epoch, step:
        Epochs and steps of the optimizer so far.
    rate:
        Learning rate of the next step.
    loss:
        Mean training loss over the epoch.
    validation:
        Metric on the validation data.
    sparsity:
        Fraction of the chosen weights that is removed.
    eligible:
        Whether all removals are done, so that this may be the best epoch.
    """

    epoch: int
    step: int
    rate: float
    loss: float
    validation: float
    sparsity: float
    eligible: bool


@dataclass(frozen=True, kw_only=True)
class Removal(Stage):
    """One time that weights were removed, as its last stage did it.

    Attributes
    ----------
    step:
        Steps of the optimizer before it.
    seconds:
        That it took, with all of its stages.
    """

    step: int
    seconds: float


@dataclass(frozen=True)
class Trained:
    """What `train` did.

    Attributes
    ----------
    sparsity:
        Fraction of the chosen weights that is removed.
    dense:
        Metric of the network that training began with, on the validation data.
    best:
        The epoch whose weights the model has now.
    epochs, history:
        Every epoch, and every removal, in order.
    layers:
        In the model's order.
    masks:
        Name → bool tensor of the weight's shape, False where removed.
    seconds:
        `pruning`, `training` and `total`, over all processes that had a part in the run.
    method:
        The options of the `Method` that removed weights.
    warnings:
        Every fallback and warning on the way.
    """

    sparsity: float
    dense: float
    best: Epoch
    epochs: list[Epoch]
    history: list[Removal]
    layers: list[Layer]
    masks: dict[str, Tensor] = field(repr=False)
    seconds: dict[str, float]
    method: dict[str, Any]
    warnings: list[str]

    @classmethod
    def of(cls, module: Finetuning, best: Epoch, dense: float) -> Trained:
        """What a training that has ended did to a network of which `dense` is the metric; the epoch that it kept."""
        masks = {name: mask.cpu() for name, mask in module.pruner.masks.items()}
        pruning = sum(removal.seconds for removal in module.removals)
        return cls(
            sparsity=module.pruner.sparsity,
            dense=dense,
            best=best,
            epochs=module.epochs,
            history=module.removals,
            layers=layers_of(masks),
            masks=masks,
            seconds={"pruning": pruning, "training": module.seconds - pruning, "total": module.seconds},
            method=module.pruner.method.to_dict(),
            warnings=module.warned,
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything without the masks, as JSON takes it."""
        return {
            "woodfisher": __version__,
            "sparsity": self.sparsity,
            "size": sum(layer.size for layer in self.layers),
            "kept": sum(layer.kept for layer in self.layers),
            "validation": {"metric": self.best.validation, "dense": self.dense},
            "best_epoch": self.best.epoch,
            "method": self.method,
            "layers": [layer.to_dict() for layer in self.layers],
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "history": [asdict(removal) for removal in self.history],
            "seconds": self.seconds,
            "pruning_share": self.seconds["pruning"] / self.seconds["total"],
            "warnings": self.warnings,
        }


def train(
    task: Task,
    sparsity: float | Schedule,
    training: Training | None = None,
    *,
    criterion: str | Method = "woodfisher",
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    log: Literal["csv", "tensorboard"] = "csv",
    progress: Progress | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    **options: Unpack[PruningOptions],
) -> Trained:
    """Train a task's model on, and remove weights on the way; the model ends as it was in the best epoch.

    That is the one of the best validation metric among the epochs after the last removal (of equal ones the
    latest). The model changes at the very end. On a CPU the result depends on the arguments and the number of
    threads alone, also where the run was killed at any moment and resumed.

    Parameters
    ----------
    task:
        Model, data, loss and metric. Training batches go through `task.augment`; rows for the curvature don't. A loss
        that is a module is copied, and its parameters are trained, too.
    sparsity:
        Fraction of the chosen weights to remove (see `gradually`), or a schedule whose times are in epochs.
    training:
        How to train.
    criterion:
        As for `Pruner`.
    seed:
        Of the order of the batches, their augmentation, and the samples that rows are taken from.
    out:
        Folder of a checkpoint, checkpoint.ckpt, and metrics.csv, which are written after every epoch.
    resume:
        Go on from the checkpoint in `out`, which must be of a run with the same arguments; without one, start.
    log:
        `tensorboard` writes its events to `out`/tensorboard, too.
    progress:
        Called as `progress(phase, done, total)`, with phase `steps` for those of the optimizer.
    on_epoch:
        Called after every epoch.
    **options:
        As for `prune`. `precision` is that of training too; weights and what the optimizer keeps stay in float32.

    Raises
    ------
    WoodfisherError
        On bad input or a numerical failure; the model is then as it was.
    """
    require_lightning()
    from woodfisher.training.finetuning import Finetuning

    training, out = training or Training(), None if out is None else Path(out)
    chosen, parts = apart(options)
    precision = chosen.get("precision", "float32")
    _check(task, training, seed, out, resume, log)
    schedule = sparsity if isinstance(sparsity, Schedule) else gradually(sparsity, training.epochs)
    data = read_apart(task.train)
    steps = batches_in(data)
    schedule = schedule.in_epochs(steps)
    last = _last_removal(schedule, steps, training.epochs)
    model = unwrapped(copied(task.model)).train()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise WoodfisherError("every parameter of the model is frozen, and training needs some: thaw them.")
    with isolated(task.model), reseeded(task.train, seed):
        dense = task.validate(task.model)
        loss = copied(task.loss) if isinstance(task.loss, nn.Module) else task.loss
        objective = Objective(model, data, loss, **chosen)
        pruner = Pruner(
            model, objective, schedule, criterion=criterion, seed=seed, progress=progress, **parts
        )
        asked = _asked(task, pruner, training, precision)
        checkpoint = None if out is None else _checkpoint(out, asked, resume=resume)
        module = Finetuning(
            task, pruner, training, steps=steps, last=last, folder=out, options=asked, on_epoch=on_epoch
        )
        _fit(module, checkpoint, precision, log)
    assert module.best is not None
    number, weights = module.best
    own = unwrapped(task.model)
    adopt_buffers(own, weights)
    own.load_state_dict(weights)
    return Trained.of(module, module.epochs[number - 1], dense)


def _check(
    task: Task,
    training: Training,
    seed: int,
    out: Path | None,
    resume: bool,
    log: Literal["csv", "tensorboard"],
) -> None:
    training.check()
    check_choice("log", log, LOGS)
    check_seed(seed)
    if out is None and (resume or log != "csv"):
        raise WoodfisherError("to resume, or to log, needs a folder: give out=.")
    if training.distil and task.loss is None:
        raise WoodfisherError(
            "distillation compares logits, for a task with a loss(outputs, targets); this one has none: distil=0."
        )


def _asked(task: Task, pruner: Pruner, training: Training, precision: Precision) -> dict[str, Any]:
    """What a run must have in common with the one that it resumes."""
    return {
        "task": task.name,
        "weights": digest(task.model),
        "samples": length(task.train),
        "chosen": list(pruner.objective.layout.shapes),
        "schedule": str(pruner.schedule),
        "training": asdict(training),
        "precision": precision,
        "method": repr(pruner.method),
        "seed": pruner.seed,
    }


def _checkpoint(out: Path, options: dict[str, Any], *, resume: bool) -> Path | None:
    """The one to go on from; of a run that starts anew, what an earlier one has left goes."""
    from woodfisher.training.finetuning import CHECKPOINT, METRICS, read_checkpoint

    path = out / CHECKPOINT
    if resume and path.exists():
        _check_same(read_checkpoint(path)["woodfisher"]["options"], options, path)
        return path
    remove(path)
    remove(out / METRICS)
    return None


def _fit(
    module: Finetuning, checkpoint: Path | None, precision: Precision, log: Literal["csv", "tensorboard"]
) -> None:
    """Have Lightning's Trainer train; the pruner lets the model go at the end, whatever that is."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import TensorBoardLogger

    from woodfisher.integrations.lightning import PruningCallback
    from woodfisher.training.finetuning import WholeFiles, quiet

    out = module.folder
    with quiet():
        trainer = Trainer(
            **_device_options(module.model),
            precision=_OF_LIGHTNING[precision],
            max_epochs=module.training_options.epochs,
            callbacks=[PruningCallback(module.pruner, module.note_removal)],
            plugins=[WholeFiles()],
            logger=TensorBoardLogger(out, name="tensorboard", version="")
            if out and log == "tensorboard"
            else False,
            log_every_n_steps=1,
            default_root_dir=out,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        interrupted = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(module, ckpt_path=checkpoint)
        except SystemExit as exit_:
            # What Lightning makes of an interruption, after it has switched the signal off.
            signal.signal(signal.SIGINT, interrupted)
            raise KeyboardInterrupt from exit_
        finally:
            module.pruner.release()


def require_lightning() -> None:
    """Raise, before any work, where Lightning is missing."""
    with extra("train", "training needs Lightning"):
        import lightning.pytorch  # noqa: F401


def batches_in(data: Iterable[Any]) -> int:
    """Number of batches in an epoch, by counting where the data doesn't say."""
    try:
        count = len(data) if isinstance(data, Sized) else None
    except TypeError:  # a DataLoader over an IterableDataset
        count = None
    if count is None:
        count = sum(1 for _ in data)
    if not count:
        raise WoodfisherError("the task's training data holds no batch: give one at least.")
    return count


def digest(model: nn.Module) -> str:
    """A digest of a model's state."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(bytes_of(tensor).data)
    return found.hexdigest()


def _last_removal(schedule: Schedule, steps: int, epochs: int) -> int:
    """The step after which the schedule removes weights for the last time; raises if training ends before."""
    if schedule.reached >= steps * epochs:
        raise WoodfisherError(
            f"the schedule reaches its sparsity {schedule.goal:g} after the training's last step ({epochs} epochs of "
            f"{steps} steps): end it sooner, or train longer."
        )
    return schedule.reached


def _check_same(there: dict[str, Any], here: dict[str, Any], path: Path) -> None:
    there, here = (_flat(options) for options in (there, here))
    unlike = [name for name in here if there.get(name) != here[name]]
    if unlike:
        differences = "; ".join(f"{name}: {there.get(name)} there, {here[name]} here" for name in unlike)
        raise WoodfisherError(
            f"{path} is of a run with other arguments ({differences}): give the same ones, or train without resume to "
            "start anew."
        )


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """Options with those of the training among them, by their own names."""
    return {**options, **options.get("training", {}), "training": None}


def _device_options(model: nn.Module) -> dict[str, Any]:
    """Of the Trainer: to stay where the model is."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return {"accelerator": "gpu", "devices": [device.index or 0]}
    return {"accelerator": device.type, "devices": 1}
