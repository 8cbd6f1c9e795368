"""Which of vLLM's interfaces our code stands on, found in its sources: imported, inherited, overridden, called, read, set."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tools.upgrade.expressions import VLLM, Evaluator, function_env, of_vllm
from tools.upgrade.tree import Function, Symbol, signature


def names_missing(handler: ast.ExceptHandler) -> bool:
    """Whether a handler is for imports that fail."""
    told = "" if handler.type is None else ast.unparse(handler.type)
    return "ImportError" in told or "ModuleNotFoundError" in told


class Collector(Evaluator):
    """Walks our modules. Arguments as for ``Evaluator``."""

    # Modules, classes, functions ---------------------------------------------------------------------------------

    def visit_module(self, name: str) -> None:
        here = self.tree.module(name)
        assert here is not None
        self.module, self.env, self.cls, self.owner = name, {}, None, None
        self.statements(here.node.body)

    def statements(self, body: list[ast.stmt]) -> None:
        for node in body:
            self.statement(node)

    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            self.imported(node)
        elif isinstance(node, Function):
            self.function(node, None)
        elif isinstance(node, ast.ClassDef):
            self.class_(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            self.assigned(node)
        elif isinstance(node, ast.For | ast.AsyncFor):
            over = self.ev(node.iter)
            self.bind(node.target, None if over is None else over.items[0] if over.kind == "dict" else over.item)
            self.statements([*node.body, *node.orelse])
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            self._typing_only = True
            self.statements(node.body)
            self._typing_only = False
        elif isinstance(node, ast.Try) and any(names_missing(one) for one in node.handlers):
            self.tried(node)
        else:
            for _, value in ast.iter_fields(node):
                for child in value if isinstance(value, list) else [value]:
                    self.any(child)

    def tried(self, node: ast.Try) -> None:
        """Imports with others to fall back on."""
        kept, self.missing = self.missing, {}
        self.statements(node.body)
        failed, self.missing = self.missing, kept
        for key in failed:
            self.uses.pop(key, None)
            self.spared.add(key)
        for handler in node.handlers:
            if failed:
                self.statements(handler.body)
            else:
                self.spared |= {key for one in handler.body for key, _ in self.keys_of(one)}
        self.statements([*node.orelse, *node.finalbody])

    def keys_of(self, node: ast.stmt) -> Iterator[tuple[str, str]]:
        """What an import takes from vLLM, and the name that it gets here."""
        here = self.tree.module(self.module)
        assert here is not None
        for alias, target in here.bound(node).items() if isinstance(node, ast.Import | ast.ImportFrom) else ():
            module, name = target  # type: ignore[misc]
            if module == VLLM or module.startswith(f"{VLLM}."):
                yield (f"{module}:{name}" if name else module), alias

    def imported(self, node: ast.Import | ast.ImportFrom) -> None:
        here = self.tree.module(self.module)
        assert here is not None
        keys = {alias: key for key, alias in self.keys_of(node)}
        for alias, target in here.bound(node).items():
            module, name = target  # type: ignore[misc]
            found = self.tree.find(module, name) if name else self.tree.whole(module)
            key = keys.get(alias, "")
            self.env[alias] = None if found is None else self.value_of(found, key)
            if key:
                self.note(key, "named in types" if self._typing_only else "imported")
                if found is None:
                    self.missing.setdefault(key, set()).add(self.file_of(self.module))

    def function(self, node: Function, cls: Symbol | None) -> None:
        for default in (*node.args.defaults, *node.args.kw_defaults, *node.decorator_list):
            self.any(default)
        kept = self.env
        self.env = {**kept, **function_env(self.tree, self.module, node, cls)}
        self.statements(node.body)
        self.env = kept

    def class_(self, node: ast.ClassDef) -> None:
        cls = Symbol(self.module, node.name, node)
        bases = [
            value.symbol for base in node.bases if (value := self.ev(base)) is not None and value.symbol is not None
        ]
        local = node.name not in (self.tree.module(self.module) or node).names  # type: ignore[union-attr]
        chain = [cls, *bases] if local else self.tree.mro(cls)
        for base in bases:
            if of_vllm(base):
                self.note(base.place, "subclassed")
        for place, owner in enumerate(chain):
            if of_vllm(owner) or (owner != cls and not any(of_vllm(up) for up in self.tree.mro(cls))):
                continue
            for name, member in self.tree.members(owner).items():
                self.overridden(owner, name, member, chain[place + 1 :])
            # What is inherited from classes of ours that do not know vLLM's is looked at again, as part of this one.
            if owner == cls or not any(of_vllm(up) for up in self.tree.mro(owner)):
                self.body(owner, cls)

    def body(self, owner: Symbol, cls: Symbol) -> None:
        assert isinstance(owner.node, ast.ClassDef)
        kept = self.module, self.env, self.cls, self.owner
        if owner.module != self.module:
            self.module, self.env = owner.module, {}
        self.cls, self.owner = cls, owner
        for node in owner.node.body:
            if isinstance(node, Function):
                self.function(node, cls)
            elif not isinstance(node, ast.Expr):
                self.statement(node)
        self.module, self.env, self.cls, self.owner = kept

    def overridden(self, owner: Symbol, name: str, member: ast.AST, above: list[Symbol]) -> None:
        if name in ("__slots__", "__doc__", "__module__"):
            return
        known: list[Symbol] = []
        for base in above:
            if not of_vllm(base) or base in known or self.tree.member(base, name) is None:
                continue
            known += self.tree.mro(base)
            use = self.note(f"{base.place}.{name}", "overridden" if isinstance(member, Function) else "set")
            if isinstance(member, Function):
                use.ours[f"{self.file_of(owner.module)}:{owner.qualname}"] = signature(member, annotations=False)
