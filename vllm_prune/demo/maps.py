"""The eviction map as numbers: how long each key was visible, which token ended it, and the data of the page.

Letters: L layers, E eviction units a layer (1, or one per KV head), T keys. Query i sees key j iff j <= i < expiry[j],
and the last query is T - 1: a key whose expiry is T or more was *kept to the end*. NumPy only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

STOPS = ("#def5e5", "#8bdab2", "#40b7ad", "#348fa7", "#37659e", "#413d7b", "#2e1e3b")
"""Colours in equal steps of lightness, so that equal steps look equal, with and without colour vision."""

LIGHT = STOPS[:6]
"""From short-lived to kept on a light page: what is forgotten comes close to the paper. A dark page reverses STOPS."""

ACCENT = "#d55e00"
"""Of what is pointed at: far from every stop in hue, and safe for colour-blind eyes."""

NONE = -1


@dataclass(frozen=True)
class EvictionMap:
    """One recorded run.

    Attributes:
        pieces: text of each of the T tokens that became keys.
        expiry: int64 [L, E, T]; anything >= T means kept to the end.
        prompt_tokens: how many of the T are the prompt.
        reveal: value of ``vllm_prune.gates.base.Reveal``: when the method decides.
        title: for the head of picture and page.
    """

    pieces: list[str]
    expiry: np.ndarray
    prompt_tokens: int
    reveal: str
    title: str

    @property
    def tokens(self) -> int:
        return int(self.expiry.shape[-1])

    @property
    def kept(self) -> np.ndarray:
        """bool [L, E, T]: still visible to the last query."""
        return self.expiry >= self.tokens

    @property
    def lifetime(self) -> np.ndarray:
        """int64 [L, E, T]: how many queries saw the key, its own among them."""
        return np.minimum(self.expiry, self.tokens) - np.arange(self.tokens)

    @property
    def shade(self) -> np.ndarray:
        """float64 [L, E, T] in 1..T: what a key's colour says. Its lifetime, and T when it was kept to the end: the
        end of the text cuts a lifetime short, which says nothing about the key."""
        return np.where(self.kept, self.tokens, np.maximum(self.lifetime, 1)).astype(np.float64)

    @property
    def dropping(self) -> np.ndarray:
        """bool [L, E]: units that drop at least 1 % of their keys; all, when none does. A unit that keeps everything
        says nothing about a token, so means leave it out."""
        drops = self.kept.mean(axis=-1) <= 0.99
        return drops if drops.any() else np.ones_like(drops)

    @property
    def mean_shade(self) -> np.ndarray:
        """float64 [T]: over the units that drop, on the log scale of the colours (a geometric mean)."""
        return np.exp(np.log(self.shade[self.dropping]).mean(axis=0))

    @property
    def causes(self) -> np.ndarray:
        """int64 [L, E, T]: position of the token that decided to drop the key, NONE where it was kept.

        By query and at boundaries it is the first query that no longer sees the key; a delayed method decides at the
        next token (and acts later); one that decides at the write decides by the token itself.
        """
        own = np.broadcast_to(np.arange(self.tokens), self.expiry.shape)
        decided = {"delayed": own + 1, "at_write": own}.get(self.reveal, self.expiry)
        return np.where(self.kept, NONE, decided)

    def by_layer(self) -> list[dict[str, float]]:
        """Of each layer: ``kept`` (fraction of keys at the end), ``visible`` (fraction of all key-query pairs that
        were visible, the mean over the run) and ``lifetime`` (mean, in tokens; cut short by the end of the text)."""
        life = self.lifetime.mean(axis=1)
        most = np.arange(self.tokens, 0, -1)
        return [
            {
                "kept": float(self.kept[layer].mean()),
                "visible": float(life[layer].sum() / most.sum()),
                "lifetime": float(life[layer].mean()),
            }
            for layer in range(len(life))
        ]


def unit_names(layers: int, units: int) -> list[str]:
    if units == 1:
        return [f"layer {layer}" for layer in range(layers)]
    return [f"layer {layer}, head {unit}" for layer in range(layers) for unit in range(units)]


def page_data(data: EvictionMap, facts: list[tuple[str, str]]) -> dict[str, Any]:
    """What the page needs, as small as JSON gets it: one number a key and unit.

    Args:
        data: the map.
        facts: short (name, value) pairs for the head of the page.
    """
    layers, units, tokens = data.expiry.shape
    life = np.where(data.kept, NONE, data.lifetime).reshape(layers * units, tokens)
    return {
        "title": data.title,
        "facts": facts,
        "prompt": data.prompt_tokens,
        "reveal": data.reveal,
        "tokens": data.pieces,
        "units": unit_names(layers, units),
        "dropping": np.flatnonzero(data.dropping).tolist(),
        "life": life.tolist(),
        "stops": STOPS,
    }


def embed(value: Any) -> str:
    """JSON that may stand inside an HTML ``script`` element: nothing in it can end the element or open another."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is no text


def render_page(data: EvictionMap, facts: list[tuple[str, str]]) -> str:
    """The whole page: one file that loads nothing. Text of the run reaches it as data only, never as markup."""
    template = files("vllm_prune.demo").joinpath("page.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/", embed(page_data(data, facts)), 1)
