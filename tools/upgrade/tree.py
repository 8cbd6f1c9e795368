"""Python sources read, never imported: where a name is defined, what a class inherits, how a function is called.

A tree is a folder that holds packages, or a wheel. Several can be read as one, so that a class of ours inherits from vLLM's.
"""

from __future__ import annotations

import ast
import hashlib
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Symbol:
    """Something that is defined: ``qualname`` in ``module``; the empty qualname is the module. ``node``: its definition."""

    module: str
    qualname: str
    node: ast.AST = field(compare=False, repr=False)

    @property
    def place(self) -> str:
        return f"{self.module}:{self.qualname}" if self.qualname else self.module

    @property
    def is_class(self) -> bool:
        return isinstance(self.node, ast.ClassDef)

    @property
    def is_function(self) -> bool:
        return isinstance(self.node, Function)


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a module or class, those under ``if``, ``try`` and ``with`` too."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from statements(node.body)
            for other in (getattr(node, "orelse", []), getattr(node, "finalbody", [])):
                yield from statements(other)
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body)


@dataclass
class Module:
    """A parsed module: what its names stand for. ``names``: a definition, or (module, name or None) of an import."""

    name: str
    is_package: bool
    node: ast.Module

    def absolute(self, module: str | None, level: int) -> str:
        """The name of a module imported from here."""
        if not level:
            return module or ""
        parts = self.name.split(".")
        parts = parts[: len(parts) - level + self.is_package]
        return ".".join([*parts, module] if module else parts)

    @cached_property
    def names(self) -> dict[str, ast.AST | tuple[str, str | None]]:
        found: dict[str, ast.AST | tuple[str, str | None]] = {}
        for node in statements(self.node.body):
            found.update(self.bound(node))
        return found

    def bound(self, node: ast.stmt) -> dict[str, ast.AST | tuple[str, str | None]]:
        """Names that a statement binds."""
        if isinstance(node, ast.ClassDef | Function):
            return {node.name: node}
        if isinstance(node, ast.ImportFrom):
            module = self.absolute(node.module, node.level)
            return {alias.asname or alias.name: (module, alias.name) for alias in node.names if alias.name != "*"}
        if isinstance(node, ast.Import):
            return {
                a.asname or a.name.split(".")[0]: (a.name if a.asname else a.name.split(".")[0], None)
                for a in node.names
            }
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        return {target.id: node for target in targets if isinstance(target, ast.Name)}

    @cached_property
    def stars(self) -> list[str]:
        """Modules whose names are all imported here."""
        return [
            self.absolute(node.module, node.level)
            for node in statements(self.node.body)
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
        ]


class Tree:
    """Sources of several packages; no other is known.

    Args:
        places: of each package: the folder that holds it, or a wheel.

    Raises:
        FileNotFoundError: a package is not there.
    """

    def __init__(self, places: dict[str, Path]) -> None:
        self._folders = {package: place for package, place in places.items() if place.is_dir()}
        self._wheels = {name: zipfile.ZipFile(place) for name, place in places.items() if place.is_file()}
        for package, place in places.items():
            if not self.modules(package):
                raise FileNotFoundError(f"{place} has no Python sources of {package}")
        self._modules: dict[str, Module | None] = {}
        self._members: dict[Symbol, dict[str, ast.AST]] = {}
        self._texts: dict[str, dict[str, str]] = {}
        self._methods: dict[int, Function] = {}

    def _read(self, path: str) -> str | None:
        package = path.removesuffix(".py").partition("/")[0]
        if package in self._folders:
            file = self._folders[package] / path
            return file.read_text() if file.is_file() else None
        wheel = self._wheels.get(package)
        return wheel.read(path).decode() if wheel is not None and path in wheel.NameToInfo else None

    def module(self, name: str) -> Module | None:
        if name not in self._modules:
            text, is_package = self._text(name), self._read(f"{name.replace('.', '/')}/__init__.py") is not None
            self._modules[name] = None if text is None else Module(name, is_package, ast.parse(text))
        return self._modules[name]

    def _text(self, module: str) -> str | None:
        path = module.replace(".", "/")
        whole = self._read(f"{path}/__init__.py")
        return whole if whole is not None else self._read(f"{path}.py")

    def modules(self, package: str) -> list[str]:
        """Names of all modules of a package."""
        if package in self._folders:
            folder = self._folders[package]
            files = [str(path.relative_to(folder)) for path in (folder / package).rglob("*.py")]
        else:
            files = [name for name in self._wheels[package].namelist() if name.startswith(f"{package}/")]
        names = (file.removesuffix(".py").removesuffix("/__init__") for file in files if file.endswith(".py"))
        return sorted(name.replace("/", ".") for name in names)

    def defining(self, package: str, name: str) -> list[str]:
        """Modules of a package that may define a name at their top."""
        start = re.compile(rf"^(?:class |def |async def |){re.escape(name)}\b", re.MULTILINE)
        if package not in self._texts:
            self._texts[package] = {module: self._text(module) or "" for module in self.modules(package)}
        return [module for module, text in self._texts[package].items() if start.search(text)]

    def find(self, module: str, name: str, seen: tuple[str, ...] = ()) -> Symbol | None:
        """What ``from module import name`` brings, where it is defined."""
        here = self.module(module)
        if here is None or module + name in seen:
            return None
        seen = (*seen, module + name)
        bound = here.names.get(name)
        if isinstance(bound, ast.AST):
            return Symbol(module, name, bound)
        if bound is not None:
            return self.find(*bound, seen) if bound[1] else self.whole(bound[0])  # type: ignore[arg-type]
        for star in here.stars:
            if (found := self.find(star, name, seen)) is not None:
                return found
        return self.whole(f"{module}.{name}") if here.is_package else None

    def whole(self, module: str) -> Symbol | None:
        """A module as a symbol."""
        here = self.module(module)
        return None if here is None else Symbol(module, "", here.node)

    def at(self, place: str) -> Symbol | None:
        """``module:Class.member`` or ``module:name`` or ``module``, where it is defined."""
        module, _, qualname = place.partition(":")
        if not qualname:
            return self.whole(module)
        first, *rest = qualname.split(".")
        found = self.find(module, first)
        for name in rest:
            found = None if found is None or not found.is_class else self.member(found, name)
        return found

    def dotted(self, module: str, node: ast.AST) -> Symbol | None:
        """What a name or a dotted name means in a module."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if isinstance(node, ast.Name):
            return self.find(module, node.id)
        if isinstance(node, ast.Attribute) and (base := self.dotted(module, node.value)) is not None:
            if base.qualname:
                return self.member(base, node.attr) if base.is_class else None
            return self.find(base.module, node.attr)
        return None

    def members(self, cls: Symbol) -> dict[str, ast.AST]:
        """Of a class's own body: methods, fields, and what its methods set on ``self``."""
        if cls not in self._members:
            found: dict[str, ast.AST] = {}
            assert isinstance(cls.node, ast.ClassDef)
            own = list(statements(cls.node.body))
            for method in (node for node in own if isinstance(node, Function)):
                there = set_on_self(method)
                self._methods.update((id(node), method) for node in there.values())
                found.update(there)
            for node in own:
                if isinstance(node, ast.ClassDef | Function):
                    found[node.name] = node
                for target in targets_of(node):
                    if isinstance(target, ast.Name):
                        found[target.id] = node
            self._members[cls] = found
        return self._members[cls]

    def method_of(self, node: ast.AST) -> Function | None:
        """The method in which a member is set on ``self``."""
        return self._methods.get(id(node))

    def bases(self, cls: Symbol) -> list[Symbol]:
        assert isinstance(cls.node, ast.ClassDef)
        bare = (base.value if isinstance(base, ast.Subscript) else base for base in cls.node.bases)
        found = (self.dotted(cls.module, base) for base in bare)
        return [base for base in found if base is not None and base.is_class]

    def mro(self, cls: Symbol) -> list[Symbol]:
        """The class and what it inherits from, as far as the sources are here; shared bases come last."""
        chain = [cls, *(up for base in self.bases(cls) for up in self.mro(base))]
        return [up for i, up in enumerate(chain) if up not in chain[i + 1 :]]

    def member(self, cls: Symbol, name: str) -> Symbol | None:
        """A class's own or inherited member."""
        for owner in self.mro(cls):
            if name in self.members(owner):
                return Symbol(owner.module, f"{owner.qualname}.{name}", self.members(owner)[name])
        return None


