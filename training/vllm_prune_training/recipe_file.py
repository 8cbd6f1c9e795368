"""Reading a recipe from YAML, with overrides; every error names the file, the field and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from vllm_prune.errors import PruneError, short

from .recipe import Recipe
from .shadow.recipe import ShadowRecipe

MOST_VALUES = 10_000
"""Of a recipe, once its aliases are written out: a few lines of them can stand for any number of values."""
MOST_FAULTS = 20
"""Told of at once."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its traps: ``1e-3`` is a number, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{name}' stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises PruneError naming ``where`` and the line."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:  # of dates, tags, keys
        said = " ".join(str(error).split())
        raise PruneError(f"{where} is no valid YAML: {said}.", "Correct it there.") from None
    except RecursionError:
        raise PruneError(f"{where} is nested too deep.", "Correct it there.") from None
    left, count = [value], 0
    while left:
        part = left.pop()
        count += 1
        if count > MOST_VALUES:
            raise PruneError(f"{where} has more than {MOST_VALUES:,} values.", "Write out what its aliases mean.")
        left.extend([*part, *part.values()] if isinstance(part, dict) else part if isinstance(part, list) else ())
    return value


def override(data: dict[str, Any], item: str) -> None:
    """Apply one ``a.b.c=value`` of the command line, the value in YAML, to the raw recipe in place."""
    name, sign, text = item.partition("=")
    path = name.strip().split(".")
    if not sign or not all(path):
        raise PruneError(f"--set {item!r} is not understood.", "Write --set training.steps=10.")
    place = data
    for key in path[:-1]:
        inner = place.setdefault(key, {})
        if not isinstance(inner, dict):
            raise PruneError(f"--set {item!r}: '{key}' is no section of the recipe.", "Write --set training.steps=10.")
        place = inner
    place[path[-1]] = parse_yaml(text, f"--set {name}")


def _model_at(kind: type[BaseModel] | None, loc: Sequence[str | int]) -> type[BaseModel] | None:
    """The section of a recipe that a location of an error lies in."""
    for part in loc:
        field = kind.model_fields.get(str(part)) if kind else None
        if field is None:
            continue
        found = [t for t in _types(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
        kind = found[0] if found else kind
    return kind


def _types(annotation: Any) -> Iterator[Any]:
    inner = getattr(annotation, "__args__", ())
    if inner:
        for part in inner:
            yield from _types(part)
    else:
        yield annotation


def _explain(error: dict[str, Any], kind: type[BaseModel]) -> str:
    """One line about one error of pydantic's about a recipe of a kind."""
    loc = error["loc"]
    # Names of the branches of a union are no part of the recipe.
    names = [str(x) for x in loc if isinstance(x, int) or not re.search(r"[\[\]()]|^(int|Model|str)$", str(x))]
    field = ".".join(names) or "recipe"
    if error["type"] == "extra_forbidden":
        section = _model_at(kind, loc[:-1])
        allowed = sorted(f.alias or name for name, f in section.model_fields.items()) if section else []
        return f"field '{field}' is unknown; allowed here: {', '.join(allowed)}"
    if error["type"] == "missing":
        return f"field '{field}' is missing"
    said = error["msg"].removeprefix("Value error, ")
    got = "" if isinstance(error["input"], dict) else f", got {short(error['input'])}"
    return f"field '{field}': {said}{got}"


def parse_recipe(data: Any, where: str) -> Recipe | ShadowRecipe:
    """A checked recipe from plain data; a section ``shadow`` makes it ShadowLLM's. Raises PruneError with all its faults."""
    if not isinstance(data, dict):
        raise PruneError(f"{where} must hold fields with values, got {type(data).__name__}.", "See examples/recipes.")
    kind = ShadowRecipe if "shadow" in data else Recipe
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = list(dict.fromkeys(_explain(dict(item), kind) for item in error.errors()))
        lines[MOST_FAULTS:] = [f"and {len(lines) - MOST_FAULTS} more"] if len(lines) > MOST_FAULTS else []
        raise PruneError(f"{where}: " + "; ".join(lines) + ".", "Correct the recipe; see docs/training.md.") from None


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe | ShadowRecipe:
    """The recipe in a YAML file, with ``a.b=value`` overrides. Raises PruneError."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PruneError(f"{path} is no UTF-8 text (byte {error.start}).", "Save it as UTF-8.") from None
    except OSError as error:
        raise PruneError(f"the recipe {path} cannot be read: {error.strerror}.", "Name a YAML file.") from None
    data = parse_yaml(text, str(path))
    if isinstance(data, dict):
        for item in overrides:
            override(data, item)
    return parse_recipe(data, str(path))


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Fields whose values differ between two plain recipes, each with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in {**before, **now}:
            found += differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        return found
    plain = [list(x) if isinstance(x, tuple) else x for x in (before, now)]
    if isinstance(plain[0], list) and isinstance(plain[1], list) and len(plain[0]) == len(plain[1]):
        parts = [differences(a, b, f"{name}.{i}") for i, (a, b) in enumerate(zip(*plain, strict=True))]
        return [line for part in parts for line in part]
    return [] if plain[0] == plain[1] else [f"{name}: {plain[0]!r} before, {plain[1]!r} now"]
