"""The serve path on CUDA, start to end, with no look at results: on a real GPU, or on a stand-in for one that computes nothing.

Prefill in chunks and whole, decode, drops, ends, aborts, preemption; Model Runner V2 and V1; graphs and eager; each case in a
process of its own. On a stand-in the reports that kernels would write are made up, so that blocks go back and come again, and
prompts come whole: there every step "samples" a token, a chunk's too.

    python tests/gpu/flow.py [--null] [CASE ...]         CASE: METHOD,RUNNER,MODE
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "dcp": {"beta": 3.6},
    "dcp_kv_head": {"beta": 3.6, "scope": "kv_head"},
    "dms": {"delay": 8},
    "window": {"window": 40},
    "random": {"keep": 0.4, "delay": 8, "seed": 3},
    "ltp": {"span": 20, "grid": 16, "theta": 0.98},
    "acc": {"grid": 32, "sinks": 2, "window": 8},
}
CASES = [
    *(f"{method},v2,graphs" for method in METHODS), "dcp,v2,eager", "dcp,v1,graphs", "dcp,v1,eager", "dms,v1,graphs",
    "open,v2,graphs", "dcp_generic,v2,graphs", "dcp_prefix,v2,graphs", "dms_prefix,v1,eager",
    "dcp_fp8,v2,graphs", "dms_fp8,v1,eager", "dms_fp8_prefix,v2,graphs",
    "acc,v1,eager", "acc_fp8_prefix,v2,graphs", "nvidia,v2,graphs", "fastdms,v2,graphs", "modelopt,v1,graphs",
]  # fmt: skip


def make_up_reports() -> None:
    """What a kernel would have written: one page in use, all but the first block given back."""
    import torch

    from vllm_prune.cache import device_store

    real = device_store.close

    def told(lanes: Any, kv: Any, rows: Any, most_tokens: int) -> Any:
        out = real(lanes, kv, rows, most_tokens)
        numbers = [[1] * 5 + [1 if seen else 0, 1, 1, 1, 1] for *_, seen in rows.tolist()]
        return out.copy_(torch.nn.functional.pad(torch.tensor(numbers, dtype=torch.int32), (0, out.shape[1] - 10)))

    device_store.close = told  # type: ignore[assignment]


def run(case: str, null: bool) -> None:
    method, runner, mode = case.split(",")
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if runner == "v2" else "0"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from public_checkpoints import SAVED
    from support import engine, generate, pool_is_whole, preempted, prompts, save_gated, scheduler_of, tiny_config
    from vllm import SamplingParams

    method, prefixes = method.removesuffix("_prefix"), method.endswith("_prefix")
    method, narrow = method.removesuffix("_fp8"), method.endswith("_fp8")
    name = {"open": "random", "dcp_generic": "dcp"}.get(method, method)
    with tempfile.TemporaryDirectory() as folder:
        if name in SAVED:  # public checkpoints
            model = SAVED[name](Path(folder), torch.bfloat16)
        else:
            config = tiny_config("llama" if method == "dms" else "qwen3", layers=2, group=4 if method == "dms" else 3)
            model = save_gated(Path(folder), config, name.removesuffix("_kv_head"), torch.bfloat16,
                               generic=method == "dcp_generic", **METHODS[name])  # fmt: skip
        if null:
            make_up_reports()
        options: dict[str, Any] = {"enable_prefix_caching": prefixes, "kv_cache_dtype": "fp8" if narrow else "auto"}
        if method == "open":
            options["additional_config"] = {"vllm_prune": {"strength": 0.0}}
        with engine(model, enforce_eager=mode == "eager", block_size=64, max_num_seqs=8, kv_cache_memory_bytes=None,
                    gpu_memory_utilization=0.2, long_prefill_token_threshold=0 if null else 100, **options) as llm:  # fmt: skip
            for batch in (prompts([130, 40, 1, 300, 64]), prompts([20] * 8)):
                outputs = generate(llm, batch, tokens=12)
                assert [len(output.outputs[0].token_ids) for output in outputs] == [12] * len(batch)
            if method != "open":
                assert len(preempted(llm, prompts([120, 30]), 30)) == 2
            core = llm.llm_engine
            for i in range(3):
                core.add_request(f"gone{i}", prompts([90], seed=i)[0], SamplingParams(max_tokens=50, ignore_eos=True,
                                                                                     detokenize=False))  # fmt: skip
            for _ in range(6):
                core.step()
            core.abort_request([f"gone{i}" for i in range(3)])
            if prefixes:
                for cached in (0, 256):  # from the second on
                    (output,) = generate(llm, prompts([300], seed=9), tokens=8)
                    assert output.num_cached_tokens == cached
                scheduler_of(llm).reset_prefix_cache()
            generate(llm, prompts([10]), tokens=3)
            assert pool_is_whole(llm)
            runner_class = type(core.engine_core.engine_core.model_executor.driver_worker.worker.model_runner)
            layers = core.vllm_config.compilation_config.static_forward_context.values()
            impls = {type(layer.impl).__name__ for layer in layers if hasattr(layer, "impl")}
            print(f"FLOW {case}: {runner_class.__module__}, {', '.join(impls)}, "
                  f"{core.vllm_config.compilation_config.cudagraph_mode!r}", flush=True)  # fmt: skip


def main() -> None:
    args = [a for a in sys.argv[1:] if not a.startswith("--")]
    null = "--null" in sys.argv
    if "--one" in sys.argv:
        return run(args[0], null)
    failed = []
    for case in args or CASES:
        begin = time.time()
        command = [sys.executable, __file__, case, "--one", *(["--null"] if null else [])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        said = [line for line in done.stdout.splitlines() if line.startswith("FLOW")]
        print(*said or [f"FLOW {case}: FAILED"], f"{time.time() - begin:.0f} s", flush=True)
        if done.returncode or not said:
            failed.append(case)
            print(done.stdout[-3000:], done.stderr[-6000:], flush=True)
    print(f"{len(failed)} of {len(args or CASES)} cases failed", *failed)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
