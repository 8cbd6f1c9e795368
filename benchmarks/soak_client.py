"""The clients of the soak: requests of every kind that come at random, some of which leave or ask for what nobody can have."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
from mixed_load import draw_lengths, draw_prompt
from serving import Events

BAD = 100
"""One in so many requests is a bad one."""
LEAVE_EARLY, LEAVE_MIDWAY, SAMPLED = 0.04, 0.04, 0.2
"""Shares of requests: of clients that leave before the first token or in the middle of a stream; and those that sample, which
are counted and not compared."""
RUNNING = 32
"""Most clients at a time: arrivals wait while there are so many."""
STRENGTHS: list[dict[str, Any]] = [{}, {}, {}, {"prune.off": True}, {"prune.strength": 0.5}, {"prune.strength": 2.0}]


@dataclass(frozen=True)
class Asked:
    """A request. ``wish``: its ``prune.*`` fields. Those that sample have no seed: in vLLM 0.32 on a CPU a seed and a prompt
    in chunks end the engine ("CPU Generator does not use offset"), with gates or without."""

    prompt: list[int]
    most: int
    wish: dict[str, Any]
    greedy: bool = True

    @classmethod
    def draw(cls, rng: random.Random, longest: int, vocab: int, gated: bool, beginnings: list[list[int]]) -> Asked:
        """``beginnings``: see ``draw_prompt``."""
        length, most = draw_lengths(rng, longest)
        wish = rng.choice(STRENGTHS) if gated else {}
        return cls(draw_prompt(rng, length, vocab, beginnings), most, wish, rng.random() >= SAMPLED)

    def strength(self, usual: float) -> float:
        return 0.0 if "prune.off" in self.wish else float(self.wish.get("prune.strength", usual))

    def body(self, **more: Any) -> dict[str, Any]:
        wish = {"vllm_xargs": self.wish} if self.wish else {}
        return {"model": "soak", "prompt": self.prompt, "max_tokens": self.most, "ignore_eos": True, "return_token_ids": True,
                "temperature": 0 if self.greedy else 1, **wish, **more}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """``told``: what a whole answer says of its keys, with its map if that was asked for; a stream says nothing of them."""

    tokens: list[int]
    told: dict[str, Any] | None


BAD_OF_ALL: list[tuple[dict[str, Any] | bytes, int, str]] = [
    (b'{"prompt": [5,', 400, "JSON"),
    ({"model": "another"}, 404, "does not exist"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"temperature": -1}, 400, "temperature"),
    ({"prompt": [10**6]}, 400, "vocabulary"),
    ({"prompt": [5] * 5000}, 400, "maximum context length"),
    ({"vllm_xargs": {"x": {"y": 1}}}, 400, "vllm_xargs"),
]
BAD_OF_GATES: list[tuple[dict[str, Any] | bytes, int, str]] = [
    ({"vllm_xargs": {"prune.strength": -1}}, 400, "prune.strength"),
    ({"vllm_xargs": {"prune.strength": "much"}}, 400, "prune.strength"),
    ({"vllm_xargs": {"prune.power": 1}}, 400, "prune.power"),
    ({"vllm_xargs": {"prune.off": True, "prune.strength": 1.0}}, 400, "exclude each other"),
    ({"vllm_xargs": {"prune.protect": "sytem"}}, 400, "prune.protect"),
]
"""What is wrong with a request, the status that it must get, and a word of what it must be told."""


@dataclass
class Clients:
    """All clients of a server.

    Args:
        url: of the server, up to the port.
        rng: all that is random.
        gated: whether it has gates, that is, knows of ``prune.*``.

    Attributes:
        counts: requests by what became of them.
        wrong: what went wrong, in words.
        finished: answers in the order of their ends, with the number of the request in its catalogue.
    """

    url: str
    rng: random.Random
    gated: bool
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    finished: list[tuple[int, Answer]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Idle connections are closed before the server does it (after 5 s), lest it be in the middle of a request.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=8, keepalive_expiry=1.0)
        self.http = httpx.AsyncClient(base_url=self.url, timeout=300, limits=limits)

    async def load(self, catalogue: list[Asked], seconds: float, rate: float) -> None:
        """Requests of a catalogue come at random for some seconds, ``rate`` a second on average; then all are waited for."""
        loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()
        end = loop.time() + seconds
        while loop.time() < end:
            await asyncio.sleep(self.rng.expovariate(rate))
            if len(tasks) < RUNNING:
                task = asyncio.create_task(self._one(catalogue))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def _one(self, catalogue: list[Asked]) -> None:
        kind, number = self.rng.random(), self.rng.randrange(len(catalogue))
        asked, stream = catalogue[number], self.rng.random() < 0.5
        self.counts["sent"] += 1
        try:
            if self.counts["sent"] % BAD == BAD // 2:
                await self._bad(asked)
            elif kind < LEAVE_EARLY:
                async with asyncio.timeout(self.rng.uniform(0.0, 0.1)):
                    await (self._stream(asked) if stream else self.whole(asked))
                self.counts["answered before the client left"] += 1
            elif kind < LEAVE_EARLY + LEAVE_MIDWAY:
                await self._stream(asked, leave_after=self.rng.randrange(1, max(asked.most, 2)))
                self.counts["left midway"] += 1
            else:
                mapped = self.rng.random() < 0.5
                answer = await (self._stream(asked) if stream else self.whole(asked, mapped))
                self._note(number, asked, answer)
        except TimeoutError:
            self.counts["left before the first token or soon after"] += 1
        except Exception as error:  # whatever happens to one client is noted, and the others go on
            self.wrong.append(f"{asked.most} tokens of {len(asked.prompt)}: {error!r}")

    def _note(self, number: int, asked: Asked, answer: Answer) -> None:
        if len(answer.tokens) != asked.most:
            raise RuntimeError(f"got {len(answer.tokens)} tokens of {asked.most}")
        self.counts["finished" if asked.greedy else "finished, sampled"] += 1
        self.counts["tokens"] += asked.most
        if asked.greedy:
            self.finished.append((number, answer))

    async def whole(self, asked: Asked, mapped: bool = True) -> Answer:
        """An answer in one piece. ``mapped``: with its map where the server has gates; such a request never starts from a
        prefix that is held."""
        more = {"vllm_xargs": {**asked.wish, "prune.map": True}} if self.gated and mapped else {}
        found = await self.http.post("/v1/completions", json=asked.body(**more))
        if found.status_code != 200:
            raise RuntimeError(f"HTTP {found.status_code}: {found.text[:500]}")
        data = found.json()
        told = (data.get("kv_transfer_params") or {}).get("vllm_prune")
        return Answer(data["choices"][0]["token_ids"], told)

    async def _stream(self, asked: Asked, leave_after: int | None = None) -> Answer:
        """``leave_after``: tokens after which the client leaves."""
        tokens: list[int] = []
        async with self.http.stream("POST", "/v1/completions", json=asked.body(stream=True)) as found:
            if found.status_code != 200:
                raise RuntimeError(f"HTTP {found.status_code}: {(await found.aread())[:500]!r}")
            events = Events()
            async for chunk in found.aiter_bytes():
                for data in events.take(chunk):
                    if "error" in data:
                        raise RuntimeError(f"in a stream: {data['error']}")
                    tokens += [token for choice in data["choices"] for token in choice.get("token_ids") or ()]
                if leave_after is not None and len(tokens) >= leave_after:
                    break
        return Answer(tokens, None)

    async def _bad(self, asked: Asked) -> None:
        wrong, status, word = self.rng.choice([*BAD_OF_ALL, *(BAD_OF_GATES if self.gated else [])])
        if isinstance(wrong, bytes):
            found = await self.http.post("/v1/completions", content=wrong, headers={"content-type": "application/json"})
        else:
            found = await self.http.post("/v1/completions", json={**asked.body(), **wrong})
        self.counts["bad"] += 1
        if found.status_code != status or word not in found.text:
            raise RuntimeError(f"a bad request ({wrong!r}) got {found.status_code}, {found.text[:300]}")
