"""What an install puts on a machine, and what a build says when it cannot start.

Built without pip's isolation: `make test` has already built the core in isolation, editable, from the same
requirements; here that would only download CMake again and need a network. The wheel is built from the sdist in a
folder of its own, so one compilation (seconds) also shows that the sdist is complete, and leaves no build/ behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import fastrunner

if sys.version_info >= (3, 11):
    import tomllib

REPOSITORY = Path(__file__).resolve().parent.parent
CORE = f"fastrunner/_core{sysconfig.get_config_var('EXT_SUFFIX')}"
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # cmake and ninja of this environment
LOCATIONS = """
import torch  # before the core, which runs on torch's OpenMP
import fastrunner, fastrunner._core, fastrunner.kernels
print(*(module.__file__ for module in (fastrunner, fastrunner._core, fastrunner.kernels)))
"""


def run(command: list[str], *, cwd: Path, path: str = TOOLS) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "CMAKE_ARGS", "PYTHONPATH")} | {"PATH": path}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def pip(*arguments: str, cwd: Path, path: str = TOOLS) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "pip", *arguments], cwd=cwd, path=path)


def copy_sources(target: Path) -> Path:
    """The sources without what builds leave in them, so that the build can neither use nor disturb it."""
    target.mkdir()
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md"):
        shutil.copy(REPOSITORY / name, target)
    for name in ("fastrunner", "kernels", "csrc", "tests"):
        shutil.copytree(REPOSITORY / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    sources = copy_sources(folder / "sources")
    done = run([sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(folder)], cwd=sources)
    assert done.returncode == 0, done.stderr
    (sdist,) = folder.glob("fastrunner-*.tar.gz")
    done = pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(sdist), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("fastrunner-*.whl")
    return built


@pytest.mark.timeout(600)  # the compilation: 20 s alone on 2 cores, more where others compile too
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {p.relative_to(REPOSITORY).as_posix() for p in (REPOSITORY / "fastrunner").rglob("*")}
    kernels = {f"fastrunner/{p.relative_to(REPOSITORY).as_posix()}" for p in (REPOSITORY / "kernels").rglob("*")}
    sources = {name for name in package | kernels if name.endswith((".py", ".pyi", "/py.typed"))}
    assert {"fastrunner/kernels/__init__.py", "fastrunner/_core.pyi", "fastrunner/py.typed"} <= sources
    assert names == sources | {CORE}


@pytest.mark.timeout(600)
def test_wheel_is_installed_and_imported_in_a_clean_folder(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    done = pip("install", "--no-deps", "--target", str(target), str(wheel), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # Only the folder and this environment's torch; an editable install of this checkout must not answer.
    done = run([sys.executable, "-c", f"import sys; sys.path[0] = {str(target)!r}\n{LOCATIONS}"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(target / name) for name in ("fastrunner/__init__.py", CORE, "fastrunner/kernels/__init__.py")
    ]


@pytest.mark.timeout(600)
def test_wheel_names_its_version_and_requirements(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(path).decode())
    assert metadata["Version"] == fastrunner.__version__
    required = {line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert required == {"torch>=2.13", "numpy", "pyyaml", "rich"}
    assert set(metadata["Requires-Python"].split(",")) == {">=3.10", "<3.14"}
    extras = {"dali", "triton", "numba", "bench", "tensorboard", "test", "perf", "lint", "build", "all"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras


def test_this_environment_imports_all_three() -> None:
    """In the environment of `make test` this is the editable install."""
    done = run([sys.executable, "-c", LOCATIONS], cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert [Path(line).name for line in done.stdout.split()] == ["__init__.py", Path(CORE).name, "__init__.py"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_build_extra_is_what_isolated_builds_use() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert project["project"]["optional-dependencies"]["build"] == project["build-system"]["requires"]


CLANG = "#!/bin/sh\necho '#define __GNUC__ 14'\necho '#define __clang__ 1'\n"
OLD = "#!/bin/sh\necho '#define __GNUC__ 10'\n"
NEW = "#!/bin/sh\necho '#define __GNUC__ 12'\n"


@pytest.mark.parametrize(
    ("compiler", "sentence"),
    [
        (None, "needs g++ >= 11 (g++ not found): install it (Debian: apt install g++ cmake)"),
        (CLANG, "needs g++ >= 11 (g++ is not GNU): install it (Debian: apt install g++ cmake)"),
        (OLD, "needs g++ >= 11 (g++ is version 10): install it (Debian: apt install g++ cmake)"),
        (NEW, "needs CMake >= 3.20 (cmake not found): install it (pip install cmake, or Debian: apt install cmake)"),
    ],
    ids=["none", "clang", "old", "no-cmake"],
)
def test_missing_tools_are_one_sentence(compiler: str | None, sentence: str, tmp_path: Path) -> None:
    sources, tools = copy_sources(tmp_path / "sources"), tmp_path / "bin"
    tools.mkdir()
    if compiler:
        (tools / "g++").write_text(compiler)
        (tools / "g++").chmod(0o755)
    arguments = ("install", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "target"), str(sources))
    done = pip(*arguments, cwd=tmp_path, path=str(tools))
    assert done.returncode != 0
    full = f"fastrunner compiles a C++20 core and {sentence}, then run the same command again."
    assert full in done.stderr
    assert "[1 lines of output]" in done.stderr  # pip's frame around what the build said
    assert "Traceback" not in done.stderr
