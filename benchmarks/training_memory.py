"""Peak memory of one training step under soft visibility, against sequence length: plain, plain compiled, and lean.

    python benchmarks/training_memory.py --quick --json -

One process a point: a model of the reference shape with random weights and DCP gates, a first step of 64 tokens (of the
full length where the decoder is compiled), then the peak of resident memory over one step (forward and backward, bf16
autocast, one sequence, no optimizer). The peak is the kernel's (VmHWM, set back before the step). Lengths grow until a
point passes the limit, or the next one is predicted to pass 10 GiB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import ROOT, Shape, arguments, frame, publish, say

REFERENCE = Shape(hidden=256, layers=8, heads=4, kv_heads=2, head_dim=64, mlp=768, vocab=4096, dtype="float32")
RANK = 32
LIMIT_GIB, NEVER_ABOVE_GIB = 8.0, 10.0
WAYS = {
    "plain": "log visibility and attention weights [T, T] of every layer kept for the backward pass",
    "plain_compiled": "the same, the decoder compiled whole",
    "lean": "blocks of 256 query rows, recomputed in the backward pass",
}
LENGTHS = [512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384]
QUICK = [512, 1024, 2048]
LONGEST = {"plain": 16384, "plain_compiled": 16384, "lean": 8192}


def resident(field: str) -> float:
    """GiB of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def point(way: str, length: int) -> dict[str, float]:
    """One measurement, in a process of its own. GiB and seconds."""
    sys.path[:0] = [str(ROOT), str(ROOT / "training")]
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from vllm_prune_training.masked import GatedModel

    from vllm_prune.config import DropGateConfig
    from vllm_prune.gates import DCPGate, GateShape

    s = REFERENCE
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=s.vocab, hidden_size=s.hidden, intermediate_size=s.mlp, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim, tie_word_embeddings=True,
        max_position_embeddings=max(LENGTHS),
    ))  # fmt: skip
    gates = [DCPGate(GateShape(s.hidden, s.kv_heads, s.layers), rank=RANK, beta=4.0) for _ in range(s.layers)]
    section = DropGateConfig(
        method="dcp", params={"rank": RANK}, num_layers=s.layers, num_kv_heads=s.kv_heads, hidden_size=s.hidden
    )
    gated = GatedModel(model, gates, section, torch.bfloat16, visibility="lean" if way == "lean" else "naive")
    body = torch.compile(model.get_decoder(), dynamic=False) if way == "plain_compiled" else None

    def step(tokens: int) -> None:
        ids = torch.randint(0, s.vocab, (1, tokens))
        with torch.autocast("cpu", torch.bfloat16):
            out = gated(ids, "soft", alpha=torch.tensor(1.5), collect=False, body=body)
        loss = torch.nn.functional.cross_entropy(out.logits[0, :-1].float(), ids[0, 1:])
        (loss + 0.1 * torch.stack(out.kept).mean()).backward()

    step(length if body is not None else 64)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    started = time.perf_counter()
    step(length)
    seconds = time.perf_counter() - started
    return {"before_gib": before, "peak_gib": resident("VmHWM"), "seconds": seconds}


def measure(way: str, length: int, threads: int) -> dict[str, Any]:
    """``point`` in a new process. Tensors are mapped one by one, so that the allocator hides nothing it has freed."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--point", way, str(length)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{way} at {length} tokens failed: {done.stderr[-2000:]}")
    found = {"tokens": length, **json.loads(done.stdout.splitlines()[-1])}
    found["step_gib"] = found["peak_gib"] - found["before_gib"]
    say(f"{way:15} {length:6} tokens: peak {found['peak_gib']:.2f} GiB, {found['seconds']:.1f} s")
    return found


def predict(points: list[dict[str, Any]], length: int) -> float:
    """Peak GiB at a length, as a + b T + c T^2 through the last points (less of it while there are fewer)."""
    import numpy as np

    last = points[-3:]
    fit = np.polyfit([p["tokens"] for p in last], [p["peak_gib"] for p in last], len(last) - 1)
    return float(np.polyval(fit, length))


def fitting_tokens(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Most tokens, in steps of 64, whose peak stays under the limit: between two measured points, or predicted."""
    most = 64
    while most < 2**20 and predict(points, most + 64) <= LIMIT_GIB:
        most += 64
    return {"tokens": most, "measured_up_to": points[-1]["tokens"], "extrapolated": most > points[-1]["tokens"]}


def run(ways: list[str], lengths: list[int], threads: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for way in ways:
        points: list[dict[str, Any]] = []
        compiled = way == "plain_compiled"  # slow to start: powers of two only
        for length in [n for n in lengths if not compiled or n & (n - 1) == 0]:
            if length > LONGEST[way] or (len(points) > 2 and predict(points, length) > NEVER_ABOVE_GIB):
                break
            points.append(measure(way, length, threads))
            if points[-1]["peak_gib"] > LIMIT_GIB:
                break
        results[way] = {"what": WAYS[way], "points": points, "fits_8_gib": fitting_tokens(points)}
    return results


def main() -> None:
    if sys.argv[1:2] == ["--point"]:
        print(json.dumps(point(sys.argv[2], int(sys.argv[3]))))
        return
    started = time.perf_counter()
    args = arguments(__doc__ or "")
    results = run(list(WAYS), QUICK if args.quick else LENGTHS, args.threads)
    result = {"benchmark": "training_memory", "results": results, **frame(args, REFERENCE, started)}
    result["forced"] = "Random weights, random tokens, DCP gates of rank 32 at alpha 1.5; no optimizer, one sequence."
    publish(args, result)


if __name__ == "__main__":
    main()
