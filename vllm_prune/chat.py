"""Where the messages of a chat lie in a prompt's tokens, found by what the chat template puts around them.

A template is rendered once with known texts. What stands before a message's text, from a special token on, tells the roles
apart in most templates: its header. Prompts are then searched for headers; no text is parsed. Runs in the front end
(``find_markers``) and in the engine core (``Markers``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

LEAD = 16
"""Tokens that a template may write before its first message."""
TEXTS = {"system": "Alpha omega.", "user": "Beta lambda?", "assistant": "Gamma delta!"}
"""A text for each role that occurs in no template."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Markers:
    """What a chat template puts around messages, as token ids.

    Attributes:
        headers: (role, ids) of each role whose header can be told from the others'. The first id is of a special token.
        special: ids of all special tokens that the template writes.
        ask: ids that ask for an answer, at the end of a prompt; empty where the template writes none.
    """

    headers: tuple[tuple[str, tuple[int, ...]], ...]
    special: frozenset[int]
    ask: tuple[int, ...] = ()

    def _headers_at(self, ids: Sequence[int], i: int) -> list[tuple[str, int]]:
        """Role and length of each header that begins there; all begin with a special token."""
        if ids[i] not in self.special:
            return []
        return [(role, len(header)) for role, header in self.headers if tuple(ids[i : i + len(header)]) == header]

    def messages(self, ids: Sequence[int]) -> list[tuple[str, Span]]:
        """Role and span [begin, end) of each message of a prompt, header included, in order. The header that asks for an answer
        is none."""
        last = len(ids) - len(self.ask)
        end = last if self.ask and tuple(ids[last:]) == self.ask else len(ids)
        starts: list[tuple[str, int]] = []
        for i in range(end):
            starts += [(role, i) for role, length in self._headers_at(ids, i) if i + length < end][:1]
        return [(role, (begin, after)) for (role, begin), (_, after) in pairwise([*starts, ("", end)])]

    def system_end(self, ids: Sequence[int]) -> int:
        """Where a chat's first message ends, if it is the system's and others follow; else 0."""
        begun = False
        for i in range(len(ids)):
            found = self._headers_at(ids, i)
            if begun and found:
                return i
            if found and found[0][0] == "system":
                begun = True
            elif found or (not begun and i >= LEAD):
                return 0
        return 0

    def marks(self, ids: Sequence[int]) -> list[Span]:
        """Spans of headers and of single special tokens in a prompt."""
        found, i = [], 0
        while i < len(ids):
            length = max((length for _, length in self._headers_at(ids, i)), default=1)
            if ids[i] in self.special:
                found.append((i, i + length))
            i += length
        return found


def find_markers(tokenizer: Any) -> Markers | None:
    """Of a tokenizer's own chat template; None where it has none, or none that writes special tokens before messages.

    Args:
        tokenizer: Hugging Face's, a fast one.
    """
    if not getattr(tokenizer, "chat_template", None) or not getattr(tokenizer, "is_fast", False):
        return None
    roles: tuple[str, ...] = ("system", "user", "assistant", "user")
    rendered = _render(tokenizer, roles)
    if rendered is None:
        roles = roles[1:]
        rendered = _render(tokenizer, roles)
    if rendered is None:
        return None
    ids, gaps = rendered
    special = frozenset(ids) & frozenset(tokenizer.all_special_ids) | frozenset(
        i for i in set(ids) if i in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[i].special
    )
    headers: list[tuple[str, tuple[int, ...]]] = []
    for role in dict.fromkeys(roles):
        mine = [gap for gap, other in zip(gaps, roles, strict=True) if other == role]
        others = [gap for gap, other in zip(gaps, roles, strict=True) if other != role]
        header = _header(mine[-1], others, special)
        if header is not None:
            headers.append((role, header))
    asked = _render(tokenizer, roles, ask=True)
    ask = tuple(asked[0][len(ids) :]) if asked is not None and asked[0][: len(ids)] == ids else ()
    return Markers(tuple(headers), special, ask) if headers else None


def _render(tokenizer: Any, roles: Sequence[str], ask: bool = False) -> tuple[list[int], list[list[int]]] | None:
    """Ids of a chat of these roles, and those before each message's text; None where the template refuses it."""
    try:
        chat = [{"role": role, "content": TEXTS[role]} for role in roles]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask)
    except Exception:  # templates raise what they like
        return None
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = found["input_ids"], found["offset_mapping"]
    gaps, at = [], 0
    for role in roles:
        begin = text.find(TEXTS[role], at)
        if begin < 0:
            return None
        gaps.append([i for i, (a, b) in zip(ids, offsets, strict=True) if a >= at and b <= begin and text[a:b].strip()])
        at = begin + len(TEXTS[role])
    return ids, gaps


def _header(gap: list[int], others: list[list[int]], special: frozenset[int]) -> tuple[int, ...] | None:
    """The shortest end of a gap that begins with a special token and ends no other role's gap."""
    for i in range(len(gap) - 1, -1, -1):
        end = gap[i:]
        if end[0] in special and all(other[-len(end) :] != end for other in others):
            return tuple(end)
    return None
