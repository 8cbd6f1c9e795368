"""The kernels of a decode step alone, replayed from a CUDA graph over many layers: microseconds a layer, bytes a second.

python benchmarks/gpu_kernels.py --sweep       tries sizes of tiles and parts, and prints the best ones last
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from vllm_prune_kernels import decode as decoding
from vllm_prune_kernels import single as singles
from vllm_prune_kernels.lanes import NEVER, Lanes, Sizes
from vllm_prune_kernels.rows import Rows
from vllm_prune_kernels.single import QUERY, Decision, Meeting, single

LAYERS, HEADS, GROUP, SIZE, RANK, PAGE = 12, 8, 4, 128, 32, 64
"""Of Qwen3-8B, with fewer layers: more than the cache of an H200 holds."""

SWEEP = [(*tile, programs, least) for tile in ((64, 4, 3), (64, 4, 4), (64, 4, 5), (128, 4, 3), (128, 8, 3))
         for programs, least in ((528, 4), (528, 2), (1056, 4))]  # fmt: skip


class Step:
    """Lanes of ``tokens`` tokens for ``batch`` rows, pages in a random order."""

    def __init__(self, batch: int, tokens: int) -> None:
        per_layer, width, gate_page = HEADS + 1, -(-(tokens + 64) // PAGE), 2 * PAGE * SIZE // RANK
        gate_width = -(-(tokens + 64) // gate_page)
        blocks = -(-batch * (HEADS * width + gate_width) // HEADS)
        self.sizes = Sizes(LAYERS, HEADS, 1, PAGE, SIZE, RANK, blocks, batch, width, 8)
        self.lanes = Lanes.make(self.sizes, "cuda")
        self.kv = torch.randn(self.sizes.pages, self.sizes.page_numbers, device="cuda", dtype=torch.bfloat16)
        self.lanes.expiry.fill_(NEVER)
        self.lanes.length.fill_(tokens)
        for layer in range(LAYERS):
            pages = torch.randperm(blocks * HEADS, device="cuda").int() + layer * blocks * HEADS
            table = self.lanes.table[:, layer * per_layer : (layer + 1) * per_layer]
            table[:, :HEADS] = pages[: batch * HEADS * width].view(batch, HEADS, width)
            table[:, HEADS, :gate_width] = pages[batch * HEADS * width :][: batch * gate_width].view(batch, gate_width)
        first = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        self.rows = Rows.make(batch, 1, first, "cuda")
        self.rows.slot.copy_(torch.arange(batch))
        self.rows.start.fill_(tokens)
        fused = torch.randn(batch, (GROUP + 2) * HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
        self.query, self.key, self.value = fused.split([GROUP * HEADS, HEADS, HEADS], dim=1)
        self.features = torch.randn(batch, 2 * RANK, device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty(batch, GROUP * HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
        self.batch, self.tokens = batch, tokens

    def attention(self) -> float:
        splits = decoding.splits_for(self.batch, HEADS, decoding.PROGRAMS)
        shapes = decoding.scratch_for(self.batch, HEADS, GROUP, SIZE, splits)
        partial, sums = (torch.empty(shape, device="cuda") for shape in shapes)
        arrivals = torch.zeros(self.batch, HEADS, dtype=torch.int32, device="cuda")

        def launch(layer: int) -> None:
            decoding.decode(
                self.lanes, self.kv, self.rows, layer, self.query, self.out, 0.1, partial, sums, arrivals, splits
            )

        return microseconds(launch)

    def decisions(self, splits: int) -> float:
        """No key dies: biases are high."""
        meeting = Meeting.make(self.batch, 1, "cuda")
        rule = Decision(QUERY, torch.full((1,), 1e4, device="cuda"), 0.1)

        def launch(layer: int) -> None:
            single(self.lanes, self.kv, self.rows, layer, rule, self.key, self.value, self.features, meeting, splits)

        found = microseconds(launch)
        self.lanes.length.fill_(self.tokens)
        return found

    @property
    def bytes(self) -> int:
        """Of keys and values that one layer's attention reads."""
        return self.batch * HEADS * self.tokens * SIZE * 4


def microseconds(launch: Any) -> float:
    """Median time of a layer's launch."""
    for _ in range(2):
        launch(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(LAYERS):
            launch(layer)
    times = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / LAYERS + 1e-9)
    return sorted(times)[4]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", default="128,1664,6592")
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args()
    steps = [Step(args.batch, int(n)) for n in args.tokens.split(",")]
    names = ("KEYS", "WARPS", "STAGES", "PROGRAMS", "LEAST")
    now = tuple(getattr(decoding, name) for name in names)
    grid = SWEEP if args.sweep else [now]
    rows = []
    for choice in grid:
        for name, value in zip(names, choice, strict=True):
            setattr(decoding, name, value)
        try:
            times = [step.attention() for step in steps]
        except Exception as error:  # too much shared memory
            print(choice, repr(error)[:300], file=sys.stderr)
            continue
        share = [step.bytes / time * 1e6 for step, time in zip(steps, times, strict=True)]
        rows.append({"choice": dict(zip(names, choice, strict=True)), "us": times, "bytes_per_second": share})
    least = [min(column) for column in zip(*(row["us"] for row in rows), strict=True)]
    rows.sort(key=lambda row: sum(time / best for time, best in zip(row["us"], least, strict=True)))
    decisions = []
    for keys, splits in itertools.product((128, 256), (4, 8, 16, 32)) if args.sweep else [(singles.KEYS, 32)]:
        singles.KEYS = keys
        decisions.append({"KEYS": keys, "splits": splits, "us": [step.decisions(splits) for step in steps]})
    for row in [*rows[:8], *decisions]:
        print(json.dumps(row))
    if args.json:
        Path(args.json).write_text(
            json.dumps({"tokens": args.tokens, "attention": rows, "decisions": decisions}, indent=1)
        )
    print("BEST", *(rows[0]["choice"][name] for name in names))


if __name__ == "__main__":
    main()
