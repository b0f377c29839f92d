"""`woodfisher export`."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from rich.table import Table
from tyro.conf import arg

from woodfisher.checks import check_count, check_positive
from woodfisher.cli.console import note, out, print_json
from woodfisher.cli.example import example_inputs
from woodfisher.cli.options import File, Folder, Number, load_on
from woodfisher.errors import WoodfisherError
from woodfisher.export import (
    OnnxModel,
    Race,
    difference,
    load_export,
    measure_layers,
    race,
    save_dense,
    save_export,
    to_onnx,
    to_semi_structured,
    to_sparse,
)
from woodfisher.files import check_folder, check_other_file, save_json, text_of, write_folder
from woodfisher.gradients.batches import map_tensors, samples_in
from woodfisher.gradients.outputs import outputs_of
from woodfisher.surgeon.channels import cost_of, shrink

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from woodfisher.export import LayerSpeed

    Forward = Callable[[Any], list[torch.Tensor]]


@dataclass(frozen=True)
class Export:
    """Write a pruned model in a form that is smaller to ship or faster to run.

    The file is read back, and its outputs on samples of the task must be those of the pruned model; otherwise nothing
    is written.

    dense: a plain safetensors file, which loads without this package. onnx: for onnxruntime and others, with any
    batch size; it computes with all weights, zeros included. csr: Linear and convolution layers with sparse weights,
    for the CPU, where the measurement says that they are faster. channels: without the channels that are zero.
    2:4: for NVIDIA GPUs.

    Writes OUT/model.safetensors or OUT/model.onnx, and OUT/export.json.
    """

    to: Literal["dense", "onnx", "csr", "2:4", "channels"]
    """The form."""

    task: str = "digits"
    """The task whose model was pruned, as in `woodfisher prune`."""

    weights: File = None
    """Its pruned weights: the model.safetensors of `woodfisher prune` or `train`."""

    data_root: Folder = None
    """Folder of the task's data files (default: $WOODFISHER_DATA)."""

    device: str = "cpu"
    """Where to compute: cpu, cuda or cuda:N."""

    measure: bool = False
    """Time the dense and the exported model in turns, on one sample and on a batch."""

    batch: int = 64
    """Samples in that batch."""

    layers: Annotated[tuple[str, ...], arg(metavar="LAYER [LAYER ...]", help_behavior_hint="")] = ()
    """csr: convert these layers (default: those that measure faster, on one sample)."""

    samples: int = 64
    """Samples on which outputs are compared."""

    tolerance: Number = None
    """Largest difference of outputs, as a fraction of the largest output (default: 1e-5; 1e-2 for 2:4, which computes
    in half precision)."""

    out: Folder = None
    """Folder for the results (default: the folder of the weights, and in it TO); files there are replaced."""

    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""

    def run(self) -> None:
        """Check everything, convert, compare, measure, write, show."""
        check_count("batch", self.batch)
        check_count("samples", self.samples)
        form = _FORMS[self.to]
        tolerance = self._allowed
        check_positive("tolerance", tolerance, "the largest difference of outputs that is allowed")
        if self.weights is None:
            raise WoodfisherError(
                "name the pruned weights with --weights: the model.safetensors of `woodfisher prune` or `train`."
            )
        if self.layers and self.to != "csr":
            raise WoodfisherError("--layers belongs to --to csr.")
        if self.measure and self.to == "dense":
            raise WoodfisherError(
                "a dense export is as fast as the dense model: --measure belongs to the others."
            )
        folder = self.out or self.weights.parent / self.to.replace(":", "-")
        check_folder(folder)
        check_other_file(folder / form.file, self.weights)
        note(f"loading {self.task}")
        task = load_on(self.device, self.task, data_root=self.data_root, weights=self.weights)
        model = task.model.eval()
        if form.half:
            model = model.half()
        inputs = example_inputs(task, max(2, self.samples, self.batch))
        with tempfile.TemporaryDirectory() as scratch:
            draft = Path(scratch) / form.file
            layers = form.write(self, model, inputs, draft) or []
            exported = form.read(model, draft)
            checked = _first(inputs, self.samples)
            apart = difference(exported(checked), outputs_of(model, checked))
            if not apart <= tolerance:
                raise WoodfisherError(
                    f"the outputs of the exported model are {apart:.1e} of the largest output away from the pruned "
                    f"model's on {samples_in(checked)} samples, and at most {tolerance:.1e} is allowed: nothing was "
                    "written. --tolerance allows more."
                )
            content: dict[str, Any] = {
                "task": self.task,
                "to": self.to,
                "weights": text_of(self.weights),
                "samples": samples_in(checked),
                "difference": apart,
                "tolerance": tolerance,
                "bytes": {
                    "dense": sum(t.numel() * t.element_size() for t in model.state_dict().values()),
                    "stored": draft.stat().st_size,
                },
                "layers": [layer.to_dict() for layer in layers],
                "measured": self._measured(model, exported, inputs) if self.measure else [],
                "out": text_of(folder),
            }
            write_folder(
                folder,
                {
                    form.file: partial(shutil.copyfile, draft),
                    "export.json": lambda path: save_json(content, path),
                },
            )
        if self.json:
            print_json(content)
        else:
            _show(content)

    @property
    def _allowed(self) -> float:
        """The tolerance."""
        return _FORMS[self.to].tolerance if self.tolerance is None else self.tolerance

    def _write_dense(self, model: nn.Module, inputs: Any, path: Path) -> None:
        save_dense(model, path)

    def _write_onnx(self, model: nn.Module, inputs: Any, path: Path) -> None:
        to_onnx(model, _first(inputs, max(2, self.samples)), path, tolerance=self._allowed)

    def _write_csr(self, model: nn.Module, inputs: Any, path: Path) -> list[LayerSpeed]:
        one = _first(inputs, 1)
        layers = measure_layers(model, one)
        sparse = to_sparse(model, self._chosen(layers))
        if not self.layers:
            self._check_faster(model, sparse, one)
        save_export(sparse, path)
        return layers

    def _write_semi_structured(self, model: nn.Module, inputs: Any, path: Path) -> None:
        save_export(to_semi_structured(model), path)

    def _write_channels(self, model: nn.Module, inputs: Any, path: Path) -> None:
        one = _first(inputs, 1)
        small = shrink(model, one)
        if cost_of(small, one).parameters == cost_of(model, one).parameters:
            raise WoodfisherError(
                "no channel of the model can be cut out: prune it with --pattern coupled-channels, or take another "
                "form."
            )
        save_export(small, path)

    def _chosen(self, layers: list[LayerSpeed]) -> dict[str, str]:
        """Name → layout of the layers to convert."""
        if self.layers:
            layouts = {layer.name: layer.layout for layer in layers}
            return {name: layouts.get(name, "csr") for name in self.layers}
        chosen = {layer.name: layer.layout for layer in layers if layer.race.won}
        if not chosen:
            best = max(layers, key=lambda layer: layer.race.speedup, default=None)
            told = (
                "it has no zeros in layers that can be sparse"
                if best is None
                else f"the best, {best.name} at {best.sparsity:.1%}, takes {1 / best.race.speedup:.2f} of the dense "
                f"time, with {best.race.threads} of torch's threads"
            )
            raise WoodfisherError(
                f"dense is faster here: no layer of the model is faster with a sparse weight beyond the spread of "
                f"the measurement ({told}). Nothing was written. --layers converts the ones that you name."
            )
        return chosen

    def _check_faster(self, model: nn.Module, sparse: nn.Module, inputs: Any) -> None:
        """Layers that are faster alone need not make the whole so, as when something else disturbed their timing."""
        timed = race(partial(outputs_of, model, inputs), partial(outputs_of, sparse, inputs))
        if timed.lost:
            raise WoodfisherError(
                f"dense is faster here: with the layers sparse that are faster alone, the model takes "
                f"{1 / timed.speedup:.2f} of the dense time, with {timed.threads} of torch's threads. Nothing was "
                "written. --layers converts the ones that you name."
            )

    def _measured(self, model: nn.Module, exported: Forward, inputs: Any) -> list[dict[str, Any]]:
        results = []
        for count in dict.fromkeys((1, self.batch)):
            some = _first(inputs, count)
            note(f"timing batches of {count}")
            timed = race(partial(outputs_of, model, some), partial(exported, some))
            results.append({"batch": samples_in(some), **timed.to_dict(), "verdict": _verdict(timed)})
        return results


