"""Registry and build_from_cfg: MMCV's forms, and an error for each way to get them wrong."""

from __future__ import annotations

import subprocess
import sys
import traceback

import pytest

from fastrunner import registry as registry_module
from fastrunner.registry import Registry, build_from_cfg


class Anchor:
    def __init__(self, size: int = 1, **rest: int) -> None:
        self.size, self.rest = size, rest


def make_anchor(size: int) -> tuple[str, int]:
    return ("function", size)


@pytest.fixture
def zoo() -> Registry:
    zoo = Registry("zoo", scope="zoo")
    zoo.register_module(module=Anchor)
    zoo.register_module(module=make_anchor)
    return zoo


# ---------------------------------------------------------------- registering


def test_decorator_registers_under_the_class_name_and_returns_the_class():
    r = Registry("r")

    @r.register_module()
    class Cat:
        pass

    assert r.get("Cat") is Cat
    assert len(r) == 1
    assert "Cat" in r
    assert list(r) == ["Cat"]


def test_decorator_with_one_and_with_several_names():
    r = Registry("r")

    @r.register_module(name="one")
    @r.register_module(name=["two", "three"])
    class Cat:
        pass

    assert r.module_dict == {"one": Cat, "two": Cat, "three": Cat}


def test_direct_form_returns_the_module():
    r = Registry("r")
    assert r.register_module(module=Anchor) is Anchor
    assert r.register_module("f", module=make_anchor) is make_anchor
    assert r.module_dict == {"Anchor": Anchor, "f": make_anchor}


def test_duplicate_is_an_error_that_names_both_and_force_replaces(zoo):
    class Other:
        pass

    with pytest.raises(KeyError, match=r"Anchor is already registered in zoo; force=True"):
        zoo.register_module("Anchor", module=Other)
    assert zoo.get("Anchor") is Anchor
    zoo.register_module("Anchor", force=True, module=Other)
    assert zoo.get("Anchor") is Other


def test_one_taken_name_of_several_registers_none(zoo):
    with pytest.raises(KeyError, match="Anchor"):
        zoo.register_module(["fresh", "Anchor"], module=Anchor)
    assert "fresh" not in zoo


def test_old_forms_still_work_and_warn():
    r = Registry("r")
    with pytest.warns(DeprecationWarning, match="deprecated"):
        assert r.register_module(Anchor) is Anchor
    with pytest.warns(DeprecationWarning, match="deprecated"):

        @r.register_module
        class Bare:
            pass

    with pytest.warns(DeprecationWarning, match="deprecated"):

        @r.deprecated_register_module(force=True)
        class Called:
            pass

    assert r.module_dict == {"Anchor": Anchor, "Bare": Bare, "Called": Called}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(force=1), "force must be a bool, got int"),
        (dict(name=3), "name must be None, a str or a sequence of str, got int"),
        (dict(name=["a", 1]), "name must be None, a str or a sequence of str, got list"),
        (dict(name=make_anchor), "with parentheses"),  # a bare decorator on a function
        (dict(module=Anchor()), "only a class or a function can be registered, got Anchor"),
        (dict(module="Anchor"), "only a class or a function can be registered, got str"),
    ],
)
def test_wrong_types_are_refused_when_registering(arguments, message):
    with pytest.raises(TypeError, match=message):
        Registry("r").register_module(**arguments)


# ---------------------------------------------------------------- scopes and children


def test_scope_is_the_package_of_the_caller():
    assert Registry("r").scope == __name__.partition(".")[0]
    assert Registry("r", scope="mine").scope == "mine"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("ResNet", (None, "ResNet")),
        ("mmdet.ResNet", ("mmdet", "ResNet")),
        ("mmdet.mmyolo.ResNet", ("mmdet", "mmyolo.ResNet")),
    ],
)
def test_split_scope_key(key, expected):
    assert Registry.split_scope_key(key) == expected


@pytest.fixture
def tree() -> dict[str, Registry]:
    """root(mmengine) -> det -> yolo, and root -> seg. One class in each, under the same name."""
    root = Registry("model", scope="root")
    det = Registry("model", parent=root, scope="det")
    yolo = Registry("model", parent=det, scope="yolo")
    seg = Registry("model", parent=root, scope="seg")
    nodes = dict(root=root, det=det, yolo=yolo, seg=seg)
    for name, node in nodes.items():
        node.register_module("Net", module=type(name, (), {}))
    return nodes


@pytest.mark.parametrize(
    ("asked", "key", "found"),
    [
        ("root", "Net", "root"),
        ("root", "root.Net", "root"),
        ("root", "det.Net", "det"),
        ("root", "det.yolo.Net", "yolo"),
        ("det", "Net", "det"),
        ("det", "yolo.Net", "yolo"),
        ("det", "root.Net", "root"),
        ("det", "seg.Net", "seg"),  # a sibling, through the root
        ("yolo", "seg.Net", "seg"),
        ("yolo", "root.Net", "root"),
        ("yolo", "mmcv.Net", "root"),
        ("yolo", "fastrunner.Net", "root"),
        ("root", "mmcv.Net", "root"),
        ("root", "fastrunner.det.yolo.Net", None),  # ours is a prefix of a name, not of a path
    ],
)
def test_scoped_lookup(tree, asked, key, found):
    got = tree[asked].get(key)
    assert (got and got.__name__) == found
    assert (key in tree[asked]) == (found is not None)


