"""Config files and what is asked of them, run alike on mmcv's Config and on ours.

``run(case, Config, folder)`` writes the files of a case into an empty folder, reads the one called ``main`` and returns
what came of it in JSON's types. ``record.py`` keeps mmcv's answers in ``config.json``.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

BASE = """
work_dir = './work_dirs/{{ fileBasenameNoExtension }}'
model = dict(type='Net', depth=50, neck=dict(type='FPN', out=256), heads=[dict(a=1), dict(b=2)])
optimizer = dict(type='SGD', lr=0.1, momentum=0.9)
steps = (8, 11)
"""

# name -> files, the options to merge, other arguments of fromfile
FILES: dict[str, dict[str, Any]] = {
    "python": dict(files={"main.py": "a = 1\nb = dict(c=[1, dict(d=(2, 3))])\n_private = 'kept'\n__hidden__ = 4\n"}),
    "python drops modules and functions": dict(
        files={"main.py": "import os\nfrom math import pi\ndef f(): return 3\na = f()\nclass K: pass\nK = K.__name__\n"}
    ),
    "json": dict(files={"main.json": '{"a": 1, "b": {"c": [1, {"d": null}]}, "e": 1e-4, "name": "{{fileExtname}}"}'}),
    "yaml": dict(files={"main.yaml": "a: 1\nb:\n  c: [1, {d: null}]\nname: '{{ fileBasename }}'\n"}),
    "yml": dict(files={"main.yml": "workflow:\n- [train, 1]\n- [val, 1]\n"}),
    "base": dict(
        files={"base.py": BASE, "main.py": "_base_ = './base.py'\nmodel = dict(depth=101, extra=dict(x=1))\n"}
    ),
    "two bases": dict(
        files={
            "a.py": "x = 1\nd = dict(p=1)\n",
            "sub/b.json": '{"y": {"z": 2}}',
            "main.py": "_base_ = ['a.py', './sub/b.json']\nd = dict(q=2)\ny = dict(w=3)\n",
        }
    ),
    "grandparent": dict(
        files={
            "configs/root.yml": "a: {b: {c: 1, d: 2}}\n",
            "configs/mid/mid.py": "_base_ = ['../root.yml']\na = dict(b=dict(c=10))\n",
            "main.py": "_base_ = ['configs/mid/mid.py']\na = dict(b=dict(e=3))\nf = 4\n",
        }
    ),
    "bases that share a key": dict(
        files={"a.py": "x = 1\n", "b.py": "x = 2\n", "main.py": "_base_ = ['a.py', 'b.py']\n"}
    ),
    "delete": dict(
        files={
            "base.py": BASE,
            "main.py": "_base_ = 'base.py'\nmodel = dict(neck=dict(_delete_=True, type='None'))\n"
            "optimizer = dict(_delete_=True, type='Adam')\n",
        }
    ),
    "delete false": dict(
        files={"base.py": BASE, "main.py": "_base_ = 'base.py'\noptimizer = dict(_delete_=False, type='Adam')\n"}
    ),
    "delete where the base has nothing": dict(
        files={"base.py": BASE, "main.py": "_base_ = 'base.py'\nnew = dict(_delete_=True, type='Adam')\n"}
    ),
    "delete over a scalar": dict(
        files={"base.py": BASE, "main.py": "_base_ = 'base.py'\nsteps = dict(_delete_=True, by='epoch')\n"}
    ),
    "dict over a scalar": dict(files={"base.py": BASE, "main.py": "_base_ = 'base.py'\nsteps = dict(by='epoch')\n"}),
    "scalar and list over dicts": dict(
        files={"base.py": BASE, "main.py": "_base_ = 'base.py'\nmodel = None\noptimizer = [1]\n"}
    ),
    "base references in python": dict(
        files={
            "base.py": BASE,
            "main.py": "_base_ = 'base.py'\nlr = {{ _base_.optimizer.lr }}\nm = dict(n=[{{_base_.model}}], "
            "t=({{ _base_.steps }}, 1))\nmodel = dict(depth={{ _base_.optimizer.momentum }})\n",
        }
    ),
    "base references in json": dict(
        files={"base.json": '{"a": {"b": [1, 2]}}', "main.json": '{"_base_": "base.json", "c": {{ _base_.a.b }}}'}
    ),
    "base references in yaml": dict(
        files={"base.yaml": "a: {b: [1, 2]}\n", "main.yaml": "_base_: base.yaml\nc: {{ _base_.a }}\n"}
    ),
    "base reference to nothing": dict(
        files={"base.py": BASE, "main.py": "_base_ = 'base.py'\nlr = {{ _base_.optimizer.nothing }}\n"}
    ),
    "predefined variables": dict(
        files={
            "main.py": "a = '{{fileDirname}}'\nb = '{{ fileBasename }}'\nc = '{{  fileBasenameNoExtension}}'\n"
            "d = ['{{ fileExtname }}']\ne = '{{ fileNothing }}'\n"
        }
    ),
    "predefined variables left alone": dict(
        files={"main.py": "a = '{{ fileBasename }}'\n"}, arguments=dict(use_predefined_variables=False)
    ),
    "deprecation": dict(
        files={"main.py": "_deprecation_ = dict(expected='new.py', reference='https://example.com')\na = 1\n"}
    ),
    "reserved key": dict(files={"main.py": "text = 1\n"}),
    "missing base": dict(files={"main.py": "_base_ = 'nowhere.py'\n"}),
    "unknown extension": dict(files={"main.txt": "a = 1\n"}),
    "python that does not parse": dict(files={"main.py": "a = 1\nb = dict(\n"}),
    "json that does not parse": dict(files={"main.json": '{"a": 1,\n "b": }'}),
    "custom imports": dict(files={"main.py": "custom_imports = dict(imports=['json.tool', 'colorsys'])\n"}),
    "custom imports that fail": dict(files={"main.py": "custom_imports = dict(imports=['no_such_module_here'])\n"}),
    "custom imports that may fail": dict(
        files={"main.py": "custom_imports = dict(imports=['no_such_module_here'], allow_failed_imports=True)\n"}
    ),
    "custom imports of a wrong type": dict(files={"main.py": "custom_imports = dict(imports=dict(a=1))\n"}),
}

MERGES: dict[str, dict[str, Any]] = {
    "nested keys": dict(options={"model.depth": 18, "model.neck.out": 64, "new.deep.key": [1, 2]}),
    "a dict": dict(options={"model": dict(depth=18, extra=dict(x=1))}),
    "list index": dict(options={"model.heads.0.a": 5, "model.heads.1": dict(c=3)}),
    "list replaced": dict(options={"model.heads": [1]}),
    "list index past the end": dict(options={"model.heads.2": dict(c=3)}),
    "list index not allowed": dict(options={"model.heads.0.a": 5}, arguments=dict(allow_list_keys=False)),
    "list key that is no index": dict(options={"model.heads.first.a": 5}),
    "delete": dict(options={"optimizer": dict(_delete_=True, type="Adam")}),
    "delete by key": dict(options={"optimizer._delete_": True, "optimizer.type": "Adam"}),
    "dict over a scalar": dict(options={"optimizer.lr.start": 1}),
    "scalar over a dict": dict(options={"optimizer": None}),
}

ACTIONS = [
    "1", "-3", "1.5", "1e-3", "inf", "true", "False", "TRUE", "None", "none", "text", "a.b/c", "", "'quoted'", '"1"',
    "1,2,3", "a,b", "[1,2,3]", "(1,2,3)", "[a, b, c]", "[(1, 2, 3), [a, b], c]", "[[1],[2,[3]]]", "(1)", "()", "[]",
    "1,", "[1,]", ",1", "['a','b']", "'[1,2]'", "a b", "[1,2", "[1,(2])", "((1,2)", "k=v", "x(y", "[a=b,c]",
    "[1.0,true,None]", "(a),b", "0x10", "1_000",
]  # fmt: skip


def plain(value: Any) -> Any:
    """Dict subclasses as dicts, so that ``repr`` compares."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return type(value)(map(plain, value)) if isinstance(value, (list, tuple)) else value


