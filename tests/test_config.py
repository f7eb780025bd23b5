"""Config, ConfigDict and DictAction: mmcv's answers (tests/golden/config.json), and what is decided differently."""

from __future__ import annotations

import argparse
import collections
import copy
import enum
import json
import pathlib
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from golden import config_cases
from hypothesis import example, given
from hypothesis import strategies as st

from fastrunner.config import Config, ConfigDict, DictAction, import_modules_from_strings

GOLDEN = json.loads((pathlib.Path(config_cases.__file__).parent / "config.json").read_text())
BASE = config_cases.BASE.replace("{{ fileBasenameNoExtension }}", "x")

# What is decided differently from mmcv 1.7.2, each with its reason.
FILE_DIFFERENCES: dict[str, dict[str, Any]] = {
    # `_delete_` has nothing to delete there, but it must not reach the constructor of the object as an argument.
    "delete where the base has nothing": dict(
        value=GOLDEN["files"]["delete where the base has nothing"]["value"].replace("'_delete_': True, ", "")
    ),
    # JSON and YAML fail alike, with the file and the line in the message; JSONDecodeError is a ValueError too.
    "json that does not parse": dict(error="ValueError"),
}
ACTION_DIFFERENCES = {  # a bare assert, and an endless recursion
    "[1,2": "ValueError",
    "((1,2)": "ValueError",
    "[1,(2])": "ValueError",
}


# ---------------------------------------------------------------- against mmcv


@pytest.mark.parametrize("name", config_cases.FILES)
@pytest.mark.filterwarnings("ignore:custom_imports")
def test_reading_files_gives_what_mmcv_gives(name, tmp_path):
    ours = config_cases.run_file(config_cases.FILES[name], Config, str(tmp_path))
    assert ours == {**GOLDEN["files"][name], **FILE_DIFFERENCES.get(name, {})}


@pytest.mark.parametrize("name", config_cases.MERGES)
def test_merging_options_gives_what_mmcv_gives(name):
    assert config_cases.run_merge(config_cases.MERGES[name], Config) == GOLDEN["merges"][name]


@pytest.mark.parametrize("text", config_cases.ACTIONS)
def test_option_values_parse_as_in_mmcv(text):
    wanted = GOLDEN["actions"][text]
    if text in ACTION_DIFFERENCES:
        assert wanted["error"] in ("AssertionError", "RecursionError")
        wanted = dict(error=ACTION_DIFFERENCES[text])
    assert config_cases.run_action(text, DictAction) == wanted


# ---------------------------------------------------------------- ConfigDict


def test_config_dict_is_a_dict_with_attributes():
    cfg = ConfigDict(dict(a=dict(b=[dict(c=1)], t=(dict(d=2), 3))), e=5)
    assert isinstance(cfg, dict)
    assert cfg == dict(a=dict(b=[dict(c=1)], t=(dict(d=2), 3)), e=5)
    assert cfg.a.b[0].c == 1
    assert cfg.a.t[0].d == 2
    assert {**cfg}["e"] == 5
    assert dict(**cfg.a.b[0]) == dict(c=1)
    assert json.dumps(cfg.a.b) == '[{"c": 1}]'
    assert "a" in dir(cfg)


def test_what_is_missing():
    cfg = ConfigDict(depth=50)
    with pytest.raises(KeyError, match="width"):
        cfg["width"]
    with pytest.raises(AttributeError, match="'ConfigDict' object has no attribute 'width'"):
        cfg.width  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'width'"):
        del cfg.width
    assert not hasattr(cfg, "width")
    assert cfg.get("width", 3) == 3
    assert "width" not in cfg  # asking created nothing


def test_setting_and_deleting():
    cfg = ConfigDict()
    cfg.a = 1
    cfg["b"] = 2
    assert cfg == dict(a=1, b=2)
    del cfg.a, cfg["b"]
    assert cfg == {}
    with pytest.raises(AttributeError, match="'keys' is a method of ConfigDict"):
        cfg.keys = 3
    shared: dict[str, int] = {}
    cfg.later = shared
    assert cfg.later is shared  # as in mmcv: only the constructor converts


