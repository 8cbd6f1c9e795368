"""What a routed model computes and costs, against the dense one: KL, perplexity, pairs, FLOPs; and blocks taken out whole.

For ``claims_ftp.py``. Letters: L blocks, T tokens of a row, P of them of the prompt (T without one).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from vllm_prune_training.acc_profile import layer_flops
from vllm_prune_training.ftp_search import Rows
from vllm_prune_training.masked import GatedModel
from vllm_prune_training.routed import Decide, Routes


@torch.no_grad()
def similarity(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Cosine of each block's input and output: share of (token, block) pairs above 0.8 and deciles, over all and per block."""
    found: list[torch.Tensor] = []

    def look(_module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        found.append(torch.cosine_similarity(x.float(), output.float(), dim=-1).flatten())

    hooks = [layer.register_forward_hook(look, with_kwargs=True) for layer in model.get_decoder().layers]
    model.get_decoder()(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    every = torch.cat(found)
    return {
        "pairs": every.numel(), "share_above_0.8": float((every > 0.8).float().mean()),
        "deciles": [round(float(q), 4) for q in every.quantile(torch.linspace(0.1, 0.9, 9))],
        "share_above_0.8_per_block": [round(float((part > 0.8).float().mean()), 4) for part in found],
    }  # fmt: skip


def computed_flops(ran: torch.Tensor, config: Any, keeps_kv: bool) -> float:
    """Share of the dense blocks' FLOPs that is computed. What the router itself costs is not in it.

    Args:
        ran: bool [L, P].
        keeps_kv: keys and values of skipped tokens are made, and seen.
    """
    blocks, p = ran.shape
    token, attention = layer_flops(config, p)
    pair = attention / (p / 2)
    heads = config.num_key_value_heads
    keys = 2.0 * 2 * config.hidden_size * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    place = torch.arange(1, p + 1, dtype=torch.float64)
    total = 0.0
    for row in ran.double():
        seen = place if keeps_kv else row.cumsum(0)
        total += token * float(row.sum()) + pair * float((row * seen).sum())
        total += keys * float((1.0 - row).sum()) if keeps_kv else 0.0
    return total / (blocks * (token * p + pair * float(place.sum())))


@dataclass(frozen=True)
class Judge:
    """Rows, and what the dense model says of them.

    Attributes:
        dense: log p of each row's predicted tokens, [., V]: of what follows the prompt where there is one.
    """

    rows: Rows
    dense: list[torch.Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, gated: GatedModel, rows: Rows) -> Judge:
        """With the model's gates open."""
        open_ = [gated(ids, "open").logits[0, (p or 1) - 1 : -1].float().log_softmax(-1) for ids, p in rows.each()]
        return cls(rows, open_)

    def dense_perplexity(self) -> float:
        nll = [-log_p.gather(1, ids[0, p or 1 :, None]).mean()
               for log_p, (ids, p) in zip(self.dense, self.rows.each(), strict=True)]  # fmt: skip
        return float(torch.stack(nll).mean().exp())

    @torch.no_grad()
    def measure(self, gated: GatedModel, decide: Decide | None = None) -> dict[str, Any]:
        """KL(dense || routed) a predicted token, perplexity, share of pairs skipped (all, and by block), share of FLOPs."""
        kl = nll = flops = 0.0
        skipped = []
        for log_p, (ids, p) in zip(self.dense, self.rows.each(), strict=True):
            out = gated(ids, "hard", strength=1.0, collect=False, decide=decide, prompt=p)
            log_q = out.logits[0, (p or 1) - 1 : -1].float().log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
            nll -= float(log_q.gather(1, ids[0, p or 1 :, None]).mean())
            ran = torch.stack(out.runs)[:, 0, :p] > 0
            skipped.append(1.0 - ran.float().mean(-1))
            flops += computed_flops(ran, gated.config, gated.routed is not None and gated.routed.keep_kv)
        n, by_block = len(self.dense), torch.stack(skipped).mean(0)
        return {"kl": kl / n, "perplexity": math.exp(nll / n), "skipped": float(by_block.mean()), "flops": flops / n,
                "skipped_per_block": [round(x, 4) for x in by_block.tolist()]}  # fmt: skip


def without(removed: Collection[int]) -> Decide:
    """Decisions that take whole blocks out, for all tokens."""

    def decide(layer: int, routes: Routes) -> torch.Tensor | None:
        return torch.zeros(routes.facts.shape[:2], device=routes.facts.device) if layer in removed else None

    return decide


def removed_greedily(gated: GatedModel, judge: Judge, count: int) -> list[int]:
    """Blocks to take out, in order: each time the one whose removal costs the least KL beside those gone already."""
    gone: list[int] = []
    for _ in range(count):
        left = [block for block in range(len(gated.gates)) if block not in gone]
        gone.append(min(left, key=lambda block: judge.measure(gated, without({*gone, block}))["kl"]))
    return gone


def falling_at(
    value: Callable[[float], float], wanted: float, low: float, high: float, steps: int, close: float = 0.0
) -> float:
    """Where a function that falls takes a value, by halving: the best of the points tried, or the first that is close."""
    best, least = low, math.inf
    for _ in range(steps):
        middle = (low + high) / 2
        found = value(middle)
        if abs(found - wanted) < least:
            best, least = middle, abs(found - wanted)
        if least <= close:
            break
        low, high = (middle, high) if found > wanted else (low, middle)
    return best