def test_no_upward_search_without_a_scope(tree):
    tree["root"].register_module("OnlyRoot", module=Anchor)
    assert tree["det"].get("OnlyRoot") is None
    assert tree["det"].get("root.OnlyRoot") is Anchor


def test_a_child_called_mmcv_goes_before_the_alias():
    root = Registry("r", scope="root")
    child = Registry("r", parent=root, scope="mmcv")
    root.register_module("Net", module=Anchor)
    child.register_module("Net", module=make_anchor)
    assert root.get("mmcv.Net") is make_anchor


def test_unknown_scope_is_a_key_error_that_lists_the_known_ones(tree):
    with pytest.raises(KeyError, match=r"unknown scope 'cls' in 'cls.Net'.*'det'.*'root'.*'seg'"):
        tree["yolo"].get("cls.Net")
    assert "cls.Net" not in tree["yolo"]


def test_two_children_of_one_scope_are_refused(tree):
    with pytest.raises(ValueError, match="scope 'det' exists in model registry"):
        Registry("model", parent=tree["root"], scope="det")


def test_parent_must_be_a_registry():
    with pytest.raises(TypeError, match="parent of registry 'r' must be a Registry, got str"):
        Registry("r", parent="models")


def test_build_func_is_own_then_the_parents(tree):
    def build(cfg, registry):
        return (cfg, registry.name)

    parent = Registry("parent", build_func=build, scope="p")
    child = Registry("child", parent=parent, scope="c")
    assert child.build("anything") == ("anything", "child")
    assert tree["det"].build_func is build_from_cfg


def test_repr_names_the_items(zoo):
    assert repr(zoo) == f"Registry(name=zoo, items={{'Anchor': {Anchor}, 'make_anchor': {make_anchor}}})"


# ---------------------------------------------------------------- building


def test_builds_from_a_name_a_class_and_a_function_without_touching_the_config(zoo):
    cfg = dict(type="Anchor", size=3)
    assert build_from_cfg(cfg, zoo).size == 3
    assert cfg == dict(type="Anchor", size=3)
    assert zoo.build(dict(type=Anchor, size=4)).size == 4
    assert zoo.build(dict(type="make_anchor", size=5)) == ("function", 5)
    assert zoo.build(dict(type=make_anchor, size=6)) == ("function", 6)
    assert zoo.build(dict(type="mmcv.Anchor", size=7)).size == 7


def test_default_args_fill_in_and_never_override(zoo):
    built = build_from_cfg(dict(size=3), zoo, default_args=dict(type="Anchor", size=9, depth=2))
    assert (built.size, built.rest) == (3, {"depth": 2})
    # keyword order: the config's, then the defaults'
    built = build_from_cfg(dict(type="Anchor", b=1), zoo, default_args=dict(a=2))
    assert list(built.rest) == ["b", "a"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda r: build_from_cfg("Anchor", r), TypeError, "cfg must be a dict, got str"),
        (lambda r: build_from_cfg(dict(size=1), r), KeyError, 'must contain the key "type"'),
        (lambda r: build_from_cfg(dict(size=1), r, dict(size=2)), KeyError, 'must contain the key "type"'),
        (lambda r: build_from_cfg(dict(type="Anchor"), "zoo"), TypeError, "registry must be a Registry, got str"),
        (
            lambda r: build_from_cfg(dict(type="Anchor"), r, 3),
            TypeError,
            "default_args must be a dict or None, got int",
        ),
        (lambda r: build_from_cfg(dict(type=3), r), TypeError, "a class or a function, got int"),
        (
            lambda r: build_from_cfg(dict(type="ancor"), r),
            KeyError,
            "ancor is not in the zoo registry; did you mean An",
        ),
        (
            lambda r: build_from_cfg(dict(type="mmcv.Ancor"), r),
            KeyError,
            "mmcv.Ancor is not in the zoo registry; did you",
        ),
        (lambda r: build_from_cfg(dict(type="Xyzzy"), r), KeyError, "import the module that registers Xyzzy"),
        (lambda r: build_from_cfg(dict(type="no.Anchor"), r), KeyError, "unknown scope 'no'"),
    ],
)
def test_bad_configs_name_the_thing_and_the_remedy(zoo, call, error, message):
    with pytest.raises(error, match=message):
        call(zoo)


class TwoArguments(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)