def test_update_and_or_merge_nested_dicts():
    cfg = ConfigDict(a=dict(x=1, y=2), b=1)
    cfg.update(dict(a=dict(y=3)), b=dict(z=4))
    assert cfg == dict(a=dict(x=1, y=3), b=dict(z=4))
    assert cfg | dict(a=dict(w=0)) == dict(a=dict(x=1, y=3, w=0), b=dict(z=4))
    assert {"c": 1, "b": {"k": 1}} | cfg == dict(c=1, b=dict(k=1, z=4), a=dict(x=1, y=3))
    assert cfg == dict(a=dict(x=1, y=3), b=dict(z=4))  # neither | changed it
    cfg |= dict(b=dict(z=5))
    assert cfg["b"]["z"] == 5
    assert type(cfg | {}) is ConfigDict


def test_none_and_pairs_make_a_config_dict():
    assert ConfigDict(None) == {}
    assert ConfigDict([("a", dict(b=1))]).a.b == 1


def test_namedtuples_survive():
    Point = collections.namedtuple("Point", "x y")
    cfg = ConfigDict(p=Point(dict(a=1), 2))
    assert cfg.p.x.a == 1
    assert cfg.p == (dict(a=1), 2)
    assert type(cfg.p) is Point
    assert type(cfg.to_dict()["p"].x) is dict


@pytest.mark.parametrize("duplicate", [copy.copy, ConfigDict.copy])
def test_shallow_copies_share_values(duplicate):
    cfg = ConfigDict(a=dict(b=1), c=2)
    other = duplicate(cfg)
    assert type(other) is ConfigDict
    assert other == cfg
    assert other.a is cfg.a
    other.c = 3
    assert cfg.c == 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, ConfigDict.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_deep_copies_and_pickles_share_nothing(duplicate):
    cfg = ConfigDict(a=dict(b=[dict(c=1)]))
    other = duplicate(cfg)
    assert type(other) is type(other.a) is type(other.a.b[0]) is ConfigDict
    other.a.b[0].c = 2
    assert cfg.a.b[0].c == 1


def test_to_dict_is_plain_everywhere():
    cfg = ConfigDict(a=dict(b=[dict(c=1)], t=({},)))
    cfg.later = dict(x=ConfigDict(y=1))
    plain = cfg.to_dict()
    assert plain == cfg
    kinds = [plain, plain["a"], plain["a"]["b"][0], plain["a"]["t"][0], plain["later"]["x"]]
    assert {type(k) for k in kinds} == {dict}


# ---------------------------------------------------------------- Config


def test_config_behaves_as_its_dict():
    cfg = Config(dict(a=1, b=dict(c=2)))
    assert (len(cfg), list(cfg), "b" in cfg, cfg.b.c, cfg["b"]["c"], cfg.get("x")) == (2, ["a", "b"], True, 2, 2, None)
    assert list(cfg.items()) == [("a", 1), ("b", dict(c=2))]
    cfg.d = dict(e=1)
    cfg["f"] = dict(g=2)
    assert (cfg.d.e, cfg.f.g) == (1, 2)  # a dict that is set becomes a ConfigDict
    del cfg.d, cfg["f"]
    assert cfg.pop("a") == 1
    assert cfg._cfg_dict == dict(b=dict(c=2))
    assert "b" in dir(cfg)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cfg.nothing  # noqa: B018
    assert repr(cfg) == "Config (path: None): {'b': {'c': 2}}"


def test_config_from_nothing_and_from_a_filename(tmp_path):
    assert len(Config()) == 0
    (tmp_path / "a.py").write_text("x = 1\n")
    cfg = Config(dict(x=1), filename=tmp_path / "a.py")
    assert (cfg.filename, cfg.text) == (str(tmp_path / "a.py"), "x = 1\n")
    assert Config(dict(x=1), cfg_text="given").text == "given"


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ([("a", 1)], TypeError, "cfg_dict must be a dict, got list"),
        (dict(filename=1), KeyError, "filename is reserved"),
        (dict(pretty_text=1), KeyError, "pretty_text is reserved"),
    ],
)
def test_config_refuses(argument, error, message):
    with pytest.raises(error, match=message):
        Config(argument)


