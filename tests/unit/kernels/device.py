"""A pool of device lanes driven step by step, by kernels or by their twins, for tests. Letters as in the kernels' ``lanes``."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from vllm_prune_kernels.close import close, close_naive
from vllm_prune_kernels.crossing import crossing, crossing_naive
from vllm_prune_kernels.grants import forget, forget_naive, grant, grant_naive, pages_of
from vllm_prune_kernels.lanes import NEVER, Lanes, Sizes, to_device
from vllm_prune_kernels.marks import at_write, at_write_naive, delayed, delayed_naive
from vllm_prune_kernels.narrow import FP8
from vllm_prune_kernels.plan import page_tokens_of, plan, plan_naive
from vllm_prune_kernels.rows import Rows, find_rows, rows_naive
from vllm_prune_kernels.settle import settle, settle_naive, token_rows
from vllm_prune_kernels.share import share, share_naive
from vllm_prune_kernels.single import DELAYED, OWN, QUERY, WRITE, Decision, Meeting, single

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sizes(**more: Any) -> Sizes:
    """Small ones."""
    usual = {"layers": 2, "heads": 2, "units": 1, "page_tokens": 16, "head_size": 16, "gate_rank": 0, "blocks": 40,
             "slots": 4, "width": 12, "grants": 40}  # fmt: skip
    return Sizes(**{**usual, **more})


@dataclass
class Request:
    """A live request of a pool: its slot, tokens so far, length of its grant log, blocks held."""

    slot: int
    tokens: int = 0
    log: list[int] = field(default_factory=list)
    live: list[int] = field(default_factory=list)


class Pool:
    """Lanes, cache and host-side bookkeeping; ``fast`` chooses kernels, else twins. ``dtype``: of the cache."""

    def __init__(
        self, s: Sizes, fast: bool, method: str, dtype: torch.dtype = torch.float32, record: int = 256
    ) -> None:
        self.sizes, self.fast, self.method = s, fast, method
        self.device = DEVICE if fast else "cpu"
        self.lanes = Lanes.make(s, self.device, record_tokens=record)
        self.set_knobs()
        self.kv = torch.full((s.pages, s.page_numbers), float("nan"), dtype=dtype, device=self.device)
        self.scales = (0.5, 2.0) if dtype == FP8 else (1.0, 1.0)
        self.requests: dict[int, Request] = {}
        self.free = list(range(1, s.blocks))
        self.meeting, self.singles = Meeting.make(s.slots + 1, s.units, self.device), 0

    def begin(
        self, ended: list[int], step: dict[int, int], origin: dict[int, int] | None = None, starts: bool = False
    ) -> None:
        """Bury, grant and plan: ``step`` has the tokens of each request; ``origin``: whose lanes it will begin with; ``starts``:
        these are snapshots."""
        origin = origin or {}
        begins = [(begun, slot) for slot, begun in origin.items()] if starts else []
        gone = [(slot, self.requests[slot].log[0]) for slot in ended]
        for slot in ended:
            self.free += self.requests.pop(slot).live
        news, plans = [], []
        for slot, tokens in step.items():
            request = self.requests.setdefault(slot, Request(slot))
            pages = sum(
                -(
                    -(int(self.lanes.length[origin.get(slot, slot), z]) * (slot not in ended) + tokens)
                    // page_tokens_of(self.lanes, z)
                )
                - (int(self.lanes.settled[origin[slot], z]) if (origin.get(slot), slot) in begins else 0)
                - int(self.lanes.shared[slot, z]) * (slot not in ended)
                for z in range(self.sizes.lanes)
            )
            more = max(-(-pages // self.sizes.block_pages) - len(request.live), 0)
            blocks = [self.free.pop(0) for _ in range(more)]
            news += [(slot, block, len(request.log) + i, i) for i, block in enumerate(blocks)]
            request.log += blocks
            request.live += blocks
            plans.append((slot, tokens, more, origin.get(slot, slot)))
        wide = ((gone, 2), (news, 4), (plans, 4), (begins, 2))
        tables = [to_device(x, columns, torch.device(self.device)) for x, columns in wide]
        if self.fast:
            forget(self.lanes, tables[0])
            grant(self.lanes, tables[1])
            share(self.lanes, tables[3])
            plan(self.lanes, tables[2], max(step.values()))
        else:
            forget_naive(self.lanes, tables[0])
            grant_naive(self.lanes, tables[1])
            share_naive(self.lanes, tables[3])
            plan_naive(self.lanes, tables[2])

    def set_knobs(self) -> None:
        """Each slot decides in its own way; gates of the last are open."""
        slots = torch.arange(self.sizes.slots)
        base = {"dcp": 0.0, "dms": 0.4, "dms_own": 0.4}.get(self.method, 0.0)
        shift = base - 0.125 * slots
        shift[-1] = float("inf")
        limit = (slots + 1) * 2**30
        limit[-1] = 2**32
        spared = torch.zeros_like(self.lanes.spared)
        spared[1, 0], spared[1, 1] = -(2**31) + 0b1011, 3  # positions 0, 1, 3, 31, 32, 33
        self.lanes.spared.copy_(spared)
        self.lanes.n_spared[1] = 6
        for into, values in ((self.lanes.shift, shift), (self.lanes.limit, limit), (self.lanes.delay, 7 + slots)):
            into.copy_(values)

    def rows(self, step: dict[int, int], padding: int = 1) -> Rows:
        """Rows of the step, with padding behind them."""
        first = torch.tensor([0, *step.values()], dtype=torch.int32).cumsum(0).int()
        first = torch.cat([first, first[-1:].expand(padding)]).to(self.device)
        rows = Rows.make(len(step) + padding, self.sizes.units, first, self.device)
        table = torch.zeros(len(step) + padding, 3, dtype=torch.int32)
        table[: len(step), 0] = torch.tensor([self.requests[slot].log[0] for slot in step])
        lens = torch.zeros(len(step) + padding, dtype=torch.int32)
        lens[: len(step)] = torch.tensor([self.requests[slot].tokens + tokens for slot, tokens in step.items()])
        (find_rows if self.fast else rows_naive)(self.lanes, rows, table.to(self.device), lens.to(self.device))
        return rows

    def layer(self, layer: int, rows: Rows, step: dict[int, int], inputs: dict[str, Any]) -> torch.Tensor:
        """Decide and settle; returns the chunk's expiries [E, T]. ``inputs``: key, value, features, and the rule's numbers."""
        s, most, total = self.sizes, max(step.values()), sum(step.values())
        key, value, features = (inputs[name].to(self.device) for name in ("key", "value", "features"))
        chunk = torch.full((s.units, total), NEVER, dtype=torch.int32, device=self.device)
        rule = inputs["rule"]
        if self.fast and most == 1:
            constants = rule["biases" if self.method == "dcp" else "salts"].to(self.device)
            decision = {
                "dcp": Decision(QUERY, constants, 0.25, sinks=2, window=3),
                "dms": Decision(DELAYED, constants, sinks=1),
                "dms_own": Decision(OWN, constants, sinks=1),
            }.get(self.method, Decision(WRITE, constants, sinks=1))
            single(self.lanes, self.kv, rows, layer, decision, key, value, features, self.meeting, 3, *self.scales)
            self.singles += 1
            return chunk
        if self.method == "dcp":
            args = (self.lanes, self.kv, rows, layer, features, chunk, 0.25, rule["biases"].to(self.device), 2, 3)
            crossing(*args, splits=3, most_tokens=most) if self.fast else crossing_naive(*args)
        elif self.method in ("dms", "dms_own"):
            args, own = (self.lanes, rows, layer, features, chunk, 1), self.method == "dms_own"
            delayed(*args, most, own) if self.fast else delayed_naive(*args, own)
        else:
            args = (self.lanes, rows, chunk, rule["salts"].to(self.device), 1)
            at_write(*args, most) if self.fast else at_write_naive(*args)
        gate = features if s.gate_rank else None
        if self.fast:
            rank = torch.zeros_like(chunk)
            settle(self.lanes, self.kv, rows, layer, key, value, gate, chunk, rank, most, 1 + total % 2, *self.scales)
        else:
            settle_naive(self.lanes, self.kv, rows, layer, key, value, gate, chunk, *self.scales)
        return chunk

    def end(self, step: dict[int, int], ahead: int, keep_all: bool = False) -> torch.Tensor:
        """Close the step, and take back what the reports give up."""
        table = [(slot, ahead, 0, 0 if keep_all else len(self.requests[slot].log)) for slot in step]
        rows = torch.tensor(table, dtype=torch.int32, device=self.device)
        out = (
            close(self.lanes, self.kv, rows, max(step.values()))
            if self.fast
            else close_naive(self.lanes, self.kv, rows)
        )
        for (slot, tokens), said in zip(step.items(), out.tolist(), strict=True):
            request = self.requests[slot]
            request.tokens += tokens
            if not keep_all:
                stay = [block for block in request.live if request.log.index(block) < said[5]]
                self.free += [block for block in request.live if block not in stay]
                request.live = stay
        return out.cpu()

    def contents(self) -> dict[Any, Any]:
        """Everything that matters, by request: lanes token by token, counts, drops."""
        lanes, s = self.lanes.__class__(self.sizes, *(x.cpu() for x in self.tensors())), self.sizes
        kv = self.kv.cpu()
        found: dict[Any, Any] = {}
        for slot in self.requests:
            for lane in range(s.lanes):
                length, h = int(lanes.length[slot, lane]), lane % s.per_layer
                found[slot, lane] = [token_rows(lanes, kv, slot, lane, j).tolist() for j in range(length)]
                if h < s.units:
                    at = [(int(lanes.table[slot, lane, j // 16]), j % 16) for j in range(length)]
                    found[slot, lane, "who"] = [(int(lanes.position[x]), int(lanes.expiry[x])) for x in at]
            found[slot, "dropped"] = lanes.dropped[slot].tolist()
            found[slot, "recorded"] = lanes.recorded[slot].tolist()
        return found

    def tensors(self) -> list[torch.Tensor]:
        return [getattr(self.lanes, f.name) for f in fields(self.lanes) if f.name != "sizes"]

    def check(self) -> None:
        """Each page has one owner, and free pages and used ones are the pages of live blocks."""
        lanes, s = self.lanes.__class__(self.sizes, *(x.cpu() for x in self.tensors())), self.sizes
        assert int(lanes.error) == 0
        for slot, request in self.requests.items():
            n = int(lanes.n_live[slot])
            assert lanes.live_block[slot, :n].tolist() == request.live
            own = {page for block in request.live for page in pages_of(lanes, block)}
            free = {
                page for block in request.live for page in lanes.block_free[block, : int(lanes.n_free[block])].tolist()
            }
            used = []
            for lane in range(s.lanes):
                shared = lanes.table[slot, lane, : int(lanes.shared[slot, lane])].tolist()
                assert not own & set(shared) and int(lanes.settled[slot, lane]) <= int(lanes.held[slot, lane])
                for index in range(len(shared), int(lanes.held[slot, lane])):
                    page = int(lanes.table[slot, lane, index])
                    assert (int(lanes.page_lane[page]), int(lanes.page_index[page])) == (lane, index)
                    used.append(page)
            assert len(set(used)) == len(used) and not free & set(used) and free | set(used) == own


def random_steps(s: Sizes, seed: int, steps: int) -> list[tuple[list[int], dict[int, int]]]:
    """Requests that end before each step, and the tokens of those that take part in it."""
    rng = random.Random(seed)
    plans: list[tuple[list[int], dict[int, int]]] = []
    tokens: dict[int, int] = {}
    for _ in range(steps):
        ended = [slot for slot in list(tokens) if rng.random() < 0.08 or tokens[slot] > 110]
        for slot in ended:
            del tokens[slot]
        step = {}
        for slot in rng.sample(range(s.slots), s.slots):
            if rng.random() < 0.75:
                step[slot] = rng.choice([1, 1, 1, 2, 15, 16, 17, 40]) if slot in tokens else rng.choice([1, 5, 33, 50])
                tokens[slot] = tokens.get(slot, 0) + step[slot]
        if (
            step and rng.random() < 0.5 and min(tokens[slot] - n for slot, n in step.items()) > 0
        ):  # a step of single tokens
            for slot, n in step.items():
                tokens[slot] -= n - 1
            step = dict.fromkeys(step, 1)
        if step:
            plans.append((ended, step))
        else:
            tokens = {slot: n for slot, n in tokens.items() if slot not in ended}
            plans.append((ended, {0: 1}))
            tokens[0] = tokens.get(0, 0) + 1
    return plans


def random_inputs(
    s: Sizes, total: int, method: str, g: torch.Generator, dtype: torch.dtype, cells: int = 1
) -> dict[str, Any]:
    """Keys, values and features of a step's tokens. ``cells``: numbers of the cache that one of ``dtype`` takes."""
    wide = {"dcp": 2 * s.units * s.gate_rank // cells, "dms": s.units, "dms_own": s.units}.get(method, 1)
    return {
        "key": torch.randn(total, s.heads, s.head_size, generator=g).to(dtype),
        "value": torch.randn(total, s.heads, s.head_size, generator=g).to(dtype),
        # Halves: dot products are exact in any order, and never a tie with a bias.
        "features": ((2 * torch.randn(total, wide, generator=g)).round() / 2).to(dtype),
        "rule": {"biases": torch.linspace(1.2, 1.5, s.units), "salts": torch.arange(s.units) * 977 + 5},
    }
