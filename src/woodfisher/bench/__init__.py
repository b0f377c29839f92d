"""How fast the factor-and-score phase is on a machine, beside its limits and beside the recursions it replaces."""

from woodfisher.bench.measure import Bench, Case, Error, Grid, Measurement, PeerMeasurement, run_bench
from woodfisher.bench.spread import Spread

__all__ = ["Bench", "Case", "Error", "Grid", "Measurement", "PeerMeasurement", "Spread", "run_bench"]