def test_copies_and_pickles_of_a_config():
    cfg = Config.fromstring("a = dict(b=[1])", ".py")
    shared = copy.copy(cfg)
    shared.a.b.append(2)
    shared.c = 3
    assert cfg.a.b == [1, 2]  # a copy shares the dict, as in mmcv
    assert cfg.c == 3
    for other in (copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg))):
        assert (other._cfg_dict, other.text, other.filename) == (cfg._cfg_dict, cfg.text, cfg.filename)
        other.a.b.append(9)
        assert 9 not in cfg.a.b


# ---------------------------------------------------------------- reading: errors, and what mmcv leaves open


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("a.py", "x = 1\ny = (\nz = 2\n", SyntaxError, r"There are syntax errors in config file .*a\.py, line 2"),
        ("a.py", "x = 1\n  y = 2\n", SyntaxError, r"a\.py, line 2: unexpected indent"),
        ("a.json", '{"a": 1,\n"b": oops}', ValueError, r"config file .*a\.json, line 2: Expecting value"),
        ("a.yaml", "a: 1\nb: [1, 2\nc: 3\n", ValueError, r"config file .*a\.yaml, line 3: "),
        ("a.yaml", "- 1\n- 2\n", ValueError, r"a\.yaml must hold a mapping, not a list"),
        ("a.json", "3", ValueError, r"a\.json must hold a mapping, not a int"),
        (
            "a.yaml",
            "a: !!python/object/apply:os.getcwd []\n",
            ValueError,
            r"a\.yaml, line 1: could not determine a constr",
        ),
        ("a.py", "_base_ = 'a.py'\n", ValueError, r"a\.py inherits from itself: .*a\.py -> .*a\.py"),
        ("a.py", "_base_ = 'b.py'\n", FileNotFoundError, r"b\.py, a base of .*a\.py, does not exist"),
        ("a.txt", "x = 1\n", OSError, r"a config is one of \.py, \.json, \.yaml, \.yml, got .*a\.txt"),
        ("a.py", "x = {{ _base_.y }}\n", KeyError, r"{{ _base_.y }} is not in its bases"),
        ("a.py", "_base_ = []\nx = 'at {{ _base_.y }}'\n", ValueError, r"{{ _base_.y }} must be a value by itself"),
    ],
)
def test_bad_files_name_the_file_and_the_place(name, text, error, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        Config.fromfile(tmp_path / name)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config file .*nowhere\.py, does not exist"):
        Config.fromfile(tmp_path / "nowhere.py")


def test_keys_shared_by_bases_are_named(tmp_path):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("model = 1\n")
    (tmp_path / "c.py").write_text("_base_ = ('a.py', 'b.py')\n")  # a tuple is a list too
    with pytest.raises(KeyError, match=r"share the keys \['model'\].*b\.py"):
        Config.fromfile(tmp_path / "c.py")


def test_an_error_in_a_python_config_points_at_its_line(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\ny = x / 0\n")
    with pytest.raises(ZeroDivisionError) as caught:
        Config.fromfile(tmp_path / "a.py")
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno) == (tmp_path / "a.py", 1)  # counted from 0


def test_delete_never_reaches_the_result(tmp_path):
    (tmp_path / "base.py").write_text("a = dict(x=1)\n")
    (tmp_path / "main.py").write_text(
        "_base_ = 'base.py'\n"
        "a = dict(_delete_=True, inner=dict(_delete_=True, y=2), items=[dict(_delete_=False, z=3)])\n"
        "b = dict(_delete_=True, w=4)\n"
    )
    cfg = Config.fromfile(tmp_path / "main.py")
    assert cfg._cfg_dict == dict(a=dict(inner=dict(y=2), items=[dict(z=3)]), b=dict(w=4))


def test_predefined_variables_can_be_left_alone_in_bases_too(tmp_path):
    (tmp_path / "base.py").write_text("a = '{{ fileBasename }}'\n")
    (tmp_path / "main.py").write_text("_base_ = 'base.py'\nb = '{{ fileBasename }}'\n")
    cfg = Config.fromfile(tmp_path / "main.py", use_predefined_variables=False)
    assert cfg._cfg_dict == dict(a="{{ fileBasename }}", b="{{ fileBasename }}")
    assert Config.fromfile(tmp_path / "main.py")._cfg_dict == dict(a="base.py", b="main.py")


def test_a_python_config_sees_its_own_module(tmp_path):
    (tmp_path / "a.py").write_text(
        "from __future__ import annotations\nimport dataclasses, sys\n"
        "@dataclasses.dataclass\nclass Point:\n    x: int\n"
        "here, x = __file__, Point(3).x\n"
    )
    cfg = Config.fromfile(tmp_path / "a.py")
    assert (cfg.here, cfg.x) == (str(tmp_path / "a.py"), 3)


def test_deprecation_names_the_successor(tmp_path):
    (tmp_path / "old.py").write_text("_deprecation_ = dict(expected='new.py', reference='a link')\nx = 1\n")
    with pytest.warns(DeprecationWarning, match=r"old\.py will be deprecated.*use new\.py instead.*a link") as caught:
        cfg = Config.fromfile(tmp_path / "old.py")
    assert cfg._cfg_dict == dict(x=1)
    assert caught[0].filename == __file__  # it points at the caller


def test_fromstring_finds_bases_in_the_current_folder(tmp_path):
    (tmp_path / "base.py").write_text("a = dict(x=1)\n")  # the tests run in tmp_path
    cfg = Config.fromstring("_base_ = 'base.py'\na = dict(y=2)\n", ".py")
    assert cfg._cfg_dict == dict(a=dict(x=1, y=2))
    with pytest.raises(OSError, match=r"one of \.py, .*, got 'py'"):
        Config.fromstring("a = 1", "py")
    with pytest.warns(UserWarning, match="is it Python"), pytest.raises(ValueError, match=r"line 1"):
        Config.fromstring("a = dict(b=1)", ".json")


def test_custom_imports(tmp_path, monkeypatch):
    (tmp_path / "a_custom_module.py").write_text("flag = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_modules_from_strings("a_custom_module").flag == 7
    assert [m.__name__ for m in import_modules_from_strings(["json", "a_custom_module"])] == ["json", "a_custom_module"]
    assert import_modules_from_strings([]) is None
    text = "custom_imports = dict(imports=['no_such_module'])\n"
    with pytest.raises(ImportError, match="no_such_module does not import: No module named") as caught:
        Config.fromstring(text, ".py")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    (tmp_path / "b.py").write_text(text)
    assert "custom_imports" in Config.fromfile(tmp_path / "b.py", import_custom_modules=False)
    with pytest.warns(UserWarning, match="no_such_module failed to import"):
        assert import_modules_from_strings("no_such_module", allow_failed_imports=True) is None


# ---------------------------------------------------------------- merging


def test_merging_errors_name_the_key():
    cfg = Config.fromstring(BASE, ".py")
    with pytest.raises(KeyError, match=r"Index 5 exceeds the length of list"):
        cfg.merge_from_dict({"model.heads.5.a": 1})
    with pytest.raises(TypeError, match=r"'first' is not an index"):
        cfg.merge_from_dict({"model.heads.first.a": 1})
    with pytest.raises(TypeError, match=r"You may set `_delete_=True`"):
        cfg.merge_from_dict({"optimizer.lr.x": 1})
    with pytest.raises(TypeError, match=r"'a.b' goes into 'a', which another option sets to 1"):
        cfg.merge_from_dict({"a": 1, "a.b": 2})
    assert cfg._cfg_dict == Config.fromstring(BASE, ".py")._cfg_dict


def test_a_scalar_can_replace_a_list_item():
    cfg = Config(dict(steps=[1, 2], pipeline=[dict(a=1), dict(b=2)]))
    cfg.merge_from_dict({"steps.1": 5, "pipeline.0": dict(_delete_=True, c=3)})
    assert cfg._cfg_dict == dict(steps=[1, 5], pipeline=[dict(c=3), dict(b=2)])


def test_merging_changes_neither_the_options_nor_earlier_references():
    cfg = Config(dict(a=dict(x=1)))
    before, options = cfg.a, {"a": dict(_delete_=True, y=2)}
    cfg.merge_from_dict(options)
    assert (before, options, cfg.a) == (dict(x=1), {"a": dict(_delete_=True, y=2)}, dict(y=2))
    cfg.merge_from_dict({"n.deep": dict(z=1)})
    assert cfg.n.deep.z == 1


# ---------------------------------------------------------------- text


def evaluated(text: str) -> dict[str, Any]:
    """What a Python file of this text defines, by Python itself rather than by Config."""
    scope: dict[str, Any] = {}
    exec(compile(text, "pretty.py", "exec"), scope)
    return {k: v for k, v in scope.items() if not (isinstance(k, str) and k.startswith("__"))}


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=4)
keys = st.text(max_size=4) | st.sampled_from(["type", "lr", "class", "dict", "float", "a b", "set", "globals"])
values = st.recursive(
    scalars | st.frozensets(st.integers(), max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)
top_keys = keys.filter(lambda k: not k.startswith("__") and k not in ("filename", "text", "pretty_text"))


@example({"ª": None, "a": dict(ª=1)})  # Python reads ª as a
@example({"dict": {"a": dict(b=1)}, "float": float("inf"), "class": (dict(c=2),)})
@given(st.dictionaries(top_keys, values, max_size=4))
def test_pretty_text_evaluates_to_the_same_dict(cfg_dict):
    text = Config(cfg_dict).pretty_text
    again = evaluated(text)
    again.pop("__builtins", None)
    assert again == cfg_dict
    assert repr(again) == repr({k: again[k] for k in cfg_dict})  # and in the same order
    assert Config.fromstring(text, ".py")._cfg_dict == cfg_dict
    assert Config.fromstring(text, ".py").pretty_text == text


class Color(enum.Enum):
    RED = 1


@pytest.mark.parametrize("value", [
    float("inf"), -float("inf"), 1e-7, 10**30, True, None, ..., b"\xff", "it's \"so\"\n\\", "\u2028é", 1 + 2j,
    complex(float("inf"), 1), range(0, 9, 2), set(), {3, 1, 2}, {"b", "a"}, frozenset({1}), frozenset(), (1,), (), [],
    {}, {1: "a", (2, 3): "b"}, {"not a name": {"class": 1}}, np.float64(0.1), np.float32(0.1), np.int64(3),
    np.bool_(True), pathlib.PurePosixPath("a/b"), Color.RED, dict, collections.OrderedDict, torch.optim.SGD, json.dumps,
    len, collections.OrderedDict(a=1),
])  # fmt: skip
def test_pretty_text_of_single_values(value):
    cfg = Config(dict(key=value, nested=dict(deep=[value])))
    again = evaluated(cfg.pretty_text)
    assert again["key"] == value
    assert again["nested"]["deep"][0] == value
    if callable(value) or isinstance(value, enum.Enum):
        assert again["key"] is value


def test_pretty_text_of_nan():
    assert np.isnan(evaluated(Config(dict(x=[float("nan")])).pretty_text)["x"][0])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(2), r"a\.b\.1: a ndarray cannot be written as Python"),
        (object(), r"a\.b\.1: a object cannot be written as Python"),
        (lambda: 3, r"a\.b\.1: a function cannot be written as Python"),
    ],
)
def test_what_cannot_be_written_is_named(value, message):
    with pytest.raises(TypeError, match=message):
        Config(dict(a=dict(b=[1, value]))).dump()


