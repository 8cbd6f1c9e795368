"""All methods on the reference model, at equal measured KV, through the live engine: quality and speed side by side.

For each gated folder and each share of KV to keep, the strength is fitted on calibration cases. Then the test cases
(``baselines/cases.py``): the context is the prompt; what follows it, a question with its answer or the text's continuation, is
written by force while the gates go on working (``forced.py``). Perplexity is of continuations; an answer is right when each of
its tokens was the model's first choice, as greedy decoding would have it. ``kept`` is what the engine held of all (token,
layer, KV head) at a request's end; ``computed`` the share of (prompt token, layer) pairs that methods which skip computation ran.
ShadowLLM's token form keeps all KV and skips in generated tokens: its budget is the share of their multiplications.
Speed: prefill of one context and decoding of four at a time, against stock vLLM on the base, engines taking turns.

    python benchmarks/methods.py --json benchmarks/results/methods.json DCP=examples/reference-dcp LTP=build/reference/ltp ...

``--beside EARLIER.json`` takes the methods that are not named from an earlier run of the same cases, if the dense base had
the same perplexity and recall there. Runs of other cases can only be drawn together, each over its own dense base:

    python benchmarks/methods.py --draw docs/img/methods.png benchmarks/results/methods.json benchmarks/results/methods-token.json

Beside OUT.json come OUT.md and OUT.png.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import Engine, Shape, environment, origin, say

COLUMNS = ("asked", "strength", "kept", "computed", "perplexity", "ratio", "recall", "prefill", "decode")


@dataclass
class Point:
    """One method at one budget.

    Attributes:
        method, asked, strength: name, share of KV asked for (1: gates open), strength fitted.
        kept: share of keys held at the end of a request, mean over requests.
        computed: share of (prompt token, layer) pairs computed; of the token form, see ``token_form_share``.
        perplexity: of continuations; ratio: to the dense base.
        recall: share of answers right, of ``answers``.
        prefill, decode: speed relative to stock vLLM on the base, medians over rounds; None where not measured.
    """

    method: str
    asked: float
    strength: float
    kept: float
    computed: float
    perplexity: float
    ratio: float
    recall: float
    answers: int
    prefill: float | None = None
    decode: float | None = None


def ungated(folder: Path, where: Path) -> Path:
    """A folder as its base: itself, or links to the files of a gated one with a config that knows no gates."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.pop("drop_gate", None) is None:
        return folder
    for path in folder.resolve().iterdir():
        if path.is_file() and path.name not in ("config.json", "drop_gate.safetensors"):
            (where / path.name).symlink_to(path)
    config["architectures"] = [config["architectures"][0].removeprefix("Pruned")]
    (where / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return where


def token_form_share(folder: Path, strength: float, context: int) -> float:
    """Of a generated token's multiplications in all blocks, what ShadowLLM's token form runs. K and V are always made.

    Args:
        context: tokens that it attends to.
    """
    from vllm_prune.gates.shadow import share_at

    shape = shape_of(folder)
    params = json.loads((folder / "config.json").read_text(encoding="utf-8"))["drop_gate"]["params"]
    skipping = (shape.layers - 1) * shape.kv_heads
    closed = int(share_at(params["closed"], strength) * skipping + 1e-6)
    closed = min(closed, skipping - (shape.layers - 1) * params.get("least", 0))
    shut = int(share_at(params["closed_neurons"], strength) * shape.mlp + 1e-6) * (shape.layers - 1)
    group = 2 * shape.head_dim * shape.heads // shape.kv_heads * (shape.hidden + context)  # Q, output; QK, PV
    neuron = 3 * shape.hidden
    fixed = shape.layers * 2 * shape.hidden * shape.kv_heads * shape.head_dim
    whole = fixed + shape.layers * (shape.kv_heads * group + shape.mlp * neuron)
    return 1.0 - (closed * group + shut * neuron) / whole


def shape_of(folder: Path) -> Shape:
    """The base's shape, from its config."""
    c = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Shape(c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"], c["num_key_value_heads"],
                 c["head_dim"], c["intermediate_size"], c["vocab_size"])  # fmt: skip


class Runner:
    """Engines of one base shape, made and closed one at a time."""

    def __init__(self, tokens: int, blocks: int) -> None:
        self.tokens, self.blocks = tokens, blocks

    def engine(self, folder: Path, shape: Shape, strength: float | None) -> Engine:
        from forced import ForceTokens

        options = {} if strength is None else {"additional_config": {"vllm_prune": {"strength": strength}}}
        return Engine(folder, shape, self.blocks, max_model_len=self.tokens, max_num_seqs=4, dtype="bfloat16",
                      max_num_batched_tokens=self.tokens, logits_processors=[ForceTokens], **options)  # fmt: skip


def method_of(folder: Path) -> str:
    """Name of a gated folder's method."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["drop_gate"]["method"]


def skips(folder: Path) -> bool:
    """Whether the gates of a folder leave out the computation of what they do not keep."""
    from vllm_prune.gates import GATES

    return bool(getattr(GATES[method_of(folder)], "routes", False))


def run_cases(engine: Engine, cases: list[Any], skipping: bool = False) -> dict[str, Any]:
    """Every branch of every case as a request of its own. ``skipping``: what is not kept was not computed either."""
    from forced import forced_params, judged

    branches = [(case, ids, span) for case in cases for ids, span in case.branches()]
    for i, (case, ids, _) in enumerate(branches):
        engine.llm.llm_engine.add_request(f"b{i}", {"prompt_token_ids": case.context}, forced_params(ids))
    nll = tokens = right = answers = 0.0
    kept = []
    for output in engine.drain():
        case, ids, span = branches[int(output.request_id.lstrip("b").split("-")[0])]
        found = judged(output, ids)[span.start : span.stop]
        memory = (output.kv_transfer_params or {}).get("vllm_prune")
        kept.append(1.0 if memory is None else memory["kept_fraction"])
        if case.continuation:
            nll -= sum(logprob for logprob, _ in found)
            tokens += len(found)
        else:
            right += all(first for _, first in found)
            answers += 1
    held = statistics.mean(kept)
    return {"perplexity": math.exp(nll / tokens) if tokens else math.nan, "recall": right / answers if answers else 0.0,
            "answers": int(answers), "kept": held, "computed": held if skipping else 1.0}  # fmt: skip


def fit(runner: Runner, folder: Path, shape: Shape, keep: float, cases: list[Any], steps: int) -> float:
    """A strength that keeps about ``keep`` on the calibration cases; of the token form, that computes it."""
    known: dict[float, float] = {}
    if method_of(folder) == "shadow_token":
        found = [1.02**i for i in range(-150, 150)]
        return min(found, key=lambda strength: abs(token_form_share(folder, strength, len(cases[0].context)) - keep))

    def kept(strength: float) -> float:
        if strength not in known:
            engine = runner.engine(folder, shape, strength)
            known[strength] = run_cases(engine, cases)["kept"]
            engine.close()
        return known[strength]

    low, high = (1 / 16, 1.0) if kept(1.0) <= keep else (1.0, 16.0)
    for _ in range(steps):
        if min(abs(value - keep) for value in known.values()) <= 0.02 * keep:
            break
        middle = math.sqrt(low * high)
        low, high = (middle, high) if kept(middle) > keep else (low, middle)
    return min(known, key=lambda strength: abs(known[strength] - keep))


def speed(stock: Engine, gated: Engine, context: int, rounds: int) -> tuple[float, float]:
    """Speed of prefill (one context) and of decoding (four contexts, 32 tokens) relative to stock, medians of rounds."""
    ratios: dict[str, list[float]] = {"prefill": [], "decode": []}
    for turn in range(rounds + 1):
        taken: dict[str, list[float]] = {"prefill": [], "decode": []}
        for engine in (stock, gated) if turn % 2 else (gated, stock):
            engine.add([context], 1, tag=f"p{turn}-", seed=turn)
            begin = time.perf_counter()
            engine.drain()
            taken["prefill"].append(time.perf_counter() - begin)
            engine.add([context] * 4, 34, tag=f"d{turn}-", seed=turn)
            steps = []
            while engine.llm.llm_engine.has_unfinished_requests():
                steps.append(engine.step()[0])
            taken["decode"].append(sum(steps[-32:]))
        if turn:  # the first warms both up
            for name, (first, second) in taken.items():
                ratios[name].append(first / second if turn % 2 else second / first)
    return statistics.median(ratios["prefill"]), statistics.median(ratios["decode"])


def markdown(points: list[Point]) -> str:
    """A table, by budget, then by recall."""
    lines = ["| method | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for p in sorted(points, key=lambda p: (-p.asked, -p.recall, p.ratio)):
        cells = [getattr(p, name) for name in COLUMNS]
        lines.append(f"| {p.method} | " + " | ".join("" if c is None else f"{c:.3g}" for c in cells) + " |")
    return "\n".join(lines) + "\n"


def plot(points: list[Point], path: Path, title: str) -> None:
    """Perplexity ratio and recall over what is kept, perplexity ratio over what is computed; one colour a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.4))
    for method in dict.fromkeys(p.method for p in points if p.method != "dense"):
        mine = [p for p in points if p.method == method]
        (line,) = left.plot([], [], marker="o", label=method)
        for axes, x, y in ((left, "kept", "ratio"), (middle, "kept", "recall"), (right, "computed", "ratio")):
            if any(getattr(p, x) < 1.0 for p in mine):
                pairs = sorted((getattr(p, x), getattr(p, y)) for p in mine)
                axes.plot(*zip(*pairs, strict=True), marker="o", color=line.get_color())
    for axes in (left, right):
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set_yscale("log")
        axes.set_ylabel("perplexity / dense base (log)")
    middle.axhline(next(p.recall for p in points if p.method == "dense"), color="grey", linewidth=0.8)
    middle.set_ylabel("share of answers right")
    for axes, label in ((left, "share of KV held"), (middle, "share of KV held"), (right, "share computed")):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right center")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0, 0.89, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def earlier(
    path: Path, named: list[str], plan: dict[str, Any], keeps: list[float], dense: Point
) -> tuple[list[Point], dict[str, Any]]:
    """Points of an earlier run for methods that are not ``named``, and where each comes from.

    Raises:
        SystemExit: the earlier run had other cases, budgets, or another base.
    """
    other = json.loads(path.read_text(encoding="utf-8"))
    points = [Point(**p) for p in other["points"]]
    before = next(p for p in points if p.method == "dense")
    told = {"plan": json.loads(json.dumps(plan)), "keeps": keeps}
    differ = [name for name, mine in told.items() if other[name] != mine]
    differ += [name for name in ("perplexity", "recall", "answers") if getattr(before, name) != getattr(dense, name)]
    if differ:
        sys.exit(f"{path} cannot stand beside this run: other {', '.join(differ)}")
    taken = [p for p in points if p.method not in ("dense", *named)]
    source = {name: other[name] for name in ("command", "git_commit", "date", "versions", "machine")}
    return taken, {p.method: other.get("beside", {}).get(p.method, source) for p in taken}


