"""What an expression is, as far as annotations say: enough to know which attributes of vLLM's objects are read."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from tools.upgrade.tree import Function, Symbol, Tree

MANY = ("list", "Sequence", "Iterable", "Iterator", "Collection", "set", "frozenset", "deque", "AsyncGenerator",
        "AsyncIterator", "AsyncIterable", "Generator")  # fmt: skip
SAME = ("Optional", "ClassVar", "Annotated", "Final", "Required", "NotRequired")


@dataclass(frozen=True)
class Value:
    """What is known of an expression.

    Attributes:
        kind: module, class, instance, super, function; many, dict, tuple of ``items``.
        symbol: what is meant; of an instance, its class.
        items: of many, one; of a dict, key and value; of a tuple, all.
        key: under which the use of it was noted.
        at: of a bound method or ``super()``, the class that it was reached through.
    """

    kind: str
    symbol: Symbol | None = None
    items: tuple[Value | None, ...] = ()
    key: str = ""
    at: Symbol | None = None

    @property
    def item(self) -> Value | None:
        """What iterating or subscripting brings."""
        return self.items[-1] if self.kind in ("many", "dict") and self.items else None


def annotated(tree: Tree, module: str, node: ast.AST | None, receiver: Symbol | None = None) -> Value | None:
    """A value of an annotated type. ``receiver``: what ``Self`` means."""
    if node is None:
        return None
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        try:
            node = ast.parse(node.value, mode="eval").body
        except SyntaxError:
            return None
    if isinstance(node, ast.BinOp):
        return annotated(tree, module, node.left, receiver) or annotated(tree, module, node.right, receiver)
    if isinstance(node, ast.Subscript):
        return _subscripted(tree, module, node, receiver)
    if isinstance(node, ast.Name) and node.id == "Self":
        return None if receiver is None else Value("instance", receiver)
    found = tree.dotted(module, node)
    if found is None:
        return None
    if found.is_class:
        return Value("instance", found)
    if isinstance(found.node, ast.Assign):  # an alias
        return annotated(tree, found.module, found.node.value, receiver)
    return None


def _subscripted(tree: Tree, module: str, node: ast.Subscript, receiver: Symbol | None) -> Value | None:
    base = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if base in SAME:
        return annotated(tree, module, inner[0], receiver)
    if base in ("Union",):
        return next((found for one in inner if (found := annotated(tree, module, one, receiver))), None)
    values = tuple(annotated(tree, module, one, receiver) for one in inner)
    if base in MANY or (base.lower() == "tuple" and len(inner) == 2 and isinstance(inner[1], ast.Constant)):
        return Value("many", items=values[:1])
    if base.lower() == "tuple":
        return Value("tuple", items=values)
    if base.lower() in ("dict", "mapping", "defaultdict", "mutablemapping"):
        return Value("dict", items=values)
    if base.lower() == "type":
        return None if values[0] is None else Value("class", values[0].symbol)
    found = tree.dotted(module, node.value)
    return Value("instance", found) if found is not None and found.is_class else None


def is_property(function: Function) -> bool:
    names = {one.attr if isinstance(one, ast.Attribute) else getattr(one, "id", "") for one in function.decorator_list}
    return bool(names & {"property", "cached_property"})