def test_pretty_text_is_readable():
    cfg = Config.fromstring(
        BASE + "pipeline = [dict(type='Load', to_float32=True, color_type='color'), "
        "dict(type='Resize', img_scale=[(1333, 640), (1333, 800)], keep_ratio=True)]\n",
        ".py",
    )
    assert (
        cfg.pretty_text
        == """\
work_dir = './work_dirs/x'
model = dict(
    type='Net',
    depth=50,
    neck=dict(type='FPN', out=256),
    heads=[dict(a=1), dict(b=2)],
)
optimizer = dict(type='SGD', lr=0.1, momentum=0.9)
steps = (8, 11)
pipeline = [
    dict(type='Load', to_float32=True, color_type='color'),
    dict(type='Resize', img_scale=[(1333, 640), (1333, 800)], keep_ratio=True),
]
"""
    )


@pytest.mark.parametrize("extension", [".py", ".json", ".yaml", ".yml"])
def test_dump_and_read_again(extension, tmp_path):
    content = dict(a=dict(b=[1, 2.5, None, True, "x"]), **{"not a name": dict(c="d")}, lr=1e-5)
    cfg = Config(dict(content, t=(1, 2), n=np.float32(0.5), p=pathlib.PurePosixPath("a"), r=range(2), z=np.arange(2)))
    if extension == ".py":
        del cfg.z  # an array has no form in Python source
    path = tmp_path / f"dumped{extension}"
    assert cfg.dump(path) is None
    again = Config.fromfile(path)
    for key, value in content.items():
        assert again[key] == value, key
    assert list(again) == list(cfg)
    assert (list(again.t), again.n, str(again.p), list(again.r)) == ([1, 2], 0.5, "a", [0, 1])
    assert again.dump() == path.read_text()  # without a file: the text, in the format that it came in


