"""What fits into a budget, on made-up times."""

from __future__ import annotations

import pytest

from fastrunner.bench import schedule


def cost(plan: dict, took: dict[str, float], started_s: float) -> float:
    """Seconds, counted again: a warm-up round and the others in each session, starts from the second on."""
    once = sum(
        schedule.ORDER_S + took[name] * (r["num_iters"] + r["lead"] + 1) for name, r in plan["rounds_of"].items()
    )
    return plan["sessions"] * (plan["rounds"] + 1) * once + (plan["sessions"] - 1) * started_s


def test_as_asked_where_there_is_time():
    took = {"raw": 1e-3, "lightning": 1e-2}
    plan = schedule.make(took, 5.0, 400.0, sessions=6, rounds=6)
    assert (plan["sessions"], plan["rounds"]) == (6, 6)
    assert plan["rounds_of"]["raw"] == {"num_iters": 250, "lead": 20, "log_interval": 50}
    assert plan["rounds_of"]["lightning"] == {"num_iters": 25, "lead": 6, "log_interval": 25}


@pytest.mark.parametrize("seconds", [1e-5, 1e-3, 0.1, 0.7])
@pytest.mark.parametrize("left", [60.0, 150.0, 500.0])
def test_it_keeps_to_the_budget(seconds, left):
    took = {str(i): seconds * (1 + i) for i in range(9)}
    plan = schedule.make(took, 12.0, left, 6, 6)
    assert cost(plan, took, 12.0) <= left or (plan["sessions"], plan["rounds"]) == (1, 2)
    assert all(r["num_iters"] % r["log_interval"] == 0 for r in plan["rounds_of"].values())


def test_rounds_go_before_sessions():
    took = {str(i): 1e-3 for i in range(9)}
    plans = [schedule.make(took, 10.0, left, 6, 6) for left in (250.0, 140.0, 90.0, 60.0, 5.0)]
    assert [plan["sessions"] for plan in plans] == [6, 6, 5, 5, 1]
    assert [plan["rounds"] for plan in plans[:2]] == [6, 4]
    assert [plan["rounds_of"]["0"]["num_iters"] for plan in plans[2:4]] == [250, 50]


def test_the_account_is_in_the_reserve():
    assert [schedule.account_iters(seconds) for seconds in (1e-5, 0.01, 1.0)] == [400, 100, 12]
    assert schedule.account_s(1.0) == 1.25 * 12 + 4
