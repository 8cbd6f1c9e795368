"""FTP's gate by itself: strength, protection, the soft twin, the static router, what must go together."""

from __future__ import annotations

import pytest
import torch

from vllm_prune.gates import NEVER, FTPGate, GateShape, Protection, expiry_mask
from vllm_prune.gates.ftp import MOST, share_router, static_keep

SHAPE = GateShape(16, 2, 3)


def gate(seed: int = 0, sparsity: float = 0.5, **params: str) -> FTPGate:
    torch.manual_seed(seed)
    made = FTPGate(SHAPE, **params)
    with torch.no_grad():
        for weight in made.router.parameters():
            weight.normal_(std=2.0)
        made.sparsity.fill_(sparsity)
        run, skip = made.logits(facts(300, 9), torch.tensor(sparsity)).unbind(-1)
        made.router[2].bias[0] += (skip - run).median()  # type: ignore[operator]
    return made


def facts(t: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.arange(t).float(), torch.rand(t, generator=g) * 3, torch.rand(t, generator=g)], dim=-1)


def test_a_skipped_token_is_never_stored_and_others_never_expire():
    made, x = gate(), facts(80)
    kept = made.keep(x, 1.0)
    assert 0.1 < kept.float().mean() < 0.9
    expiry = made.expiry(x, 1.0, Protection())
    assert expiry.shape == (1, 80)
    assert torch.equal(expiry[0], torch.where(kept, NEVER, torch.arange(80)))
    assert torch.equal(expiry_mask(expiry)[0].any(0), kept)


def test_kept_kv_never_expires():
    assert (gate(kv="keep").expiry(facts(40), 1.0, Protection()) == NEVER).all()


@pytest.mark.parametrize("strength,sparsity", [(0.0, 0.5), (1.0, 0.0), (16.0, 0.0)])
def test_nothing_is_skipped_where_nothing_is_asked_for(strength, sparsity):
    made = gate(sparsity=0.5)
    made.sparsity.fill_(sparsity)
    assert made.keep(facts(50), strength).all()
    assert made.always_runs == (sparsity == 0.0)
    assert (made.keep_soft(facts(50), strength) == 1.0).all()


def test_strength_scales_the_requirement_up_to_a_limit():
    made = gate(sparsity=0.4)
    assert made.requirement(0.5) == pytest.approx(0.2) and made.requirement(16.0) == pytest.approx(MOST)
    assert not torch.equal(made.keep(facts(300), 1.0), made.keep(facts(300), 2.0))


def test_protected_tokens_run_and_a_window_is_refused():
    made, x = gate(), facts(80)
    assert made.runs_on(x, 1.0, Protection(sinks=9))[:9].all()
    assert torch.equal(made.runs_on(x, 1.0, Protection(sinks=9))[9:], made.keep(x, 1.0)[9:])
    with pytest.raises(ValueError, match="window"):
        made.runs_on(x, 1.0, Protection(window=1))


def test_in_prompt_mode_the_end_of_the_prompt_and_all_after_it_run():
    made, x = gate(form="prompt"), facts(80)
    for protection, exempt in ((Protection(), [59]), (Protection(sinks=3, window=4), [0, 1, 2, *range(55, 60)])):
        runs = made.runs_on(x, 1.0, protection, 60)
        assert runs[exempt].all() and runs[60:].all()
        rest = [j for j in range(60) if j not in exempt]
        assert torch.equal(runs[rest], made.keep(x, 1.0)[rest]) and not runs[rest].all()
    both = made.runs_on(torch.stack([x, x]), 1.0, Protection(), torch.tensor([[60], [7]]))
    assert torch.equal(both[0], made.runs_on(x, 1.0, Protection(), 60)) and both[1, 6:].all()
    assert made.expiry(x, 1.0, Protection())[0, -1] == NEVER, "the definition takes a sequence as a prompt"
    with pytest.raises(ValueError, match="need its length"):
        made.runs_on(x, 1.0, Protection())
    with pytest.raises(ValueError, match="'causal' or 'prompt'"):
        FTPGate(SHAPE, form="whole")


def test_the_soft_twin_becomes_the_decision_and_its_visibility_falls():
    made, x = gate(), facts(60)
    hard = made.keep(x, 1.0).float()
    assert torch.equal((made.keep_soft(x, tau=1e-6) > 0.5).float(), hard)
    log_v = made.log_visibility(x[None], tau=0.7)
    past = torch.ones(60, 60, dtype=torch.bool).tril(-1)
    assert log_v.shape == (1, 1, 60, 60) and (log_v <= 0).all()
    assert (log_v[0, 0][~past] == 0).all()
    sharp = made.log_visibility(x[None], tau=1e-7)[0, 0].exp().detach()
    visible = expiry_mask(made.expiry(x, 1.0, Protection()))[0]
    assert torch.equal(sharp[past].round(), visible[past].float())  # the rows of skipped tokens do not exist


def test_a_decision_knows_nothing_of_later_tokens():
    made, x = gate(), facts(60)
    changed = x.clone()
    changed[30:, 1:] += 0.3
    assert torch.equal(made.keep(x, 1.0)[:30], made.keep(changed, 1.0)[:30])
    assert torch.equal(made.keep(x[:17], 1.0), made.keep(x, 1.0)[:17])


@pytest.mark.parametrize(
    "tokens,share,want", [(5, 0.4, [1, 0, 0, 1, 1]), (4, 0.0, [1, 1, 1, 1]), (6, 0.95, [1, 0, 0, 0, 0, 0])]
)
def test_static_router_keeps_the_first_and_the_latest(tokens, share, want):
    assert static_keep(tokens, share).int().tolist() == want
    both = static_keep(tokens, torch.tensor([share, 0.0]))
    assert both.shape == (2, tokens) and both[0].int().tolist() == want and both[1].all()
    cut = static_keep(tokens + 3, torch.tensor([share, share]), prompt=torch.tensor([tokens, tokens + 3]))
    assert cut[0].int().tolist() == [*want, 1, 1, 1] and torch.equal(cut[1], static_keep(tokens + 3, share))


def test_one_router_for_all_blocks():
    gates = [gate(0, 0.0), gate(1), gate(2)]
    with pytest.raises(ValueError, match="one for all blocks"):
        FTPGate.check_states([g.state_dict() for g in gates])
    share_router(gates)
    assert len({id(p) for g in gates for p in g.parameters()}) == 4
    FTPGate.check_states([g.state_dict() for g in gates])
