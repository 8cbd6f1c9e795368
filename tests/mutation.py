"""Mutation testing of ``vllm_prune/cache``: small faults are put in, one at a time, and the fast tests must notice.

    python tests/mutation.py --json benchmarks/results/mutation.json [--sample N] [--fast] [--only MODULE]

The faults are cosmic-ray's. Of the replacements that it knows for one place (an operator has a dozen) one is drawn, by a fixed
seed; ``--sample`` draws N of those places a module. vLLM is imported once, and each fault tried in a child of this process, where
an import hook hands out the changed source: the files stay as they are. A test that fails, or takes too long, has noticed.
Survivors are listed, with reasons where there are, in docs/mutation.md.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks"), str(ROOT)]
GRANTS, LEMMAS, MANAGER, ADMISSION, LANES, LANE_OPS, RECEIVED, SNAPSHOTS, PARTINGS, SHARED = (
    f"tests/unit/cache/test_{name}.py"
    for name in (
        "grants",
        "lemmas",
        "manager",
        "admission",
        "lanes",
        "lane_ops",
        "received_lanes",
        "snapshots",
        "partings",
        "shared_pages",
    )
)
LAW3 = "tests/integration/test_law3_state_machine.py::test_pool_and_lanes"
TESTS: dict[str, list[str]] = {
    "manager": [MANAGER, ADMISSION, f"{LAW3}[dcp]"],
    "lanes": [LANES, SHARED, LANE_OPS, RECEIVED, f"{LAW3}[dms]"],
    "grants": [GRANTS, LEMMAS, MANAGER, ADMISSION],
    "promise": [LEMMAS],
    "snapshots": [SNAPSHOTS, MANAGER, f"{LAW3}[dms]"],
    "partings": [PARTINGS, f"{LAW3}[dcp]"],
    "ranks": ["tests/unit/cache/test_ranks.py", LANES],
    "views": [LANES, LANE_OPS],
    "spec": [MANAGER, f"{LAW3}[dcp_kv_head]"],
    "geometry": [GRANTS, LEMMAS, MANAGER],
    "lane_ops": [LANES, SHARED, LANE_OPS, RECEIVED, f"{LAW3}[dcp_kv_head]", f"{LAW3}[dms]"],
}
"""Module of ``vllm_prune/cache`` to the tests that must notice, one file after the other."""
INTERPRETED = {
    "device_store": [
        "tests/unit/kernels/kernel_store.py", "tests/unit/kernels/kernel_ranks.py",
        "tests/integration/device_laws.py::test_law_2", "tests/integration/device_laws.py::test_prefixes",
    ],
}  # fmt: skip
TESTS |= INTERPRETED
"""Modules whose tests run under Triton's interpreter, chosen before Triton is imported: these alone, or each of their faults in
a process from its beginning."""
SLOWER = (ADMISSION, LAW3)
"""Left out with ``--fast``: what lives then may not have lived."""
DESELECT = ("storms", "all_ranks_hear")
"""Too slow, or in processes of their own, which import the files as they are."""
SLOW = (
    "conftest", "hypothesis.stateful", "torch.distributed", "transformers.models.qwen3.modeling_qwen3", "vllm._custom_ops",
    "vllm.engine.arg_utils", "vllm.model_executor.layers.attention.attention", "vllm.model_executor.models.config",
    "vllm.v1.core.sched.async_scheduler", "vllm.v1.structured_output", "vllm.v1.worker.kv_connector_model_runner_mixin",
    "vllm.distributed.kv_transfer.kv_connector.v1.metrics", "vllm.v1.attention.backend", "torch.multiprocessing",
)  # fmt: skip
"""Imported before the first child; ``conftest`` sets the environment."""
LIMIT = 400
"""Seconds that the tests may take without a fault; with one, four times what they took, and half a minute."""
EQUAL = ("ReplaceBinaryOperator_BitOr_", "ReplaceUnaryOperator_Delete_", "AddNot_never")
"""Operators of cosmic-ray that change nothing here: ``|`` stands in annotations alone, which nobody evaluates."""


def faults(path: Path, seed: int) -> list[tuple[str, int, int, str]]:
    """Of a module: operator, occurrence, line and function; one a place and kind, in random order."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast_from_path
    from cosmic_ray.ast.ast_query import ASTQuery

    tree, places = get_ast_from_path(path), {}  # type: ignore[var-annotated]
    for name in plugins.operator_names():
        operator_class = plugins.get_operator(name)
        if operator_class.arguments() or any(equal in name for equal in EQUAL):
            continue
        operator = operator_class()
        spots = [(node, at) for node in ast_nodes(tree) for at, _ in operator.mutation_positions(node)]
        for occurrence, (node, at) in enumerate(spots):
            kind = name.split("_")[0]
            places.setdefault((at, kind), []).append(
                (name, occurrence, at[0], ASTQuery(node).get_definition_name() or "")
            )
    dice = random.Random(seed)
    found = [dice.choice(places[place]) for place in sorted(places)]
    dice.shuffle(found)
    return found


def mutated(path: Path, name: str, occurrence: int) -> str | None:
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    return mutate_code(path.read_text(), plugins.get_operator(name)(), occurrence)  # type: ignore[no-any-return]


