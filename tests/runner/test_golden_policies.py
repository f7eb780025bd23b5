"""Learning rates and momenta of every policy are mmcv 1.7.2's, bit for bit (golden/policies.json)."""

from __future__ import annotations

import pytest
from golden import policies, scenarios

import fastrunner

GOLDEN = scenarios.golden("policies")

# Not built yet; a policy that is must leave this list, and is then compared.
MISSING = {
    *(f"{name}LrUpdaterHook" for name in (
        "Exp", "Poly", "Inv", "CosineAnnealing", "FlatCosineAnnealing", "CosineRestart", "Cyclic", "OneCycle",
        "LinearAnnealing",
    )),
    *(f"{name}MomentumUpdaterHook" for name in (
        "Step", "CosineAnnealing", "LinearAnnealing", "Cyclic", "OneCycle",
    )),
}  # fmt: skip
# Decided differently: where mmcv has a bare assert, ours says what is wrong; a config without the key is a KeyError.
INSTEAD_OF_AN_ASSERT = ("TypeError", "ValueError")
NO_POLICY = "KeyError"


def hooks_of(case):
    """The class names that a case builds."""
    names = set()
    for what, suffix in (("lr", "LrUpdaterHook"), ("momentum", "MomentumUpdaterHook")):
        policy = case.get(what, {}).get("policy")
        if policy not in (None, "nothing", "cosineannealing"):
            names.add((policy.title() if policy == policy.lower() else policy) + suffix)
    return names


def test_missing_policies_are_known():
    known = set().union(*map(hooks_of, policies.CASES.values()))
    assert {name for name in known if name not in fastrunner.HOOKS} == MISSING


@pytest.mark.parametrize("name", [name for name, case in policies.CASES.items() if not hooks_of(case) & MISSING])
def test_policies_are_mmcvs(name):
    ours, expected = scenarios.play("policies", name, fastrunner), GOLDEN[name]
    if expected.get("error") == "AssertionError":
        wanted = (NO_POLICY,) if name.endswith("no policy") else INSTEAD_OF_AN_ASSERT
        assert ours.get("error") in wanted
    else:
        assert ours == expected
