"""How many replicas are asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_prune.ray.scaling import KV_USED, RequestsAndFreeKv, wanted_replicas


@pytest.mark.parametrize(
    ("ongoing", "used", "wanted"),
    [
        (0, [], 0),  # Serve's minimum holds
        (20, [0.1, 0.1], 2),  # as many requests as two should have
        (30, [0.1, 0.1], 3),
        (2, [0.4, 0.4], 1),
        (2, [0.8, 0.8], 2),  # just as much free as asked for
        (2, [1.0, 1.0], 2.5),  # few requests, but long ones
        (50, [1.0, 1.0], 5),  # the larger counts
    ],
)
def test_the_larger_of_both_wishes(ongoing: float, used: list[float], wanted: float) -> None:
    assert wanted_replicas(ongoing, 10, used, 0.2) == pytest.approx(wanted)


@given(st.floats(0, 1e4), st.floats(0.5, 100), st.lists(st.floats(0, 1), max_size=8), st.floats(0, 0.99))
def test_so_many_replicas_meet_both_targets(ongoing: float, target: float, used: list[float], free: float) -> None:
    replicas = wanted_replicas(ongoing, target, used, free)
    if replicas > 0:
        assert ongoing / replicas <= target * (1 + 1e-9)
        assert sum(used) / replicas <= (1 - free) * (1 + 1e-9)


def context(current: int = 2, ongoing: float = 0, metrics: Any = None) -> Any:
    config = SimpleNamespace(get_target_ongoing_requests=lambda: 10.0)
    return SimpleNamespace(current_num_replicas=current, target_num_replicas=2, total_num_requests=ongoing,
                           aggregated_metrics=metrics, config=config)  # fmt: skip


def test_as_serve_asks() -> None:
    policy = RequestsAndFreeKv(target_free_kv=0.2)
    assert policy(context(ongoing=30)) == (3.0, {})
    assert policy(context(metrics={KV_USED: {"one": 0.9, "two": 0.7}})) == (pytest.approx(2.0), {})
    assert policy(context(metrics={"other": {"one": 5.0}})) == (0.0, {})
    assert policy(context(current=0)) == (2, {})


def test_serve_knows_what_it_is_given() -> None:
    """The parts of Serve's context and configuration that are read here, in the Ray that is installed."""
    config = pytest.importorskip("ray.serve.config", reason="Ray Serve is an extra")
    policy = config.AutoscalingPolicy(
        policy_function="vllm_prune.ray.scaling:RequestsAndFreeKv", policy_kwargs={"target_free_kv": 0.2}
    )
    real = config.AutoscalingContext(
        deployment_id=None, deployment_name="Engine", app_name="gated", current_num_replicas=1, target_num_replicas=1,
        running_replicas=[], total_num_requests=lambda: 4.0, total_queued_requests=0.0,
        aggregated_metrics=lambda: {KV_USED: {"one": 0.9}}, raw_metrics=None, capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=3, policy_state={}, last_scale_up_time=None, last_scale_down_time=None,
        current_time=None, config=config.AutoscalingConfig(max_replicas=3, target_ongoing_requests=10, policy=policy),
    )  # fmt: skip
    wanted, _ = RequestsAndFreeKv(**policy.policy_kwargs)(real)
    assert wanted == pytest.approx(0.9 / 0.8)
