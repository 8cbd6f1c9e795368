"""Training-free presses of the kvpress library on the benchmark's cases. Runs in the environment of ``make baselines``.

    .venv-baselines/bin/python benchmarks/baselines/press.py --model DIR --cases CASES.json --out ROWS.json

The context is read once, densely, before the question is seen; then each press cuts every layer's keys and values to the
budget by its own ``compress``, and each branch is run from what is left. Compression leaves the hidden states alone, so one
prefill serves all presses and budgets; ``press_cache`` is the naive twin, one prefill a press as kvpress itself runs it.

Dimension letters: T context tokens, H KV heads, D head size, B branches.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kvpress
import torch
from baselines.case_file import Case, Row, judge, load_cases
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

LOGIT_TOLERANCE = 1e-4
"""Largest absolute difference from our logits, divided by the largest of these, that lets a run start."""

PRESSES: dict[str, Callable[[float], Any]] = {
    "SnapKV": lambda ratio: kvpress.SnapKVPress(ratio),
    "ExpectedAttention": lambda ratio: kvpress.ExpectedAttentionPress(ratio),
    "KeyDiff": lambda ratio: kvpress.KeyDiffPress(ratio),
    "ObservedAttention (H2O-like)": lambda ratio: kvpress.ObservedAttentionPress(ratio),
    "TOVA": lambda ratio: kvpress.TOVAPress(ratio),
    "StreamingLLM": lambda ratio: kvpress.StreamingLLMPress(ratio),
    "Knorm": lambda ratio: kvpress.KnormPress(ratio),
    "LagKV": lambda ratio: kvpress.LagKVPress(ratio),
    "Random": lambda ratio: kvpress.RandomPress(ratio, seed=1),
}
"""Presses whose heads keep equally many keys, so that what is kept is what the cache holds; kvpress's own defaults."""

Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""Key and value [1, H, kept, D] of each layer."""


def load_model(folder: Path) -> PreTrainedModel:
    """Base weights in float32 with attention that returns its weights, which ObservedAttention needs."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def check_logits(model: PreTrainedModel, check: dict[str, Any]) -> float:
    """Relative difference to the logits that our environment computed.

    Raises:
        SystemExit: it is larger than ``LOGIT_TOLERANCE``: this library reads the folder as another model.
    """
    want = torch.tensor(check["logits"])
    found = model(torch.tensor([check["ids"]])).logits[0, -1]
    miss = float((found - want).abs().max() / want.abs().max())
    if not miss <= LOGIT_TOLERANCE:
        sys.exit(f"transformers {version('transformers')} computes other logits than ours: {miss:.2e} apart, "
                 f"{LOGIT_TOLERANCE:.0e} allowed. Look at rope and dtype in config.json.")  # fmt: skip
    return miss


