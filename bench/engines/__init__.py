"""Language models in each engine, behind one interface: ours and the peers. bench/workers.py runs them."""

from bench.engines.engine import (
    ENGINES,
    OURS,
    OURS_AVX2,
    Engine,
    EngineKind,
    engine_module,
    installed,
    load,
)

__all__ = [
    "ENGINES",
    "OURS",
    "OURS_AVX2",
    "Engine",
    "EngineKind",
    "engine_module",
    "installed",
    "load",
]
