"""What of a manifest's interfaces another vLLM has changed, and whether our code still fits."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.upgrade.manifest import OURS, READ_AGAIN, Interface, Manifest, collect, entry_point_groups, look
from tools.upgrade.tree import Tree

GONE, MOVED, BREAKS, NEW = "gone", "moved", "does not fit", "new"
ELSEWHERE, SIGNATURE, BODY = "elsewhere", "signature changed", "body changed"
BROKEN = (GONE, MOVED, BREAKS)
"""Changes that our code cannot stay as it is with."""
ORDER = (GONE, MOVED, BREAKS, NEW, ELSEWHERE, SIGNATURE, BODY)


@dataclass(frozen=True)
class Change:
    """Of one interface: what kind, at which place, and the facts in words."""

    kind: str
    place: str
    told: str
    interface: Interface


def arguments(signature: str) -> ast.arguments:
    """Of a signature as the manifest holds it."""
    text = signature[signature.index("(") :].partition(") -> ")[0].removesuffix(")") + ")"
    return ast.parse(f"def f{text}: pass").body[0].args  # type: ignore[attr-defined,no-any-return]


def is_bound(place: str, signature: str) -> bool:
    """Whether calls of a function leave its first argument out."""
    return "." in place.partition(":")[2] and "@staticmethod" not in signature


def misfit_of_call(place: str, signature: str, call: list) -> str:  # type: ignore[type-arg]
    """Why a call no longer works; empty when it does."""
    args, (count, names, more) = arguments(signature), call
    positional = [arg.arg for arg in (*args.posonlyargs, *args.args)][is_bound(place, signature) :]
    taken, keywords = positional[:count], {arg.arg for arg in args.kwonlyargs}
    if count > len(positional) and args.vararg is None:
        return f"takes {len(positional)} positional arguments, ours gives {count}"
    unknown = set(names) - set(positional[count:]) - keywords
    if unknown and args.kwarg is None:
        return f"does not take {', '.join(sorted(unknown))}"
    required = positional[: len(positional) - len(args.defaults)]
    required += [arg.arg for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True) if default is None]
    lacking = [name for name in required if name not in taken and name not in names]
    return f"wants {', '.join(lacking)}" if lacking and not more else ""


def misfit_of_override(ours: str, theirs: str) -> str:
    """Why a function of ours cannot be called as vLLM's would be; empty when it can."""
    mine, base = arguments(ours), arguments(theirs)
    have = [arg.arg for arg in (*mine.posonlyargs, *mine.args)]
    want = [arg.arg for arg in (*base.posonlyargs, *base.args)]
    by_name = {*have, *(arg.arg for arg in mine.kwonlyargs)}
    lacking = [name for name in want if name not in by_name and mine.kwarg is None and mine.vararg is None]
    lacking += [arg.arg for arg in base.kwonlyargs if arg.arg not in by_name and mine.kwarg is None]
    if lacking:
        return f"ours does not take {', '.join(lacking)}"
    required = have[: len(have) - len(mine.defaults)]
    extra = [name for i, name in enumerate(required) if i and name not in want and i >= len(want)]
    shared = [name for name in have[1:] if name in want]
    if shared != [name for name in want[1:] if name in have]:
        return "ours has the arguments in another order"
    return f"ours wants {', '.join(extra)}" if extra and base.vararg is None else ""


def moved_to(tree: Tree, place: str) -> list[str]:
    """Other places where something of the same name is defined."""
    module, _, qualname = place.partition(":")
    found = []
    for name in tree.defining("vllm", qualname.partition(".")[0]):
        symbol = None if name == module else tree.at(f"{name}:{qualname}")
        if symbol is not None and symbol.module == name:
            found.append(symbol.place)
    return found


def compare_gone(tree: Tree, place: str, was: Interface) -> Change:
    """An interface that is no longer at its place."""
    elsewhere = moved_to(tree, place)
    if not elsewhere:
        return Change(GONE, place, "nothing of this name is left", was)
    told = f"now at {', '.join(f'`{one}`' for one in elsewhere)}"
    if set(was.how) - {"assumed", "named in types"}:
        return Change(MOVED, place, told, was)
    same = [one for one in elsewhere if (now := look(tree, one)) is not None and now.body == was.body]
    return Change(
        ELSEWHERE, place, f"{told}; {'its body is the same' if same else 'its body changed'} ({was.why})", was
    )


def compare_one(tree: Tree, place: str, was: Interface) -> list[Change]:
    """Changes of one interface."""
    now = look(tree, place)
    if now is None:
        return [compare_gone(tree, place, was)]
    found: list[Change] = []

    def add(kind: str, told: str) -> None:
        found.append(Change(kind, place, told, was))

    if now.kind != was.kind and {now.kind, was.kind} != {"field", "function"}:
        add(BREAKS, f"was a {was.kind}, is a {now.kind}")
        return found
    if "subclassed" in was.how and (more := sorted(set(now.abstract) - set(was.abstract))):
        add(BREAKS, f"a subclass must now have {', '.join(more)}")
    problems: list[str] = []
    if now.kind == was.kind == "function" and now.signature != was.signature:
        for where, mine in was.ours.items():
            if (why := misfit_of_override(mine, now.signature)) and not misfit_of_override(mine, was.signature):
                problems.append(f"{where}: {why}")
        for call in was.calls:
            if (why := misfit_of_call(place, now.signature, call)) and not misfit_of_call(place, was.signature, call):
                problems.append(why)
    for problem in dict.fromkeys(problems):
        add(BREAKS, problem)
    if now.signature != was.signature or now.kind != was.kind:
        add(SIGNATURE, f"`{was.signature or was.kind}` → `{now.signature or now.kind}`")
    if READ_AGAIN & set(was.how) and was.body and now.body != was.body:
        add(BODY, was.why or "overridden")
    return found


def compare(tree: Tree, manifest: Manifest, ours: Mapping[str, Path] = OURS) -> list[Change]:
    """All changes, worst first. ``tree``: our packages and the other vLLM."""
    collector, found = collect(tree, ours), []
    for place, was in manifest.items():
        if place not in collector.spared:
            found += compare_one(tree, place, was)
            continue
        instead = [one for one in moved_to(tree, place) if one in collector.uses]
        told = ", ".join(f"`{one}`" for one in instead)
        found.append(Change(ELSEWHERE, place, f"our code looks at {told} first, which is there", was))
        found += [change for one in instead for change in compare_one(tree, one, was)]
    for group, known in entry_point_groups(tree).items():
        if not known:
            found.append(
                Change(GONE, f"entry point group `{group}`", "vllm.plugins does not name it", Interface("text"))
            )
    for place, use in collector.uses.items():
        if place in manifest or not {"overridden", "set"} & use.how or any(change.place == place for change in found):
            continue
        symbol = tree.at(place)
        assert symbol is not None
        if any(tree.at(old) == symbol for old in manifest if old.endswith(f".{place.rpartition('.')[2]}")):
            continue  # the same one, reached in another way
        known = Interface(symbol.node.__class__.__name__, sorted(use.how), sorted(use.where), ours=use.ours)
        found.append(Change(NEW, place, "a name of ours is now vLLM's too: ours overrides it", known))
    return sorted(found, key=lambda change: (ORDER.index(change.kind), change.place))
