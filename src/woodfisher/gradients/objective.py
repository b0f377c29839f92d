"""Model + data + loss → gradient rows, mean gradient and Hessian products for the chosen weights."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from woodfisher.checks import check_choice, check_count
from woodfisher.distributed import ALONE
from woodfisher.errors import NoFactorsError, WoodfisherError
from woodfisher.gradients.base import Gradients
from woodfisher.gradients.batches import (
    FORWARD_BATCH,
    check_data,
    map_tensors,
    read_apart,
    rechunk,
    samples_in,
    some,
    take,
)
from woodfisher.gradients.chunks import Chunk, Chunks
from woodfisher.gradients.flops import flops_of_modules, flops_of_weights
from woodfisher.gradients.forward import PRECISIONS, Forward, State, explained
from woodfisher.gradients.isolation import in_turns, isolated
from woodfisher.gradients.layout import Layout
from woodfisher.gradients.maker import RowMaker
from woodfisher.gradients.normalisation import fresh_statistics
from woodfisher.gradients.parameters import choose, existing_masks, inputs_first, module_of, unwrapped
from woodfisher.gradients.randomness import unmoved
from woodfisher.gradients.sharding import is_sharded, plain_copy
from woodfisher.gradients.signals import TRIED_ROWS_OF_OWN_LOSS
from woodfisher.gradients.writing import write
from woodfisher.memory import new_matrix
from woodfisher.watch import phase, report_progress, watching

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from woodfisher.distributed import Ranks
    from woodfisher.gradients.base import Labels
    from woodfisher.gradients.batches import Batch
    from woodfisher.gradients.forward import Precision
    from woodfisher.gradients.layer_rows import Factors, LayerRows

Changes = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Weights `(d,)`, which of them remain `(d,)`, and buffers that differ from the model's own."""

GRADIENT_WORKSPACE = 512 * 2**20
"""Bytes that a chunk of per-sample gradients with its activations may take."""


class ObjectiveOptions(TypedDict, total=False):
    """What an `Objective` takes beside model, data and loss."""

    params: str | Sequence[str] | None
    exclude: str | Sequence[str]
    sampler: Callable[[Any], Tensor] | None
    precision: Precision


