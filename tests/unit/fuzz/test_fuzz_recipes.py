"""Any text as a training recipe: a checked recipe, or all that is wrong with it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzz import TEXTS, damaged, examples, json_values, refused_or_fine
from hypothesis import example, given
from hypothesis import strategies as st
from vllm_prune_training.recipe import Recipe
from vllm_prune_training.recipe_file import differences, override, parse_recipe, parse_yaml, read_recipe
from vllm_prune_training.shadow.recipe import ShadowRecipe

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "examples/recipes").glob("*.yaml"))}
PARTS = [Recipe, ShadowRecipe]


def names_of(data: Any) -> set[str]:
    found: set[str] = set()
    if isinstance(data, dict):
        for name, value in data.items():
            found |= {str(name), *names_of(value)}
    elif isinstance(data, list):
        found |= set().union(*map(names_of, data)) if data else set()
    return found


NAMES = st.one_of(st.sampled_from(sorted(set().union(*map(names_of, EXAMPLES.values())))), TEXTS)


@examples(100)
@given(st.data())
def test_any_damage_to_an_example(data: st.DataObject) -> None:
    plain = data.draw(damaged(data.draw(st.sampled_from([*EXAMPLES.values()])), NAMES))
    with refused_or_fine("recipe.yaml"):
        recipe = parse_recipe(plain, "recipe.yaml")
        assert isinstance(recipe, Recipe | ShadowRecipe)
        again = json.loads(json.dumps(recipe.model_dump(by_alias=True, exclude_unset=True)))
        assert parse_recipe(again, "recipe.yaml") == recipe, "what a run writes down is what it was told"
        if isinstance(recipe, Recipe):
            assert differences(recipe.same_run(), parse_recipe(again, "recipe.yaml").same_run()) == []
            assert sum(recipe.objective.weights(recipe.gate.method).values()) > 0
        assert recipe.work_folder and "\0" not in recipe.work_folder + str(recipe.output)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi")
)
TRAPS = {
    "list as key": "? [a, b]\n: 1\n",
    "object as key": "? {a: b}\n: 1\n",
    "no date": "work: 2024-99-99\n",
    "no time": "work: 2024-01-01 99:99:99\n",
    "hex of nothing": "work: 0x_\n",
    "octal": "work: 09\n",
    "no integer": "work: !!int foo\n",
    "no float": "work: !!float foo\n",
    "no bool": "work: !!bool foo\n",
    "no timestamp": "work: !!timestamp foo\n",
    "python": "work: !!python/object/apply:os.system [true]\n",
    "python name": "work: !!python/name:os.system\n",
    "deep": "[" * 1000,
    "deep blocks": "".join(f"{' ' * i}- \n" for i in range(2000)),
    "digits": f"work: {'9' * 5000}\n",
    "binary": "work: !!binary é\n",
    "bomb": BOMB,
    "bomb in model": BOMB + "model: *i\noutput: *i\ngate: *i\n",
    "recursive": "model: &a [*a]\n",
    "recursive object": "gate: &a {method: *a}\nmodel: m\n",
    "merge": "a: &a {x: 1}\nb: {<<: *a}\n",
    "merge of nothing": "b: {<<: 3}\n",
    "value": "=: 1\n",
    "null byte": 'model: "a\\0b"\n',
    "surrogate": 'model: "\\ud800"\n',
    "tab": "a:\n\t- b\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "alias of nothing": "a: *b\n",
    "set": "model: !!set {a, b}\n",
    "pairs": "model: !!pairs [a: b]\n",
    "omap": "model: !!omap [a: b]\n",
    "sexagesimal": "work: 1:99:99\n",
    "long key": f"{'k' * 5000}: 1\n",
    "many": "".join(f"k{i}: 1\n" for i in range(3000)),
}


@pytest.mark.parametrize("case", TRAPS)
def test_traps_of_yaml(case: str, tmp_path: Path) -> None:
    """None makes a recipe, none is run, and none takes longer or more memory than reading the text."""
    path = tmp_path / "recipe.yaml"
    path.write_text(TRAPS[case], encoding="utf-8")
    with refused_or_fine("recipe.yaml"):
        read_recipe(path)
        pytest.fail("it was taken for a recipe")


BITS = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["model", "gate", ": ", "- ", "[", "]", "{", "}", "&a ", "*a", "!!int ", "!", "? ", "\n", "  ", "'", '"',
                     "|", ">", "0x", "2024-01-01", "1e5", "<<", "#",
                     "%YAML 9.9", "---", "...", "\0", "\ufeff", ",", "null", "~", "\t"]),
)  # fmt: skip
SOUP = st.lists(BITS, max_size=30).map("".join)


@examples(400)
@given(SOUP)
@example("%YAML 1.1\n---\n? ? a\n")
def test_any_text(text: str) -> None:
    with refused_or_fine("recipe.yaml"):
        parse_recipe(parse_yaml(text, "recipe.yaml"), "recipe.yaml")


@examples(200)
@given(st.one_of(st.builds("{}={}".format, st.lists(NAMES, max_size=4).map(".".join), SOUP), TEXTS))
def test_any_override(item: str) -> None:
    plain = json.loads(json.dumps(EXAMPLES["dcp-tiny"]))
    with refused_or_fine("--set", "recipe.yaml"):
        override(plain, item)
        parse_recipe(plain, "recipe.yaml")


@examples(100)
@given(json_values(NAMES))
def test_any_value(value: Any) -> None:
    with refused_or_fine("recipe.yaml"):
        parse_recipe(value, "recipe.yaml")
