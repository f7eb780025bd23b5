"""The cache of compiled libraries: what its keys contain, that files are whole, and that only one's own are trusted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from step.test_torch_private import traced

from fastrunner.step import aot_cache, torch_private
from fastrunner.step.torch_private import Unfit


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRUNNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "aot"


@pytest.fixture
def library(tmp_path):
    path = tmp_path / "step.so"
    path.write_bytes(bytes(range(256)) * 7)
    return path


def test_what_was_put_is_found(library, cache):
    assert aot_cache.find("a" * 32) is None
    path = aot_cache.put("a" * 32, library)
    assert path.read_bytes() == library.read_bytes()
    assert aot_cache.find("a" * 32) == path
    assert aot_cache.find("b" * 32) is None
    assert [file.suffix for file in cache.iterdir()] == [".so"]
    assert cache.stat().st_mode & 0o077 == 0
    aot_cache.drop(path)
    aot_cache.drop(path)  # somebody else was first
    assert aot_cache.find("a" * 32) is None


def test_a_file_under_another_key_is_none_of_this_key_s(library):
    path = aot_cache.put("a" * 32, library)
    other = path.with_name(path.name.replace("a" * 32, "b" * 32))
    path.rename(other)
    assert aot_cache.find("b" * 32) is None
    assert not other.exists()


def test_a_folder_that_others_may_write_to_is_not_trusted(library, cache):
    path = aot_cache.put("a" * 32, library)
    cache.chmod(0o777)
    assert aot_cache.find("a" * 32) is None
    assert path.exists()
    cache.chmod(0o755)
    assert aot_cache.find("a" * 32) == path


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_no_space_leaves_no_part_behind(call, library, cache, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(aot_cache.os, call, full)
    with pytest.raises(OSError, match="No space left"):
        aot_cache.put("a" * 32, library)
    assert list(cache.iterdir()) == []


def test_the_least_used_go(library, cache, monkeypatch):
    monkeypatch.setattr(aot_cache, "MAX_FILES", 3)
    paths = []
    for number in range(5):
        paths.append(aot_cache.put(f"{number:032}", library))
        os.utime(paths[-1], (number, number))
        if number == 3:
            assert aot_cache.find(f"{1:032}") == paths[1]  # used: now the newest
    assert [path.exists() for path in paths] == [False, True, False, True, True]


def body(scale=1.0, constant=None):
    def run(a, b):
        a.add_(b, alpha=scale)
        return (a.sum() if constant is None else a.sum() * torch.tensor(constant),)

    return run


def test_the_key_is_of_everything_that_the_code_is_made_for(monkeypatch):
    args = (torch.ones(3), torch.ones(3))
    keys = {"plain": aot_cache.key_of(traced(body(), *args), args)}
    assert aot_cache.key_of(traced(body(), *args), args) == keys["plain"]  # traced anew: the same
    assert len(keys["plain"]) == 32
    keys["scale"] = aot_cache.key_of(traced(body(2.0), *args), args)
    for value in (3.0, 4.0):
        keys[f"constant {value}"] = aot_cache.key_of(traced(body(constant=value), *args), args)
    for name, other in {
        "shape": (torch.ones(4), torch.ones(4)),
        "dtype": (torch.ones(3).double(), torch.ones(3).double()),
        "strides": (torch.ones(3), torch.ones(6)[::2]),
    }.items():
        keys[name] = aot_cache.key_of(traced(body(), *other), other)
    graph = traced(body(), *args)
    torch.set_num_threads(2)
    keys["threads"] = aot_cache.key_of(graph, args)
    torch.set_num_threads(1)
    for owner, name, value in [
        (torch, "__version__", "9.9.9"),
        (aot_cache, "__version__", "9.9.9"),
        (aot_cache, "machine", lambda: ("another",)),
        (aot_cache, "AHEAD", {**aot_cache.AHEAD, "size_asserts": True}),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            keys[f"{owner.__name__}.{name}"] = aot_cache.key_of(graph, args)
    assert len(set(keys.values())) == len(keys)


def test_settings_travel():
    given = aot_cache.settings()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    aot_cache.apply_settings(given)
    assert aot_cache.settings() == given
    assert torch.get_default_dtype() == torch.float32


def test_a_library_that_needs_the_proxy_executor_is_refused_by_name(monkeypatch, tmp_path):
    import torch._inductor

    needs = torch_private.PROXY

    def make(graph, args, options):
        (tmp_path / "x.wrapper.json").write_text(json.dumps(dict(nodes=[dict(node=dict(target="aten::_linalg_svd"))])))
        path = Path(options["aot_inductor.output_path"])
        path.write_bytes(b"ELF" + needs + b"...")
        return str(path)

    monkeypatch.setattr(torch._inductor, "aot_compile", make)
    with pytest.raises(Unfit, match="aten::_linalg_svd has no C interface"):
        torch_private.compile_ahead(None, (), tmp_path)
    monkeypatch.setattr(torch_private, "PROXY", b"something else")
    assert torch_private.compile_ahead(None, (), tmp_path) == tmp_path / "step.so"


def test_what_this_torch_lacks_is_said(monkeypatch):
    assert torch_private.ahead_missing() is None
    monkeypatch.setattr(torch_private, "NEEDED_AHEAD", (("torch._inductor", "gone"),))
    assert "has no torch._inductor.gone" in torch_private.ahead_missing()
