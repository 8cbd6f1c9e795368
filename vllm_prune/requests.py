"""What one request may ask of the gates: fields ``prune.*`` of ``vllm_xargs`` (OpenAI API) or ``SamplingParams.extra_args``.

Read twice with the same result: in the front end, where a bad value gets its request refused before it is queued
(``models/request_check.py``), and in the engine core, which tells the worker (``connector.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_prune.config import MAX_STRENGTH, DropGateConfig
from vllm_prune.errors import PruneError, short
from vllm_prune.gates import GATES, by_token
from vllm_prune.protect import Protect, parse_protect

PREFIX = "prune."
STRENGTH, KEEP, OFF = "prune.strength", "prune.keep", "prune.off"
PROTECT, MAP = "prune.protect", "prune.map"
FIELDS = (STRENGTH, KEEP, OFF, PROTECT, MAP)


class BadField(PruneError):
    """A request's field has a wrong value. ``field``: its name."""

    def __init__(self, field: str, problem: str, way_out: str) -> None:
        super().__init__(f"{field} {problem}", way_out)
        self.field = field

    def __reduce__(self) -> tuple[type[BadField], tuple[str, str, str]]:  # type: ignore[override]
        return type(self), (self.field, self.problem.removeprefix(self.field + " "), self.way_out)


@dataclass(frozen=True)
class RequestGates:
    """How the gates treat one request.

    Attributes:
        strength: 0 opens every gate, 1 is as trained.
        expected_keep: kept fraction that admission plans with.
        protect: what of the prompt is never dropped; None where the request does not say.
        map: its answer says how long each key was seen (``lifetimes.py``).
    """

    strength: float
    expected_keep: float
    protect: Protect | None = None
    map: bool = False


def request_gates(
    asked: Mapping[str, Any] | None,
    section: DropGateConfig,
    floor: float = 0.0,
    maps: bool = False,
    tokens: int | None = None,
) -> RequestGates:
    """What a request gets.

    Args:
        asked: ``extra_args`` of its sampling parameters; other fields than ``prune.*`` are none of ours.
        section: as served.
        floor: kept fraction that no request may go below by its own wish; 0 allows everything. What the server itself was
            started with is never refused.
        maps: requests may ask for their maps: these take memory, and say something about the prompt.
        tokens: that the request has at most, prompt and answer: what a strength keeps depends on it. None where it is not
            known yet: whether a field can be met does not depend on it.

    Raises:
        BadField: an unknown field, a bad value, or two fields that exclude each other.
    """
    fields = {name: value for name, value in (asked or {}).items() if name.startswith(PREFIX)}
    for name in fields:
        if name not in FIELDS:
            raise BadField(name, "is unknown.", f"Known: {', '.join(FIELDS)}.")
    off = _flag(fields, OFF, "true opens every gate for the request.")
    mapped = _flag(fields, MAP, "true adds each key's lifetime to the answer.")
    if mapped and not maps:
        option = """--additional-config '{"vllm_prune": {"maps": true}}'"""
        raise BadField(MAP, "is switched off on this server.", f"Leave it out, or start the server with {option}.")
    wanted = [name for name in (STRENGTH, KEEP) if name in fields] + ([OFF] if off else [])
    if len(wanted) > 1:
        raise BadField(wanted[0], f"and {wanted[1]} exclude each other.", "Give one.")
    protect = _protect(fields[PROTECT], section) if PROTECT in fields else None
    if not wanted:
        return RequestGates(section.strength, section.expected_keep, protect, mapped)
    (field,) = wanted
    found = section.at_strength(0.0 if off else _strength(fields, field, section, tokens), tokens)
    if found.strength > 0.0 and section.strength == 0.0:
        raise BadField(field, "cannot be met: this server was started with every gate open.",
                       "Leave it out, or start the server with a strength above 0.")  # fmt: skip
    if floor and found.strength > section.strength:
        _check_floor(field, found, floor)
    return RequestGates(found.strength, found.expected_keep, protect, mapped)


def _flag(fields: Mapping[str, Any], field: str, meaning: str) -> bool:
    value = fields.get(field, False)
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise BadField(field, f"must be true or false, got {short(value)}.", meaning)
    return bool(value)


def _protect(value: Any, section: DropGateConfig) -> Protect:
    try:
        found = parse_protect(value)
    except ValueError as error:
        raise BadField(PROTECT, str(error), "Correct it.") from None
    if found and not may_protect(section):
        raise BadField(PROTECT, f"is not possible with {section.method} gates.", "Leave it out, or say none.")
    return found


def may_protect(section: DropGateConfig) -> bool:
    """Whether single keys can be kept from the gates of a checkpoint: not where they decide about many at once."""
    gate = GATES[section.method]
    return by_token(gate.reveal, gate.routes)


def _strength(fields: Mapping[str, Any], field: str, section: DropGateConfig, tokens: int | None) -> float:
    value = fields[field]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:  # NaN
        raise BadField(field, f"must be a number, got {short(value)}.", "Correct it.")
    if field == STRENGTH:
        if not 0.0 <= value <= MAX_STRENGTH:
            raise BadField(
                field, f"must lie in 0..{MAX_STRENGTH:g}, got {short(value)}.", "0 opens every gate, 1 is as trained."
            )
        return float(value)
    if not 0.0 < value <= 1.0:
        raise BadField(field, f"must lie in 0..1, above 0, got {short(value)}.", "It is the share of keys to keep.")
    try:
        return section.strength_for(float(value), tokens)
    except PruneError as error:
        raise BadField(field, f"cannot be met: {error.problem}", error.way_out) from None


def _check_floor(field: str, found: DropGateConfig, floor: float) -> None:
    """Of a request that wants more dropped than the server does by itself."""
    if found.calibration is None:
        raise BadField(field, "asks for a greater strength than the server's, whose kept fraction is not known here.",
                       "Ask for less, calibrate the checkpoint, or start the server without a floor.")  # fmt: skip
    if found.expected_keep < floor:
        raise BadField(
            field,
            f"would keep {found.expected_keep:.4g} of the keys, below this server's floor of {floor:g}.",
            "Ask for less.",
        )
