"""Tiny random models, gated checkpoints and in-process engines for tests. No network, no files of the repository."""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_prune.checkpoint import GENERIC_ARCHITECTURE, add_gates
from vllm_prune.gates import GATES, ACCGate, DCPGate, DMSGate, FTPGate, Gate, GateShape, LTPGate
from vllm_prune.gates.ftp import share_router

VOCAB = 512
FULL = os.environ.get("VLLM_PRUNE_FULL") == "1"
"""Every shape of every test, and fresh random inputs: hours."""


def own_process(file: Path, timeout: int) -> None:
    """Tests of a file in a process of their own, where kernels run under Triton's interpreter unless there is a GPU.

    It must be chosen before Triton is imported, and other tests import vLLM and torch's compiler.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        env["TRITON_INTERPRET"] = "1"
    options = ["-p", "no:cacheprovider", "-o", f"python_files={file.name}"]
    command = [sys.executable, "-m", "pytest", *options, file.name]
    done = subprocess.run(command, cwd=file.parent, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr  # nonzero too where no test was found


EXACT = torch.float32 if torch.cuda.is_available() or torch.cpu._is_amx_tile_supported() else torch.bfloat16
"""Dtype in which open gates say what stock vLLM says, token for token: in bfloat16 stock has kernels of its own on a GPU and with
AMX, whose near ties fall either way."""
RECORD = {"additional_config": {"vllm_prune": {"record": True}}}
"""Options of an engine that remembers the expiry of every key."""


def tiny_config(
    family: str, head_dim: int = 64, group: int = 2, kv_heads: int = 2, layers: int = 3, **more: Any
) -> Any:
    """A small config of a family: hidden size follows from the heads."""
    heads = kv_heads * group
    return AutoConfig.for_model(
        family, vocab_size=VOCAB, hidden_size=128, intermediate_size=192, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=2048,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=2, sliding_window=None, **more,
    )  # fmt: skip


def save_base(folder: Path, config: Any, dtype: torch.dtype, seed: int = 0) -> Path:
    """A random model with weights large enough that attention matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.normal_(std=1.5 / weight.shape[1] ** 0.5)
            elif weight.ndim == 2:
                weight.normal_(std=1.0)
    model.to(dtype).save_pretrained(folder)
    config_path = folder / "config.json"
    data = json.loads(config_path.read_text())
    data["dtype"] = str(dtype).removeprefix("torch.")
    config_path.write_text(json.dumps(data))
    return folder


def random_gates(config: Any, method: str, seed: int = 0, **params: Any) -> list[Gate]:
    """Gates that drop a good part of a random model's keys. DCP: at ``beta`` > 0 keys die gradually."""
    torch.manual_seed(seed + 1000)
    shape = GateShape(config.hidden_size, config.num_key_value_heads, config.num_hidden_layers)
    gates: list[Gate] = []
    gate: Gate
    if method == "ftp":
        return ftp_gates(shape, **params)
    for layer in range(shape.num_layers):
        if method not in ("dcp", "dms"):
            gate = GATES[method](shape, **params).at_layer(layer)
            for weight in gate.parameters():  # a predictor's: what it says must depend on what it reads
                if weight.ndim == 2:
                    torch.nn.init.normal_(weight, std=3.0 / weight.shape[1] ** 0.5)
                    with torch.no_grad():
                        weight -= weight.mean(1, keepdim=True)
            if isinstance(gate, LTPGate):  # layer 0 would start at 0, and keep all
                gate.theta.data.fill_(gate.final)
            elif isinstance(gate, ACCGate):
                gate.profile.fill_(0.9 - 0.2 * layer)
                gate.coefficient.fill_(0.6)
            gates.append(gate)
            continue
        if method == "dcp":
            gate = DCPGate(shape, **{"rank": 16, "beta": 1.5, **params})
            torch.nn.init.normal_(gate.qk.weight, std=0.7 / shape.hidden_size**0.25 / 2)
        else:
            gate = DMSGate(shape, **{"delay": 8, **params})
            torch.nn.init.normal_(gate.gate.weight, std=1.0 / shape.hidden_size**0.5)
        gates.append(gate)
    return gates


def ftp_gates(shape: GateShape, wanted: float = 0.6, **params: Any) -> list[Gate]:
    """A random router of large weights, so that every factor matters, and a requirement in every block but the first."""
    gates = [FTPGate(shape, **params) for _ in range(shape.num_layers)]
    for weight in gates[0].router.parameters():
        torch.nn.init.normal_(weight, std=2.0 if weight.ndim == 2 else 0.5)
    share_router(gates)
    for gate in gates[1:]:
        gate.sparsity.fill_(wanted)
    with torch.no_grad():  # about half of typical facts on either side
        facts = torch.stack([torch.rand(500) * 200, (torch.randn(500) / 2).exp(), torch.rand(500)], dim=-1)
        run, skip = gates[0].logits(facts, torch.tensor(wanted)).unbind(-1)
        gates[0].router[2].bias[0] += (skip - run).median()  # type: ignore[index]
    return list(gates)


def save_gated(
    folder: Path,
    config: Any,
    method: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    section: dict[str, Any] | None = None,
    generic: bool = False,
    **params: Any,
) -> Path:
    """A random gated checkpoint."""
    save_base(folder, config, dtype, seed)
    gates = random_gates(config, method, seed, **params)
    defaults = {"dcp": {"rank": 16, "beta": 1.5}, "dms": {"delay": 8}}.get(method, {})
    add_gates(folder, gates, {"params": {**defaults, **params}, **(section or {})},
              architecture=GENERIC_ARCHITECTURE if generic else None)  # fmt: skip
    return folder


