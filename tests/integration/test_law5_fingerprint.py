"""Law 5: the plugin changes nothing of vLLM's. Registering adds its own entries to vLLM's registries, and that is all.

A fresh process (this file run as a script) imports vLLM's modules far and wide, notes every attribute of every module,
class and module-level object of theirs, calls ``register()`` twice, imports all of the plugin, and notes them again.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

import pytest

TOUCHED = """
vllm vllm.config vllm.logger vllm.forward_context vllm.platforms.cpu vllm.engine.arg_utils vllm.entrypoints.llm
vllm.model_executor.models vllm.model_executor.models.config vllm.model_executor.models.registry
vllm.model_executor.models.llama vllm.model_executor.models.qwen3 vllm.model_executor.models.transformers
vllm.model_executor.model_loader vllm.model_executor.layers.attention vllm.model_executor.layers.attention.attention
vllm.utils.torch_utils vllm.plugins vllm._custom_ops
vllm.v1.attention.backend vllm.v1.attention.backends.cpu_attn vllm.v1.attention.backends.registry vllm.v1.attention.selector
vllm.v1.kv_cache_interface vllm.v1.kv_cache_spec_registry vllm.v1.outputs vllm.v1.request vllm.v1.sample.sampler
vllm.v1.core.block_pool vllm.v1.core.kv_cache_manager vllm.v1.core.kv_cache_coordinator vllm.v1.core.kv_cache_utils
vllm.v1.core.single_type_kv_cache_manager vllm.v1.core.sched.scheduler vllm.v1.core.sched.output
vllm.v1.engine.core vllm.v1.engine.llm_engine vllm.v1.engine.async_llm vllm.v1.executor.multiproc_executor
vllm.v1.worker.cpu_worker vllm.v1.worker.cpu_model_runner vllm.v1.worker.gpu_model_runner vllm.v1.worker.gpu_input_batch
vllm.v1.worker.kv_connector_model_runner_mixin vllm.v1.worker.block_table
vllm.distributed.kv_transfer vllm.distributed.kv_transfer.kv_connector.factory
vllm.distributed.kv_transfer.kv_connector.v1.base
""".split()  # noqa: SIM905


class Fingerprint:
    """What a process's vLLM consists of: path to identity. Everything noted is kept alive, so that no id is reused.

    Args:
        open_dicts: dictionaries by path that may gain entries; their entries are compared apart.
    """

    def __init__(self, open_dicts: dict[str, dict[Any, Any]]) -> None:
        self.open_ids = {id(found): path for path, found in open_dicts.items()}
        self.entries = {path: dict(found) for path, found in open_dicts.items()}
        self.alive: list[Any] = []
        self.seen: set[int] = set()
        self.found: dict[str, Any] = {}
        for name, module in list(sys.modules.items()):
            if isinstance(module, types.ModuleType) and name.split(".")[0] == "vllm":
                self._attributes(name, vars(module))

    def _attributes(self, path: str, attributes: Any) -> None:
        for name, value in list(attributes.items()):
            here = f"{path}.{name}"
            self.found[here] = self._note(value)
            if isinstance(value, types.ModuleType) or id(value) in self.seen:
                continue
            self.seen.add(id(value))
            if isinstance(value, type):
                if value.__module__.split(".")[0] == "vllm":
                    self._attributes(here, vars(value))
            elif type(value).__module__.split(".")[0] == "vllm":
                self._attributes(here, getattr(value, "__dict__", {}))

    def _note(self, value: Any) -> Any:
        """Identity, and for functions and containers what they hold."""
        self.alive.append(value)
        if isinstance(value, staticmethod | classmethod):
            return id(value), self._note(value.__func__)
        if isinstance(value, property):
            return id(value), *(self._note(part) for part in (value.fget, value.fset, value.fdel))
        if isinstance(value, types.FunctionType):
            self.alive += [value.__code__, value.__defaults__, value.__kwdefaults__, value.__closure__]
            cells = tuple(id(cell.cell_contents) for cell in value.__closure__ or () if _filled(cell))
            return id(value), hash(value.__code__), *map(id, self.alive[-4:]), cells, sorted(vars(value))
        if id(value) in self.open_ids:
            return id(value)
        if type(value) is dict:
            self.alive += [*value, *value.values()]
            return id(value), [(id(key), id(held)) for key, held in value.items()]
        if type(value) in (list, tuple, set, frozenset):
            self.alive += value
            return id(value), [id(held) for held in value]
        return id(value)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def changes(before: Fingerprint, after: Fingerprint) -> Iterator[str]:
    """Paths that were replaced, removed or changed, or added to a module or class that was there. A module's new
    submodules are no change of it."""
    for path, noted in before.found.items():
        if path not in after.found:
            yield f"removed {path}"
        elif after.found[path] != noted:
            yield f"changed {path}"
    holders = {path.rpartition(".")[0] for path in before.found}
    for path in after.found.keys() - before.found.keys():
        if path.rpartition(".")[0] in holders and path not in sys.modules:
            yield f"added {path}"
    for path, entries in before.entries.items():
        now = after.entries[path]
        yield from (f"entry {key} of {path}" for key, held in entries.items() if now.get(key) != held)


def script() -> None:
    """Prints one JSON object: see the tests."""
    for name in TOUCHED:
        importlib.import_module(name)
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.platforms import current_platform
    from vllm.v1 import kv_cache_spec_registry as specs

    assert current_platform.device_type == "cpu"  # resolves vLLM's lazy platform before anything is noted
    open_dicts = {
        "models": ModelRegistry.models,
        "hooks": MODELS_CONFIG_MAP,
        "specs": specs._REGISTRY_KVCACHESPEC_LIST,
        "roles": specs._REGISTRY_ROLE_MANAGERS,
    }

    def fingerprint() -> Fingerprint:
        return Fingerprint(open_dicts)

    start = fingerprint()
    result: dict[str, Any] = {"noted": len(start.found), "quiet": list(changes(start, fingerprint()))}

    from vllm_prune.plugin import register

    register()
    once = fingerprint()
    result["once"] = list(changes(start, once))
    register()
    twice = fingerprint()
    result["twice"] = list(changes(start, twice))
    result["second_call"] = list(changes(once, twice)) + [
        path for path in open_dicts if once.entries[path] != twice.entries[path]
    ]

    import vllm_prune

    for module in pkgutil.walk_packages(vllm_prune.__path__, "vllm_prune."):
        if not module.name.endswith(("._lanes", "._sparse")):  # libraries for ctypes, not modules
            importlib.import_module(module.name)
    everything = fingerprint()
    result["everything"] = list(changes(twice, everything))
    result["added"] = {
        path: sorted(
            getattr(key, "__name__", key) for key in everything.entries[path] if key not in start.entries[path]
        )
        for path in open_dicts
    }

    # vLLM fills two of its registries on first use: what registering made it fill in, it fills in by itself.
    ours = {key: value for key, value in everything.entries["specs"].items() if key.__module__.startswith("vllm_prune")}
    for path in ("specs", "roles"):
        open_dicts[path].clear()
    specs.KVCacheSpecRegistry._ensure_registered()
    own = fingerprint()
    result["own_specs"] = own.entries["specs"] == {
        key: value for key, value in everything.entries["specs"].items() if key not in ours
    }
    result["own_roles"] = own.entries["roles"] == everything.entries["roles"]
    result["caught"] = {name: list(changes(before, after)) for name, before, after in tampering(fingerprint)}
    print("RESULT" + json.dumps(result))


def tampering(fingerprint: Any) -> Iterator[tuple[str, Fingerprint, Fingerprint]]:
    """That the test can fail: each way to change vLLM, and what is noted before and after."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def method() -> None:
        Scheduler.schedule = lambda self: None  # type: ignore[method-assign]

    def code() -> None:
        kv_cache_utils.get_kv_cache_configs.__code__ = (lambda *args, **kwargs: []).__code__

    def addition() -> None:
        CPUModelRunner.pruned = True  # type: ignore[attr-defined]

    def removal() -> None:
        del FullAttentionManager.find_longest_cache_hit

    def module_name() -> None:
        kv_cache_utils.BlockPool = object  # type: ignore[attr-defined]

    def enum_member() -> None:
        AttentionBackendEnum.CPU_ATTN._value_ = "elsewhere"

    def entry() -> None:
        MODELS_CONFIG_MAP["MambaForCausalLM"] = MODELS_CONFIG_MAP["PrunedQwen3ForCausalLM"]

    for tamper in (method, code, addition, removal, module_name, enum_member, entry):
        before = fingerprint()
        tamper()
        yield tamper.__name__, before, fingerprint()


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """Of the script, run once."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert done.returncode == 0 and lines, done.stderr[-4000:]
    return json.loads(lines[-1].removeprefix("RESULT"))


def test_nothing_changes(result):
    assert result["noted"] > 20_000
    assert result["quiet"] == [], "noting alone must change nothing, or the test is worthless"
    assert result["once"] == []
    assert result["twice"] == []
    assert result["everything"] == []


def test_second_call_adds_nothing(result):
    assert result["second_call"] == []


def test_only_our_entries_are_added(result):
    added = result["added"]
    gated = ["PrunedLlamaForCausalLM", "PrunedQwen3ForCausalLM", "PrunedTransformersForCausalLM"]
    public = ["LlamaForCausalLM", "LlamaModel", "Qwen3ForCausalLM", "Qwen3ForCausalLMDMS", "Qwen3Model"]
    assert added["models"] == [*gated, "Qwen3ForCausalLMDMS"]
    assert added["hooks"] == sorted([*gated, *public, "TransformersForCausalLM", "TransformersEmbeddingModel"])
    assert "PruneSpec" in added["specs"]


def test_registries_hold_what_vllm_puts_there(result):
    """Apart from our spec they are as vLLM fills them by itself."""
    assert result["own_specs"]
    assert result["own_roles"]


def test_tampering_is_caught(result):
    caught = result["caught"]
    assert any(line.startswith("changed") and line.endswith("Scheduler.schedule") for line in caught["method"])
    assert any(line.endswith("get_kv_cache_configs") for line in caught["code"])
    assert any(line.startswith("added") and line.endswith("CPUModelRunner.pruned") for line in caught["addition"])
    assert any(line.startswith("removed") and line.endswith(".find_longest_cache_hit") for line in caught["removal"])
    assert any(line.endswith("kv_cache_utils.BlockPool") for line in caught["module_name"])
    assert caught["enum_member"]
    assert caught["entry"] == ["entry MambaForCausalLM of hooks"]


def test_importing_the_package_is_free():
    """Neither vLLM nor torch: a command line that only prints its help must not wait for them."""
    code = "import sys, vllm_prune; print(sorted({'vllm', 'torch', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_entry_point():
    """The way vLLM finds the plugin is the function tested here, under the one name VLLM_PLUGINS filters by."""
    (found,) = [point for point in entry_points(group="vllm.general_plugins") if point.name == "vllm_prune"]
    assert found.value == "vllm_prune.plugin:register"


if __name__ == "__main__":
    script()