def _read_export(model: nn.Module, path: Path) -> Forward:
    return partial(outputs_of, load_export(model, path))


class _Form(NamedTuple):
    """A form: what writes it, and says of layers how they were timed; what reads it back; and how exact it is.

    With `half`, the model that it is made of and compared with is in half precision.
    """

    write: Callable[[Export, nn.Module, Any, Path], list[LayerSpeed] | None]
    read: Callable[[nn.Module, Path], Forward] = _read_export
    file: str = "model.safetensors"
    tolerance: float = 1e-5
    half: bool = False


_FORMS = {
    "dense": _Form(Export._write_dense),
    "onnx": _Form(Export._write_onnx, lambda _, path: OnnxModel(path), "model.onnx"),
    "csr": _Form(Export._write_csr),
    "2:4": _Form(Export._write_semi_structured, tolerance=1e-2, half=True),
    "channels": _Form(Export._write_channels),
}


def _first(inputs: Any, count: int) -> Any:
    return map_tensors(lambda t: t[:count].contiguous(), inputs)


def _verdict(timed: Race) -> str:
    if timed.won:
        return f"{timed.speedup:.2f} times as fast as dense"
    if timed.lost:
        return f"dense is faster: {timed.speedup:.2f} times as fast as dense"
    return f"no difference beyond the spread: {timed.speedup:.2f} times as fast as dense"


