"""Nothing that runs code is done with what comes from outside: no pickle, no evaluation, no remote code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from vllm_prune_training.recipe_file import _Loader

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for part in ("vllm_prune", "kernels", "training") for path in (ROOT / part).rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "code", "runpy"}
"""Whose loaders, or all of which, run what they read."""
NAMES = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "os.system", "os.popen", "torch.hub.load", "torch.jit.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load",
    "yaml.load_all", "load_dataset", "datasets.load_dataset",
}  # fmt: skip
EXCEPTIONS = {("training/vllm_prune_training/recipe_file.py", "yaml.load"): "its loader is a SafeLoader, see below"}
AUTO = {"from_pretrained", "from_config"}


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of an attribute or name; the last names alone where it hangs on a call."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def constant(call: ast.Call, name: str) -> object:
    """Value of a keyword: None where it is not given, ``...`` where it is no constant."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
    return None


def problems(source: str) -> Iterator[str]:
    """What of a module's source may run what it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES and not node.level:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            last = name.rpartition(".")[2]
            if (isinstance(node.func, ast.Name) and name in NAMES) or name in CALLS:
                yield name
            elif name == "torch.load" and constant(node, "weights_only") is not True:
                yield "torch.load without weights_only=True"
            elif name in ("np.load", "numpy.load") and constant(node, "allow_pickle") not in (None, False):
                yield "numpy.load with pickle"
            elif constant(node, "shell") not in (None, False):
                yield "a shell"
            if constant(node, "trust_remote_code") not in (None, False):
                yield "trust_remote_code"
            elif last in AUTO and "Auto" in name and constant(node, "trust_remote_code") is not False:
                yield f"{name} that may ask whether to run remote code"
            if last == "from_pretrained" and "AutoModel" in name and constant(node, "use_safetensors") is not True:
                yield f"{name} that may read pickles"


def test_no_source_runs_what_it_reads() -> None:
    assert len(SOURCES) > 150
    found = {
        (path.relative_to(ROOT).as_posix(), one)
        for path in SOURCES
        for one in problems(path.read_text(encoding="utf-8"))
    }
    assert found - set(EXCEPTIONS) == set()


def test_the_exceptions_are_needed_and_right() -> None:
    for where, name in EXCEPTIONS:
        assert name in list(problems((ROOT / where).read_text(encoding="utf-8")))
    assert issubclass(_Loader, yaml.SafeLoader)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from cloudpickle import loads", "torch.load(path)", "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)", "np.load(path, allow_pickle=True)", "yaml.load(text, Loader=L)", "eval(text)",
        "exec(text)", "f(trust_remote_code=True)", "f(trust_remote_code=asked)", "subprocess.run(text, shell=True)",
        "AutoConfig.from_pretrained(folder)", "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)",
        "__import__(name)", "os.system(text)",
    ],
)  # fmt: skip
def test_each_would_be_found(source: str) -> None:
    assert list(problems(source))
