"""What ACC-style elimination measures before it is trained: a profile over depth, and the coefficient for a budget.

Coverage R_l: the share of a prompt's tokens, best first, that hold a fraction of the attention received in layer l. The
profile P_l is its mean (or median) over sequences, made non-increasing in depth. After layer l a share clip(a P_l, least, 1)
of the prompt is left (``gates/acc_prompt.py``); a is solved for a budget by bisection. Letters: B batch, T tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch

from vllm_prune.errors import PruneError
from vllm_prune.gates.acc_prompt import MOST_COEFFICIENT, ACCPromptGate, retention

from .masked import GatedModel
from .prompt_recipe import Prompts

FLOOR = "the first layer computes everything, and no layer keeps less than gate.params.least"


def number_holding(scores: torch.Tensor, fraction: float) -> torch.Tensor:
    """How many, best first, hold ``fraction`` of the sum of each row of scores: int64 [...] of [..., P]."""
    ranked = scores.double().sort(dim=-1, descending=True).values.cumsum(-1)
    reached = ranked >= fraction * ranked[..., -1:] - 1e-12
    return reached.to(torch.int8).argmax(-1) + 1


def coverage(scores: torch.Tensor, fraction: float) -> float:
    """Share of the tokens, best first, that hold ``fraction`` of the sum of scores [P]; the last one is not looked at."""
    return int(number_holding(scores[:-1], fraction)) / len(scores)


def profile_of(coverages: torch.Tensor, statistic: str) -> list[float]:
    """P_l of coverages [sequences, L]."""
    found = coverages.mean(0) if statistic == "mean" else coverages.median(0).values
    return list(accumulate(found.tolist(), min))


def shares_left(coefficient: float, profile: Sequence[float], least: float) -> list[float]:
    """Shares of a prompt that each of the L layers computes: the first all, each other what the one before left."""
    return [1.0, *accumulate((retention(coefficient, p, least) for p in profile[:-1]), min)]


def kv_share(shares: Sequence[float]) -> float:
    """Mean share of keys stored."""
    return sum(shares) / len(shares)


def flops_share(shares: Sequence[float], token: float, pair: float) -> float:
    """Share of a prompt's FLOPs: ``token`` of each token in each layer, ``pair`` of its attention when all are there."""
    return sum(token * s + pair * s * s for s in shares) / (len(shares) * (token + pair))


def layer_flops(config: Any, tokens: int) -> tuple[float, float]:
    """Multiplications and additions of one token in one layer: of its matrices, and of its attention to half of T.

    Raises:
        PruneError: the config does not name what is needed.
    """
    try:
        d, heads = config.hidden_size, config.num_attention_heads
        kv = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or d // heads
        return 2.0 * (
            2 * d * heads * size + 2 * d * kv * size + 3 * d * config.intermediate_size
        ), 2.0 * tokens * heads * size
    except AttributeError as error:
        raise PruneError(f"the FLOPs of a {config.model_type} are not known: {error}.", "Use budget: kv.") from None


def solve_coefficient(share: Callable[[float], float], target: float, because: str = FLOOR) -> float:
    """The coefficient whose budget share is the target, by bisection of an increasing function.

    Args:
        share: of a coefficient.
        target: to reach.
        because: what bounds the share from below.

    Raises:
        PruneError: no coefficient reaches so low.
    """
    low, high = 1e-4, MOST_COEFFICIENT
    if share(low) > target:
        raise PruneError(f"objective.keep {target:g} is below what is possible here, {share(low):.4g}: {because}.",
                         "Raise it.")  # fmt: skip
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if share(middle) < target else (low, middle)
    return high


@torch.no_grad()
def tune(gated: GatedModel, ids: torch.Tensor, prompt: torch.Tensor, prompts: Prompts, keep: float) -> dict[str, Any]:
    """Measure the profile of a model's prompts and set it, with the coefficient for a budget, in its gates.

    Args:
        gated: with ACC-style gates.
        ids: int64 [B, T]; prompt: int64 [B].
        prompts: of the recipe.
        keep: the budget, a share.

    Returns:
        For the record: ``profile`` and ``coverage`` [L], ``coefficient``, ``shares`` of the prompt that layers compute.
    """
    gates: list[Any] = list(gated.gates)
    for gate in gates:
        assert isinstance(gate, ACCPromptGate)
        gate.tune(1.0, 1.0)  # nothing is eliminated while it is measured
    rows = []
    for one, p in zip(ids, prompt.tolist(), strict=True):
        out = gated(one[None, :p], "hard", prompt=p, collect=False)
        assert out.prompts is not None
        found = [coverage(scores[0], prompts.coverage) for scores in out.prompts.scores]
        rows.append([*found, found[-1] if found else 1.0])  # nobody asks for the last layer's
    table = torch.tensor(rows, dtype=torch.float64)
    profile = [1.0] * len(gates) if prompts.profile == "uniform" else profile_of(table, prompts.statistic)
    least = gates[0].least
    token, pair = layer_flops(gated.config, ids.shape[1]) if prompts.budget == "flops" else (1.0, 0.0)
    coefficient = solve_coefficient(lambda a: flops_share(shares_left(a, profile, least), token, pair), keep)
    for gate, p in zip(gates, profile, strict=True):
        gate.tune(p, coefficient)
    return {"profile": profile, "coverage": table.mean(0).tolist(), "coefficient": coefficient,
            "shares": shares_left(coefficient, profile, least), "sequences": len(ids)}  # fmt: skip
