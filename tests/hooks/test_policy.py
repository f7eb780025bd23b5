"""What lr and momentum policies share: one evaluation for equal bases, values per group and optimizer, checks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrunner.hooks.lr import format_param
from fastrunner.hooks.policy import Spread, per_optimizer
from fastrunner.hooks.policy_checks import check_numbers, check_one_of, check_target_ratio


def sgd(groups: int = 2) -> torch.optim.SGD:
    return torch.optim.SGD([dict(params=[torch.zeros(1, requires_grad=True)]) for _ in range(groups)], lr=0.1)


@given(st.lists(st.lists(st.sampled_from([0.1, 0.2, 0.4, 7.0]), max_size=12), min_size=1, max_size=5))
def test_spread_is_a_map_that_calls_once_for_equal_values(rounds):
    spread = Spread()
    for values in rounds:  # one object throughout: what it remembers of the last round must not leak into the next
        calls = []
        assert spread(lambda v, calls=calls: calls.append(v) or v + 1, values) == [v + 1 for v in values]
        assert sorted(calls) == sorted(set(values))


def test_spread_notices_a_value_written_in_place():
    spread, bases = Spread(), [0.1, 0.1, 0.2]
    assert spread(lambda v: v, bases) == [0.1, 0.1, 0.2]
    bases[1] = 0.3
    assert spread(lambda v: v, bases) == [0.1, 0.3, 0.2]


def test_per_optimizer_names_a_single_one_by_its_class():
    one, two = sgd(), sgd()
    assert per_optimizer(one, lambda name, optimizer: (name, optimizer)) == ("SGD", one)
    assert per_optimizer(dict(a=one, b=two), lambda name, optimizer: (name, optimizer)) == dict(
        a=("a", one), b=("b", two)
    )


@pytest.mark.parametrize(
    ("param", "expected"),
    [
        (0.5, [0.5, 0.5]),
        ([0.5, 0.25], [0.5, 0.25]),
        ((1, 2), [1, 2]),
        (dict(SGD=3), [3, 3]),
        (dict(SGD=[1, 2]), [1, 2]),
    ],
)
def test_format_param(param, expected):
    assert format_param("SGD", sgd(), param) == expected


def test_format_param_says_what_does_not_fit():
    with pytest.raises(ValueError, match="SGD has 2 param groups, but 3 values are given"):
        format_param("SGD", sgd(), [1, 2, 3])
    with pytest.raises(KeyError, match=r"no value for the optimizer 'SGD', only for \['Adam'\]"):
        format_param("SGD", sgd(), dict(Adam=1))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("1e-3", TypeError, r"min_lr must be a number, got '1e-3' \(yaml reads 1e-3 as text; write 1.0e-3\)"),
        (None, TypeError, "min_lr must be a number, got None"),
        (True, TypeError, "min_lr must be a number, got True"),
        (float("nan"), ValueError, "min_lr must be finite, got nan"),
    ],
)
def test_check_numbers(value, error, message):
    with pytest.raises(error, match=message):
        check_numbers(gamma=0.1, min_lr=value)


@pytest.mark.parametrize(("given_", "count"), [(dict(a=None, b=None), 0), (dict(a=0, b=0.1), 2)])
def test_check_one_of(given_, count):
    with pytest.raises(ValueError, match=f"give exactly one of a and b, got {count} of them"):
        check_one_of(**given_)


def test_zero_is_given():
    check_one_of(a=0, b=None)
    with pytest.raises(TypeError, match="b must be a number"):
        check_one_of(a=None, b="0.1")


@pytest.mark.parametrize("one", [4.0, 4, (4.0,), [4.0]])
def test_a_single_target_ratio_ends_far_below(one):
    assert check_target_ratio(one) == (4.0, 4.0 / 1e5)


@pytest.mark.parametrize("bad", ["4", (), (1, 2, 3), None, dict(high=4)])
def test_other_target_ratios_are_refused(bad):
    with pytest.raises(ValueError, match="target_ratio must be a number or a tuple of one or two"):
        check_target_ratio(bad)
