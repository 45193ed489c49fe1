"""Calls that take turns: a b c a b c, so that a drift of the machine meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

from bench.cpu.engines.worker import EngineError

SETTLE_S = 0.02  # for the threads of the one that has just answered to fall asleep

Key = TypeVar("Key", bound=Hashable)


def take_turns(
    calls: Mapping[Key, Callable[[], float]],
    seconds: float,
    minimum_rounds: int,
    failed: Callable[[Key, EngineError], None],
    settle: Callable[[], None] = lambda: time.sleep(SETTLE_S),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, list[float]]:
    """Samples of each call, in rounds a b c a b c: a drift of the machine meets all of them.

    Each has so many seconds; one that has used them up, after the least number of rounds, sits out the rest, so that
    slow peers do not keep the quick ones from having many samples. A sample's index is its round.

    Args:
        calls: each gives one sample.
        seconds: that each may use.
        minimum_rounds: samples of each at least.
        failed: told of a call that raises EngineError, which has no samples then.
        settle: called between two calls.
        clock: seconds.
    """
    samples: dict[Key, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    while due := [n for n in samples if len(samples[n]) < minimum_rounds or spent[n] < seconds]:
        for name in due:
            settle()
            start = clock()
            try:
                samples[name].append(calls[name]())
            except EngineError as error:
                failed(name, error)
                del samples[name]
            spent[name] += clock() - start
    return samples