def preempted(
    llm: Any, token_prompts: list[Any], tokens: int, after: tuple[int, ...] = (4, 15), **more: Any
) -> list[Any]:
    """Greedy outputs, in the prompts' order, of requests that are all thrown out ``after`` some steps."""
    from vllm import SamplingParams

    core = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **more)
    for index, prompt in enumerate(token_prompts):
        core.add_request(f"again{index}", prompt, params)  # records are by name: none that "generate" gives
    done: list[Any] = []
    step = 0
    while core.has_unfinished_requests():
        done += [output for output in core.step() if output.finished]
        step += 1
        if step in after:
            scheduler_of(llm).reset_prefix_cache(reset_running_requests=True)
    return sorted(done, key=lambda output: output.request_id)


@contextmanager
def collected_once() -> Iterator[None]:
    """vLLM collects garbage nine times for an engine, each time 0.4 s here, where everything is imported. Once is enough."""
    collect, gc.collect = gc.collect, lambda generation=2: 0
    try:
        yield
    finally:
        gc.collect = collect
        gc.collect()


@contextmanager
def engine(model: Path, **kwargs: Any) -> Iterator[Any]:
    """An in-process ``vllm.LLM`` with a small explicit pool, shut down at the end whatever happens."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    # vLLM's "auto" serves float32 checkpoints in bfloat16: say what the checkpoint says.
    dtype = json.loads((model / "config.json").read_text())["dtype"]
    defaults: dict[str, Any] = {
        "dtype": dtype, "skip_tokenizer_init": True, "max_model_len": 1024, "max_num_seqs": 16, "block_size": 32,
        "enforce_eager": True, "enable_prefix_caching": False,  # tests say how chunks come: a hit would say otherwise
        "kv_cache_memory_bytes": 64 << 20, "seed": 0, "disable_log_stats": True, "max_num_batched_tokens": 1024,
    }  # fmt: skip
    if torch.cuda.is_available():
        defaults["gpu_memory_utilization"] = 0.1  # several tests share the GPU
    with collected_once():
        try:
            llm = LLM(str(model), **{**defaults, **kwargs})
        except BaseException:
            cleanup_dist_env_and_memory()
            raise
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()


def prompts(lengths: list[int], seed: int = 0) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    return [{"prompt_token_ids": [rng.randrange(3, VOCAB) for _ in range(n)]} for n in lengths]


def generate(llm: Any, batch: list[dict[str, list[int]]], tokens: int = 24) -> list[Any]:
    """Greedy, ignoring end of text."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    return llm.generate(batch, params, use_tqdm=False)


PROMPT_LENGTHS = [1, 2, 31, 32, 33, 100, 257, 64]


def alone_and_in_a_batch(llm: Any, check: Callable[[list[Any]], None], layers: int) -> dict[str, Any]:
    """Prompts of ``PROMPT_LENGTHS``, some of them alone first, with ``check`` of what comes back, and the pool whole after it.
    Returns what the longest one held."""
    batch = prompts(PROMPT_LENGTHS, seed=4)
    alone = [generate(llm, [prompt], tokens=12)[0] for prompt in batch[4:7]]
    check(alone)
    outputs = generate(llm, batch, tokens=12)
    check(outputs)
    assert token_ids(alone) == token_ids(outputs[4:7])
    generate(llm, prompts([3]), tokens=2)
    assert pool_is_whole(llm)
    held: dict[str, Any] = outputs[6].kv_transfer_params["vllm_prune"]
    assert held["keys_held"] + held["keys_dropped"] == held["tokens"] * layers
    return held


def token_ids(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def state_of(llm: Any) -> Any:
    """The worker's state of an in-process engine."""
    from vllm_prune.attention.step_state import find_state

    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    return find_state(runner.vllm_config)


def count_preemptions(llm: Any) -> Callable[[], int]:
    """How many times this engine's scheduler has preempted a request since now."""
    scheduler, so_far = scheduler_of(llm), 0
    real = scheduler._preempt_request

    def preempt(*args: Any, **kwargs: Any) -> Any:
        nonlocal so_far
        so_far += 1
        return real(*args, **kwargs)

    scheduler._preempt_request = preempt
    return lambda: so_far


def pool_is_whole(llm: Any) -> bool:
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    return pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def expiries_of(store: Any, request_id: str, tokens: int) -> Any:
    """Recorded expiries [L, E, T] of a finished request, whose name in the engine begins with the one that it was given."""
    (name,) = {key for key, _ in store.events if key.split("-")[0] == request_id.split("-")[0]}
    return store.expiries(name, tokens)


def expiries_on(worker: Any, request_id: str, tokens: int) -> Any:
    """The same, E of the rank, on a worker, which may be another process."""
    from vllm_prune.attention.step_state import find_state

    return expiries_of(find_state(worker.vllm_config).store, request_id, tokens)


def recorded(llm: Any, output: Any) -> tuple[list[int], Any]:
    """Tokens that a finished request computed keys for, and its recorded expiries [L, E, T]."""
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids][:-1]
    return ids, expiries_of(state_of(llm).store, output.request_id, len(ids))