def test_dump_knows_its_formats(tmp_path):
    cfg = Config(dict(a=1))
    assert cfg.dump() == "a = 1\n"
    with pytest.raises(OSError, match=r"one of \.py, .*, got .*a\.toml"):
        cfg.dump(tmp_path / "a.toml")
    with pytest.raises(TypeError, match=r"config\.a\.0: a object cannot be written as JSON or YAML"):
        Config(dict(a=[object()])).dump(tmp_path / "a.json")
    assert not list(tmp_path.iterdir())  # an error leaves no half a file
    assert yaml.safe_load(Config.fromstring("a: [1, {b: 2}]", ".yml").dump()) == dict(a=[1, dict(b=2)])


# ---------------------------------------------------------------- the command line


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=DictAction)
    return parser


def test_dict_action_reads_options_into_a_dict(parser):
    options = ["model.depth=18", "data.scale=(1333, 800)", "a=[1,b]", "eq=x=y", "flag=true", "none=None"]
    args = parser.parse_args(["--cfg-options", *options])
    wanted = {"model.depth": 18, "data.scale": (1333, 800), "a": [1, "b"], "eq": "x=y", "flag": True, "none": None}
    assert args.cfg_options == wanted
    cfg = Config(dict(model=dict(depth=50)))
    cfg.merge_from_dict(args.cfg_options)
    assert (cfg.model.depth, cfg.data.scale) == (18, (1333, 800))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("depth", "--cfg-options takes KEY=VALUE, got 'depth'"),
        ("a=[1,2", r"Imbalanced brackets exist in \[1,2"),
        ("a=dict(b=1,c=2)", r"dict\(b=1,c=2\) is no number, text, list or tuple"),
        ("a=[1,2)", r"Imbalanced brackets exist in \[1,2\)"),
    ],
)
def test_dict_action_refuses(parser, text, message):
    with pytest.raises(ValueError, match=message):
        parser.parse_args(["--cfg-options", text])


def test_a_list_of_tuples_needs_no_outer_brackets():
    assert DictAction._parse_iterable("(1,2),(3,4)") == [(1, 2), (3, 4)]  # mmcv recurses without end