def targets_of(node: ast.AST) -> list[ast.expr]:
    """What a statement assigns to."""
    if isinstance(node, ast.Assign):
        return [one for to in node.targets for one in (to.elts if isinstance(to, ast.Tuple) else [to])]
    return [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign) else []


def set_on_self(method: Function) -> dict[str, ast.AST]:
    """Attributes that a method sets on its first argument, with the statement; one with an annotation is preferred."""
    if not method.args.args:
        return {}
    first, found = method.args.args[0].arg, {}
    for node in ast.walk(method):
        for to in targets_of(node):
            mine = isinstance(to, ast.Attribute) and isinstance(to.value, ast.Name) and to.value.id == first
            if mine and (to.attr not in found or isinstance(node, ast.AnnAssign)):  # type: ignore[union-attr]
                found[to.attr] = node  # type: ignore[union-attr]
    return found


class _Unquote(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str):
            try:
                return ast.parse(node.value, mode="eval").body
            except SyntaxError:
                return node
        return node


def told(node: ast.AST | None) -> str:
    """An annotation as text, whether it was quoted or not."""
    return "" if node is None else ast.unparse(_Unquote().visit(ast.parse(ast.unparse(node), mode="eval").body))


def signature(function: Function, annotations: bool = True) -> str:
    """Of a function: decorators, arguments, defaults and, when wanted, annotations; spelling and quotes do not matter."""
    args = ast.parse(f"def f({ast.unparse(function.args)}): pass").body[0].args  # type: ignore[attr-defined]
    for arg in (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg):
        if arg is not None and arg.annotation is not None:
            arg.annotation = ast.Name(told(arg.annotation)) if annotations else None
    decorators = "".join(f"@{ast.unparse(one)} " for one in function.decorator_list) if annotations else ""
    returns = f" -> {told(function.returns)}" if annotations and function.returns is not None else ""
    return f"{decorators}({ast.unparse(args)}){returns}"


def _plain(node: object) -> object:
    if isinstance(node, ast.AST):
        skipped = ("ctx", "kind", "type_comment", "type_params")
        pairs = ((name, value) for name, value in ast.iter_fields(node) if name not in skipped)
        return type(node).__name__, [(name, _plain(value)) for name, value in pairs if value not in (None, [])]
    return [_plain(one) for one in node] if isinstance(node, list) else repr(node)


def digest(node: ast.AST) -> str:
    """Of what a definition does: comments, docstrings, layout and a function's signature do not matter."""
    bare = ast.parse(ast.unparse(node)).body[0]
    for inner in ast.walk(bare):
        body = getattr(inner, "body", None)
        if isinstance(inner, Function | ast.ClassDef) and ast.get_docstring(inner, clean=False) is not None:
            inner.body = body[1:] or [ast.Pass()]  # type: ignore[index]
    what = bare.body if isinstance(bare, Function) else bare
    return hashlib.sha256(repr(_plain(what)).encode()).hexdigest()[:16]