@pytest.mark.parametrize(
    ("original", "text"),
    [
        (ValueError("too big"), "fails: too big"),
        (KeyError("depth"), "\"fails: 'depth'\""),  # str(KeyError) quotes, once here and once in MMCV too
        (FileNotFoundError(2, "No such file", "a.py"), "fails: [Errno 2] No such file: 'a.py'"),
    ],
)
def test_constructor_errors_keep_their_type_and_gain_the_class_name(original, text):
    def fails():
        raise original

    with pytest.raises(type(original)) as caught:
        build_from_cfg(dict(type=fails), Registry("r"))
    assert type(caught.value) is type(original)
    assert str(caught.value) == text
    assert caught.value.__cause__ is original


@pytest.mark.parametrize("original", [TwoArguments(3, "no"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad byte")])
def test_an_error_that_cannot_be_rebuilt_arrives_itself_with_context(original):
    def fails():
        raise original

    with pytest.raises(type(original)) as caught:
        build_from_cfg(dict(type=fails), Registry("r"))
    assert caught.value is original
    assert "raised while building fails" in "".join(traceback.format_exception(caught.value))


def test_a_wrong_keyword_names_the_class(zoo):
    with pytest.raises(TypeError, match=r"^make_anchor: .*unexpected keyword argument 'color'"):
        zoo.build(dict(type="make_anchor", size=1, color=2))


# ---------------------------------------------------------------- locations


@pytest.fixture
def located(tmp_path, monkeypatch):
    """A module `lazy_things` that registers Thing in `located` when it is imported."""
    registry = Registry("lazy", location="lazy_things")
    (tmp_path / "lazy_things.py").write_text(
        "import lazy_hub\n"
        "seen = lazy_hub.registry.get('Thing')\n"  # a lookup from inside the import must not recurse
        "@lazy_hub.registry.register_module()\n"
        "class Thing: pass\n"
    )
    hub = type(sys)("lazy_hub")
    hub.registry = registry
    monkeypatch.setitem(sys.modules, "lazy_hub", hub)
    monkeypatch.syspath_prepend(tmp_path)
    yield registry
    sys.modules.pop("lazy_things", None)


@pytest.mark.parametrize(
    ("ask", "answer"),
    [
        (lambda r: r.get("Thing").__name__, "Thing"),
        (lambda r: r.get("mmcv.Thing").__name__, "Thing"),
        (len, 1),
        (lambda r: "Thing" in r, True),
        (list, ["Thing"]),
        (lambda r: list(r.module_dict), ["Thing"]),
        (lambda r: type(r.build(dict(type="Thing"))).__name__, "Thing"),
        (lambda r: "Thing" in repr(r), True),
    ],
)
def test_location_is_imported_when_first_asked(located, ask, answer):
    assert "lazy_things" not in sys.modules
    assert ask(located) == answer
    assert "lazy_things" in sys.modules


def test_a_users_class_cannot_take_a_built_in_name_unnoticed(located):
    class Thing:
        pass

    with pytest.raises(KeyError, match="Thing is already registered in lazy"):
        located.register_module(module=Thing)
    located.register_module(force=True, module=Thing)
    assert located.get("Thing") is Thing


def test_a_location_that_does_not_import_says_so_every_time():
    registry = Registry("r", location="no_such_module_anywhere")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
            registry.get("Thing")


def test_the_registry_module_imports_nothing_heavy():
    code = "import sys, fastrunner.registry; print(*[m for m in ('torch', 'numpy', 'yaml') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_every_registry_of_the_package_is_here():
    kinds = {k for k in registry_module.__all__ if k.isupper()}
    assert kinds == {k for k, v in vars(registry_module).items() if isinstance(v, Registry)}
    assert {getattr(registry_module, k).scope for k in kinds} == {"fastrunner"}


# ---------------------------------------------------------------- arguments that nobody knows


class _Base:
    def __init__(self, interval=1, by_epoch=True):
        pass


class _Derived(_Base):
    def __init__(self, momentum, **kwargs):
        super().__init__(**kwargs)


def _function(momentum):
    pass


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        (dict(type=_Derived, momentum=1, intervall=3), r"_Derived: .*; did you mean interval instead of intervall\?$"),
        (dict(type=_Derived, momentun=1), r"missing .*; did you mean momentum instead of momentun\?$"),
        (dict(type=_Derived, momentum=1, zzz=3), "'zzz'.*; it knows momentum, interval, by_epoch$"),
        (dict(type=_function, momentu=1), r"_function: .*; did you mean momentum instead of momentu\?$"),
        (dict(type=_function), "missing 1 required positional argument: 'momentum'$"),
    ],
)
def test_an_unknown_argument_suggests_the_nearest(cfg, says):
    with pytest.raises(TypeError, match=says):
        build_from_cfg(cfg, Registry("thing"))


def test_a_type_error_about_something_else_stays_as_it_is():
    def inner(**kwargs):
        raise TypeError("no number")

    with pytest.raises(TypeError, match=r"^inner: no number$"):
        build_from_cfg(dict(type=inner, x=1), Registry("thing"))
