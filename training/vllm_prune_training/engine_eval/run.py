"""One engine run in a process of its own: ``python -m vllm_prune_training.engine_eval.run JOB.json ANSWERS.jsonl``.

One line an answer, written as soon as the engine has it, so that the parent can show progress.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .jobs import LEAST_NEW_TOKENS, Answer, Engine, Request


def prompt_nll(prompt: Sequence[int], logprobs: Any) -> float:
    """Sum of -log p of the prompt's tokens but the first, in nats.

    Args:
        prompt: T token ids.
        logprobs: vLLM's ``prompt_logprobs``, T entries, the first of them None.
    """
    return -sum(logprobs[at][prompt[at]].logprob for at in range(1, len(prompt)))


def answers(llm: Any, requests: Sequence[Request], stop_ids: Sequence[int] = ()) -> Iterator[Answer]:
    """Run all requests greedily in a ``vllm.LLM``; answers come in the order in which they finish.

    Raises:
        RuntimeError: the engine ended a request early, or did not say what it kept: no number could be trusted.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    for index, request in enumerate(requests):
        params = SamplingParams(
            temperature=0.0, max_tokens=max(request.new_tokens, LEAST_NEW_TOKENS), min_tokens=LEAST_NEW_TOKENS,
            stop_token_ids=list(stop_ids), detokenize=False, prompt_logprobs=0 if request.scored else None,
        )  # fmt: skip
        engine.add_request(str(index), {"prompt_token_ids": request.prompt}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                yield _answer(output, requests, set(stop_ids))


def _answer(output: Any, requests: Sequence[Request], stop_ids: set[int]) -> Answer:
    index = int(output.request_id)
    (completion,) = output.outputs
    if completion.finish_reason not in ("stop", "length"):
        raise RuntimeError(
            f"vllm-prune: the engine ended request {index} of {len(requests[index].prompt)} tokens with "
            f"'{completion.finish_reason}': it outgrew the pool. Lower --concurrency or the length."
        )
    memory = (output.kv_transfer_params or {}).get("vllm_prune")
    if memory is None:
        raise RuntimeError(f"vllm-prune: request {index} came back without what its gates kept.")
    ids = list(completion.token_ids)
    end = next((at for at, token in enumerate(ids) if token in stop_ids), len(ids))
    nll = prompt_nll(requests[index].prompt, output.prompt_logprobs) if requests[index].scored else None
    return Answer(index, ids[:end], nll, memory)


def main() -> None:
    job_path, answers_path = map(Path, sys.argv[1:3])
    job = json.loads(job_path.read_text(encoding="utf-8"))
    engine = Engine(**job["engine"])
    requests = [Request(**request) for request in job["requests"]]

    from vllm import LLM

    llm = LLM(**engine.arguments())
    with answers_path.open("w", encoding="utf-8") as file:
        for answer in answers(llm, requests, engine.stop_ids):
            file.write(json.dumps(asdict(answer), separators=(",", ":")) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
