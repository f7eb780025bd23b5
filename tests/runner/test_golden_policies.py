"""Learning rates and momenta of every policy are mmcv 1.7.2's, bit for bit (golden/policies.json)."""

from __future__ import annotations

import pytest
from golden import policies, scenarios

import fastrunner

GOLDEN = scenarios.golden("policies")

# Decided differently: where mmcv has a bare assert, ours says what is wrong.
INSTEAD_OF_AN_ASSERT = ("TypeError", "ValueError")
# Decided differently: an error in mmcv, and here what it plainly means, which is another case or this config.
MEANS = {
    "lr cosine lower case": dict(policy="CosineAnnealing", min_lr=0.01),
    "lr cyclic target list": dict(policy="cyclic", target_ratio=(4.0, 1.0)),
    "lr one cycle max_lr dict": dict(policy="OneCycle", max_lr=[0.5, 0.5]),
    "momentum one cycle dicts": dict(policy="OneCycle", base_momentum=[0.7, 0.7], max_momentum=[0.9, 0.9]),
}


def meaning(name):
    return MEANS.get(name.partition(" ")[2])


@pytest.mark.parametrize("name", [name for name in policies.CASES if meaning(name) is None])
def test_policies_are_mmcvs(name):
    ours, expected = scenarios.play("policies", name, fastrunner), GOLDEN[name]
    if expected.get("error") == "AssertionError":
        assert ours.get("error") in INSTEAD_OF_AN_ASSERT
    else:
        assert ours == expected


@pytest.mark.parametrize("name", [name for name in policies.CASES if meaning(name) is not None])
def test_configs_that_mmcv_refuses_mean_what_they_say(name, tmp_path):
    case = policies.CASES[name]
    what = "lr" if "lr" in case else "momentum"
    same = {**case, what: {**meaning(name), "by_epoch": case[what].get("by_epoch", False)}}
    assert "error" in GOLDEN[name]
    ours = scenarios.play("policies", name, fastrunner)
    assert len(ours["rows"]) == 12
    assert ours["rows"] == policies.run(same, fastrunner, str(tmp_path))["rows"]
