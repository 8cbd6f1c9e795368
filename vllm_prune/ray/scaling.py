"""How many replicas: Serve's controller asks about once a second. Delays, factors and bounds are Serve's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

KV_USED = "kv_used"
"""Name of a replica's figure: the share of its KV blocks that are in use."""


def wanted_replicas(ongoing: float, target_ongoing: float, used: Iterable[float], target_free: float) -> float:
    """Replicas that would have the load at its targets.

    Each figure is shared out: so many replicas that, if it spread evenly, none would be over its target. The larger counts.

    Args:
        ongoing: requests that run or wait.
        target_ongoing: of them, for a replica.
        used: shares of KV blocks in use, by replica. A replica that has not said anything yet uses none.
        target_free: share of KV blocks that should be free.
    """
    return max(ongoing / target_ongoing, sum(used) / (1.0 - target_free))


class RequestsAndFreeKv:
    """Serve's ``policy_function``: a class, made once in the controller with ``policy_kwargs``."""

    def __init__(self, target_free_kv: float) -> None:
        self.target_free_kv = target_free_kv

    def __call__(self, ctx: Any) -> tuple[float, dict[str, Any]]:
        """The wish and no state. ``ctx``: Serve's ``AutoscalingContext``."""
        if ctx.current_num_replicas == 0:  # all have died: they are being replaced
            return ctx.target_num_replicas, {}
        used = (ctx.aggregated_metrics or {}).get(KV_USED, {}).values()
        return wanted_replicas(ctx.total_num_requests, ctx.config.get_target_ongoing_requests(), used,
                               self.target_free_kv), {}  # fmt: skip
