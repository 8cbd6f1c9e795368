"""Drop gates on any Hugging Face decoder, as masks: the naive twin of the server, used to train and to check.

A hook on each layer takes what the gate reads, as a rule the layer's normed input (``reads``), the gate turns it into
features, and an attention function of our own applies what follows from them: a soft bias (training), a hard expiry mask
(what the server does), or nothing but causality.

Dimension letters: B batch, T tokens, L layers, H KV heads, G query heads per KV head, D head size, F features a token,
E eviction units of a layer (1 or H), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm_prune.config import DropGateConfig, parse_drop_gate
from vllm_prune.errors import PruneError
from vllm_prune.gates import NEVER, BoundaryGate, Gate, Reveal, ShadowTokenGate, expiry_mask
from vllm_prune.gates.borrowed import without_borrowed
from vllm_prune.gates.routing import RoutingGate
from vllm_prune.gates.shadow import closed_expiry
from vllm_prune.public_dms import read_gates, recognise

from . import lean
from .attend import attend, attend_masked, past_mean
from .boundaries import Walk
from .export_files import load_model
from .families import attention_modules
from .prompt_pass import PromptPass, start_prompts
from .reads import watch
from .routed import Decide, RoutedLayers, Routes
from .shadow.twin import TokenTwin

ATTENTION = "vllm_prune_masked"
Mode = Literal["soft", "hard", "open"]
Visibility = Literal["lean", "naive"]
Perturb = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class GatedOutput:
    """What ``GatedModel.forward`` returns; the lists have one entry a layer.

    Attributes:
        logits: [B, T, V] ([T, V] for unbatched input).
        hidden: [B, T, D_model], output of the final norm.
        features: [B, T, F] a layer, as scored (soft and hard mode).
        log_visibility: float32 [B, E, T, T] a layer (soft mode, naive visibility, where collected).
        kept: float32 scalar a layer (soft mode; gates at boundaries: hard mode too): mean visibility over past pairs, j < n.
            Of whole prompts, soft and hard: mean survival of the prompts' tokens.
        expiry: int64 [B, L, E, T], or [L, E, T] for unbatched input (hard mode).
        runs: float32 [B, T] a layer (routing gates): 1 where the layer ran on the token, else 0.
        prompts: the state after the pass of gates that decide about whole prompts.
    """

    logits: torch.Tensor
    hidden: torch.Tensor
    features: list[torch.Tensor] = field(default_factory=list)
    log_visibility: list[torch.Tensor] = field(default_factory=list)
    kept: list[torch.Tensor] = field(default_factory=list)
    expiry: torch.Tensor | None = None
    runs: list[torch.Tensor] = field(default_factory=list)
    prompts: PromptPass | None = None


@dataclass
class _LayerCall:
    """What one layer's hook hands to its attention: at most one of a bias [B, E, T, T], a mask [B, E, T, T], a routed
    attention, the inputs [B, T, F'] of lean attention, which hands back what it kept, and a walk that decides as it
    attends. A watched layer hands back its output ``attended``, [B, T, H * G, D]."""

    bias: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    inputs: torch.Tensor | None = None
    walk: Walk | None = None
    gate: int = 0
    borrows: bool = False
    rows: int = lean.ROWS
    soft: dict[str, Any] = field(default_factory=dict)
    kept: torch.Tensor | None = None
    watched: bool = False
    attended: torch.Tensor | None = None
    routed: Callable[..., torch.Tensor] | None = None

    def clear(self) -> None:
        """Forget the tensors of the last call."""
        self.bias = self.mask = self.inputs = self.kept = self.attended = self.routed = self.walk = None


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of gated models, in the interface of ``ALL_ATTENTION_FUNCTIONS``."""
    call: _LayerCall = module.prune_call  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if call.borrows:
        query = without_borrowed(query.transpose(1, 2), key.shape[1]).transpose(1, 2)
    if call.routed is not None:
        return call.routed(query, key, value, scale), None
    if call.inputs is not None or call.walk is not None:
        dtype = value.dtype
        if torch.is_autocast_enabled(query.device.type):
            dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if call.walk is not None:
        return call.walk.attend(query, key, value, scale), None
    if call.inputs is not None:
        out, call.kept = lean.lean_attention(query, key, value, call.inputs, call.gate, scale, call.soft, call.rows)
        return out, None
    if call.bias is not None:
        return attend(query, key, value, scale, call.bias), None
    out = attend_masked(query, key, value, scale, call.mask)
    if call.watched:
        call.attended = out
    return out, None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)


