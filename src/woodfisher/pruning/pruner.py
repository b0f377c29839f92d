"""`Pruner`: pruning inside a training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from woodfisher.checks import check_count, check_seed, described
from woodfisher.distributed import on_first_rank
from woodfisher.errors import WoodfisherError
from woodfisher.gradients.isolation import isolated
from woodfisher.gradients.objective import Objective
from woodfisher.gradients.parameters import unwrapped
from woodfisher.gradients.randomness import reseeded
from woodfisher.gradients.sharding import reshard
from woodfisher.pruning.masks import Masks
from woodfisher.pruning.method import method_asked
from woodfisher.pruning.oneshot import Pruned
from woodfisher.pruning.report import report_of, warn_of_lost_layers
from woodfisher.pruning.schedule import Schedule
from woodfisher.pruning.stages import pruned_through
from woodfisher.watch import phase, warn, watching

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Unpack

    from woodfisher.gradients.objective import Changes
    from woodfisher.pruning.method import Method, MethodParts
    from woodfisher.pruning.report import Report
    from woodfisher.watch import Progress


class Pruner:
    """Removes weights of a model while it is trained, and keeps them removed.

    Call `step()` after every step of the optimizer. When the schedule says so, curvature is estimated at the weights
    as they are then, weights are removed and the others moved to compensate. Between these times, and for as
    long as the pruner lives, removed weights are exactly zero after every step of any optimizer, get no gradient,
    and have zeros in the optimizer's state. Weights that are zero when the pruner is made are removed from the start.

    Where several processes train one model, each makes a pruner and calls all of its methods; the first process
    computes what is removed, on data of its own, and tells the others.

    Parameters
    ----------
    model:
        The model that is trained. Where it is wrapped for several processes or compiled, the wrapped or the inner
        one.
    objective:
        The `Objective` of the same model: which weights, on which data rows are taken, for which loss. Its data must
        be readable more than once.
    schedule:
        `Polynomial`, `Milestones` or `one_shot`; times count calls of `step`, from 0.
    criterion:
        Name of the method: see `woodfisher.METHODS`. In training it has one stage each time, and `woodfisher` small
        blocks; `woodtaylor` counts the gradient, away from an optimum. With `stages="auto"`, for few and large
        removals, `woodfisher` has 20 stages that adapt, of 20,000 sample gradients together. Or a `Method`, which is
        taken as it is, with all of its samples and stages each time.
    seed:
        Which samples rows are taken from. They depend on it and on the number of times that weights were removed
        before, and on nothing else; random generators of the training run, and of its loaders and their samplers, are
        not touched. (One that a dataset has of its own goes on as samples are drawn.)
    progress:
        Called as `progress(phase, done, total)` while weights are removed.
    **parts:
        Replace a part of the method, as for `prune`.

    Attributes
    ----------
    history:
        A report for each time that weights were removed by this pruner, in this process; without the masks, of which
        `masks` has the last.
    steps:
        Calls of `step` so far.

    Examples
    --------
    >>> import torch, woodfisher as wf
    >>> model = torch.nn.Linear(8, 2)
    >>> data = [(torch.randn(400, 8), torch.randint(2, (400,)))]
    >>> objective = wf.Objective(model, data, torch.nn.functional.cross_entropy)
    >>> pruner = wf.Pruner(model, objective, schedule=wf.Polynomial(0.25, 0.75, begin=0, end=2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> for _ in range(4):
    ...     loss = torch.nn.functional.cross_entropy(model(data[0][0]), data[0][1])
    ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
    ...     report = pruner.step()
    >>> pruner.sparsity, int((model.weight == 0).sum())
    (0.75, 12)
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        schedule: Schedule,
        *,
        criterion: str | Method = "woodfisher",
        seed: int = 0,
        progress: Progress | None = None,
        **parts: Unpack[MethodParts],
    ) -> None:
        if not isinstance(objective, Objective):
            raise WoodfisherError(
                f"the second argument is an Objective(model, data, loss); a {type(objective).__name__} came."
            )
        check_seed(seed)
        if unwrapped(model) is not objective.source:
            raise WoodfisherError(
                "the objective is that of another model: make it from the one that is trained, as in "
                "Pruner(model, Objective(model, data, loss), schedule)."
            )
        if not isinstance(schedule, Schedule):
            raise WoodfisherError(
                f"schedule must be wf.Polynomial(...), wf.Milestones(...) or wf.one_shot(...); {schedule!r} came."
            )
        self.method = method_asked(criterion, parts, training=True)
        self.schedule, self.seed, self.progress = schedule, seed, progress
        if self.method.curvature.samples and objective.reads_once:
            raise WoodfisherError(
                "rows are taken anew each time that weights are removed, and the objective's data can be read only "
                "once: give a list of batches or a DataLoader."
            )
        with isolated(objective.model), reseeded(objective.data, seed):
            self.selection = self.method.selection(objective)
        self.selection.final(schedule.goal)
        self.objective = objective
        masks = objective.layout.split(self.selection.present(objective.current().kept))
        for name, kept in masks.items():
            if not kept.any():
                warn(
                    f"every weight of {name!r} is zero, and counts as removed for good: leave it out of the objective "
                    "with exclude= if it is to be trained."
                )
        self._masks = Masks(objective.source_parameters, masks)
        self.steps = 0
        self._times = 0
        self.history: list[Report] = []

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name → bool tensor of the weight's shape, False where removed."""
        return self._masks.kept

    @property
    def sparsity(self) -> float:
        """Fraction of the chosen weights that is removed."""
        kept = self._kept
        return 1 - int(kept.sum()) / len(kept)

    def step(self) -> Report | None:
        """Note that the optimizer took a step; remove weights if it is time, and say how that went.

        Raises
        ------
        WoodfisherError
            On a numerical failure, or where the optimizer trains other parameters; the model is then as it was.
        """
        if self._masks.released:
            raise WoodfisherError(
                "this pruner let its model go by release(), or is a copy, which holds none: make another to go on, and "
                "give it state_dict() of the one that was copied."
            )
        self._masks.check(self.objective.source)
        sparsity = self.schedule.at(self.steps)
        report = None if sparsity is None else self._prune(sparsity)
        if report is None:
            self._masks.enforce()
        self.steps += 1
        return report

    def apply(self, model: nn.Module) -> None:
        """Zero what is removed in a copy of the model, such as a moving average of it."""
        self._masks.apply(model)

    def missing_in(self, model: nn.Module) -> str | None:
        """Name of a weight that is pruned here and that `model` doesn't have; None where it has them all."""
        there = {id(parameter) for parameter in model.parameters()}
        return next((name for name, p in self._masks.parameters.items() if id(p) not in there), None)

    def release(self) -> None:
        """Let the model go; removed weights are zero and may come back. The pruner is of no more use."""
        self._masks.release()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the model's and the optimizer's: tensors, numbers and strings alone."""
        return {"steps": self.steps, "times": self._times, "seed": self.seed, "masks": self.masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; load the model first, or after, in whichever order.

        Raises
        ------
        WoodfisherError
            If the state is of other weights; nothing has changed then.
        """
        masks = state.get("masks", {}) if isinstance(state, Mapping) else None
        if not isinstance(masks, Mapping) or not all(isinstance(mask, Tensor) for mask in masks.values()):
            raise WoodfisherError(
                "a pruner's state is a dict with tensors for masks: load what state_dict() gave."
            )
        missing = {"steps", "times", "seed", "masks"} - set(state)
        if missing:
            raise WoodfisherError(
                f"a pruner's state has steps, times, seed and masks, and this lacks {', '.join(sorted(missing))}: "
                "load what state_dict() gave."
            )
        shapes = self.objective.layout.shapes
        for name in [*shapes, *masks]:
            there = tuple(masks[name].shape) if name in masks else None
            here = tuple(shapes[name]) if name in shapes else None
            if there != here:
                raise WoodfisherError(
                    f"the checkpoint has {_described(there)} for {name!r}, and the pruner {_described(here)}: choose "
                    "the same weights of the same model as when it was saved."
                )
            mask = masks[name]
            if mask.dtype != torch.bool or mask.is_meta:
                raise WoodfisherError(
                    f"the mask of {name!r} in a pruner's state must be a bool tensor with values; {described(mask)} on "
                    f"{mask.device} came: load what state_dict() gave."
                )
        for number in ("steps", "times", "seed"):
            check_count(f"{number} of a pruner's state", state[number], least=0)
        reshard(self.objective.source)
        self.steps, self._times, self.seed = int(state["steps"]), int(state["times"]), int(state["seed"])
        self._masks.set(masks)
        goal = self.selection.target(self.schedule.goal)
        if self.steps > self.schedule.reached and self.selection.amount(self._kept) > goal:
            warn(
                f"the state is of step {self.steps}, at a sparsity of {self.sparsity:.2%}, and this pruner's schedule "
                f"ends at step {self.schedule.reached} with {self.schedule.goal:.2%}: nothing more will be removed. "
                "Give it the schedule of the run that is resumed, or one that goes on from there."
            )

    def _prune(self, sparsity: float) -> Report | None:
        objective = self.objective.current(self._kept, steps=self.steps)
        amount = self.selection.target(sparsity)
        if amount >= self.selection.amount(objective.kept):
            self.selection.check_pattern(objective.kept, amount)
            return None
        with watching(self.progress) as watch, phase("total"), isolated(objective.model):
            if self._masks.trained_elsewhere:
                warn(
                    "weights are removed from a model that no optimizer has trained since the pruner was made, while "
                    "one trains parameters of the same shapes: see that the pruner has the model that is trained."
                )

            def pruned() -> tuple[Changes, Report]:
                with reseeded(objective.data, self.seed + self._times):
                    ((at, stages),) = pruned_through(
                        objective,
                        [amount],
                        self.method,
                        self.selection,
                        skip=self._times * self.method.samples,
                    )
                warn_of_lost_layers(at)
                return Pruned(report_of(at, stages, self.method, self.selection, watch), at).told()

            made = Pruned.of(on_first_rank(pruned), objective)
        made.write()
        self._masks.remove(made.report.masks)
        self._times += 1
        self.history.append(replace(made.report, masks={}))
        return replace(made.report, masks=self.masks)

    @property
    def _kept(self) -> Tensor:
        """The masks as one vector `(d,)`, where the first weight is."""
        masks = self.masks
        device = next(iter(masks.values())).device
        return self.objective.layout.flatten({name: mask.to(device) for name, mask in masks.items()})


def _described(shape: tuple[int, ...] | None) -> str:
    return "no mask" if shape is None else f"a mask of shape {shape}"
