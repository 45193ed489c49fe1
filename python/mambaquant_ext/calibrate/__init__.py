"""Float model and token batches in, statistics out; streaming, in bounded memory."""

from mambaquant_ext.calibrate.collect import collect_moments, collect_ranges
from mambaquant_ext.calibrate.observers import RangeObserver

__all__ = ["RangeObserver", "collect_moments", "collect_ranges"]
