"""The choice of the instruction set, and what the per-CPU files are allowed to contain."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastrunner import _core

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def table(isa: str | None) -> _core.UpdateTable:
    params: list[torch.Tensor] = [torch.nn.Parameter(torch.zeros(3))]
    return _core.UpdateTable("sgd", [{"params": params}], {}, params, [0], [None], [None], [None], isa)


def test_supported_isas_are_best_first_and_end_with_scalar() -> None:
    order = ["avx512", "avx2", "scalar"]
    assert _core.supported_isas() == [isa for isa in order if isa in _core.supported_isas()]
    assert _core.supported_isas()[-1] == "scalar"


def test_supported_isas_agree_with_the_kernel_about_this_cpu() -> None:
    """/proc/cpuinfo lists what the CPU has and the operating system saves."""
    if platform.machine() != "x86_64":
        pytest.skip("avx2 and avx512 are x86-64's")
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())  # type: ignore[index]
    assert ("avx2" in _core.supported_isas()) == ({"avx2", "fma"} <= flags)
    assert ("avx512" in _core.supported_isas()) == ({"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"} <= flags)


def test_the_best_is_active(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTRUNNER_ISA", raising=False)
    assert _core.active_isa() == _core.supported_isas()[0] == table(None).isa


@pytest.mark.parametrize("isa", _core.supported_isas())
def test_environment_and_argument_force_one(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRUNNER_ISA", isa)
    assert _core.active_isa() == table(None).isa == isa
    monkeypatch.setenv("FASTRUNNER_ISA", "scalar")
    assert table(isa).isa == isa  # the argument wins


def test_empty_environment_variable_means_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRUNNER_ISA", "")
    assert _core.active_isa() == _core.supported_isas()[0]


@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx2 ", "avx512" if "avx512" not in _core.supported_isas() else "x"])
def test_unknown_or_unsupported_name_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"isa '{name}' is unknown or not supported.*choose from: .*scalar"):
        table(name)
    monkeypatch.setenv("FASTRUNNER_ISA", name)
    with pytest.raises(ValueError, match=f"FASTRUNNER_ISA='{name}' is unknown or not supported"):
        _core.active_isa()
    with pytest.raises(ValueError, match="choose from"):
        table(None)


REGISTERS = {"scalar": "xmm", "avx2": "ymm", "avx512": "zmm"}


@pytest.fixture(scope="module", params=REGISTERS)
def assembly(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(instruction set, assembly of isa_<name>.cpp built with CMakeLists.txt's flags); also of those not run here."""
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64")
    isa = request.param
    cmake = (CSRC.parent / "CMakeLists.txt").read_text()
    found = re.search(rf'isa_{isa}\.cpp PROPERTIES COMPILE_OPTIONS\s+"([^"]*)"', cmake)
    flags = found[1].split(";") if found else []
    common = re.search(r"target_compile_options\(_core PRIVATE (-O3[^)]*)\)", cmake)
    assert common, "CMakeLists.txt no longer states the core's compile options in the form read here"
    command = ["g++", "-std=c++20", "-fPIC", "-S", "-o", "-", *common[1].split(), *flags, str(CSRC / f"isa_{isa}.cpp")]
    return isa, subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_each_isa_uses_its_registers(assembly: tuple[str, str]) -> None:
    isa, text = assembly
    assert REGISTERS[isa] in text
    wider = {"scalar": ("ymm", "zmm"), "avx2": ("zmm",), "avx512": ()}[isa]
    assert not [name for name in wider if name in text]


def test_each_isa_exports_its_loops_and_nothing_else(assembly: tuple[str, str]) -> None:
    """A weak symbol, from an inline function in a header, could be the one that every other file is linked to."""
    isa, text = assembly
    visible = set(re.findall(r"^\t\.(?:globl|weak)\t(\S+)$", text, re.M))
    names = subprocess.run(["c++filt", *visible], check=True, capture_output=True, text=True).stdout.split("\n")
    halves = [f"{verb}_{half}" for verb in ("widen", "narrow", "follow") for half in ("bfloat16", "float16")]
    loops = ["sum_squares", "sgd_update", "adam_update", "average", *halves, "add_row", "shrink_row"]
    assert {name.split("(")[0] for name in names if name} == {f"fastrunner::{isa}::{loop}" for loop in loops}


def test_nothing_is_contracted(assembly: tuple[str, str]) -> None:
    """The norm has no fused multiply-add in its source, so none may be in its code: others would round differently."""
    _, text = assembly
    body = re.search(r"^\S*sum_squares\S*:\n(.*?)\.cfi_endproc", text, re.M | re.S)
    assert body
    assert "mulps" in body[1]
    assert "fmadd" not in body[1]
