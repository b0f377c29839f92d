"""Pruned models in the forms in which they run faster, and measurements of whether they do."""

from woodfisher.export.onnx import OnnxModel, to_onnx
from woodfisher.export.semistructured import semi_structured_layers, to_semi_structured
from woodfisher.export.sparse import LayerSpeed, SparseConv2d, SparseLinear, measure_layers, to_sparse
from woodfisher.export.stored import load_export, save_dense, save_export
from woodfisher.export.timing import Race, Timing, race
from woodfisher.gradients.outputs import difference

__all__ = [
    "LayerSpeed",
    "OnnxModel",
    "Race",
    "SparseConv2d",
    "SparseLinear",
    "Timing",
    "difference",
    "load_export",
    "measure_layers",
    "race",
    "save_dense",
    "save_export",
    "semi_structured_layers",
    "to_onnx",
    "to_semi_structured",
    "to_sparse",
]
