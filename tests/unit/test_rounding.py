"""The soak's judge: a difference that hangs on the last bits is told from one that does not."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mixed_load import draw_tokens
from support import VOCAB, save_gated, tiny_config
from vllm_prune_training.masked import load_gated

from vllm_prune.gates import NEVER
from vllm_prune.gates.base import decision_shift

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from rounding import Judge, Run

TOKENS, PROMPT, STRENGTH = 90, 60, 2.0


@pytest.fixture(scope="module", params=["dcp", "dms"])
def case(request, tmp_path_factory):
    """A checkpoint, its twin, and a run with the drops that the twin finds."""
    params = {"dcp": {"beta": 3.6}, "dms": {"delay": 8}}[request.param]
    folder = save_gated(tmp_path_factory.mktemp(request.param), tiny_config("qwen3", layers=2), request.param, **params)
    twin = load_gated(folder)
    ids = draw_tokens(random.Random(1), TOKENS, VOCAB)
    with torch.no_grad():
        out = twin(torch.tensor(ids), mode="hard", strength=STRENGTH)
    assert out.expiry is not None
    expiry = out.expiry.numpy()
    return folder, twin, out, Run(ids, PROMPT, STRENGTH, np.where(expiry >= TOKENS, NEVER, expiry))


def later(run: Run, layer: int, unit: int, key: int) -> Run:
    """The run as it would be had one key been held to the end."""
    assert run.expiry is not None
    changed = run.expiry.copy()
    changed[layer, unit, key] = NEVER
    return replace(run, expiry=changed)


def test_a_clear_decision_that_fell_otherwise_is_lost(case):
    folder, _, _, run = case
    layer, unit, key = (int(x[0]) for x in np.nonzero(run.expiry < NEVER))
    assert not Judge(folder).rounding(run, later(run, layer, unit, key))
    assert not Judge(folder).rounding(later(run, layer, unit, key), run)


def test_a_decision_on_its_limit_is_rounding(case, monkeypatch):
    """The gate is shifted so that one key's score lies on the limit of its decision, within the last bits."""
    folder, twin, out, run = case
    layer, unit, key = (int(x[-1]) for x in np.nonzero(run.expiry < NEVER))
    query = int(run.expiry[layer, unit, key])
    gate, features = twin.gates[layer], out.features[layer][0]
    if gate.method == "dcp":
        gap = -(gate.scores(features)[unit, query, key] + decision_shift(STRENGTH) * gate.unit)
    else:
        gap = features[key + 1, unit] - decision_shift(STRENGTH) * gate.unit
    judge = Judge(folder)
    shifted = load_gated(folder)
    real = type(gate).expiry
    for at in (0.999999, 1.000001):  # of the gap: just dropped, just kept
        offset = float(gap) * at

        def expiry(self, features, strength, protection, offset=offset):
            if gate.method == "dms":
                return real(self, features - offset, strength, protection)
            with torch.no_grad():
                beta, self.beta.data = self.beta.data, self.beta.data + offset
                try:
                    return real(self, features, strength, protection)
                finally:
                    self.beta.data = beta

        monkeypatch.setattr(type(gate), "expiry", expiry)
        judge.twin = shifted
        assert judge.rounding(run, later(run, layer, unit, key))
        monkeypatch.undo()


def test_tokens_that_tie_are_rounding_and_others_are_not(case, monkeypatch):
    folder, _, out, run = case
    logits = out.logits[TOKENS - 2]
    best = int(logits.argmax())
    alone = replace(run, ids=[*run.ids[:-1], best])
    other = replace(run, ids=[*run.ids[:-1], int(logits.argsort()[-2])])
    gap = float(logits[best] - logits[other.ids[-1]])
    for tie, same in ((gap * 1.01, True), (gap * 0.99, False)):
        monkeypatch.setattr("rounding.TIE", tie)
        assert Judge(folder).rounding(alone, other) is same


def test_what_follows_a_difference_is_not_judged(case):
    """Only the first one is: here a clear one, whatever came of it."""
    folder, _, _, run = case
    query = np.where(run.expiry < NEVER, run.expiry, NEVER)
    layer, unit, key = (int(x) for x in np.unravel_index(query.argmin(), query.shape))
    first = later(run, layer, unit, key)
    assert not Judge(folder).rounding(run, replace(first, ids=[*run.ids[:-1], run.ids[-1] ^ 1]))
    assert not Judge(folder).rounding(replace(run, expiry=None), first), "without a map nothing is excused"
    assert not Judge(None).rounding(run, first)
