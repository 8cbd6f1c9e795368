"""Drop gates: one file a method, and the contract in ``base``. Torch only."""

from vllm_prune.gates.acc import ACCGate
from vllm_prune.gates.acc_prompt import ACCPromptGate
from vllm_prune.gates.base import (
    NEVER,
    Gate,
    GateShape,
    Protection,
    Reads,
    Reveal,
    Scope,
    by_token,
    decision_shift,
    expiry_mask,
    on_gpu,
)
from vllm_prune.gates.boundary import BoundaryGate, BoundaryRule
from vllm_prune.gates.dcp import DCPGate
from vllm_prune.gates.dms import DMSGate
from vllm_prune.gates.ftp import FTPGate
from vllm_prune.gates.ltp import LTPGate
from vllm_prune.gates.ltp_prompt import LTPPromptGate
from vllm_prune.gates.prompt import PromptGate
from vllm_prune.gates.random_drop import RandomGate
from vllm_prune.gates.shadow import ShadowGate
from vllm_prune.gates.shadow_token import ShadowTokenGate
from vllm_prune.gates.window import WindowGate

_METHODS: tuple[type[Gate], ...] = (
    DCPGate, DMSGate, LTPGate, LTPPromptGate, ACCGate, ACCPromptGate, WindowGate, RandomGate, ShadowGate, ShadowTokenGate,
    FTPGate,
)  # fmt: skip

GATES: dict[str, type[Gate]] = {gate.method: gate for gate in _METHODS}
"""Every method by its name in a checkpoint's ``drop_gate`` section."""

__all__ = [
    "GATES",
    "NEVER",
    "ACCGate",
    "ACCPromptGate",
    "BoundaryGate",
    "BoundaryRule",
    "DCPGate",
    "DMSGate",
    "FTPGate",
    "Gate",
    "GateShape",
    "LTPGate",
    "LTPPromptGate",
    "PromptGate",
    "Protection",
    "RandomGate",
    "Reads",
    "Reveal",
    "Scope",
    "ShadowGate",
    "ShadowTokenGate",
    "WindowGate",
    "by_token",
    "decision_shift",
    "expiry_mask",
    "on_gpu",
]