def _show(content: dict[str, Any]) -> None:
    console = out()
    if content["layers"]:
        table = Table(title="Layers on one sample: time of the sparse weight against the dense one")
        table.add_column("layer")
        for column in ("shape", "sparsity", "layout", "dense, µs", "sparse, µs", "ratio"):
            table.add_column(column, justify="right")
        for layer in content["layers"]:
            table.add_row(
                layer["name"],
                "×".join(map(str, layer["shape"])),
                f"{layer['sparsity']:.1%}",
                layer["layout"],
                *(_microseconds(layer[side]) for side in ("dense", "sparse")),
                f"{layer['speedup']:.2f}",
            )
        console.print(table)
    for each in content["measured"]:
        threads = "1 thread" if each["threads"] == 1 else f"{each['threads']} threads"
        console.print(
            f"batch {each['batch']}, {threads}: dense {_microseconds(each['dense'])} µs, exported "
            f"{_microseconds(each['sparse'])} µs: {each['verdict']}",
            soft_wrap=True,
        )
    if content["measured"] and content["to"] == "onnx":
        console.print(
            "onnxruntime computes with zeros, too: the difference is its own and not that of pruning.",
            soft_wrap=True,
        )
    sizes = content["bytes"]
    console.print(
        f"Outputs on {content['samples']} samples differ by {content['difference']:.1e} of the largest one at most "
        f"({content['tolerance']:.0e} allowed); {sizes['stored']:,} bytes, dense {sizes['dense']:,}",
        soft_wrap=True,
    )
    console.print(f"Results are in {content['out']}", soft_wrap=True)


def _microseconds(timing: dict[str, float]) -> str:
    """Median and quartiles."""
    median, low, high = (1e6 * timing[key] for key in ("median", "low", "high"))
    return f"{median:.0f} ({low:.0f}-{high:.0f})"
