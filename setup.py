"""Compiles csrc/ to fastrunner._core with CMake, and maps kernels/ to fastrunner.kernels.

Everything else about the package stands in pyproject.toml, everything else about the compilation in CMakeLists.txt.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MIN_GXX = 11  # the first with the C++20 that csrc/ uses
COMPILING = {"dist_info", "bdist_wheel", "editable_wheel", "build", "build_ext", "install", "develop"}


def compiler_problem(command: list[str]) -> str | None:
    """What is wrong with the compiler, in a few words; clang counts as wrong, since its OpenMP is not torch's."""
    if shutil.which(command[0]) is None:
        return f"{command[0]} not found"
    probe = [*command, "-dM", "-E", "-x", "c++", os.devnull]
    lines = subprocess.run(probe, capture_output=True, text=True).stdout.splitlines()
    macros = dict(line.split(maxsplit=2)[1:] for line in lines if len(line.split()) > 2)
    if "__clang__" in macros or "__GNUC__" not in macros:
        return f"{command[0]} is not GNU"
    version = int(macros["__GNUC__"])
    return f"{command[0]} is version {version}" if version < MIN_GXX else None


def missing_tool() -> str | None:
    """One sentence that says what to install, or None if everything is there."""
    if found := compiler_problem(shlex.split(os.environ.get("CXX", "g++"))):
        return (
            f"fastrunner compiles a C++20 core and needs g++ >= {MIN_GXX} ({found}): "
            "install it (Debian: apt install g++ cmake), then run the same command again."
        )
    if shutil.which("cmake") is None:
        return (
            "fastrunner compiles a C++20 core and needs CMake >= 3.20 (cmake not found): "
            "install it (pip install cmake, or Debian: apt install cmake), then run the same command again."
        )
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return (
            f"fastrunner compiles a C++20 core and needs the headers of {sys.executable} (Python.h not found): "
            "install them (Debian: apt install python3-dev), then run the same command again."
        )
    return None


class CMakeBuild(build_ext):
    """Lets CMake write the module to where setuptools expects it: the wheel, or the source tree when editable."""

    def build_extension(self, ext: Extension) -> None:
        # From an empty folder: in pip's isolated builds ninja and nanobind lie elsewhere every time.
        build_dir = Path(self.build_temp).resolve() / "cmake"
        shutil.rmtree(build_dir, ignore_errors=True)
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build_dir)),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={Path(self.get_ext_fullpath(ext.name)).resolve().parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            *(("-G", "Ninja") if shutil.which("ninja") else ()),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        for command in (configure, ["cmake", "--build", str(build_dir), "--parallel", str(os.cpu_count() or 1)]):
            if code := subprocess.run(command).returncode:
                raise SystemExit(
                    f"fastrunner: `{shlex.join(command)}` failed with exit code {code}; the cause is above."
                )


# Said first, before pip downloads torch or setuptools copies a file.
if COMPILING.intersection(sys.argv) and (problem := missing_tool()):
    raise SystemExit(problem)

setup(
    packages=[
        *find_packages(include=["fastrunner", "fastrunner.*"]),
        "fastrunner.kernels",
        *(f"fastrunner.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"fastrunner.kernels": "kernels"},
    ext_modules=[Extension("fastrunner._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
