"""Float model and batches in, statistics out; streaming, in bounded memory."""

from mambaquant_ext.calibrate.agreement import check_stand_ins
from mambaquant_ext.calibrate.collect import collect_moments, collect_ranges
from mambaquant_ext.calibrate.observers import RangeObserver
from mambaquant_ext.calibrate.runs import (
    BlockRun,
    CalibrationRun,
    LanguageRun,
    ModuleRun,
    token_ids,
)

__all__ = [
    "BlockRun",
    "CalibrationRun",
    "LanguageRun",
    "ModuleRun",
    "RangeObserver",
    "check_stand_ins",
    "collect_moments",
    "collect_ranges",
    "token_ids",
]
