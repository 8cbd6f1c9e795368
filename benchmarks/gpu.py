"""Stock vLLM and gated serving side by side on one GPU, at the shapes of real models with random weights.

    python benchmarks/gpu.py --shape qwen3-8b --json benchmarks/results/gpu-qwen3-8b.json

Each variant runs in a process of its own, one after another, with equal settings: decode at several contexts, time to first
token, concurrency in equal scarce memory. A roofline line says which share of the measured copy bandwidth a decode step reached
(weights once, and the keys and values that are held).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from gpu_engine import VARIANTS, Engine, shape_of

SHAPES = common.ROOT / "benchmarks" / "shapes"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-8b", choices=sorted(path.stem for path in SHAPES.glob("*.json")))
    parser.add_argument("--variants", default="stock,drop,open", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--decode", default="512x8,8192x8,32768x8,40000x8", help="CONTEXTxBATCH, ...")
    parser.add_argument("--first", default="8192,32768", help="contexts of the time to first token")
    parser.add_argument(
        "--scarce", default="8192x40", help="CONTEXTxREQUESTS for the concurrency in --scarce-gib; empty: none"
    )
    parser.add_argument("--scarce-gib", type=float, default=8.0)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--block-size", type=int, help="of all variants (default: each one's own)")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--batched-tokens", type=int, help="max_num_batched_tokens of all variants (default: vLLM's)")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "fp8"), help="of all variants")
    parser.add_argument("--memory", type=float, default=0.9, help="gpu_memory_utilization")
    parser.add_argument(
        "--profile", metavar="FOLDER", help="write tables of kernels there, at --decode's first two settings"
    )
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def pairs(text: str) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in (part.split("x") for part in text.split(",") if part)]


def child(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements of one variant, ``--child VARIANT``."""
    config = json.loads((SHAPES / f"{args.shape}.json").read_text())
    decodes, scarce = pairs(args.decode), pairs(args.scarce)
    firsts = [int(x) for x in args.first.split(",") if x]
    chunks = max(length * batch for length, batch in decodes) // (args.batched_tokens or 2048)
    longest = max([length for length, _ in decodes + scarce] + firsts) + args.new_tokens + chunks + 8
    options: dict[str, Any] = {
        "max_model_len": min(longest, config["max_position_embeddings"]), "max_num_seqs": args.max_num_seqs,
        "enable_prefix_caching": False, "enforce_eager": args.eager, "gpu_memory_utilization": args.memory,
        "kv_cache_dtype": args.kv_cache_dtype,
    }  # fmt: skip
    if args.block_size:
        options["block_size"] = args.block_size
    if args.batched_tokens:
        options["max_num_batched_tokens"] = args.batched_tokens
    if args.child == "open":  # stock's own kernels: two settings tell
        firsts, decodes, scarce = firsts[:1], decodes[:2], []
    engine = Engine(config, args.child, args.keep, args.rank, **options)
    found: dict[str, Any] = {"facts": engine.facts()}
    engine.decode(300, min(8, args.max_num_seqs), 24)  # compile what is left to compile
    found["first_token_seconds"] = {str(length): engine.first_token(length) for length in firsts}
    found["decode"] = []
    for length, batch in decodes:
        found["decode"].append(engine.decode(length, batch, args.new_tokens))
        common.say(args.child, json.dumps(found["decode"][-1]))
    found["concurrency"] = [
        engine.concurrency(length, n, args.new_tokens, args.scarce_gib * 2**30) for length, n in scarce
    ]
    common.say(args.child, json.dumps(found["concurrency"]))
    if args.profile:
        for length, batch in decodes[:2]:
            path = Path(args.profile, f"{args.shape}-{args.child}-{length}x{batch}.txt")
            path.write_text(engine.profile(length, batch))
    return found


def run_child(name: str) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", name, "--json", file.name]
        done = subprocess.run(command, timeout=900)
        if done.returncode:
            common.say(f"{name} failed")
            return {"failed": done.returncode}
        result: dict[str, Any] = json.loads(Path(file.name).read_text())
        return result


def copy_bandwidth() -> float:
    """Bytes a second of a device copy, read and written."""
    import torch

    a = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        b.copy_(a)
        torch.cuda.synchronize()
        best = max(best, 2 * a.numel() / (time.perf_counter() - begin))
    return best


def ratios(args: argparse.Namespace, found: dict[str, Any], bandwidth: float) -> dict[str, Any]:
    """Each variant against stock, and the roofline."""
    shape = shape_of(json.loads((SHAPES / f"{args.shape}.json").read_text()))
    stock = found.get("stock", {})
    out: dict[str, Any] = {}
    for name, result in found.items():
        if "failed" in result:
            continue
        rows = []
        for i, mine in enumerate(result["decode"]):
            row = {"length": mine["length"], "batch": mine["batch"]}
            row["roofline_share"] = (shape.weight_bytes + mine["kv_bytes"]) / (mine["step_ms"] / 1e3) / bandwidth
            if name != "stock" and "decode" in stock:
                row["decode_ratio"] = mine["tokens_per_second"] / stock["decode"][i]["tokens_per_second"]
                row["kv_ratio"] = stock["decode"][i]["kv_bytes"] / max(mine["kv_bytes"], 1)
            rows.append(row)
        out[name] = {"decode": rows}
        if name != "stock" and result["concurrency"] and "concurrency" in stock:
            out[name]["concurrency_ratio"] = [
                mine["most_running"] / theirs["most_running"]
                for mine, theirs in zip(result["concurrency"], stock["concurrency"], strict=True)
            ]
        if name != "stock" and "first_token_seconds" in stock:
            out[name]["first_token_ratio"] = {
                length: seconds / stock["first_token_seconds"][length]
                for length, seconds in result["first_token_seconds"].items()
            }
    return out


def main() -> None:
    started = time.perf_counter()
    args = parse()
    common.environment(1)
    if args.child:
        Path(args.json).write_text(json.dumps(child(args)))
        os._exit(0)  # nothing of the engine needs an orderly end
    names = [v for v in args.variants.split(",") if v]
    found = {name: run_child(name) for name in names}
    import torch

    bandwidth = copy_bandwidth()
    result = {
        "settings": vars(args), "gpu": torch.cuda.get_device_name(), "copy_bytes_per_second": bandwidth, "values": found,
        "ratios": ratios(args, found, bandwidth), "forced": common.FORCED, **common.origin(1, started),
    }  # fmt: skip
    common.say(json.dumps(result["ratios"], indent=1))
    common.publish(args, result)


if __name__ == "__main__":
    main()