@torch.no_grad()
def press_cache(model: PreTrainedModel, context: Sequence[int], press: Any) -> Layers:
    """What a press leaves of a context, by a prefill of its own: the naive twin of ``press_all``."""
    cache = DynamicCache()
    with press(model):
        model.model(input_ids=torch.tensor([list(context)]), past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


@torch.no_grad()
def press_all(model: PreTrainedModel, context: Sequence[int], presses: Sequence[Any]) -> list[Layers]:
    """What each press leaves of a context, all from one prefill."""
    kept: list[Layers] = [[] for _ in presses]
    rotary = model.model.rotary_emb
    for press in presses:
        press.post_init_from_model(model)

    def hook(module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        for press, found in zip(presses, kept, strict=True):
            found.append(press.compress(module, kwargs["hidden_states"], layer.keys, layer.values, output[1], kwargs))

    hooks = []
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = rotary  # some presses rotate queries or keys themselves
        hooks.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
    try:
        model.model(input_ids=torch.tensor([list(context)]), past_key_values=DynamicCache())
    finally:
        for each in hooks:
            each.remove()
    return kept


def grown(layers: Layers, branches: int) -> DynamicCache:
    """A cache of B = ``branches`` rows that start with the same keys; the tensors in ``layers`` stay as they are."""
    cache = DynamicCache()
    for index, (key, value) in enumerate(layers):
        cache.update(key.expand(branches, -1, -1, -1), value.expand(branches, -1, -1, -1), index)
    return cache


@torch.no_grad()
def branch_logits(model: PreTrainedModel, layers: Layers, tokens: int, padded: torch.Tensor) -> torch.Tensor:
    """Logits [B, Q, V] of branches [B, Q] after a context of ``tokens`` tokens of which ``layers`` is left."""
    b, q = padded.shape
    positions = torch.arange(tokens, tokens + q)[None].expand(b, -1)
    return model(padded, past_key_values=grown(layers, b), position_ids=positions).logits


@torch.no_grad()
def greedy(model: PreTrainedModel, layers: Layers, tokens: int, question: Sequence[int], length: int) -> list[int]:
    """``length`` tokens that greedy decoding writes after a question."""
    cache, ids, at, out = grown(layers, 1), torch.tensor([list(question)]), tokens, []
    for _ in range(length):
        positions = torch.arange(at, at + ids.shape[1])[None]
        logits = model(ids, past_key_values=cache, position_ids=positions).logits
        at += ids.shape[1]
        ids = logits[:, -1:].argmax(-1)
        out.append(int(ids))
    return out


def kept_fraction(layers: Layers, tokens: int) -> float:
    """Measured from the cache: keys left, mean over layers (heads keep equally many)."""
    return sum(key.shape[2] for key, _ in layers) / (len(layers) * tokens)


def rows_of(
    model: PreTrainedModel, case: Case, names: Sequence[str], budgets: Sequence[float], greedy_check: list[bool]
) -> Iterator[Row]:
    """Rows of all presses on one case. The first question is decoded greedily too: ``greedy_check`` gets whether that
    agrees with the teacher-forced verdict."""
    wanted = [(name, budget) for name in names for budget in budgets]
    presses = [PRESSES[name](1.0 - budget) for name, budget in wanted]
    for (name, budget), layers in zip(wanted, press_all(model, case.context, presses), strict=True):
        logits = branch_logits(model, layers, len(case.context), case.padded())
        yield Row(name, budget, case.name, case.task, kept_fraction(layers, len(case.context)), **judge(case, logits))
        if case.questions:
            first = case.questions[0]
            said = greedy(model, layers, len(case.context), first.ids, len(first.answer))
            start = len(first.ids) - 1
            forced = logits[0, start : start + len(first.answer)].argmax(-1).tolist()
            greedy_check.append((said == first.answer) == (forced == first.answer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--cases", type=Path, required=True, help="written by benchmarks/quality.py")
    parser.add_argument("--out", type=Path, required=True, help="JSON with one row a case, press and budget")
    parser.add_argument("--presses", nargs="+", choices=list(PRESSES), default=list(PRESSES))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.3, 0.2, 0.1])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if not all(0.0 < budget <= 1.0 for budget in args.budgets):
        parser.error("--budgets must lie in (0, 1]")
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    cases, check = load_cases(args.cases)
    model = load_model(args.model)
    miss = check_logits(model, check)
    print(f"logits agree with ours to {miss:.1e}", flush=True)
    rows: list[Row] = []
    agreed: list[bool] = []
    started = time.time()
    tests = [case for case in cases if case.split == "test"]
    for number, case in enumerate(tests, 1):
        rows += rows_of(model, case, args.presses, args.budgets, agreed)
        print(f"{number}/{len(tests)} {case.name}: {time.time() - started:.0f} s", flush=True)
    record = {
        "versions": {name: version(name) for name in ("kvpress", "transformers", "torch")},
        "logit_difference": miss, "greedy_checked": len(agreed), "greedy_agreed": sum(agreed),
        "seconds": round(time.time() - started, 1),
    }  # fmt: skip
    args.out.write_text(json.dumps({"record": record, "rows": [asdict(row) for row in rows]}), encoding="utf-8")


if __name__ == "__main__":
    main()
