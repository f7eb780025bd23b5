"""How a comparison keeps to its budget: iterations of a round, rounds of a session, sessions.

Sessions matter most: the interval is over processes. So rounds become fewer first, then shorter; there are fewer than
five sessions only where nothing else fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from .statistics import FEW

ROUND_S = 0.25  # of each case
ACCOUNT_S = 1.0  # of iterations that are looked at one by one
LONGEST = 2000  # iterations of a round
LEAD = 20  # iterations before the clock starts, at most: caches, branch predictors
LOG = 50  # iterations between two logs; a round has a whole number of them, where it has that many
ORDER_S = 0.06  # beside the iterations: an order, a sweep of garbage, the runner's start and end
PROBES = (2, 20, 100)  # iterations of the rounds from which times are estimated; a slow case has the first only
SLOW_S = 0.02
RESERVE_S = 12.0  # for the machine's limits, and for writing it all down


def make(took_s: Mapping[str, float], started_s: float, left_s: float, sessions: int, rounds: int) -> dict[str, Any]:
    """What fits.

    Args:
        took_s: case -> seconds of an iteration.
        started_s: seconds until all processes of a session are ready; those of the first are.
        left_s: seconds for all sessions.
        sessions, rounds: at most.
    Returns:
        sessions, rounds, rounds_of (case -> num_iters, lead, log_interval), session_s (what a session is expected to
        take). Where not even one session of two rounds fits, it is that: less would say nothing.
    """
    for fewest in (min(FEW, sessions), 1):
        for shorter in (1, 2, 4):
            rounds_of = {name: _round(seconds, ROUND_S / shorter) for name, seconds in took_s.items()}
            once = sum(ORDER_S + took_s[name] * (r["num_iters"] + r["lead"] + 1) for name, r in rounds_of.items())
            for number in range(sessions, fewest - 1, -1):
                fits = int((left_s - (number - 1) * started_s) / (number * once)) - 1  # each session warms up once
                if fits >= 2:
                    return _plan(number, min(rounds, fits), rounds_of, started_s, once)
    return _plan(1, 2, rounds_of, started_s, once)


def _plan(sessions: int, rounds: int, rounds_of: dict[str, Any], started_s: float, once_s: float) -> dict[str, Any]:
    session_s = started_s + (rounds + 1) * once_s
    return {"sessions": sessions, "rounds": rounds, "rounds_of": rounds_of, "session_s": session_s}


def _round(seconds: float, round_s: float) -> dict[str, int]:
    num_iters = max(1, min(LONGEST, round(round_s / seconds)))
    if num_iters >= LOG:
        num_iters = num_iters // LOG * LOG
    return {"num_iters": num_iters, "lead": max(1, min(LEAD, num_iters // 4)), "log_interval": min(LOG, num_iters)}


def account_iters(seconds: float) -> int:
    """Iterations that are looked at one by one, where one takes that long."""
    return max(12, min(400, round(ACCOUNT_S / seconds)))


def account_s(seconds: float) -> float:
    """Seconds that this takes: the iterations, a quarter of them again for the hooks, two for the plan."""
    return seconds * (ceil(1.25 * account_iters(seconds)) + 4)
