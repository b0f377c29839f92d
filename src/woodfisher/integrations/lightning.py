"""Pruning inside Lightning's `Trainer`. Needs the extra `train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from woodfisher.errors import extra
from woodfisher.gradients.parameters import unwrapped
from woodfisher.integrations.source import PrunerSource, warn_unless_done

with extra("train", "training needs Lightning"):
    from lightning.pytorch import Callback

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch import LightningModule, Trainer

    from woodfisher.pruning.pruner import Pruner


class PruningCallback(Callback):
    """Lets a `Pruner` step for every step of the optimizer, and keeps its state in Lightning's checkpoints.

    Steps are those of `trainer.global_step`, and weights are removed as a batch ends. With manual optimization a batch
    may have several, of several optimizers, but those alone that `configure_optimizers` returned. Training that ends
    before the schedule does warns.

    Removed weights are zero, too, in the averages of `WeightAveraging`, `EMAWeightAveraging` and
    `StochasticWeightAveraging`, wherever these stand among the callbacks.

    Parameters
    ----------
    pruner:
        A `Pruner` of the module that is trained (or of a part of it), or a function that makes one of the
        LightningModule. The function is called once fitting starts, when the module is on its device.
    on_pruned:
        Called as `on_pruned(step, report)` whenever weights were removed, with the number of optimizer steps so far.
    name:
        Of its state in checkpoints, where a Trainer has several of them, each with a pruner of its own.

    Examples
    --------
    ::

        def pruner(module):
            objective = wf.Objective(module.model, batches, cross_entropy)
            return wf.Pruner(module.model, objective, wf.Polynomial(0.5, 0.9, begin=0, end=2000, every=200))

        Trainer(max_epochs=10, callbacks=[PruningCallback(pruner)]).fit(module, loader)
    """

    def __init__(
        self,
        pruner: Pruner | Callable[[LightningModule], Pruner],
        on_pruned: Callable[[int, Any], None] | None = None,
        name: str = "",
    ) -> None:
        self.name = name
        self._source = PrunerSource(pruner)
        self.pruner = self._source.given
        self._on_pruned = on_pruned
        self._loaded: dict[str, Any] | None = None
        self._steps = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.pruner is None or self.pruner.missing_in(pl_module):
            if self.pruner is not None and self._source.given is None:
                self.pruner.release()  # it may hold masks of a part of the module
            self.pruner = self._source.of(pl_module)
        self._load()

    def _load(self) -> None:
        """Take over the state of a checkpoint, which some strategies read before there is a pruner, and some after."""
        if self._loaded is not None and self.pruner is not None:
            self.pruner.load_state_dict(self._loaded)
            self._loaded = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._load()
        self._apply_to_averages(trainer, pl_module)
        self._steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.pruner is not None
        # None where gradients accumulate over batches; with manual optimization any number.
        for _ in range(self._steps, trainer.global_step):
            report = self.pruner.step()
            if report is not None:
                self._apply_to_averages(trainer, pl_module)
                if self._on_pruned is not None:
                    self._on_pruned(self.pruner.steps, report)
        self._steps = trainer.global_step

    def _apply_to_averages(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Zero what is removed in callbacks' averages of the module, where it stays so: they add zeros from here on."""
        assert self.pruner is not None
        masks, chosen = self.pruner.masks, self.pruner.objective.source_parameters
        kept = {id(parameter): masks[name] for name, parameter in chosen.items()}
        averages = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
        for average in averages:
            if average is None:
                continue
            with torch.no_grad():
                for own, averaged in zip(
                    pl_module.parameters(), unwrapped(average).parameters(), strict=True
                ):
                    if id(own) in kept:
                        averaged.masked_fill_(~kept[id(own)].to(averaged.device), 0)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What averages weights puts its own into the module as training ends.
        assert self.pruner is not None
        self.pruner.apply(self.pruner.objective.source)
        warn_unless_done(self.pruner, "steps of the optimizers that configure_optimizers returned")

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name) if self.name else type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        return {} if self.pruner is None else self.pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = dict(state_dict)
