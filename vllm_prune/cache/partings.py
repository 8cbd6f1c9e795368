"""Where prompts should leave snapshots: where they end, where they part from each other, and at fixed distances. Engine core.

A beginning that two prompts share will be asked for again, and so will a chat's system message, be it the first. Prompts are
compared as they arrive, not as they are admitted: of many that come at once the first learns where the others part from it before
it gets there, and leaves a snapshot for all of them.

Owns: who came first with which beginning, and the places that each request has to leave. Does not own: snapshots.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from dataclasses import dataclass, field
from math import inf
from typing import Any

SEEN = 1 << 16
"""Block hashes of prompts that are remembered."""
MOST_PARTS = 3
"""That a request's tokens of a step are cut into: it leaves two snapshots in a step at most."""
PUT_OFF = 16
"""Steps that a request waits at most for the report of what it could start from."""


@dataclass(eq=False)
class _Way:
    """Of one request through its prompt.

    Attributes:
        request_id: whose.
        places: ascending, in tokens: where it leaves snapshots.
        guessed: of these, one that nobody else is known to want.
        past: tokens that it has been told to compute; endless once it has ended.
        behind: who will come by the place up to which this prompt is the same, and the place.
        waited: steps for the report of that.
    """

    request_id: str
    places: list[int] = field(default_factory=list)
    guessed: int = 0
    past: float = 0
    behind: tuple[_Way, int] | None = None
    waited: int = 0


class Partings:
    """See the module.

    Args:
        block_tokens: N; places are multiples of it.
        spacing: tokens between places that every prompt has, rounded up to whole blocks; 0: none.
    """

    def __init__(self, block_tokens: int, spacing: int = 0) -> None:
        self.block_tokens = block_tokens
        self.spacing = -(-spacing // block_tokens) * block_tokens
        self._ways: dict[str, _Way] = {}
        self._first: OrderedDict[bytes, _Way] = OrderedDict()  # the prompts of late are its last ones

    def __len__(self) -> int:
        return len(self._ways)

    def arrives(self, request: Any, lead: int = 0) -> None:
        """A request is new: its prompt is compared with those of late. Its last token is computed in any case, for its logits.

        Args:
            lead: its first tokens, with which others are likely to come: it leaves them unless somebody was to.
        """
        n = self.block_tokens
        hashes = request.block_hashes[: (request.num_prompt_tokens - 1) // n]
        way = self._ways[request.request_id] = _Way(request.request_id)
        shared = next((blocks for blocks in range(len(hashes), 0, -1) if hashes[blocks - 1] in self._first), 0)
        if shared:
            first = self._first[hashes[shared - 1]]
            if first.past < shared * n:
                way.behind = first, shared * n
                if first.guessed == shared * n:
                    first.guessed = 0
                if shared * n not in first.places:
                    insort(first.places, shared * n)
        spaced = range(self.spacing, len(hashes) * n, self.spacing) if self.spacing else ()
        likely = min(lead // n, len(hashes))
        way.guessed = likely * n if shared < likely < len(hashes) else 0
        way.places = sorted({len(hashes) * n, shared * n, way.guessed, *spaced} - {0})
        for blocks, one in enumerate(hashes, start=1):
            first = self._first.pop(one, way)
            self._first[one] = first if first.past < blocks * n else way
        while len(self._first) > SEEN:
            self._first.popitem(last=False)

    def starts(self, request_id: str, tokens: int) -> None:
        """A request is admitted, with so many tokens that need not be computed."""
        self._ways[request_id].past = tokens

    def take(self, request_id: str, before: int, covered: int) -> list[int]:
        """Where a request leaves snapshots in a step that takes it from ``before`` tokens to ``covered``, ascending."""
        way = self._ways[request_id]
        way.past = covered
        if not way.places or way.places[-1] <= before:
            return []
        due = [at for at in way.places if before < at <= covered]
        # There may be more than a step can be cut for: what is known to be shared first, and what is longer.
        due.sort(key=lambda at: (at == way.guessed, self.spacing > 0 and at % self.spacing == 0, -at))
        return sorted(due[: MOST_PARTS - 1])

    def behind(self, request_id: str) -> tuple[str, int, bool] | None:
        """Who was going to come by a place that a waiting request's prompt shares with it, the place in tokens, and whether it is
        still to come by; None: nobody."""
        behind = self._ways[request_id].behind
        return None if behind is None else (behind[0].request_id, behind[1], behind[0].past < behind[1])

    def may_wait(self, request_id: str) -> bool:
        """Whether a request may be put off by one more step, in which a report should come."""
        way = self._ways[request_id]
        way.waited += 1
        return way.waited <= PUT_OFF

    def ended(self, request_id: str) -> None:
        way = self._ways.pop(request_id, None)
        if way is not None:
            way.past, way.behind, way.places = inf, None, []
