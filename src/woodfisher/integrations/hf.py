"""Pruning inside the `Trainer` of Hugging Face transformers. Needs the extra `hf`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from woodfisher.errors import WoodfisherError, extra
from woodfisher.files import unreadable, write_whole
from woodfisher.integrations.source import PrunerSource, warn_unless_done

with extra("hf", "pruning in Hugging Face's Trainer needs transformers and accelerate"):
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from woodfisher.pruning.pruner import Pruner

_PRESENT: dict[str, Any] = {"args": {}, "attributes": {}}
"""What a callback puts into the state of the Trainer under its mark. One read from a checkpoint is another object."""


class PruningCallback(TrainerCallback):
    """Lets a `Pruner` step after every step of the optimizer, and keeps its state in the Trainer's checkpoints.

    Each update is a step of the schedule, however many batches gradients accumulate over. A second `train()` goes on
    where a given pruner is in its schedule; a function makes one that begins anew.
    `train(resume_from_checkpoint=...)` goes on from the pruner's state too. A checkpoint that was written without this
    callback starts the schedule. Training that ends before the schedule does warns. Trials of a hyperparameter search
    store no state.

    In a checkpoint's folder `pruner.safetensors`, or `pruner-NAME.safetensors`, has the masks as tensors, and the
    numbers of the pruner's state as JSON in the metadata.

    Parameters
    ----------
    pruner:
        A `Pruner` of the model that is trained (or of a part of it), or a function that makes one of the model, for a
        Trainer with `model_init`. The objective takes no `loss` where the model returns its own; its data is batches
        as the model takes them, in a list or in a plain `DataLoader` with the Trainer's collator.
    checkpoint:
        The folder that training resumes from, where that is not in `output_dir`: a callback isn't told.
    name:
        Of its state in checkpoints, where a Trainer has several of them, each with a pruner of its own.

    Examples
    --------
    ::

        batches = DataLoader(train, batch_size=16, shuffle=True, collate_fn=collator)
        objective = wf.Objective(model, batches, exclude="classifier")
        pruner = wf.Pruner(model, objective, wf.Polynomial(0.5, 0.9, begin=0, end=2000, every=200))
        Trainer(model, args, data_collator=collator, train_dataset=train, callbacks=[PruningCallback(pruner)]).train()
    """

    def __init__(
        self,
        pruner: Pruner | Callable[[nn.Module], Pruner],
        checkpoint: str | Path | None = None,
        name: str = "",
    ) -> None:
        if Path(name).name != name:
            raise WoodfisherError(f"name is a part of a file's name; {name!r} came, which is a path.")
        self.name = name
        self._source = PrunerSource(pruner)
        self.pruner = self._source.given
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        suffix = f"-{name}" if name else ""
        self._mark, self._file = f"woodfisher{suffix}", f"pruner{suffix}.safetensors"

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if args.load_best_model_at_end:
            raise WoodfisherError(
                "load_best_model_at_end=True would end with the weights of some earlier time, when fewer were removed: "
                "set it to False, and choose among the checkpoints yourself."
            )
        # Goes into each checkpoint with the Trainer's own state, and tells that a file of the pruner's belongs to it.
        marks = cast("dict[str, Any]", state.stateful_callbacks)
        if marks.get(self._mark) is _PRESENT:
            raise WoodfisherError(
                f"two callbacks that prune have the name {self.name!r}, and their states would go into one file: give "
                "each a name= of its own."
            )
        assert model is not None
        self.pruner = None  # the last one may hold the masks of the same model
        self.pruner = self._source.of(model)
        if state.global_step:
            file = (self._checkpoint or _folder(args, state)) / self._file
            self._resume(self.pruner, file, marked=self._mark in marks)
        marks[self._mark] = _PRESENT

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # `on_step_end` would come after gradients are dropped and the learning rate has changed.
        assert self.pruner is not None
        self.pruner.step()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.pruner is not None
        if not args.should_save or state.is_hyper_param_search:
            return
        numbers = self.pruner.state_dict()
        masks = {name: mask.cpu().contiguous() for name, mask in numbers.pop("masks").items()}
        write_whole(
            _folder(args, state) / self._file,
            lambda path: save_file(masks, path, metadata={"woodfisher": json.dumps(numbers)}),
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.pruner is not None
        warn_unless_done(self.pruner)

    @staticmethod
    def _resume(pruner: Pruner, file: Path, *, marked: bool) -> None:
        if not file.exists():
            if marked:
                raise WoodfisherError(
                    f"the checkpoint was written with a pruner, and {file.parent} has no {file.name}: give "
                    "PruningCallback(..., checkpoint=folder) the folder that training resumes from."
                )
            return
        try:
            with safe_open(file, framework="pt") as state:
                masks = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118  it is no dict
                numbers = json.loads(state.metadata()["woodfisher"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise unreadable(file, "the state of a pruner", error) from error
        weights = pruner.objective.layout.split(pruner.objective.current().weights)
        for name, weight in weights.items():
            if name in masks and masks[name].shape == weight.shape and weight.cpu()[~masks[name]].any():
                raise WoodfisherError(
                    f"{file} is of another run: weights of {name!r} that it has as removed are not zero in the "
                    "checkpoint that training resumes from: give PruningCallback(..., checkpoint=folder) the folder "
                    "of that."
                )
        pruner.load_state_dict({**numbers, "masks": masks})


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer puts the checkpoint of this step."""
    assert args.output_dir is not None
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
