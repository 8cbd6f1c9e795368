"""Random bad input for tests: how many examples, any JSON value, and small damage to a valid one."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from support import FULL

from vllm_prune.errors import PruneError

SECONDS = 5.0
"""Of the processor that a reader may take for one input; most take milliseconds. What waits for ever meets pytest's timeout."""


def examples(few: int, many: int | None = None) -> Callable[[Any], Any]:
    """So many examples, always the same; with VLLM_PRUNE_FULL=1 ``many`` fresh ones, by default 50 times as many."""
    count = (50 * few if many is None else many) if FULL else few
    return settings(max_examples=count, deadline=None, derandomize=not FULL, suppress_health_check=list(HealthCheck))


NUMBERS = st.one_of(
    st.integers(-2, 70), st.integers(), st.floats(),
    st.sampled_from([0, 2**31 - 1, 2**31, 2**62, 2**63, 2**64, -(2**63), 10**400, -(10**400), 1e308, -0.0, 5e-324]),
)  # fmt: skip
"""What Python's JSON reader makes numbers of: NaN, infinities and integers of any size among them."""
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [
            "",
            "true",
            "1",
            "nan",
            "..",
            "../../etc/passwd",
            "/etc/passwd",
            "a\0b",
            "\ud800",
            "ñ漢",
            "٣",
            "\u202e",
            "{}",
            "None",
        ]
    ),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)


def deep(depth: int) -> list[Any]:
    """Lists in lists: more than any reader that calls itself has stack for."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def json_values(names: st.SearchStrategy[str] = TEXTS) -> st.SearchStrategy[Any]:
    """Any JSON value; keys of its objects are among ``names``."""
    return st.recursive(
        SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4), max_leaves=10
    )


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of every part of a value, itself left out."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*at, key)
        yield from places(part, (*at, key))


def damaged(valid: Any, names: st.SearchStrategy[str] = TEXTS, most: int = 3) -> st.SearchStrategy[Any]:
    """A valid JSON value with one to ``most`` of its parts replaced, removed, renamed, or joined by another."""
    anything = json_values(names)

    @st.composite
    def draw_one(draw: Any) -> Any:
        found = copy.deepcopy(valid)
        for _ in range(draw(st.integers(1, most))):
            paths = list(places(found))
            if not paths:
                return draw(anything)
            *way, last = draw(st.sampled_from(paths))
            parent = found
            for key in way:
                parent = parent[key]
            kind = draw(st.sampled_from(["replace", "remove", "add", "rename", "copy"]))
            if kind == "replace":
                parent[last] = draw(anything)
            elif kind == "remove":
                del parent[last]
            elif kind == "copy":
                other = draw(st.sampled_from(paths))
                value = found
                for key in other:
                    value = value[key] if not isinstance(value, dict) or key in value else None
                    if value is None:
                        break
                parent[last] = copy.deepcopy(value)
            elif isinstance(parent, list):
                parent.insert(last, draw(anything))
            else:
                parent[draw(names)] = parent.pop(last) if kind == "rename" else draw(anything)
        return found

    return draw_one()


@contextmanager
def refused_or_fine(*said: str) -> Iterator[None]:
    """The block ends, in bounded time; where it raises, then a PruneError whose problem has one of ``said`` and which names a
    way out."""
    begun = time.process_time()
    try:
        yield
    except PruneError as error:
        assert str(error).startswith("vllm-prune: ") and error.way_out, error
        assert any(word in error.problem for word in said), (error.problem, said)
        str(error).encode("utf-8", "backslashreplace")
        assert len(str(error)) < 20_000, "an answer, not an echo"
    assert time.process_time() - begun < SECONDS
