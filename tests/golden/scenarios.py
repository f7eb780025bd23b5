"""All scenarios, by the name of their golden file: each has ``CASES`` and ``run(case, api, folder)``.

``api`` is the module ``mmcv.runner`` or ``fastrunner``: ``record.py`` and the tests run literally the same code.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
import warnings
from types import ModuleType
from typing import Any

from . import accumulation, checkpoints, evaluations, events, hook_info, library, logs, policies, together, values

SCENARIOS: dict[str, ModuleType] = dict(
    events=events,
    values=values,
    logs=logs,
    checkpoints=checkpoints,
    hook_info=hook_info,
    policies=policies,
    library=library,
    evaluations=evaluations,
    accumulation=accumulation,
    together=together,
)
_FOLDER = pathlib.Path(__file__).parent


def play(scenario: str, name: str, api: Any) -> Any:
    """Run one case and give the result in JSON's types."""
    module = SCENARIOS[scenario]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mmcv's own, about what it calls in torch
        result = module.run(module.CASES[name], api, folder)
    return json.loads(json.dumps(result))


def golden(scenario: str) -> dict[str, Any]:
    """What mmcv did: name of the case -> result."""
    recorded = json.loads((_FOLDER / f"{scenario}.json").read_text(encoding="utf-8"))
    if list(recorded) != list(SCENARIOS[scenario].CASES):
        raise ValueError(f"{scenario}.json and its cases differ: run tests/golden/record.py where mmcv is installed")
    return recorded  # type: ignore[no-any-return]
