"""Prefix caching with 80 % of the keys dropped, against stock vLLM with its own: hits, prefixes held, a load of several turns.

    python benchmarks/prefix.py [--quick] [--json PATH]

Engines of one process take turns on equal pools. ``first_token``: time to the first token of a prompt whose beginning is held,
over that of stock's hit (``hit``) and of the plugin without caching (``cold``). ``prefixes``: how many of many long prompts are
still held after all were served, in a pool in which stock vLLM can hold many of them, and (``prefixes_in_little_room``) in one
for a few, where the dense room that a prompt takes while it is computed is a large part. ``turns``: conversations that each come
back with their whole history and some more; the pool has room for a part of them, so that somebody's history is lost between
turns. ``shared``: many with one system prompt that is new, in ample room; all at once, and one after another
(``shared_one_by_one``), then as chats whose system message that prompt is (``chats_one_by_one``). ``spaced`` is the plugin with
snapshots at chunk borders (``snapshot_spacing``).
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any

from common import Engine, Shape, arguments, frame, publish, say, spread, temporary_models

RANK = 16
KEEP = 0.2
START, END, ROLES = 0, 1, {"system": 3, "user": 4, "assistant": 5}
"""Token ids of the chat template. Prompts are drawn from those above."""
SHAPE = Shape(hidden=512, layers=4, heads=16, kv_heads=4, head_dim=64, mlp=1024, vocab=4096)


def ask(engine: Engine, prompts: list[list[int]], new_tokens: int, tag: str) -> tuple[float, list[Any]]:
    """All prompts at once, greedy: seconds until all have ended, and the outputs in their order."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    for i, ids in enumerate(prompts):
        engine.llm.llm_engine.add_request(f"{tag}{i:04d}", {"prompt_token_ids": ids}, params)
    begin = time.perf_counter()
    found = engine.drain()
    return time.perf_counter() - begin, sorted(found, key=lambda output: output.request_id)


def drawn(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(8, SHAPE.vocab) for _ in range(tokens)]


def save_tokenizer(folder: Any) -> None:
    """A tokenizer of words, w8 and up, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|start|>", "<|end|>", "<|pad|>", *ROLES, *(f"w{i}" for i in range(6, SHAPE.vocab))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w6"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|start|>"]})
    fast.chat_template = (
        "{% for m in messages %}<|start|> {{ m['role'] }} {{ m['content'] }} <|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|> assistant{% endif %}"
    )
    fast.save_pretrained(folder)


def first_token(engines: dict[str, Engine], length: int, rounds: int) -> dict[str, Any]:
    """Seconds to the first token of a prompt of ``length`` tokens, and 16 that are new, by engine."""
    rng = random.Random(1)
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds):
        prefix, tails = drawn(rng, length), [drawn(rng, 16) for _ in range(2)]
        for name, engine in engines.items():
            ask(engine, [prefix + tails[0]], 1, f"w{turn}")
            seconds, (output,) = ask(engine, [prefix + tails[1]], 1, f"f{turn}")
            assert (output.num_cached_tokens >= length - 32) == (name != "plugin_without"), (
                name,
                output.num_cached_tokens,
            )
            times[name].append(seconds)
    hits = [a / b for a, b in zip(times["plugin"], times["stock"], strict=True)]
    cold = [a / b for a, b in zip(times["plugin_without"], times["plugin"], strict=True)]
    return {"prompt": length, "hit_over_stock_hit": statistics.median(hits), "without_over_hit": statistics.median(cold),
            "spread": {"hit_over_stock_hit": spread(hits), "without_over_hit": spread(cold)}, "rounds": rounds}  # fmt: skip


def prefixes(engine: Engine, length: int, count: int) -> dict[str, Any]:
    """Of ``count`` prompts, asked again from the newest, how many are found; then one that was found is not counted twice."""
    rng = random.Random(2)
    prompts = [drawn(rng, length) for _ in range(count)]
    for i, prompt in enumerate(prompts):
        ask(engine, [prompt], 1, f"p{i}")
    found = 0
    for i, prompt in enumerate(reversed(prompts)):
        _, (output,) = ask(engine, [prompt], 1, f"q{i}")
        if output.num_cached_tokens < length // 2:
            break  # from here on older ones were lost, and computing this one anew throws out others
        found += 1
    return {"prompt": length, "asked": count, "held": found}


def both(engines: dict[str, Engine], length: int, count: int) -> dict[str, Any]:
    names = [name for name in engines if name != "plugin_without"]
    found: dict[str, Any] = {name: prefixes(engines[name], length, count) for name in names}
    return {**found, "over_stock": found["plugin"]["held"] / found["stock"]["held"]}


def served(engine: Engine, batches: Iterable[list[list[int]]], answer: int, tag: str) -> dict[str, Any]:
    """One batch of prompts after another: tokens, of these from a cache, and tokens a second."""
    seconds = cached = asked = answered = 0.0
    for turn, batch in enumerate(batches):
        took, outputs = ask(engine, batch, answer, f"{tag}{turn}_")
        seconds += took
        cached += sum(output.num_cached_tokens for output in outputs)
        asked += sum(map(len, batch))
        answered += len(batch) * answer
    return {"prompt_tokens": asked, "cached_tokens": cached, "seconds": seconds,
            "tokens_per_second": (asked + answered) / seconds}  # fmt: skip


def turns(people: int, length: int, said: int, answer: int, rounds: int) -> Iterator[list[list[int]]]:
    """``people`` conversations, all at once in each turn; answers are made up, so that all engines see the same prompts."""
    rng = random.Random(3)
    history = [drawn(rng, length) for _ in range(people)]
    for _ in range(rounds):
        yield history
        history = [ids + drawn(rng, answer + said) for ids in history]


def shared(people: int, length: int, said: int, rounds: int, at_once: bool) -> Iterator[list[list[int]]]:
    """In each round a system prompt that nobody has seen, and ``people`` who come with it, at the same time or one by one."""
    rng = random.Random(4 + at_once)
    for _ in range(rounds):
        system = drawn(rng, length)
        prompts = [system + drawn(rng, said) for _ in range(people)]
        yield from [prompts] if at_once else [[prompt] for prompt in prompts]


def chats(people: int, length: int, said: int, rounds: int) -> Iterator[list[list[int]]]:
    """As ``shared`` one by one, with what the template puts around a system message and a user's."""
    rng = random.Random(6)
    for _ in range(rounds):
        system = [START, ROLES["system"], *drawn(rng, length - 3), END]
        for _ in range(people):
            yield [[*system, START, ROLES["user"], *drawn(rng, said - 5), END, START, ROLES["assistant"]]]


