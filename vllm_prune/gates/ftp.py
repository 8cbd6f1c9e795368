"""FTP: fine-grained token-wise pruner (Li et al., arXiv 2412.11494), causal mode and prompt mode.

The unit of decision is a (token j, block i) pair: where block i skips token j, x_out = x_in, and no key of j is stored
there. A router of four factors decides, one MLP 4 -> 64 -> 2 shared by all blocks, argmax of its two outputs:

1. position: log2(1 + j) / 4 - 2, known while streaming and independent of the length still to come;
2. attention score in the last block that computed j, in units of a uniform share: log2(score + 2^-6) / 2;
3. relative rank there, 4 times the share of others with more, minus 2;
4. the block's sparsity requirement: 4 times strength x s_i, the product at most ``MOST``.

*Causal mode* (``form: causal``, ours): the score is A[j, j] x live count, the weight of j's own key in its own row, averaged
over heads, and the rank is among that row's live keys. Every position is decided alike, while generating too.

*Prompt mode* (``form: prompt``): score and rank come from the whole prompt, as published. The score is the attention that j
received from the prompt's later tokens that the block ran on (``prompt.py`` has the formula), the rank is among the prompt's
tokens that the block ran on. The prompt must come whole. Its last token always runs, which ours makes sure of, and so does
what is generated. There is no cascade: a token that one block skips the next may run.

The scaling is ours (factors of about the same spread: with smaller ones the router learns all or nothing). Block 0 has no
attention before it and always runs (s_0 = 0). Strength scales the schedule: 0 runs everything, 1 is as trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from vllm_prune.gates.base import Gate, GateShape, at_least_float32
from vllm_prune.gates.routing import RoutingGate

FACTORS, HIDDEN = 4, 64
MOST = 0.95
"""Largest requirement that the router is asked for."""


def factors(facts: torch.Tensor, requirement: torch.Tensor) -> torch.Tensor:
    """The router's inputs [..., 4] from facts [..., 3] and a requirement that broadcasts to [...]."""
    position, score, rank = facts.unbind(-1)
    return torch.stack(
        [
            (position + 1.0).log2() / 4.0 - 2.0,
            (score + 2.0**-6).log2() / 2.0,
            4.0 * rank - 2.0,
            4.0 * requirement.to(facts.dtype).expand_as(position),
        ],
        dim=-1,
    )


class FTPGate(RoutingGate):
    """FTP's router in front of one block. All blocks of a model hold equal routers and a requirement each.

    Args:
        shape: of the base model.
        kv: ``skip`` stores nothing of a skipped token in the block; ``keep`` (ours) projects and stores its key and value
            from the stream that passes by, so that later tokens still see it.
        form: ``causal`` or ``prompt``, see the module.
    """

    method: ClassVar[str] = "ftp"

    def __init__(self, shape: GateShape, kv: str = "skip", form: str = "causal") -> None:
        super().__init__()
        if kv not in ("skip", "keep"):
            raise ValueError(f"kv must be 'skip' or 'keep', got {kv!r}")
        if form not in ("causal", "prompt"):
            raise ValueError(f"form must be 'causal' or 'prompt', got {form!r}")
        self.shape, self.kv = shape, kv
        self.whole_prompt = form == "prompt"
        self.router = nn.Sequential(nn.Linear(FACTORS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))
        self.sparsity: torch.Tensor
        self.register_buffer("sparsity", torch.zeros(()))

    @property
    def keeps_kv(self) -> bool:
        return self.kv == "keep"

    @property
    def always_runs(self) -> bool:
        return not bool(self.sparsity > 0)

    def requirement(self, strength: float | torch.Tensor) -> torch.Tensor:
        """strength x s_i, at most ``MOST``; of the shape of the strength."""
        return (at_least_float32(self.sparsity) * strength).clamp(max=MOST)

    def logits(self, facts: torch.Tensor, requirement: torch.Tensor) -> torch.Tensor:
        """The router's two outputs (run, skip): facts [..., 3], requirement broadcast to [...]. float32 [..., 2]."""
        hidden: nn.Linear
        out: nn.Linear
        hidden, out = self.router[0], self.router[2]  # type: ignore[assignment]
        x = factors(at_least_float32(facts), requirement)
        x = F.linear(x, hidden.weight.to(x.dtype), hidden.bias.to(x.dtype)).relu()
        return F.linear(x, out.weight.to(x.dtype), out.bias.to(x.dtype))

    def keep(self, facts: torch.Tensor, strength: float) -> torch.Tensor:
        requirement = self.requirement(strength)
        if not requirement > 0.0:
            return torch.ones(facts.shape[:-1], dtype=torch.bool, device=facts.device)
        run, skip = self.logits(facts, requirement).unbind(-1)
        return run >= skip

    def keep_soft(self, facts: torch.Tensor, strength: float | torch.Tensor = 1.0, **soft: Any) -> torch.Tensor:
        """Probability of running at temperature ``soft["tau"]`` (default 1), before any sampling."""
        requirement = self.requirement(strength)
        if not bool((requirement > 0.0).any()):
            return torch.ones(facts.shape[:-1], device=facts.device)
        run, skip = self.logits(facts, requirement).unbind(-1)
        return torch.sigmoid((run - skip) / soft.get("tau", 1.0))

    @classmethod
    def check_states(cls, states: Sequence[dict[str, torch.Tensor]]) -> None:
        for layer, state in enumerate(states):
            for name, tensor in state.items():
                if name.startswith("router.") and not torch.equal(tensor, states[0][name]):
                    raise ValueError(
                        f"the router of block {layer} differs from that of block 0; FTP has one for all blocks"
                    )
            value = float(state["sparsity"])
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"the sparsity of block {layer} is {value:g}, which is no share")
        if states and float(states[0]["sparsity"]) != 0.0:
            raise ValueError("block 0 has a sparsity above 0, but it always runs: there is no attention before it")


def share_router(gates: Sequence[Gate]) -> None:
    """Make all blocks use block 0's router, so that training moves one. Other methods' gates are left alone."""
    for gate in gates:
        if isinstance(gate, FTPGate) and isinstance(gates[0], FTPGate):
            gate.router = gates[0].router


def static_keep(
    tokens: int,
    requirement: torch.Tensor | float,
    device: torch.device | None = None,
    prompt: torch.Tensor | None = None,
) -> torch.Tensor:
    """The static router, without parameters: the first token and the most recent ones, (1 - s) P in all, at least one.

    In causal mode it is a guide for training and for the schedule search only, since it needs to know where the text ends.

    Args:
        tokens: T.
        requirement: s, float or [...].
        prompt: int64 [...], P: what follows is kept. None takes all T tokens.

    Returns:
        bool [..., T].
    """
    s = torch.as_tensor(requirement, dtype=torch.float32, device=device)
    end = torch.tensor(tokens, device=s.device) if prompt is None else prompt
    budget = ((1.0 - s) * end).round().clamp_min(1.0)[..., None]
    position = torch.arange(tokens, device=s.device)
    priority = torch.where(position == 0, 0, end[..., None] - position)
    return priority < budget