class Objective(Gradients):
    """The loss of a model on data, as a function of the weights chosen for pruning.

    Nothing that an objective computes leaves a trace: model and loss run in evaluation mode on copies of buffers and
    samples, and training flags, gradients, what torch is set to and random generators are as before when it returns,
    and wherever an iterator hands over a part (but for a generator that is a loader's own, which goes on as samples are
    drawn, and for what the data itself does as it is read). It sees the weights in `weights`, which start as the
    model's own; `at` gives the same objective elsewhere, and only `write` changes the model.

    Parameters
    ----------
    model:
        Any module, also compiled, wrapped for several processes, or spread over them by `fully_shard` (each then
        makes the objective, at the same time); its chosen parameters may have any floating dtype (rows are float32,
        or float64 where one of them is).
    data:
        Iterable of batches: `(inputs, targets)`, or dicts for a model that returns `.loss`. Where `inputs`
        is itself a tuple or a dict, the model is called with its parts. None for methods that use no data.
    loss:
        `loss(outputs, targets)`, the mean over the samples of a batch (or one value a sample, which is then
        averaged). None for models that compute their own.
    params:
        Patterns (as in a shell: `encoder.*`, `*.weight`) of parameter names, or of names of modules that
        hold them. Default: the weights of Linear layers (transformers' Conv1D among them) and of convolutions; no
        biases, no norms, and not the packed weights of attention and recurrent layers (`in_proj_weight`,
        `weight_ih_l0`, ...), which patterns choose; a warning names what is left out.
    exclude:
        Patterns of what to leave out.
    sampler:
        `sampler(outputs) -> targets`, draws targets from the model's own distribution for
        `labels="model"`; known for the usual losses of torch.
    precision:
        Of the forward and backward passes for gradients: `float32` for that of the weights, or `bfloat16` for what
        torch's autocast makes of it, which is about twice as fast where the processor has it, and rounds rows by
        about 1 %. Losses that stages are checked on are rounded as well, those of targets are not.

    Attributes
    ----------
    layout:
        Names, shapes and order of the chosen weights; `d = layout.size`.
    model, source:
        The model that is run, and the one that was given, without its wrappers. They are the same, unless
        `fully_shard` has spread the latter over processes: then the former is a copy of whole weights.
    parameters, source_parameters:
        Name → the parameter of `model`, and that of `source`, of which this process may have a shard.
    weights:
        Their values, `(d,)`.
    buffers:
        Name → the model's buffers, as the objective sees them.
    kept:
        Bool `(d,)`: False where a weight is exactly zero or masked out by `torch.nn.utils.prune`. Such a
        weight counts as removed and takes part in no gradient row.
    ranks:
        The processes among which samples and weights are dealt out; this one alone unless pruning set others.
    base:
        Bytes that the process had when the run began that this belongs to; None outside of one.
    warnings:
        What making it warned of.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Batch] | None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        *,
        params: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        sampler: Callable[[Any], Tensor] | None = None,
        precision: Precision = "float32",
    ) -> None:
        self.source = unwrapped(model)
        if isinstance(model, torch.jit.ScriptModule):
            raise WoodfisherError(
                "a module that TorchScript made can't be pruned: give the one that it was made from."
            )
        check_choice("precision", precision, PRECISIONS)
        if loss is not None and not callable(loss):
            raise WoodfisherError(
                "loss must be a function loss(outputs, targets), as torch.nn.functional.cross_entropy is; a "
                f"{type(loss).__name__} came."
            )
        self.loss, self._sampler, self._precision = loss, sampler, precision
        check_data([] if data is None else data)
        self.data: Iterable[Batch] = [] if data is None else read_apart(data)
        self._sharded = is_sharded(self.source)
        with watching() as watch:
            self._bind(params, exclude)
        self.warnings = tuple(watch.warnings)
        self._read(None)
        if precision == "bfloat16" and self.dtype == torch.float64:
            raise WoodfisherError(
                "autocast leaves a float64 model as it is: convert it, or leave out precision=."
            )
        self.workspace = GRADIENT_WORKSPACE
        self._chunks = Chunks()
        self.ranks: Ranks = ALONE
        self.base: int | None = None

    def _bind(self, params: str | Sequence[str] | None, exclude: str | Sequence[str]) -> None:
        """Take the model as it is, or a plain copy of its shards, and choose weights of it."""
        self.model = plain_copy(self.source) if self._sharded else self.source
        self.parameters = choose(self.model, params, exclude)
        named = dict(self.source.named_parameters())
        self.source_parameters = {name: named[name] for name in self.parameters}
        forward = Forward(self.model, self.loss, self._sampler, self._precision)
        modules = {name: module_of(self.model, name) for name in self.parameters}
        self.layout = Layout(
            {name: tuple(p.shape) for name, p in self.parameters.items()},
            {
                name: getattr(module, "groups", 1)
                for name, module in modules.items()
                if self.parameters[name].ndim > 1 and inputs_first(module)
            },
        )
        self._maker, self._by_weight = (
            RowMaker(way, self.layout, modules, self.parameters) for way in (forward, forward.by_weight())
        )

    def changes(self) -> Changes:
        """What became of the model, for `changed` in another process."""
        return self.weights.cpu(), self.kept.cpu(), self.fresh_buffers()

    def fresh_buffers(self) -> dict[str, Tensor]:
        """Name → the buffers that are not the model's own, on the CPU."""
        own = dict(self.model.named_buffers())
        return {name: buffer.cpu() for name, buffer in self.buffers.items() if buffer is not own[name]}

    def changed(self, changes: Changes) -> Objective:
        """The same objective after the changes of another process."""
        weights, kept, buffers = changes
        return self.at(weights.to(self.device), kept.to(self.device)).with_buffers(buffers)

    def with_buffers(self, buffers: Mapping[str, Tensor]) -> Objective:
        """The same objective with some buffers, by name, in the place of others."""
        fresh = {name: buffer.to(self.buffers[name].device) for name, buffer in buffers.items()}
        return self._with(buffers={**self.buffers, **fresh})

    def among(self, ranks: Ranks) -> Objective:
        """The same objective, whose samples and weights are dealt out among several processes."""
        return self._with(ranks=ranks)

    def joined(self) -> Objective:
        return self

    def current(self, kept: Tensor | None = None, *, steps: int | None = None) -> Objective:
        """The same objective where the model is now, of whose weights those in `kept` `(d,)` remain.

        Without `kept` these are the ones that are not zero, as for a new objective. The model may have moved to
        another device or dtype. `steps` of training have led there, if any: an error says so.
        """
        if self._sharded:
            self._bind(list(self.layout.shapes), ())  # of this one, or there would be two copies of the model
        other = self._with()
        other._read(kept, steps)
        return other

    def _read(self, kept: Tensor | None, steps: int | None = None) -> None:
        """Take everything that training changes from the model."""
        own = self.parameters.values()
        self.device = next(iter(own)).device
        absent = next((name for name, p in self.model.named_parameters() if p.is_meta), None)
        if absent is not None:
            raise WoodfisherError(
                f"{absent!r} is on the device meta, without values: load the weights first."
            )
        self.dtype = torch.float64 if any(p.dtype == torch.float64 for p in own) else torch.float32
        self.buffers = dict(self.model.named_buffers())
        weights = self._flat(self.parameters)
        if not torch.isfinite(weights).all():
            bad = self.layout.name_at(int((~torch.isfinite(weights)).nonzero()[0]))
            after = f" after {steps} steps of training: lower the learning rate, or go on from an earlier checkpoint."
            advice = ": load a sound one." if steps is None else after
            raise WoodfisherError(f"the model's own weight {bad!r} holds NaN or infinity{advice}")
        if kept is None:
            kept = (weights != 0) & self._flat(existing_masks(self.model, self.parameters)).bool()
        self.layout.check(kept, "kept")
        kept = kept.to(self.device)
        self.weights, self.kept = torch.where(kept, weights, 0), kept

    @property
    def forward(self) -> Forward:
        """The model with its loss."""
        return self._maker.forward

    @property
    def flow_itemsize(self) -> int:
        if self.forward.precision == "bfloat16":
            return 2
        return max((p.dtype.itemsize for p in self.parameters.values()), default=self.dtype.itemsize)

    def on(self, data: Iterable[Batch]) -> Objective:
        """The same objective on other data."""
        check_data(data)
        return self._with(data=data)

    def on_weighted(self, data: Iterable[Batch]) -> Objective:
        """The same objective on batches `(inputs, (targets, weights))`, of whose mean each sample has a share."""
        return self._with(data=data, _maker=self._by_weight)

    def recalibrated(self, samples: int) -> Objective:
        """The same objective with the statistics of batch normalisation taken anew at its weights.

        Running means and variances become their plain averages over batches of the first `samples` samples,
        from forward passes alone. Models without such layers stay as they are.
        """
        check_count("samples", samples)
        return self.with_buffers(fresh_statistics(self, samples))

    def state(self, weights: Tensor | None = None) -> State:
        """What the model is run on: `weights` `(d,)`, its own by default, in the model's dtypes, and the buffers."""
        parts = self.layout.split(self.weights if weights is None else weights)
        return State({name: part.to(self.parameters[name]) for name, part in parts.items()}, self.buffers)

    def on_device(self, batch: Batch) -> Batch:
        """The batch where the model is."""
        return map_tensors(lambda t: t.to(self.device), batch)

    def mean_loss(self, *, rounded: bool = False) -> float:
        """Mean loss over all of the data, from forward passes alone; `rounded` in the precision of gradients.

        NaN or infinity where the model gives it, and NaN where no sample has a target that counts.
        """
        total, count, seen = 0.0, 0.0, False
        precision = self.forward.precision if rounded else "float32"
        with isolated(self.model), torch.no_grad():
            state = self.state()
            for number, chunk in enumerate(rechunk(self.data, FORWARD_BATCH, 1)):
                counted, seen = self.forward.counted(chunk), True
                count += counted
                if counted and number % self.ranks.size == self.ranks.rank:
                    chunk = self.on_device(chunk)
                    with explained(chunk):
                        total += float(self.forward.mean_loss(state, chunk, precision)) * counted
                    self._chunks.check_mean(self, some(chunk, 0, 1))
        if not seen:
            raise WoodfisherError("the mean loss of no samples was asked for: the data holds no batch.")
        return sum(self.ranks.gather(total)) / count if count else math.nan

    def least_loss(self) -> float:
        """The smallest loss of a sample of the data; of a batch, where the model computes its own loss."""
        with isolated(self.model), torch.no_grad():
            chunks = (self.on_device(chunk) for chunk in rechunk(self.data, FORWARD_BATCH, 1))
            return min((self.forward.least_loss(self.state(), chunk) for chunk in chunks), default=math.inf)

    def flops(self) -> Tensor:
        """FLOPs that each weight takes part in for one sample, int64 `(d,)`: two at each place where it is used.

        Those of matrix products and convolutions are counted; biases and norms take part in none. Data that can be
        read only once is refused, since counting would take its first samples.
        """
        return flops_of_weights(self)

    def first_samples(self, most: int, group: int = 1) -> Batch | None:
        """As many samples as the first batch has, `most` at most, and `group` at least where there are as many.

        Drawn with no trace on random generators.
        """
        with isolated(self.model), unmoved(self.data):
            batches = take(self.data, most)
            first = next(batches, None)
            if first is not None and samples_in(first) < group:
                first = next(rechunk(chain([first], batches), group, group), first)
        return None if first is None else self.on_device(first)

    def row_bytes(self, group: int = 1) -> int:
        first = self.first_samples(group, group)
        return 0 if first is None else self._chunks.bytes_saved(self, first)

    def forward_flops(self) -> int:
        return (flops_of_modules(self) or {}).get("", 0)

    def iter_rows(
        self,
        samples: int,
        *,
        group: int = 1,
        labels: Labels = "data",
        columns: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Iterator[Tensor]:
        self.layout.check_columns(columns)
        width = self.layout.size if columns is None else len(columns)

        def made(chunk: Chunk) -> Tensor:
            with phase("gradients"):
                here = (
                    new_matrix(chunk.count, width, self.dtype, self.device)
                    if out is None
                    else out[chunk.first : chunk.first + chunk.count]
                )
                self.fill_rows(here, chunk, columns)
            return here

        return in_turns(self.model, map(made, self.row_chunks(samples, group, labels, 2 * width)))

    def iter_layer_rows(
        self, samples: int, *, group: int = 1, labels: Labels = "data", names: Sequence[str] | None = None
    ) -> Iterator[dict[str, LayerRows]]:
        names = list(self.layout.shapes if names is None else names)
        self._maker.check_possible(names)
        able = {} if self.reads_once else self.factors(group)
        floats = 2 * sum(able[name].floats for name in names if name in able)

        def made(chunk: Chunk) -> dict[str, LayerRows]:
            with phase("gradients"):
                return self.layer_rows(chunk, names)

        return in_turns(self.model, map(made, self.row_chunks(samples, group, labels, floats)))

    def squares(self, samples: int, *, group: int = 1, labels: Labels = "data") -> tuple[Tensor, int]:
        able = self.factors(group)
        factored = able.keys() == self.layout.shapes.keys()
        width = sum(each.floats for each in able.values()) if factored else self.layout.size
        total = torch.zeros(self.layout.size, dtype=torch.float64, device=self.device)
        count = 0
        with isolated(self.model):
            for number, chunk in enumerate(self.row_chunks(samples, group, labels, 2 * width)):
                count += chunk.count
                if number % self.ranks.size == self.ranks.rank:
                    with phase("gradients"):
                        total += self._squares_of(chunk)
        return self.ranks.sum(total) * self.kept, count

    def _squares_of(self, chunk: Chunk) -> Tensor:
        """From factors, or from as many dense rows at a time as there is room for."""
        found = self._maker.squares(self.state(), chunk, self.workspace)
        if found is not None:
            return found
        total = torch.zeros(self.layout.size, dtype=torch.float64, device=self.device)
        step = max(self.workspace // (2 * self.layout.size * self.dtype.itemsize), 1)
        for first in range(0, chunk.count, step):
            part = chunk.part(first, first + step)
            rows = new_matrix(part.count, self.layout.size, self.dtype, self.device)
            self.fill_rows(rows, part)
            total += rows.double().square().sum(0)
        return total

    def factors(self, group: int = 1) -> dict[str, Factors]:
        if self.reads_once:
            return {}
        with isolated(self.model):
            batch = self.first_samples(TRIED_ROWS_OF_OWN_LOSS * group, group)
            if batch is None or samples_in(batch) < group:
                return {}
            return self._factors_of(batch, group)

    def _factors_of(self, batch: Batch, group: int) -> dict[str, Factors]:
        """`factors` tried on the first rows of a batch, for the first one of its form."""
        return self._maker.signals.factors(self.state(), batch, group, self.workspace)

    def row_chunks(
        self, samples: int, group: int, labels: Labels, floats: int, told: str = "gradients"
    ) -> Iterator[Chunk]:
        """Chunks of samples with their targets, for whoever is `isolated`; progress goes by the name `told`.

        A row takes `floats` numbers beside what its backward pass needs.
        """
        check_count("samples", samples)
        check_count("group", group)
        check_choice("labels", labels, ("data", "model"))
        if samples < group:
            raise WoodfisherError(f"a row averages {group} samples; samples={samples} make no row.")
        state, done = self.state(), 0
        for batch in self._chunks.of(self, samples, group, floats):
            if labels == "model":
                with phase("gradients"):
                    batch = self.forward.with_sampled_targets(state, batch)
            count = samples_in(batch) // group
            yield Chunk(batch, done, count, group)
            done += count
            report_progress(told, done, samples // group)

    def fill_rows(self, out: Tensor, chunk: Chunk, columns: Tensor | None = None) -> None:
        """Write the rows of a chunk to `out` `(c, k)`, of the weights in `columns` `(k,)` or all."""
        self._maker.fill(out, self.state(), chunk, columns, self.workspace)
        kept = self.kept if columns is None else self.kept[columns]
        if not kept.all():
            out *= kept

    def layer_rows(self, chunk: Chunk, names: Sequence[str]) -> dict[str, LayerRows]:
        """The rows of a chunk in factor form, of the weights in `names`."""
        return self._maker.layer_rows(self.state(), chunk, names)

    def iter_fisher_rows(self, samples: int) -> Iterator[Tensor]:
        """Rows `(c, d)` whose outer products, summed and divided by `samples`, are the Fisher (docs/method.md §2).

        The expectation over the model's distribution is exact for the usual losses of torch and up to 100 classes
        or outputs: as many rows a sample, √p(y | x) ∇ℓ(y, x). Otherwise each sample gives one row, of a drawn target.
        """
        return in_turns(self.model, self._fisher_rows(samples))

    def _fisher_rows(self, samples: int) -> Iterator[Tensor]:
        state = self.state()
        for chunk in self.row_chunks(samples, 1, "data", 2 * self.layout.size, "Fisher"):
            for share, batch in self.forward.with_every_target(state, chunk.batch):
                rows = torch.empty(chunk.count, self.layout.size, dtype=self.dtype, device=self.device)
                with phase("gradients"):
                    self.fill_rows(rows, replace(chunk, batch=batch))
                yield rows * share[:, None].to(rows).sqrt()

    def gradient(self, samples: int) -> Tensor:
        total = torch.zeros(self.layout.size, dtype=torch.float64, device=self.device)
        count, seen = 0.0, 0
        with phase("gradients"), isolated(self.model):
            state = self.state()
            for number, batch in enumerate(self._chunks.of(self, samples, 1, 0, mean=True)):
                counted, here = self.forward.counted(batch), samples_in(batch)
                if counted and number % self.ranks.size == self.ranks.rank:
                    gradients = self.forward.gradient(state, batch)
                    flat = self._flat(gradients)
                    self._maker.check_finite(flat[None], Chunk(batch, seen, 1, here))
                    total += flat * counted
                count, seen = count + counted, seen + here
        return (self.ranks.sum(total) / (count or 1) * self.kept).to(self.weights)

    def gradient_norms(self, batch: Batch) -> Tensor | None:
        """How large the gradients of single samples are at most, by the last layer that has factor form: `(n,)`.

        That is the norm of what flows into it times that of what flows back, for which the backward pass goes no
        further. None where no layer has factor form, the losses of samples don't add up, or one is not finite.
        """
        norms = torch.zeros(samples_in(batch), dtype=torch.float64, device=self.device)
        last, done = "", 0
        with phase("gradients"), isolated(self.model):
            for number, chunk in enumerate(rechunk([batch], FORWARD_BATCH, 1)):
                chunk, count = self.on_device(chunk), samples_in(chunk)
                if number == 0:
                    last = self._last_with_factors(chunk)
                    if not last:
                        return None
                if number % self.ranks.size == self.ranks.rank:
                    norms[done : done + count] = self._largest_gradients(chunk, count, last)
                done += count
        norms = self.ranks.sum(norms)
        return norms if norms.isfinite().all() else None

    def _last_with_factors(self, chunk: Batch) -> str:
        """The last weight that has factor form; none where the losses of samples don't add up."""
        with explained(chunk):
            able = self._factors_of(chunk, 1) if self.forward.adds_up(self.state(), chunk) else {}
        return next((name for name in reversed(list(self.layout.shapes)) if name in able), "")

    def _largest_gradients(self, chunk: Batch, count: int, name: str) -> Tensor | float:
        try:
            return self._maker.signals.rows(self.state(), chunk, count, [name])[name].most_norms()
        except NoFactorsError:
            return math.nan

    def hessian_columns(self, samples: int, columns: slice) -> Tensor:
        """Columns of the Hessian of the mean loss over the first `samples` samples: float64 `(d, k)`.

        Rows and columns of removed weights are zero. The loss must be twice differentiable in torch.
        """
        index = torch.arange(self.layout.size, device=self.device)[columns]
        total = torch.zeros(self.layout.size, len(index), dtype=torch.float64, device=self.device)
        count = 0.0
        eye = torch.nn.functional.one_hot(index, self.layout.size).to(self.weights)
        with (
            phase("gradients"),
            isolated(self.model),
            sdpa_kernel(SDPBackend.MATH),  # the others have no second derivative
        ):
            for chunk in self._chunks.of(self, samples, 1, 0, mean=True):
                counted = self.forward.counted(chunk)
                product = self._hessian_product(chunk, eye) if counted else None
                if product is not None:
                    total += product.mT.double() * counted
                count += counted
        return total / (count or 1) * self.kept[:, None] * self.kept[index]

    @torch.enable_grad()
    def _hessian_product(self, chunk: Batch, vectors: Tensor) -> Tensor | None:
        """`vectors` `(k, d)` times the Hessian of the mean loss of a chunk; None where its gradient is constant."""
        flat = self.weights.clone().requires_grad_()
        state = self.state(flat)

        def product() -> Tensor | None:
            loss = self.forward.mean_loss(state, chunk)
            (gradient,) = torch.autograd.grad(loss, flat, create_graph=True)
            if not gradient.requires_grad:
                return None
            return torch.autograd.grad(gradient, flat, vectors, is_grads_batched=True)[0]

        with explained(chunk):
            return self.forward.at(state.copied(), product)

    def write(self, model: nn.Module | None = None) -> None:
        """Put `weights` (removed ones exactly zero) and `buffers` into the model, or into another one like it.

        Other parameters stay, and those of another model must be equal to this one's. Raises before the first change.
        """
        write(self, model)

    def _flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Named tensors → `(d,)` in the dtype and on the device of the flat weights."""
        out = torch.empty(self.layout.size, dtype=self.dtype, device=self.device)
        for name, where in self.layout.slices.items():
            out[where] = tensors[name].detach().reshape(-1)
        return out
