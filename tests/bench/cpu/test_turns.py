"""Calls that take turns."""

import pytest
from bench.cpu.engines import EngineError
from bench.cpu.turns import take_turns


class TestTurns:
    def test_rounds_go_in_turn_and_the_slow_sit_out(self):
        now, calls = [0.0], []

        def call(name, seconds):
            def run():
                calls.append(name)
                now[0] += seconds
                return seconds

            return run

        samples = take_turns(
            {"slow": call("slow", 10.0), "quick": call("quick", 1.0)},
            seconds=4.0,
            minimum_rounds=2,
            failed=lambda *_: pytest.fail("none does"),
            settle=lambda: None,
            clock=lambda: now[0],
        )
        assert calls == ["slow", "quick"] * 2 + ["quick"] * 2
        assert samples == {"slow": [10.0] * 2, "quick": [1.0] * 4}

    def test_an_engine_that_fails_is_told_and_has_no_samples(self):
        answers, told = iter([1.0, EngineError("gone")]), []

        def failing():
            answer = next(answers)
            if isinstance(answer, EngineError):
                raise answer
            return answer

        calls = {"failing": failing, "sound": lambda: 2.0}
        failed = lambda name, error: told.append((name, str(error)))  # noqa: E731
        samples = take_turns(calls, 0.0, 3, failed, settle=lambda: None)
        assert samples == {"sound": [2.0] * 3}
        assert told == [("failing", "gone")]
