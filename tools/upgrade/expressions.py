"""What our code's expressions are, and what of vLLM they use."""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tools.upgrade.tree import Function, Symbol, Tree, targets_of
from tools.upgrade.values import Value, annotated, is_property

VLLM = "vllm"
NAMED = {
    "vllm_config": "vllm.config:VllmConfig",
    "scheduler_stats": "vllm.v1.metrics.stats:SchedulerStats",
    "kv_transfer_config": "vllm.config:KVTransferConfig",
}
"""What values of these names are where they have no annotation, or Any."""
NAMED_IN = {("vllm_prune.compat", "c"): "vllm.config:VllmConfig"}
"""The same, in one module."""

Env = dict[str, Value | None]


@dataclass
class Use:
    """How one interface is used. ``calls``: positional arguments, names of the others, whether there may be more of either.
    ``ours``: signatures of what overrides it, by place."""

    how: set[str] = field(default_factory=set)
    where: set[str] = field(default_factory=set)
    calls: set[tuple[int, tuple[str, ...], bool]] = field(default_factory=set)
    ours: dict[str, str] = field(default_factory=dict)


def of_vllm(symbol: Symbol | None) -> bool:
    return symbol is not None and (symbol.module == VLLM or symbol.module.startswith(f"{VLLM}."))


def function_env(tree: Tree, module: str, function: Function | ast.Lambda, cls: Symbol | None) -> Env:
    """A function's arguments by their annotations; ``cls``: of the object that a method is called on."""
    args = function.args
    env: Env = {arg.arg: None for arg in (args.vararg, args.kwarg) if arg is not None}
    for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs):
        env[arg.arg] = annotated(tree, module, arg.annotation)
        name = NAMED_IN.get((module, arg.arg)) or NAMED.get(arg.arg)
        plain = arg.annotation is None or ast.unparse(arg.annotation) == "Any"
        if plain and name is not None and (found := tree.at(name)) is not None:
            env[arg.arg] = Value("instance", found)
    if cls is not None and args.args and not isinstance(function, ast.Lambda):
        kinds = {getattr(one, "id", "") for one in function.decorator_list}
        if "staticmethod" not in kinds:
            env[args.args[0].arg] = Value("class" if "classmethod" in kinds else "instance", cls)
    return env


