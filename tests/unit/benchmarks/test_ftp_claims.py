"""What FTP's claims are counted with: FLOPs, blocks taken out, the router of hidden states, the verdicts."""

from __future__ import annotations

import pytest
import torch
from claims_ftp import REMOVED, claims_of, summary, told
from ftp_measure import Judge, computed_flops, falling_at, removed_greedily, without
from ftp_routers import HiddenGate, Router, Stream
from hypothesis import given, settings
from hypothesis import strategies as st
from test_branches import tiny
from vllm_prune_training.acc_profile import layer_flops
from vllm_prune_training.ftp import RouterPass
from vllm_prune_training.ftp_search import Rows
from vllm_prune_training.masked import GatedModel

from vllm_prune.config import DropGateConfig
from vllm_prune.gates import FTPGate
from vllm_prune.gates.ftp import share_router

CONFIG = tiny().config


def gated(kind: type[FTPGate], sparsity: float = 0.5) -> GatedModel:
    model = tiny().requires_grad_(False)
    section = DropGateConfig(method="ftp", num_layers=2, num_kv_heads=2, hidden_size=CONFIG.hidden_size)
    torch.manual_seed(0)
    gates = [kind(section.shape) for _ in range(2)]
    gates[1].sparsity.fill_(sparsity)
    share_router(gates)
    return GatedModel(model, gates, section).eval()  # type: ignore[arg-type]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(0, 99), st.booleans())
def test_flops_pair_by_pair(p: int, seed: int, keeps: bool) -> None:
    ran = torch.rand(3, p, generator=torch.Generator().manual_seed(seed)) < 0.5
    c, size = CONFIG, CONFIG.head_dim
    token = 2 * (c.hidden_size * size * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
                 + 3 * c.hidden_size * c.intermediate_size)  # fmt: skip
    keys = 2 * 2 * c.hidden_size * size * c.num_key_value_heads
    assert layer_flops(c, p)[0] == token

    def flops(rows: torch.Tensor) -> float:
        total = 0.0
        for row in rows.tolist():
            for n in range(p):
                seen = sum(1 for j in range(n + 1) if keeps or row[j])
                total += token + 4 * size * c.num_attention_heads * seen if row[n] else keys * keeps
        return total

    assert computed_flops(ran, c, keeps) == pytest.approx(flops(ran) / flops(torch.ones_like(ran)), rel=1e-6)


@torch.no_grad()
def test_blocks_are_taken_out_whole_and_the_cheapest_first() -> None:
    model = gated(FTPGate)
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    judge = Judge.of(model, Rows(ids, torch.tensor([5, 5])))
    one = {block: judge.measure(model, without({block})) for block in (0, 1)}
    assert all(row["skipped"] == row["flops"] == 0.5 for row in one.values())
    body, removed = tiny().model, 1
    hidden = body.layers[0](
        body.embed_tokens(ids), position_embeddings=body.rotary_emb(ids.float(), torch.arange(12)[None])
    )
    want = tiny().lm_head(body.norm(hidden)).log_softmax(-1)
    log_p = tiny()(ids).logits.log_softmax(-1)
    kl = (log_p.exp() * (log_p - want)).sum(-1)[:, 4:-1].mean()
    assert one[removed]["kl"] == pytest.approx(float(kl), rel=1e-3) and float(kl) > 1e-3
    order = removed_greedily(model, judge, 2)
    assert order == sorted((0, 1), key=lambda block: one[block]["kl"])


@torch.no_grad()
def test_the_hidden_router_reads_what_enters_the_block() -> None:
    model = gated(HiddenGate)
    stream = Stream(model.model)
    router = Router(model, lambda routes: stream.x)
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    want = tiny().model(ids, output_hidden_states=True).hidden_states[1]
    gate = model.gates[1]
    run, skip = gate.logits(want, torch.tensor(0.5)).unbind(-1)  # type: ignore[operator]
    middle = float((run - skip).median())
    out = model(ids, "hard", decide=router.decide(-middle), collect=False)
    torch.testing.assert_close(stream.x, want)
    assert torch.equal(out.runs[1] > 0, run - skip >= middle) and 0.3 < out.runs[1].mean() < 0.7
    plain = gated(FTPGate)
    own = Router(plain, RouterPass.reads).decide()
    torch.testing.assert_close(plain(ids, "hard", decide=own).logits, plain(ids, "hard").logits)


def test_where_a_falling_function_takes_a_value() -> None:
    assert falling_at(lambda x: 1 - x, 0.3, 0.0, 1.0, 30) == pytest.approx(0.7, abs=1e-6)
    assert falling_at(lambda x: float(x < 0.2), 0.3, 0.0, 1.0, 30) == 0.5, "a jump: the nearer side, first found"


def test_claims_compare_only_what_skipped_as_much() -> None:
    targets = ["0.1", *(f"FLOPs of {count} blocks out" for count in REMOVED)]
    names = {name for pair in claims_of(targets).values() for name in pair[:2]}

    def run(kl: float) -> dict[str, dict[str, float]]:
        rows = {name: {"kl": 1.0, "skipped": 0.1, "flops": 0.9, "perplexity": 9.0} for name in names}
        rows["four factors, matched"]["kl"] = kl
        rows["four factors, as trained"].update(kl=0.1, skipped=0.0)
        rows["hidden states, matched"]["kl"] = 0.0 if kl == 0.25 else 1.0
        return rows

    claims = summary({1: run(0.5), 2: run(0.7)}, targets)["claims"]
    met = claims["four factors over hidden states, matched"]
    assert met["met"] and met["kl_ratio"]["mean"] == pytest.approx(0.6) and met["kl_ratio"]["std"] > 0
    assert claims["four factors over hidden states, as trained"]["met"] is None
    assert claims["searched over uniform, 0.1"]["met"] is False
    assert "KL ratio 0.600 +- 0.141, met" in told("x", met)
    lost = summary({1: run(0.25)}, targets)["claims"]["four factors over hidden states, matched"]
    assert lost["met"] is None and "no KL to compare with" in told("x", lost)
