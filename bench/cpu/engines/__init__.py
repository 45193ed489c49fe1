"""Language models in each engine, behind one interface: ours and the peers, each in a process of its own."""

from bench.cpu.engines.engine import (
    ENGINES,
    KINDS,
    OURS,
    OURS_AVX2,
    WAYS,
    Engine,
    EngineKind,
    engine_module,
    installed,
    load,
)
from bench.cpu.engines.worker import EngineError, Worker

__all__ = [
    "ENGINES",
    "KINDS",
    "OURS",
    "OURS_AVX2",
    "WAYS",
    "Engine",
    "EngineError",
    "EngineKind",
    "Worker",
    "engine_module",
    "installed",
    "load",
]
