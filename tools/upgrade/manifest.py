"""The manifest: every interface of one vLLM that our code stands on, with what it looks like there. A file for people and for
``compare``; made by ``python -m tools.upgrade --write``, never by hand."""

from __future__ import annotations

import ast
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tools.upgrade.assumed import ASSUMED
from tools.upgrade.tree import Function, Symbol, Tree, digest, signature, told
from tools.upgrade.uses import Collector, of_vllm

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = Path(__file__).with_name("interfaces.json")
OURS = {
    "vllm_prune": ROOT,
    "vllm_prune_training": ROOT / "training",
    "vllm_prune_kernels": ROOT / "kernels",
}
"""Our packages, and the folders that hold them."""
READ_AGAIN = {"overridden", "assumed"}
"""Uses for which not only the signature of a function counts, but what it does."""


@dataclass
class Interface:
    """One interface as it is in one vLLM.

    Attributes:
        kind: module, class, function, field (of a class) or variable.
        how: imported, named in types, subclassed, overridden, called, read, set, assumed.
        where: our files.
        defined: where, if elsewhere than its name says.
        signature: of a function; of a class, its bases; of a field, its annotation.
        body: digest of what it does, where that counts.
        abstract: methods that a subclass must have.
        calls: how ours call it: positional arguments, names of the others, whether there may be more of either.
        ours: signatures of what overrides it.
        why: of what is assumed.
    """

    kind: str
    how: list[str] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    defined: str = ""
    signature: str = ""
    body: str = ""
    abstract: list[str] = field(default_factory=list)
    calls: list[list[Any]] = field(default_factory=list)
    ours: dict[str, str] = field(default_factory=dict)
    why: str = ""


Manifest = dict[str, Interface]


def our_tree(vllm: Path, ours: Mapping[str, Path] = OURS) -> Tree:
    """Our packages and a vLLM: a folder that holds the package, or a wheel."""
    return Tree({**ours, "vllm": vllm})


def collect(tree: Tree, ours: Mapping[str, Path] = OURS) -> Collector:
    """All uses of vLLM in our packages."""

    def file_of(module: str) -> str:
        here = tree.module(module)
        assert here is not None
        folder = ours[module.partition(".")[0]]
        path = module.replace(".", "/") + ("/__init__.py" if here.is_package else ".py")
        return (folder / path).relative_to(ROOT).as_posix() if folder.is_relative_to(ROOT) else path

    collector = Collector(tree, file_of)
    for package in ours:
        for module in tree.modules(package):
            collector.visit_module(module)
    return collector


def abstract_methods(tree: Tree, cls: Symbol) -> list[str]:
    """Methods without a body anywhere in vLLM's part of what a class inherits."""
    found: dict[str, bool] = {}
    for owner in tree.mro(cls):
        for name, node in tree.members(owner).items() if of_vllm(owner) else ():
            decorators = [ast.unparse(one) for one in node.decorator_list] if isinstance(node, Function) else []
            found.setdefault(name, any(one.rpartition(".")[2] == "abstractmethod" for one in decorators))
    return sorted(name for name, empty in found.items() if empty)


def look(tree: Tree, place: str) -> Interface | None:
    """What is at a place; None when nothing is. The body and abstract methods are always looked at."""
    symbol = tree.at(place)
    if symbol is None:
        return None
    node, member = symbol.node, "." in symbol.qualname
    found = Interface("field" if member else "variable")
    if isinstance(node, ast.Module):
        found.kind = "module"
    elif isinstance(node, ast.ClassDef):
        found.kind, found.signature = "class", ", ".join(ast.unparse(base) for base in node.bases)
        found.abstract, found.body = abstract_methods(tree, symbol), digest(node)
    elif isinstance(node, Function):
        found.kind, found.signature, found.body = "function", signature(node), digest(node)
    elif isinstance(node, ast.AnnAssign):
        found.signature = told(node.annotation)
    found.defined = symbol.place if symbol.place != place else ""
    return found


def make_manifest(tree: Tree, ours: Mapping[str, Path] = OURS, assumed: Mapping[str, str] = ASSUMED) -> Manifest:
    """Of our code on a vLLM.

    Raises:
        LookupError: something is imported, or assumed, that is not there.
    """
    collector = collect(tree, ours)
    missing = [f"{place} ({', '.join(sorted(where))})" for place, where in collector.missing.items()]
    missing += [place for place in assumed if tree.at(place) is None]
    if missing:
        raise LookupError(f"not in this vLLM: {'; '.join(missing)}")
    made: Manifest = {}
    for place in sorted({*collector.uses, *assumed}):
        found = look(tree, place)
        assert found is not None, place
        use = collector.uses.get(place)
        if use is not None:
            found.how, found.where = sorted(use.how), sorted(use.where)
            found.calls = [[count, list(names), more] for count, names, more in sorted(use.calls)]
            found.ours = dict(sorted(use.ours.items()))
        if place in assumed:
            found.how, found.why = sorted([*found.how, "assumed"]), assumed[place]
        if not READ_AGAIN & set(found.how):
            found.body = ""
        if "subclassed" not in found.how:
            found.abstract = []
        made[place] = found
    return made


def entry_point_groups(tree: Tree) -> dict[str, bool]:
    """The groups of vLLM's that our distribution has entry points in, and whether this vLLM knows them."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    plugins = tree.module("vllm.plugins")
    named = set() if plugins is None else {getattr(node, "value", None) for node in ast.walk(plugins.node)}
    return {group: group in named for group in groups if group.startswith("vllm.")}


def to_json(version: str, manifest: Manifest) -> str:
    """As the file holds it: what is empty is left out."""
    entries = {
        place: {name: value for name, value in asdict(found).items() if value} for place, found in manifest.items()
    }
    return json.dumps({"vllm": version, "interfaces": entries}, indent=1) + "\n"


def read(path: Path = MANIFEST) -> tuple[str, Manifest]:
    """The version that a manifest is of, and what it holds."""
    data = json.loads(path.read_text())
    known = {one.name for one in fields(Interface)}
    return data["vllm"], {
        place: Interface(**{name: value for name, value in entry.items() if name in known})
        for place, entry in data["interfaces"].items()
    }