def draw(out: Path, results: list[Path]) -> None:
    """The plot of several results, each over its own dense base; a method comes from the first that has it."""
    points: list[Point] = []
    for path in results:
        found = [Point(**p) for p in json.loads(path.read_text(encoding="utf-8"))["points"]]
        known = {p.method for p in points}
        points += [p for p in found if p.method not in known]
    plot(points, out, "Reference model, live engine")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gated", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--draw", type=Path, help="draw results there; what follows are JSON files")
    parser.add_argument("--base", type=Path, default=Path("examples/reference-dcp"), help="a gated one: its weights")
    parser.add_argument("--corpus", type=Path, default=Path("build/reference/corpus-dcp"))
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--tokens", type=int, default=1024, help="of a context")
    parser.add_argument("--rounds", type=int, default=5, help="of the speed comparison")
    parser.add_argument("--quick", action="store_true", help="few short cases, one budget: shows that it runs")
    parser.add_argument("--beside", type=Path, help="result of an earlier run, for the methods that are not named")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.draw:
        return draw(options.draw, [Path(name) for name in options.gated])
    if options.json is None:
        parser.error("--json is needed")
    environment(options.threads)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
    started = time.perf_counter()
    import torch
    from baselines.cases import CasePlan, make_cases
    from vllm_prune_training.packing import load_corpus

    torch.set_num_threads(options.threads)
    plan = CasePlan(tokens=options.tokens, continuation=96)
    keeps, rounds, steps = options.keeps, options.rounds, 6
    if options.quick:
        plan = CasePlan(tokens=512, texts=2, continuation=32, tasks=1, questions=2, names=("niah_single_1",))
        keeps, rounds, steps = keeps[:1], 1, 2
    folders = [(name, Path(folder)) for name, _, folder in (item.partition("=") for item in options.gated)]
    cases = make_cases(load_corpus(options.corpus, options.base, *(folder for _, folder in folders)), plan)
    test = [case for case in cases if case.split == "test"]
    calibration = [case for case in cases if case.split == "calibration"]
    longest = plan.tokens + 256
    runner, shape = Runner(longest, blocks=4 * longest // 32 + 64), shape_of(options.base)
    links = tempfile.TemporaryDirectory(prefix="vllm-prune-methods-")
    stock = runner.engine(ungated(options.base, Path(links.name)), shape, None)
    dense = run_cases(stock, test)
    points = [Point("dense", 1.0, 0.0, ratio=1.0, **dense)]
    others, beside = [], {}  # type: ignore[var-annotated]
    if options.beside:  # before anything is measured that could be lost
        others, beside = earlier(options.beside, [name for name, _ in folders], plan.__dict__, keeps, points[0])
    failed: dict[str, str] = {}
    for name, folder in folders:
        for keep in keeps:
            try:
                strength = fit(runner, folder, shape, keep, calibration, steps)
                engine = runner.engine(folder, shape, strength)
                found = run_cases(engine, test, skips(folder))
                if method_of(folder) == "shadow_token":
                    found["computed"] = token_form_share(folder, strength, plan.tokens)
                prefill, decode = speed(stock, engine, plan.tokens, rounds)
                engine.close()
            except Exception as error:  # one method must not cost the others their numbers
                failed[f"{name}@{keep:g}"] = f"{type(error).__name__}: {error}"
                say(name, keep, failed[f"{name}@{keep:g}"])
                continue
            points.append(Point(name, keep, strength, ratio=found["perplexity"] / dense["perplexity"], prefill=prefill,
                                decode=decode, **found))  # fmt: skip
            say(json.dumps(asdict(points[-1])))
    stock.close()
    links.cleanup()
    points += others
    result: dict[str, Any] = {
        "base": str(options.base), "folders": options.gated, "plan": plan.__dict__, "keeps": keeps, "failed": failed,
        "points": [asdict(p) for p in points], "beside": beside, **origin(options.threads, started),
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    options.json.with_suffix(".md").write_text(markdown(points), encoding="utf-8")
    plot(points, options.json.with_suffix(".png"), f"Reference model, contexts of {plan.tokens} tokens, live engine")
    print(markdown(points))
    if failed:
        sys.exit("failed: " + "; ".join(f"{key}: {text[:200]}" for key, text in failed.items()))


if __name__ == "__main__":
    main()
