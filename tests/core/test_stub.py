"""_core.pyi says what the built module has: the same names, and the same parameters in the same order."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from fastrunner import _core

STUB = ast.parse((Path(__file__).resolve().parents[2] / "fastrunner" / "_core.pyi").read_text())


def stub_members(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def public(thing: Any) -> set[str]:
    return {name for name in vars(thing) if not name.startswith("_")}


def built_parameters(function: Any) -> list[tuple[str, bool]]:
    """(name, has a default) of each parameter, as nanobind recorded them."""
    text = function.__nb_signature__[0][0]
    parsed = ast.parse(re.sub(r"\\\d+", "...", text) + ": ...").body[0]  # \\0 stands for the first default value
    assert isinstance(parsed, ast.FunctionDef)
    return parameters(parsed)


def parameters(node: ast.FunctionDef) -> list[tuple[str, bool]]:
    names = [arg.arg for arg in node.args.posonlyargs + node.args.args]
    first_default = len(names) - len(node.args.defaults)
    return [(name, i >= first_default) for i, name in enumerate(names)]


STUBBED = stub_members(STUB.body)
FUNCTIONS = sorted(name for name, node in STUBBED.items() if isinstance(node, ast.FunctionDef))
CLASSES = sorted(name for name, node in STUBBED.items() if isinstance(node, ast.ClassDef))


def test_same_public_names() -> None:
    assert public(_core) == set(STUBBED)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_function_parameters(name: str) -> None:
    node = STUBBED[name]
    assert isinstance(node, ast.FunctionDef)
    assert parameters(node) == built_parameters(getattr(_core, name))


@pytest.mark.parametrize("name", CLASSES)
def test_same_class_members(name: str) -> None:
    built, node = getattr(_core, name), STUBBED[name]
    assert isinstance(node, ast.ClassDef)
    assert inspect.isclass(built)
    assert [base.__name__ for base in built.__bases__ if base is not object] == [ast.unparse(b) for b in node.bases]
    stubbed = stub_members(node.body)
    assert public(built) == {member for member in stubbed if not member.startswith("_")}
    for member, declared in stubbed.items():
        assert isinstance(declared, ast.FunctionDef)
        if isinstance(vars(built)[member], property):
            assert [ast.unparse(d) for d in declared.decorator_list] == ["property"]
        else:
            assert parameters(declared) == built_parameters(getattr(built, member))