class Evaluator(ABC):
    """Follows expressions of one module.

    Args:
        tree: of our sources and of one vLLM's.
        file_of: path of one of our modules, for the record.
    """

    def __init__(self, tree: Tree, file_of: Callable[[str], str]) -> None:
        self.tree, self.file_of = tree, file_of
        self.uses: dict[str, Use] = {}
        self.missing: dict[str, set[str]] = {}
        """Imports that lead nowhere: where they are."""
        self.spared: set[str] = set()
        """Imports that this vLLM need not have: they fail and another is tried, or would be tried after one that succeeds."""
        self.module, self.env, self.cls, self.owner = "", Env(), None, None  # type: ignore[var-annotated]
        self._typing_only = False
        self._asked: set[tuple[Symbol, int]] = set()

    def note(self, key: str, how: str) -> Use:
        if of_vllm(self.tree.whole(self.module)):
            return Use()  # only what a value is was looked up in vLLM's own sources
        use = self.uses.setdefault(key, Use())
        use.how.add(how)
        use.where.add(self.file_of(self.module))
        return use

    @abstractmethod
    def statement(self, node: ast.stmt) -> None:
        """Note what a statement uses."""

    def any(self, node: object) -> None:
        if isinstance(node, ast.stmt):
            self.statement(node)
        elif isinstance(node, ast.expr):
            self.ev(node)
        elif isinstance(node, ast.AST):
            for child in ast.iter_child_nodes(node):
                self.any(child)

    def bind(self, target: ast.AST, value: Value | None) -> None:
        if isinstance(target, ast.Name):
            self.env[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            for i, one in enumerate(target.elts):
                inner = None
                if value is not None and value.kind in ("tuple", "many"):
                    inner = value.item if value.kind == "many" else value.items[i] if i < len(value.items) else None
                self.bind(one, inner)
        elif isinstance(target, ast.Attribute):
            self.attribute(self.ev(target.value), target.attr, "set")
        elif isinstance(target, ast.expr):
            self.ev(target)

    def assigned(self, node: ast.Assign | ast.AnnAssign | ast.AugAssign) -> None:
        value = self.ev(node.value) if node.value is not None else None
        if isinstance(node, ast.AnnAssign):
            value = annotated(self.tree, self.module, node.annotation) or value
        for target in node.targets if isinstance(node, ast.Assign) else targets_of(node):
            self.bind(target, value)

    def ev(self, node: ast.expr) -> Value | None:
        """What an expression is; notes what it uses."""
        handler = getattr(self, f"ev_{type(node).__name__}", None)
        if handler is not None:
            return handler(node)  # type: ignore[no-any-return]
        for child in ast.iter_child_nodes(node):
            self.any(child)
        return None

    def ev_Name(self, node: ast.Name) -> Value | None:
        if node.id in self.env:
            return self.env[node.id]
        found = self.tree.find(self.module, node.id)
        return None if found is None else self.value_of(found)

    def ev_Attribute(self, node: ast.Attribute) -> Value | None:
        return self.attribute(self.ev(node.value), node.attr, "read" if isinstance(node.ctx, ast.Load) else "set")

    def ev_Await(self, node: ast.Await) -> Value | None:
        return self.ev(node.value)

    def ev_Tuple(self, node: ast.Tuple) -> Value | None:
        return Value("tuple", items=tuple(self.ev(one) for one in node.elts))

    def ev_NamedExpr(self, node: ast.NamedExpr) -> Value | None:
        value = self.ev(node.value)
        self.bind(node.target, value)
        return value

    def ev_IfExp(self, node: ast.IfExp) -> Value | None:
        self.ev(node.test)
        first, second = self.ev(node.body), self.ev(node.orelse)
        return first or second

    def ev_BoolOp(self, node: ast.BoolOp) -> Value | None:
        return next((value for value in [self.ev(one) for one in node.values] if value is not None), None)

    def ev_Subscript(self, node: ast.Subscript) -> Value | None:
        base = self.ev(node.value)
        self.ev(node.slice)
        if base is None:
            return None
        if base.kind == "tuple":
            index = node.slice.value if isinstance(node.slice, ast.Constant) else None
            return base.items[index] if isinstance(index, int) and -len(base.items) <= index < len(base.items) else None
        return (
            base if base.kind == "class" or (base.kind == "many" and isinstance(node.slice, ast.Slice)) else base.item
        )

    def ev_Lambda(self, node: ast.Lambda) -> Value | None:
        with self.inner(function_env(self.tree, self.module, node, None)):
            self.ev(node.body)
        return None

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> Value | None:
        with self.inner({}):
            for one in node.generators:
                over = self.ev(one.iter)
                self.bind(one.target, None if over is None else over.items[0] if over.kind == "dict" else over.item)
                for test in one.ifs:
                    self.ev(test)
            if isinstance(node, ast.DictComp):
                return Value("dict", items=(self.ev(node.key), self.ev(node.value)))
            return Value("many", items=(self.ev(node.elt),))

    ev_ListComp = ev_SetComp = ev_GeneratorExp = ev_DictComp = _comprehension

    def ev_Call(self, node: ast.Call) -> Value | None:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name == "super" and not node.args and self.cls is not None:
            return Value("super", self.cls, at=self.owner)
        function = self.ev(node.func)
        values = [self.ev(one) for one in node.args]
        for keyword in node.keywords:
            self.ev(keyword.value)
        if name in ("getattr", "hasattr", "setattr") and isinstance(node.args[1], ast.Constant):
            return self.attribute(values[0], node.args[1].value, "set" if name == "setattr" else "read")
        if name == "cast":
            return annotated(self.tree, self.module, node.args[0])
        if name in ("list", "sorted", "reversed", "set", "tuple") and values:
            return values[0]
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("values", "items", "get", "pop"):
            base = self.ev(node.func.value)
            if base is not None and base.kind == "dict":
                pair = Value("many", items=(Value("tuple", items=base.items),))
                return {"values": Value("many", items=base.items[-1:]), "items": pair}.get(node.func.attr, base.item)
        return None if function is None else self.called(function, node)

    def called(self, function: Value, node: ast.Call) -> Value | None:
        assert function.symbol is not None or function.kind not in ("class", "function")
        if function.key and function.kind in ("class", "function"):
            more = any(isinstance(one, ast.Starred) for one in node.args) or any(
                one.arg is None for one in node.keywords
            )
            count = sum(not isinstance(one, ast.Starred) for one in node.args)
            names = tuple(sorted(one.arg for one in node.keywords if one.arg is not None))
            self.note(function.key, "called").calls.add((count, names, more))
        if function.kind == "class":
            return Value("instance", function.symbol)
        if function.kind == "function" and isinstance(function.symbol.node, Function):  # type: ignore[union-attr]
            return annotated(self.tree, function.symbol.module, function.symbol.node.returns, function.at)  # type: ignore[union-attr]
        return None

    @contextmanager
    def inner(self, env: Env) -> Iterator[None]:
        kept = self.env
        self.env = {**kept, **env}
        yield
        self.env = kept

    # Values ------------------------------------------------------------------------------------------------------

    def attribute(self, base: Value | None, name: str, how: str) -> Value | None:
        if base is None or base.symbol is None:
            return None
        if base.kind == "module":
            found = self.tree.find(base.symbol.module, name)
            key = f"{base.symbol.module}:{name}"
            if of_vllm(found):
                self.note(key, how)
            return None if found is None else self.value_of(found, key if of_vllm(found) else "")
        if base.kind not in ("class", "instance", "super"):
            return None
        chain = self.tree.mro(base.symbol)
        if base.kind == "super" and base.at in chain:
            chain = chain[chain.index(base.at) + 1 :]
        for cls in chain:
            if of_vllm(cls) and (found := self.tree.member(cls, name)) is not None:
                key = f"{cls.place}.{name}"
                self.note(key, how)
                return self.value_of(found, key, base.symbol)
            if not of_vllm(cls) and name in (own := self.tree.members(cls)):
                return self.value_of(Symbol(cls.module, f"{cls.qualname}.{name}", own[name]), "", base.symbol)
        return None

    def value_of(self, symbol: Symbol, key: str = "", receiver: Symbol | None = None) -> Value | None:
        """What a definition stands for. ``receiver``: the class it was reached through."""
        node = symbol.node
        if isinstance(node, ast.Module):
            return Value("module", symbol, key=key)
        if isinstance(node, ast.ClassDef):
            return Value("class", symbol, key=key or (symbol.place if of_vllm(symbol) else ""))
        if isinstance(node, Function):
            if "." in symbol.qualname and is_property(node):
                return annotated(self.tree, symbol.module, node.returns, receiver)
            return Value("function", symbol, key=key, at=receiver)
        if isinstance(node, ast.AnnAssign) and (
            found := annotated(self.tree, symbol.module, node.annotation, receiver)
        ):
            return found
        return self.looked_up(symbol, node, receiver) if isinstance(node, ast.Assign | ast.AnnAssign) else None

    def looked_up(self, symbol: Symbol, node: ast.Assign | ast.AnnAssign, receiver: Symbol | None) -> Value | None:
        """What was assigned to a name elsewhere, without noting the uses there."""
        if node.value is None or (symbol, id(node)) in self._asked:
            return None
        self._asked.add((symbol, id(node)))
        method = self.tree.method_of(node)
        silent = type(self)(self.tree, self.file_of)
        silent.module, silent._asked = symbol.module, self._asked
        silent.env = {} if method is None else function_env(self.tree, symbol.module, method, receiver)
        name, found = symbol.qualname.rpartition(".")[2], silent.ev(node.value)
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if isinstance(target, ast.Tuple):
                names = [getattr(one, "attr", getattr(one, "id", "")) for one in target.elts]
                pick = found.items if found is not None and found.kind == "tuple" else ()
                found = pick[names.index(name)] if name in names and len(pick) == len(names) else None
        self._asked.discard((symbol, id(node)))
        return found