class Changed(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Import hook: one module of another source than its file's. Never cached."""

    def __init__(self, fullname: str, path: Path, source: str) -> None:
        super().__init__(fullname, str(path))
        self.source = source.encode()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def get_data(self, path: Any) -> bytes:
        return self.source

    def path_stats(self, path: Any) -> Any:
        raise OSError  # no bytecode is looked for, nor kept


def begun(module: str, path: Path, source: str, fast: bool) -> int:
    """Process id of a child that runs the tests on this source: 0 is its end where none fails."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            if module in INTERPRETED and os.environ.get("TRITON_INTERPRET") != "1":
                place = Path(tempfile.mkstemp(suffix=".py")[1])
                place.write_text(source)
                told = [str(x) for x in (Path(__file__), "--json", place, "--only", module, "--inside")]
                os.execve(sys.executable, [sys.executable, *told], {**os.environ, "TRITON_INTERPRET": "1"})
            sys.meta_path.insert(0, Changed(f"vllm_prune.cache.{module}", path, source))
            code = run_tests(module, fast)
        finally:
            os._exit(code)
    return child


def tried(
    module: str, path: Path, sources: list[str], fast: bool, jobs: int, limit: float
) -> Iterator[tuple[int, str]]:
    """Which of the sources, and ``killed``, ``too long`` or ``survived``, as they end. ``limit``: seconds that each may take."""
    waiting, running = deque(enumerate(sources)), dict[int, tuple[int, float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            index, source = waiting.popleft()
            running[begun(module, path, source, fast)] = (index, time.monotonic() + limit)
        for child, (index, until) in list(running.items()):
            done, status = os.waitpid(child, os.WNOHANG)
            late = not done and time.monotonic() > until
            if late:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            if done or late:
                del running[child]
                yield index, "too long" if late else "killed" if status else "survived"
        time.sleep(0.05)


def run_tests(module: str, fast: bool) -> int:
    import pytest

    wanted = " and ".join(f"not {name}" for name in DESELECT)
    for tests in TESTS[module]:
        if fast and tests.startswith(SLOWER):
            continue
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:warnings", "-k", wanted, tests]))
        if code:
            return code
    return 0


def preload() -> None:
    """All that is slow to import, and nothing of ours."""
    for name in SLOW:
        importlib.import_module(name)
    del sys.modules["conftest"]
    ours = [name for name in sys.modules if name.startswith("vllm_prune")]
    assert not ours, f"imported before they could be changed: {ours}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutation testing of vllm_prune/cache.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sample", type=int, help="places a module; default all")
    parser.add_argument("--only", choices=list(TESTS), action="append", help="modules; default all")
    parser.add_argument("--fast", action="store_true", help="unit tests of the module alone")
    parser.add_argument("--jobs", type=int, default=2, help="faults tried at a time")
    parser.add_argument(
        "--inside", action="store_true", help=argparse.SUPPRESS
    )  # this process tries the source in --json
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.perf_counter()
    os.chdir(ROOT)
    if args.inside:
        source = args.json.read_text()
        args.json.unlink()
        (module,) = args.only
        sys.meta_path.insert(0, Changed(f"vllm_prune.cache.{module}", ROOT / f"vllm_prune/cache/{module}.py", source))
        sys.exit(run_tests(module, args.fast))
    os.environ["VLLM_PRUNE_HISTORIES"] = "3"
    if set(args.only or TESTS) <= set(INTERPRETED):
        os.environ["TRITON_INTERPRET"] = "1"
    preload()
    modules: dict[str, Any] = {}
    for module in args.only or TESTS:
        path = ROOT / "vllm_prune" / "cache" / f"{module}.py"
        begin = time.monotonic()
        if next(tried(module, path, [path.read_text()], args.fast, 1, LIMIT))[1] != "survived":
            raise SystemExit(f"{module}: the tests fail without any fault")
        limit = 30 + 4 * args.jobs * (time.monotonic() - begin)
        every = faults(path, args.seed)
        chosen = [(fault, mutated(path, *fault[:2])) for fault in every[: args.sample]]
        known = [(fault, source) for fault, source in chosen if source is not None]
        outcomes: Counter[str] = Counter()
        survivors = []
        for index, outcome in tried(module, path, [source for _, source in known], args.fast, args.jobs, limit):
            (name, _, line, function), source = known[index]
            outcomes[outcome] += 1
            if outcome == "survived":
                old, new = path.read_text().splitlines(), source.splitlines()
                at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), line - 1)
                change = [old[at].strip(), new[at].strip() if at < len(new) else ""]
                survivors.append({"line": at + 1, "in": function, "operator": name.split("/")[1], "change": change})
                print(module, survivors[-1], file=sys.stderr, flush=True)
        modules[module] = {"places": len(every), "tried": sum(outcomes.values()), **outcomes, "survivors": survivors}
        print(module, dict(outcomes), round(time.perf_counter() - started), file=sys.stderr, flush=True)
        write(args, modules, started)


def write(args: argparse.Namespace, modules: dict[str, Any], started: float) -> None:
    if args.json is None:
        return
    from common import origin

    total = sum(module["tried"] for module in modules.values())
    lived = sum(len(module["survivors"]) for module in modules.values())
    result = {
        "killed_share": round(1 - lived / max(total, 1), 4), "tried": total, "sample": args.sample, "fast": args.fast,
        "seed": args.seed, "modules": modules, **origin(1, started),
    }  # fmt: skip
    args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
