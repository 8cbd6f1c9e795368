"""What of a request's prompt no gate may drop: field ``prune.protect`` of a request, option ``protect`` of the server.

Words separated by commas: ``system`` (messages of that role, with the tool schemas that templates write into them), ``markers``
(headers and special tokens of the chat template), ``message:K`` or ``message:K-L`` (messages K to L of the chat, from 0), ``A:B``
(tokens A to B - 1 of the prompt), ``none``. Read in the front end and in the engine core.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_prune.chat import Markers, Span
from vllm_prune.errors import short

DEFAULT = "system,markers"
WORDS = "system, markers, message:K, message:K-L, A:B (tokens of the prompt, B not included), none"
MOST_WORDS = 1000
"""Of one request: spans are found between two steps of the engine."""


@dataclass(frozen=True)
class Protect:
    """Attributes: system, markers: whether these; messages: first and last of each wish; tokens: spans [begin, end)."""

    system: bool = False
    markers: bool = False
    messages: tuple[Span, ...] = ()
    tokens: tuple[Span, ...] = ()

    @property
    def asks_for_chat(self) -> bool:
        """Whether a chat template's markers are needed to tell what is meant."""
        return self.system or self.markers or bool(self.messages)

    def __bool__(self) -> bool:
        return self != Protect()

    def spans(self, ids: Sequence[int], markers: Markers | None) -> tuple[Span, ...]:
        """Positions [begin, end) of a prompt, in order, apart from each other. What the prompt does not have is left out."""
        found = [(begin, min(end, len(ids))) for begin, end in self.tokens]
        if markers is not None and self.asks_for_chat:
            messages = markers.messages(ids)
            if self.markers and messages:  # of a chat: a lone special token is no marker of one
                found += markers.marks(ids)
            found += [span for role, span in messages if self.system and role == "system"]
            for first, after in join([(first, last + 1) for first, last in self.messages]):
                found += [span for _, span in messages[first:after]]
        return join(found)


def join(spans: Sequence[Span]) -> tuple[Span, ...]:
    """The same positions in spans that neither meet nor overlap."""
    joined: list[Span] = []
    for begin, end in sorted(spans):
        if begin >= end:
            continue
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return tuple(joined)


def parse_protect(value: object) -> Protect:
    """Raises ValueError with what is wrong and which words there are."""
    if not isinstance(value, str):
        raise ValueError(f"must be text, got {short(value)}. Words: {WORDS}.")
    words = [word.strip() for word in value.split(",", MOST_WORDS)]
    if len(words) > MOST_WORDS:
        raise ValueError(f"has more than {MOST_WORDS} words.")
    system = markers = False
    messages: list[Span] = []
    tokens: list[Span] = []
    for word in words:
        if word == "system":
            system = True
        elif word == "markers":
            markers = True
        elif word == "none" and len(words) == 1:
            pass
        elif match := re.fullmatch(r"message:(\d{1,6})(?:-(\d{1,6}))?", word):
            messages.append(_ordered(word, int(match[1]), int(match[2] or match[1])))
        elif match := re.fullmatch(r"(\d{1,9}):(\d{1,9})", word):
            tokens.append(_ordered(word, int(match[1]), int(match[2])))
        else:
            raise ValueError(f"has the word {short(word)}, which is none of: {WORDS}.")
    return Protect(system, markers, tuple(messages), tuple(tokens))


def _ordered(word: str, first: int, last: int) -> Span:
    if first > last:
        raise ValueError(f"has {short(word)}, which ends before it begins.")
    return first, last
