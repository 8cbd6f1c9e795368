"""Eviction map: lifetimes and causes from expiries, the data of the page, what may stand in HTML."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from vllm_prune.demo import maps, plot
from vllm_prune.gates import NEVER


def small(expiry: list, reveal: str = "by_query", pieces: list[str] | None = None) -> maps.EvictionMap:
    array = np.asarray(expiry, np.int64)
    return maps.EvictionMap(pieces or [f"t{i}" for i in range(array.shape[-1])], array, 2, reveal, "title")


def test_lifetime_counts_the_queries_that_saw_the_key():
    data = small([[[1, 3, NEVER, 4]]])
    assert data.lifetime.tolist() == [[[1, 2, 2, 1]]]
    assert data.kept.tolist() == [[[False, False, True, True]]]  # expiry 4 of 4 tokens: no query came to miss it
    seen = sum(int(j <= i < data.expiry[0, 0, j]) for i in range(4) for j in range(4))
    assert data.lifetime.sum() == seen


def test_kept_keys_have_the_longest_shade_wherever_they_stand():
    data = small([[[1, 3, NEVER, NEVER]]])
    assert data.shade.tolist() == [[[1.0, 2.0, 4.0, 4.0]]]


def test_a_key_never_stored_has_no_lifetime_but_a_colour():
    data = small([[[0, NEVER]]], reveal="at_write")
    assert data.lifetime[0, 0, 0] == 0
    assert data.shade[0, 0, 0] == 1.0


def test_mean_shade_is_taken_on_the_log_scale_over_the_units_that_drop():
    data = small([[[1, *[NEVER] * 15]], [[NEVER, 2, *[NEVER] * 14]], [[NEVER] * 16]])
    assert data.dropping.tolist() == [[True], [True], [False]]
    assert data.mean_shade[0] == pytest.approx(4.0)  # between 1 and 16
    assert maps.page_data(data, [])["dropping"] == [0, 1]
    assert small([[[NEVER] * 4]]).dropping.all()


@pytest.mark.parametrize(
    ("reveal", "causes"),
    [
        ("by_query", [2, -1, 3, -1]),
        ("at_boundary", [2, -1, 3, -1]),
        ("delayed", [1, -1, 3, -1]),
        ("at_write", [0, -1, 2, -1]),
    ],
)
def test_the_cause_is_the_token_that_decided(reveal: str, causes: list[int]):
    assert small([[[2, NEVER, 3, 5]]], reveal).causes.tolist() == [[causes]]


def test_layers_average_over_units_and_runs():
    rows = small([[[1, NEVER], [NEVER, NEVER]], [[1, 2], [1, 2]]]).by_layer()
    assert [row["kept"] for row in rows] == [0.75, 0.5]
    assert rows[0]["visible"] == pytest.approx((1.5 + 1) / 3)
    assert rows[1]["lifetime"] == pytest.approx(1.0)


def test_units_are_named_by_head_only_where_heads_decide():
    assert maps.unit_names(2, 1) == ["layer 0", "layer 1"]
    assert maps.unit_names(1, 2) == ["layer 0, head 0", "layer 0, head 1"]


def test_page_data_says_kept_as_minus_one_and_rebuilds_the_expiries():
    data = small([[[1, 3, NEVER, 9]]])
    (life,) = maps.page_data(data, [])["life"]
    assert life == [1, 2, -1, -1]
    assert [j + n if n >= 0 else NEVER for j, n in enumerate(life)] == [1, 3, NEVER, NEVER]


def test_nothing_of_the_text_can_leave_the_data_element():
    evil = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&lt;", "\u2028", "<!--", '"']
    page = maps.render_page(small([[[NEVER] * 6]], pieces=evil), [("<b>", "</div>")])
    assert "alert(1)</script>" not in page and "<img" not in page and "\u2028" not in page and "<!--" not in page
    assert page.count("</script>") == 2
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert json.loads(block)["tokens"] == evil
    assert json.loads(block)["facts"] == [["<b>", "</div>"]]


def test_the_page_loads_nothing():
    page = maps.render_page(small([[[1, NEVER]]]), [])
    assert "http" not in page and "src=" not in page and "@import" not in page and "url(" not in page
    assert "innerHTML" not in page and "document.write" not in page


def test_the_page_of_a_long_run_stays_small():
    tokens, layers = 3200, 8
    rng = np.random.default_rng(0)
    life = np.exp(rng.uniform(0, np.log(tokens), (layers, 1, tokens))).astype(np.int64) + 1
    data = small((np.arange(tokens) + life).tolist(), pieces=[" token"] * tokens)
    assert len(maps.render_page(data, [])) < 250_000


def test_colours_rise_in_equal_steps_of_lightness():
    def lightness(color: str) -> float:
        y = plot.luminance(np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]))
        return 116 * y ** (1 / 3) - 16

    steps = np.diff([lightness(color) for color in maps.STOPS])
    assert np.abs(steps - steps.mean()).max() < 1.5


def test_lines_keep_every_token_and_break_where_the_text_does():
    pieces = ["def f", "(x", "):", "\n    ", "return", "\t1", "\n\n", "", "y" * 12]
    lines = plot.lines_of(pieces, columns=10)
    assert ["".join(part for _, _, part in line) for line in lines] == [
        "def f(x):\u21b5", "    return", "    1\u21b5", "", "y" * 10, "yy",
    ]  # fmt: skip
    assert {token for line in lines for token, _, _ in line} == {0, 1, 2, 3, 4, 5, 6, 8}
    for line in lines:
        ends = [column + len(part) for _, column, part in line]
        assert [column for _, column, _ in line][1:] == ends[:-1]


def test_the_excerpt_begins_with_a_definition():
    lines = plot.lines_of([f"{'def f' if i == 33 else 'x'}\n" for i in range(100)], 80)
    assert plot.excerpt(lines, 20) == (33, 53)
    assert plot.excerpt(lines[:10], 20) == (0, 10)


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    expiry = np.arange(90) + rng.integers(1, 120, (2, 2, 90))
    data = small(expiry.tolist(), pieces=["$x^2$ ", "\n", "<b>"] * 30)
    path = tmp_path / "map.png"
    plot.draw(data, {"with": [(0, 0), (60, 2), (90, 3)], "without": [(0, 0), (60, 4), (90, 6)]}, "sub", path)
    assert path.stat().st_size > 20_000
