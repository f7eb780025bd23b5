"""The small things of ``mmcv.utils``."""

from __future__ import annotations

import io
import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrunner import collect_env, obj_from_dict, set_random_seed, utils


@given(st.lists(st.integers(0, 99), min_size=1, max_size=6), st.lists(st.integers(0, 99), min_size=1, max_size=6))
def test_versions_compare_as_their_numbers(first, second):
    texts = [".".join(map(str, numbers)) for numbers in (first, second)]
    padded = [tuple((numbers + [0] * 4)[:4]) for numbers in (first, second)]
    digits = [utils.digit_version(text) for text in texts]
    assert (digits[0] < digits[1]) == (padded[0] < padded[1])


def test_versions_before_and_after_a_release():
    ordered = ["1.0.dev1", "1.0a1", "1.0b2", "1.0rc1", "1.0", "1.0.post1", "1.0.1"]
    assert sorted(ordered, key=utils.digit_version) == ordered
    with pytest.raises(ValueError, match="'parrots' is not a version"):
        utils.digit_version("parrots")


def test_types():
    assert utils.is_list_of([1, 2], int)
    assert not utils.is_list_of((1, 2), int)
    assert utils.is_tuple_of((1, "a"), (int, str))
    assert not utils.is_seq_of([1, "a"], int)
    assert utils.is_seq_of("ab", str)
    assert utils.is_str("a")
    assert not utils.is_str(b"a")


def test_methods():
    class Base:
        def f(self): ...
        def g(self): ...

    class Derived(Base):
        def f(self): ...

    assert utils.is_method_overridden("f", Base, Derived)
    assert utils.is_method_overridden("f", Base, Derived())
    assert not utils.is_method_overridden("g", Base, Derived)
    assert utils.has_method(Derived(), "f")
    with pytest.raises(TypeError, match="must be a class"):
        utils.is_method_overridden("f", Base(), Derived)


def test_obj_from_dict():
    made = obj_from_dict(dict(type="SGD", lr=0.1), torch.optim, dict(params=[torch.nn.Parameter(torch.zeros(1))], lr=9))
    assert type(made) is torch.optim.SGD
    assert made.param_groups[0]["lr"] == 0.1
    assert obj_from_dict(dict(type=dict, a=1)) == dict(a=1)
    for bad, error in (("x", TypeError), (dict(a=1), KeyError), (dict(type=3), TypeError)):
        with pytest.raises(error):
            obj_from_dict(bad)


def test_files(tmp_path):
    utils.mkdir_or_exist(tmp_path / "a" / "b")
    utils.mkdir_or_exist("")
    (tmp_path / "a" / "x.TXT").touch()
    (tmp_path / "a" / "b" / "y.py").touch()
    (tmp_path / "a" / ".hidden").touch()
    assert sorted(utils.scandir(tmp_path / "a")) == ["x.TXT"]
    assert sorted(utils.scandir(tmp_path / "a", recursive=True)) == ["b/y.py", "x.TXT"]
    assert list(utils.scandir(tmp_path / "a", (".txt", ".py"), True, case_sensitive=False)).sort() is None
    assert list(utils.scandir(tmp_path / "a", ".txt")) == []
    for target in ("x", "y"):
        utils.symlink(target, str(tmp_path / "link"))
    assert (tmp_path / "link").readlink() == Path("y")
    with pytest.raises(FileNotFoundError, match='file "none" does not exist'):
        utils.check_file_exist("none")


@pytest.mark.parametrize("name", ["r.json", "r.yaml", "r.yml", "r.pkl", "folder/r.pickle"])
def test_load_gives_back_what_dump_wrote(name):
    value = dict(score=0.5, names=["a", "b"], nested=dict(n=None))
    assert utils.dump(value, name) is None
    assert utils.load(name) == value


def test_dump_writes_numpy_and_refuses_other_formats():
    value = dict(a=np.float32(0.5), b=np.arange(2), c={1}, d=range(2))
    assert utils.dump(value, file_format="json") == '{"a": 0.5, "b": [0, 1], "c": [1], "d": [0, 1]}'
    with pytest.raises(ValueError, match="'csv' is none of the formats"):
        utils.dump(value, "a.csv")
    with pytest.raises(ValueError, match="file_format says"):
        utils.dump(value)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_progress_bar_floods_no_log_file():
    log, terminal = io.StringIO(), Terminal()
    assert list(utils.track_iter_progress(range(1000), file=log)) == list(range(1000))
    assert log.getvalue().count("\r") == 1
    assert "1000/1000" in log.getvalue()
    bar = utils.ProgressBar(4, bar_width=8, file=terminal)
    bar.update()
    assert "[>>      ] 1/4" in terminal.getvalue()
    unknown = utils.ProgressBar(file=terminal)
    unknown.update(3)
    assert "completed: 3" in terminal.getvalue()


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_seeds(monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    for flag, value in (("deterministic", False), ("benchmark", True)):
        monkeypatch.setattr(torch.backends.cudnn, flag, value)
    set_random_seed(3)
    first = draws()
    set_random_seed(3)
    assert draws() == first
    assert os.environ["PYTHONHASHSEED"] == "3"
    assert torch.backends.cudnn.benchmark
    set_random_seed(4, deterministic=True)
    assert draws() != first
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)
    monkeypatch.setattr("fastrunner.environment.get_dist_info", lambda: (1, 2))
    set_random_seed(2, use_rank_shift=True)
    assert draws() == first


def test_the_environment():
    env = collect_env()
    assert env["PyTorch"] == torch.__version__
    assert env["fastrunner core"].startswith(("scalar", "avx2", "avx512"))
    assert all(isinstance(value, str) for value in env.values())
    logging.getLogger("x").info("\n".join(f"{key}: {value}" for key, value in env.items()))
