"""Sections and tables of gated checkpoints, valid and odd, for the tests beside this file."""

from __future__ import annotations

from typing import Any, get_type_hints

from fuzz import NUMBERS, SCALARS, TEXTS, damaged, json_values
from hypothesis import strategies as st

from vllm_prune.calibration import Calibration
from vllm_prune.config import DropGateConfig
from vllm_prune.gates import GATES

BASE = {
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "head_dim": 8,
    "intermediate_size": 48,
}  # fmt: skip
SIZES = {"num_layers": 3, "num_kv_heads": 2, "hidden_size": 32}
PARAMS: dict[str, dict[str, Any]] = {
    "dcp": {"rank": 4, "beta": 2.0, "scope": "kv_head"},
    "dms": {"delay": 8, "eps": 1e-6, "form": "separate", "about": "previous", "per": "head", "scale": 100.0, "offset": 5.0},
    "ltp": {"span": 64, "grid": 32, "theta": 0.1}, "ltp_prompt": {"theta": 0.2},
    "acc": {"grid": 32, "sinks": 4, "window": 32, "least": 0.02}, "acc_prompt": {"least": 0.02}, "window": {"window": 9},
    "random": {"keep": 0.5, "delay": 3, "seed": 1}, "ftp": {"kv": "skip", "form": "causal"},
    "shadow": {"query_heads": 4, "width": 32, "hidden": 4, "closed": 0.3, "least": 1},
    "shadow_token": {"query_heads": 4, "width": 32, "neurons": 48, "hidden": 4, "neuron_hidden": 4, "closed": 0.3,
                     "closed_neurons": 0.3, "least": 0},
}  # fmt: skip
ROW = {"live": 0.5, "ppl": 2.0, "kl": 0.1, "length": 64}
TABLE = {
    "version": 1, "length": 64, "tokens": 640, "data_sha256": "d", "gates_sha256": "g", "dtype": "auto", "max_rise": 0.01,
    "safe_strength": 1.0, "noise": 0.0,
    "rows": [{"strength": x, "kept": kept, **ROW} for x, kept in ((0.0, 1.0), (0.5, 0.7), (2.0, 0.2), (4.0, 0.2))],
}  # fmt: skip


def valid(method: str) -> dict[str, Any]:
    return {
        "format_version": 1, "method": method, "params": PARAMS[method], "strength": 1.0, **SIZES, "expected_keep": 0.5,
        "protect": {"sinks": 0, "window": 0}, "dtype": "auto", "tensors": "file", "provenance": {"made": ["by", 1]},
        "calibration": TABLE,
    }  # fmt: skip


NAMES = st.one_of(
    st.sampled_from(
        [*DropGateConfig.model_fields, *Calibration.model_fields, *TABLE["rows"][0], "sinks", "shape", "self"]
    ),
    st.sampled_from(sorted({name for params in PARAMS.values() for name in params})),
    TEXTS,
)
METHODS = st.sampled_from(sorted(GATES))


@st.composite
def sections(draw: Any) -> Any:
    """Anything at all; a valid one with some damage; or one whose parameters alone are odd, where most checks passed already."""
    method = draw(METHODS)
    kind = draw(st.sampled_from(["any", "damaged", "params", "table"]))
    if kind == "any":
        return draw(st.one_of(json_values(NAMES), st.dictionaries(NAMES, json_values(NAMES), max_size=8)))
    if kind == "damaged":
        return draw(damaged(valid(method), NAMES))
    if kind == "table":
        return {**valid(method), "calibration": draw(damaged(TABLE, NAMES))}
    hints = get_type_hints(GATES[method].__init__)
    odd = st.sampled_from(sorted(set(hints) - {"shape", "return"})) if PARAMS[method] else TEXTS
    values = st.one_of(
        NUMBERS, st.sampled_from(["layer", "kv_head", "query", "stream", "prompt", "keep", "own"]), SCALARS
    )
    changes = draw(st.dictionaries(odd, values, min_size=1, max_size=3))
    return {**valid(method), "params": {**PARAMS[method], **changes}, "calibration": None}


def sized(**more: Any) -> dict[str, Any]:
    return {**valid("dcp"), "calibration": None, **more}