def run_file(case: dict[str, Any], config_type: Any, folder: str) -> dict[str, Any]:
    """What reading the case's main file gives: the dict's repr, the text, warnings; or the type of the exception."""
    for name, content in case["files"].items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(content)
    main = next(name for name in case["files"] if name.startswith("main."))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            cfg = config_type.fromfile(os.path.join(folder, main), **case.get("arguments", {}))
        except Exception as error:
            return dict(error=type(error).__name__)
    return dict(
        value=repr(plain(cfg._cfg_dict)).replace(folder, "<folder>"),
        text=cfg.text.replace(folder, "<folder>"),
        filename=cfg.filename.replace(folder, "<folder>"),
        warnings=[w.category.__name__ for w in caught if w.category in (DeprecationWarning, UserWarning)],
    )


def run_merge(case: dict[str, Any], config_type: Any) -> dict[str, Any]:
    cfg = config_type.fromstring(BASE.replace("{{ fileBasenameNoExtension }}", "x"), ".py")
    try:
        cfg.merge_from_dict(case["options"], **case.get("arguments", {}))
    except Exception as error:
        return dict(error=type(error).__name__)
    return dict(value=repr(plain(cfg._cfg_dict)))


def run_action(text: str, action_type: Any) -> dict[str, Any]:
    try:
        return dict(value=repr(action_type._parse_iterable(text)))
    except Exception as error:
        return dict(error=type(error).__name__)