def ours(**of_the_plugin: Any) -> dict[str, Any]:
    return {"additional_config": {"vllm_prune": of_the_plugin}}


def some(folders: Any, blocks: int, longest: int, budget: int, spaced: bool = False) -> dict[str, Engine]:
    """Engines of equal pools. ``spaced``: also one that holds prompts at the borders of its chunks."""
    options = {
        "max_model_len": longest,
        "max_num_seqs": 32,
        "max_num_batched_tokens": budget,
        "skip_tokenizer_init": False,
    }
    unprotected = {"protect": "none"}  # system messages are made to lose as many keys as the rest
    found = {
        "stock": Engine(folders[0], SHAPE, blocks, enable_prefix_caching=True, **options),
        "plugin": Engine(folders[1], SHAPE, blocks, enable_prefix_caching=True, **options, **ours(**unprotected)),
        "plugin_without": Engine(folders[1], SHAPE, blocks, **options, **ours(**unprotected)),
    }
    if spaced:
        held = ours(snapshot_spacing=budget, **unprotected)
        found["plugin_spaced"] = Engine(folders[1], SHAPE, blocks, enable_prefix_caching=True, **options, **held)
    return found


def main() -> None:
    args = arguments("Prefix caching of compressed state against stock vLLM's.")
    started = time.perf_counter()
    length, people, rounds, many = (1024, 6, 4, 12) if args.quick else (2048, 12, 10, 24)
    grown = length // 2 + rounds * 96
    # Stock can hold the histories of half of the conversations.
    blocks, scarce = 3 * length // 32 + 32, people * grown // 2 // 32 + 1
    result: dict[str, Any] = {"benchmark": "prefix"}
    with temporary_models(SHAPE, KEEP, RANK) as folders:
        for folder in folders:
            save_tokenizer(folder)
        engines = some(folders, blocks, length + 64, 512)
        result["first_token"] = first_token(engines, length, 3 if args.quick else 36)
        say(result["first_token"])
        result["prefixes_in_little_room"] = both(engines, length // 2, 4 * blocks * 64 // length)
        say(result["prefixes_in_little_room"])
        for engine in engines.values():
            engine.close()
        engines = some(folders, many * length // 32, length + 128, 512, spaced=True)
        result["prefixes"] = both(engines, length, 5 * many + 5)
        say(result["prefixes"])
        for load, at_once in (("shared", True), ("shared_one_by_one", False)):
            result[load] = {"people": people, "rounds": 3, "system_prompt": length} | {
                name: served(engine, shared(people, length, 64, 3, at_once), 32, load)
                for name, engine in engines.items()
            }
            say(result[load])
        result["chats_one_by_one"] = {"people": people, "rounds": 3, "system_prompt": length} | {
            name: served(engine, chats(people, length, 64, 3), 32, "c") for name, engine in engines.items()
        }
        say(result["chats_one_by_one"])
        for engine in engines.values():
            engine.close()
        engines = some(folders, scarce, grown + 128, 512)
        result["turns"] = {"people": people, "turns": rounds, "first_prompt": length // 2} | {
            name: served(engine, turns(people, length // 2, 64, 32, rounds), 32, "t")
            for name, engine in engines.items()
        }
        say(result["turns"])
        for engine in engines.values():
            engine.close()
    over = {
        f"{load}_{name}_over_stock".replace("_plugin", ""): result[load][name]["tokens_per_second"]
        / result[load]["stock"]["tokens_per_second"]
        for load in ("turns", "shared", "shared_one_by_one", "chats_one_by_one")
        for name in result[load]
        if name.startswith("plugin")
    }
    result = {
        "prefixes_over_stock": result["prefixes"]["over_stock"],
        **over,
        "targets": {"hit_over_stock_hit": 1.1, "prefixes_over_stock": 0.85 / KEEP, "turns_over_stock": 1.0},
        "pool_blocks": {
            "first_token, prefixes_in_little_room": blocks,
            "prefixes": many * length // 32,
            "turns": scarce,
        },
        "gate": {"method": "dcp", "rank": RANK, "target_keep": KEEP, "expected_keep": KEEP},
        **result,
        **frame(args, SHAPE, started),
    }
    say({key: round(result[key], 3) for key in ("prefixes_over_stock", *over)})
    publish(args, result)


if __name__ == "__main__":
    main()