class GatedModel(nn.Module):
    """A causal decoder with one gate a layer.

    Args:
        model: any Hugging Face causal LM that uses the attention interface (``families.attention_modules``).
        gates: one a layer.
        section: strength, protection and dtype are honoured in hard mode.
        visibility: how soft mode applies visibility: ``lean`` in blocks of query rows that are recomputed in the backward
            pass, ``naive`` as a bias [B, E, T, T], which can be collected.
        rows: query rows of a block of lean visibility.
        cache_dtype: features are rounded to it before they are scored, as the server's KV cache does; default is
            the model's own dtype.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        gates: Sequence[Gate],
        section: DropGateConfig,
        cache_dtype: torch.dtype | None = None,
        visibility: Visibility = "lean",
        rows: int = lean.ROWS,
    ) -> None:
        super().__init__()
        if visibility not in ("lean", "naive") or rows < 1:
            raise ValueError(f"visibility must be 'lean' or 'naive' and rows >= 1, got {visibility!r} and {rows}")
        self.visibility = visibility
        layers = attention_modules(model)
        if not len(layers) == len(gates) == section.num_layers:
            raise ValueError(f"{len(layers)} layers, {len(gates)} gates, section of {section.num_layers} layers")
        self.model, self.gates, self.section = model, nn.ModuleList(gates), section
        self.cache_dtype = cache_dtype or model.dtype
        self.calls = [_LayerCall(gate=lean.register(gate), borrows=gate.borrows, rows=rows) for gate in gates]
        self._mode: Mode = "open"
        self._soft: dict[str, Any] = {}
        self._perturb: Perturb | None = None
        self._strength = section.strength
        self._prompt: int | None = None
        self._per_request = gates[0].reveal is Reveal.PER_REQUEST
        self.token_twin = TokenTwin(model, gates[0]) if isinstance(gates[0], ShadowTokenGate) else None
        self.calls[0].watched = self._per_request
        self._features: list[torch.Tensor] = []
        self._found: list[torch.Tensor] = []
        self._kept: list[torch.Tensor] = []
        self._prompts: PromptPass | None = None
        self._collect = True
        model.set_attn_implementation(ATTENTION)
        self.routed: RoutedLayers | None = None
        if isinstance(gates[0], RoutingGate):
            self.routed = RoutedLayers(model, self.calls, gates[0])
        for index, layer in enumerate(layers):
            object.__setattr__(layer, "prune_call", self.calls[index])
            if self.routed is not None:
                continue
            watch(model, layer, gates[index], self.calls[index].clear, partial(self._take, index))

    @property
    def config(self) -> Any:
        """The base model's configuration."""
        return self.model.config

    def features(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """What the server would score: the gate's output of what it reads, [B, T, D_model] as a rule, in the cache's dtype."""
        gate = self.gates[layer]
        dtype = next(gate.parameters(), x).dtype  # a window has no parameters
        with torch.autocast(x.device.type, enabled=False):
            return gate(x.to(dtype)).to(self.cache_dtype)

    def _take(self, index: int, x: torch.Tensor) -> None:
        if self._mode != "open":
            self._gate(index, x)

    def _gate(self, index: int, x: torch.Tensor) -> None:
        gate, call = self.gates[index], self.calls[index]
        if self._prompts is not None:
            call.routed = partial(self._prompts.attend, index, masked=attend_masked)
            return
        if isinstance(gate, BoundaryGate):
            soft, strength = (self._soft, 1.0) if self._mode == "soft" else ({}, self._strength)
            call.walk = Walk(gate, strength, self.section.protection, soft.get("tau"))
            return
        features = self.features(index, x)
        if self._mode == "hard":
            if self._per_request and index > 0 and self._strength > 0.0:
                rows = list(self._closed_expiry(index, features.shape[1]))
            else:
                rows = [gate.expiry(row, self._strength, self.section.protection) for row in features]
            found = torch.stack(rows)  # [B, E, T]
            call.mask = torch.stack([expiry_mask(row) for row in rows])
        else:
            if self._perturb is not None:
                features = self._perturb(features)
            if self.visibility == "lean":
                call.inputs, call.soft = gate.soft_inputs(features), self._soft
                self._features.append(features)
                return
            found = call.bias = gate.log_visibility(features, **self._soft)
            self._kept.append(past_mean(found))
        self._features.append(features)
        if self._collect:
            self._found.append(found)

    def _closed_expiry(self, index: int, tokens: int) -> torch.Tensor:
        """int64 [B, H, T] of a layer under the decisions at the prompt's end."""
        gate, attended, prompt = self.gates[0], self.calls[0].attended, self._prompt
        assert attended is not None and prompt is not None
        if prompt > tokens:
            prompt = tokens  # not over yet: nothing is closed for these queries
        closed = [gate.close(row[prompt - 1].flatten(), self._strength)[index] for row in attended]
        return closed_expiry(torch.stack(closed), prompt, tokens)

    def _decide(self, layer: int, routes: Routes) -> torch.Tensor | None:
        """The gates' own decisions [B, T] (routing gates)."""
        gate: Any = self.gates[layer]
        if gate.always_runs:
            return None
        if self._mode == "hard":
            return gate.keep(routes.facts, self._strength).float()  # type: ignore[no-any-return]
        return gate.keep_soft(routes.facts, **self._soft)  # type: ignore[no-any-return]

    def _routed_output(self, out: GatedOutput, routes: Routes) -> None:
        """Facts, decisions, and what they keep: a skipped token's key is never stored unless KV is kept."""
        assert self.routed is not None
        out.features, out.runs = routes.seen, [run.detach() for run in routes.kept]
        stored = [torch.ones_like(run) for run in out.runs] if self.routed.keep_kv else out.runs
        out.kept = [routes.stored_share(run) for run in stored]
        if self._mode == "hard" and self._collect:
            position = torch.arange(stored[0].shape[1], device=stored[0].device)
            out.expiry = torch.stack([torch.where(run > 0, NEVER, position) for run in stored], dim=1)[:, :, None]

    def _by_attention(self, name: str) -> list[torch.Tensor]:
        """``kept`` or ``found`` of every layer's call, where attention decides them."""
        given = [getattr(call.walk or call, name, None) for call in self.calls]
        if any(x is None for x in given):
            raise RuntimeError("a layer ran without the attention function of gated models")
        return given  # type: ignore[return-value]

    def forward(
        self,
        input_ids: torch.Tensor,
        mode: Mode = "hard",
        *,
        strength: float | None = None,
        prompt: int | torch.Tensor | None = None,
        perturb: Perturb | None = None,
        collect: bool = True,
        body: Callable[..., Any] | None = None,
        decide: Decide | None = None,
        **soft: Any,
    ) -> GatedOutput:
        """Run whole sequences without a cache.

        Args:
            input_ids: int64 [B, T] or [T].
            mode: soft bias, hard expiry mask, or open (the base model).
            strength: replaces the section's in hard mode.
            prompt: P, tokens of each row's prompt: needed in hard mode by gates that decide at its end, and in soft mode
                too by those that decide about whole prompts, which also take int64 [B]; their logits before position
                P - 1 mean nothing.
            perturb: applied to the features in soft mode (noise).
            collect: whether to return log visibility (large; naive only) or expiries.
            body: replaces the decoder's forward (a compiled one).
            decide: replaces the decisions of routing gates, soft or hard.
            soft: the gate's temperature, e.g. ``alpha=4.0`` or ``tau=0.1``.

        Raises:
            PruneError: gates that decide at the prompt's end are not told where it is, or have no soft form.
        """
        tells = self._per_request or self.token_twin is not None
        if tells and mode == "hard" and (not isinstance(prompt, int) or prompt < 1):
            raise PruneError(
                f"gates of method '{self.section.method}' need the prompt's end, which is not given (prompt={prompt}).",
                "This measurement knows texts without prompts; see docs/methods.md for the method's own.",
            )
        if mode == "soft" and not self.gates[0].softens:
            raise PruneError(f"gates of method '{self.section.method}' have no soft form.", "Use mode hard.")
        self._prompt = prompt if isinstance(prompt, int) else None
        self._mode, self._soft, self._perturb = mode, soft, perturb
        self._strength = self.section.strength if strength is None else strength
        if self.token_twin is not None:
            self.token_twin.prompt = prompt if mode == "hard" else None
            self.token_twin.strength = self._strength
        self._features, self._found, self._kept, self._collect = [], [], [], collect
        batch = input_ids if input_ids.ndim == 2 else input_ids[None]
        lean_again = self.visibility == "lean" and torch.is_grad_enabled()
        self._prompts = None
        if mode != "open":
            self._prompts = start_prompts(list(self.gates), batch, prompt, mode, self._strength,
                                          self.section.protection, soft, lean_again)  # fmt: skip
        routes: Routes | None = None
        if self.routed is not None and mode != "open":
            routes = self.routed.start(batch, decide or self._decide, self.section.protection, prompt)
        try:
            run = self.model.get_decoder() if body is None else body
            hidden = run(input_ids=batch, use_cache=False).last_hidden_state
            out = GatedOutput(self.model.get_output_embeddings()(hidden), hidden, self._features)
            if routes is not None:
                self._routed_output(out, routes)
            elif self._prompts is not None:
                out.prompts, out.kept = self._prompts, self._prompts.kept
                out.expiry = torch.stack(self._prompts.expiry, dim=1) if mode == "hard" and collect else None
            elif mode == "soft":
                out.log_visibility, out.kept = self._found, self._kept or self._by_attention("kept")
            elif mode == "hard":
                out.kept = [call.walk.kept for call in self.calls if call.walk is not None]  # type: ignore[misc]
                out.expiry = torch.stack(self._found or self._by_attention("found"), dim=1) if collect else None
        finally:
            if self.routed is not None:
                self.routed.stop()
            for call in self.calls:
                call.clear()
            self._features, self._found, self._kept = [], [], []
            self._prompts = None
            self._mode = "open"
        if input_ids.ndim == 1:
            out.logits = out.logits[0]
            out.expiry = None if out.expiry is None else out.expiry[0]
            out.runs = [run[0] for run in out.runs]
        return out


def load_gated(folder: str | Path, dtype: str | torch.dtype = "auto", strength: float | None = None) -> GatedModel:
    """Load a gated checkpoint, or a public DMS checkpoint as it is (``public_dms``), with plain Hugging Face classes and our
    gates, ready for evaluation.

    Args:
        folder: of the checkpoint. The class follows from ``model_type``, not from the gated architecture's name.
        dtype: of the base weights; ``auto`` is the checkpoint's.
        strength: replaces the checkpoint's strength.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    recognise(config, str(folder))
    section = parse_drop_gate(config, strength)
    model = load_model(folder, config, dtype)
    states = read_gates(str(folder), section)
    wanted = torch.float32 if section.dtype == "float32" else model.dtype
    gates = []
    for layer, state in enumerate(states):
        gate = section.build_gate().at_layer(layer)
        gate.load_state_dict(state)
        gates.append(gate.to(wanted))
    return GatedModel(model, gates, section).eval()
