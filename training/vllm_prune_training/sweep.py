"""What a gated model keeps and costs at several strengths, on the same windows, with the hard mask of the server.

Dimension letters: N windows, T tokens, L layers, H KV heads, E eviction units of a layer (1 or H), V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from vllm_prune.gates import ShadowGate

from .gate_evaluation import final_live, past_pair_kept
from .masked import GatedModel

ROWS = 512
"""Positions whose logits are compared at a time: two float32 copies of [ROWS, V] are held."""
SHORTEST = 16
"""Tokens of the shortest beginning of a window that is measured by itself."""


@dataclass(frozen=True)
class Point:
    """One strength, measured.

    Attributes:
        strength: as given.
        kept, live: float64 [L, E], means over windows of the past-pair share and of the final live share.
        ppl: perplexity a token.
        kl: mean KL(open gates || gated) a position, nats.
        shorter: means over windows, layers and units of the past-pair share among the first tokens, by their number; of gates
            that decide at the prompt's end none.
    """

    strength: float
    kept: torch.Tensor
    live: torch.Tensor
    ppl: float
    kl: float
    shorter: dict[int, float] = field(default_factory=dict)


@dataclass
class _Sums:
    kept: torch.Tensor
    live: torch.Tensor
    loss: float = 0.0
    kl: float = 0.0
    shorter: Counter[int] = field(default_factory=Counter)


def losses(dense: torch.Tensor, gated: torch.Tensor, ids: torch.Tensor) -> tuple[float, float]:
    """Summed next-token loss of the gated logits over T - 1 positions, and summed KL(dense || gated) over T, in nats.

    Args:
        dense, gated: logits [T, V].
        ids: int64 [T].
    """
    loss = kl = 0.0
    for start in range(0, len(ids), ROWS):
        log_q = F.log_softmax(gated[start : start + ROWS].float(), dim=-1)
        targets = ids[start + 1 : start + 1 + ROWS]
        loss += F.nll_loss(log_q[: len(targets)], targets, reduction="sum").item()
        if dense is not gated:
            log_p = F.log_softmax(dense[start : start + ROWS].float(), dim=-1)
            kl += F.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
    return loss, max(0.0, kl)


def shorter_lengths(length: int) -> list[int]:
    """Powers of two from ``SHORTEST`` to below ``length``."""
    return [1 << i for i in range(SHORTEST.bit_length() - 1, (length - 1).bit_length())]


@torch.no_grad()
def sweep(
    gated: GatedModel,
    ids: torch.Tensor,
    strengths: Sequence[float],
    seen: Callable[[float, torch.Tensor], None] | None = None,
) -> list[Point]:
    """Measure every strength on every window; open gates are run once a window and compared with.

    Args:
        gated: in evaluation mode.
        ids: int64 [N, T].
        strengths: 0 costs nothing extra.
        seen: called with each strength above 0 and the expiries [L, E, T] of each window.

    With gates that decide at the prompt's end the first half of each window is the prompt: kept is the share of its keys
    that are stored at the end, and losses are those of the second half.

    Returns:
        One point a strength, in the given order.
    """
    told, first = {}, 1
    if gated.gates[0].whole_prompt or isinstance(gated.gates[0], ShadowGate):
        first = max(1, ids.shape[1] // 2)
        told = {"prompt": first}
    shape = (len(gated.calls), gated.gates[0].num_units)  # type: ignore[union-attr]
    lengths = [] if told else shorter_lengths(ids.shape[1])
    sums = [_Sums(torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)) for _ in strengths]
    for row in ids:
        dense = gated(row, "open").logits[first - 1 :]
        for strength, total in zip(strengths, sums, strict=True):
            if strength == 0.0:
                logits = dense
                total.kept += 1.0
                total.live += 1.0
                total.shorter.update(dict.fromkeys(lengths, 1.0))  # type: ignore[arg-type]
            else:
                out = gated(row, "hard", strength=strength, **told)
                logits = out.logits[first - 1 :]
                if isinstance(gated.gates[0], ShadowGate):  # its keys outlive the prompt's last query
                    total.kept += (out.expiry[..., :first] >= ids.shape[1]).double().mean(-1)
                else:
                    total.kept += final_live(out.expiry[..., :first]) if told else past_pair_kept(out.expiry)
                total.live += final_live(out.expiry)
                total.shorter.update({t: past_pair_kept(out.expiry[..., :t]).mean().item() for t in lengths})  # type: ignore[misc]
                if seen is not None:
                    seen(strength, out.expiry)
            loss, kl = losses(dense, logits, row[first - 1 :])
            total.loss += loss
            total.kl += kl
    n, t = ids.shape[0], ids.shape[1] - first + 1
    return [
        Point(strength, s.kept / n, s.live / n, math.exp(s.loss / (n * (t - 1))), s.kl / (n * t),
              {length: share / n for length, share in s.shorter.items()})
        for strength, s in zip(strengths, sums, strict=True)
    ]  # fmt: skip
