"""A folder that brings code, or names files that are not its own: no code of it is run, and nobody is asked whether to."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import engine, generate, prompts, save_gated, tiny_config, token_ids
from test_bad_checkpoints import configure
from transformers import AutoConfig
from vllm_prune_training import build, export
from vllm_prune_training.export_files import weight_files
from vllm_prune_training.masked import load_gated
from vllm_prune_training.tokenizer import train_tokenizer

from vllm_prune.chat import find_markers
from vllm_prune.config import SECTION, DropGateConfig, read_config_json
from vllm_prune.demo.main import load_tokenizer
from vllm_prune.errors import PruneError

TRAP = (
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_gated(tmp_path_factory.mktemp("plain"), tiny_config("qwen3", layers=2), "dcp", torch.float32)
    train_tokenizer(["a text of some words"], 320, 512).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*said: Any) -> str:
        raise AssertionError(f"asked: {said}")

    monkeypatch.setattr(builtins, "input", asked)


@pytest.fixture
def armed(plain: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The folder, with modules that leave a marker when they are imported, and the marker's path."""
    folder, marker = tmp_path / "armed", tmp_path / "marker"
    shutil.copytree(plain, folder)
    for kind in ("configuration", "modeling", "tokenization", "conftest", "sitecustomize"):
        (folder / f"{kind}_evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
    edit(folder / "config.json", auto_map={name: f"{kind}_evil.Evil" for name, kind in AUTO.items()})
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]},
    )
    (folder / "chat_template.jinja").write_text(TRAP.replace("MARKER", str(marker)))
    return folder, marker


AUTO = {"AutoConfig": "configuration", "AutoModel": "modeling", "AutoModelForCausalLM": "modeling"}


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_the_trap_works(armed: tuple[Path, Path]) -> None:
    """The control: who trusts the folder runs its code."""
    folder, marker = armed
    edit(folder / "config.json", model_type="evil")
    with pytest.raises((ValueError, AttributeError, TypeError)):
        AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()


def test_served(plain: Path, armed: tuple[Path, Path]) -> None:
    """With its own tokenizer, and the same answers as without the code."""
    folder, marker = armed
    asked = prompts([40], seed=1)
    with engine(folder, skip_tokenizer_init=False) as llm:
        found = token_ids(generate(llm, asked, tokens=6))
        markers = find_markers(llm.get_tokenizer())
    with engine(plain) as llm:
        assert token_ids(generate(llm, asked, tokens=6)) == found
    assert markers is None and not marker.exists()


READERS: dict[str, Callable[[Path], Any]] = {
    "load_gated": load_gated,
    "train": lambda folder: build.base_config(str(folder)),
    "export": lambda folder: export._hf_config(
        folder, DropGateConfig.model_validate(read_config_json(str(folder))[SECTION])
    ),
    "demo": load_tokenizer,
    "serve": configure,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("model_type", ["qwen3", "evil"])
def test_read(armed: tuple[Path, Path], reader: str, model_type: str) -> None:
    """Where nothing but the folder's code knows the model, it is refused."""
    folder, marker = armed
    edit(folder / "config.json", model_type=model_type)
    try:
        READERS[reader](folder)
    except ValueError:  # PruneError, pydantic's and transformers' own are
        assert model_type == "evil"
    else:
        assert model_type == "qwen3" or reader == "demo"
    assert not marker.exists()


# Names of files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "inner/../../outside.safetensors", "..", "", 7]
)
def test_weights_of_another_folder(plain: Path, tmp_path: Path, name: Any) -> None:
    """An index that names a file outside: it is neither loaded nor linked into an export."""
    folder = Path(shutil.copytree(plain, tmp_path / "folder"))
    (folder / "inner").mkdir()
    outside = tmp_path / "outside.safetensors"
    shutil.move(folder / "model.safetensors", outside)
    named = str(outside) if name == "/outside.safetensors" else name
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(outside), named)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for read in (weight_files, load_gated):
        with pytest.raises(PruneError, match="of its index"):
            read(folder)
    if name == "../outside.safetensors":
        with pytest.raises(Exception, match=r"[Ww]eights|find any model"), engine(folder):
            pytest.fail("an engine was started with weights of another folder")


def test_no_field_of_ours_names_a_file(plain: Path, tmp_path: Path) -> None:
    """Gates lie in one file of one name; what a section says of others is refused, or never looked at."""
    folder = Path(shutil.copytree(plain, tmp_path / "folder"))
    section = json.loads((folder / "config.json").read_text())["drop_gate"]
    for field in ("gate_file", "file", "path", "weights"):
        edit(folder / "config.json", drop_gate={**section, field: "../outside.safetensors"})
        with pytest.raises(ValueError, match=rf"drop_gate\.{field}' is invalid"):
            configure(folder)
    for value in ("../outside.safetensors", "file:///etc/passwd"):
        edit(folder / "config.json", drop_gate={**section, "tensors": value})
        with pytest.raises(ValueError, match=r"drop_gate\.tensors' is invalid"):
            configure(folder)
    edit(folder / "config.json", drop_gate={**section, "provenance": {"file": "/nowhere/at/all"}})
    configure(folder)


def test_pickled_weights_are_not_read(plain: Path, tmp_path: Path) -> None:
    folder, marker = Path(shutil.copytree(plain, tmp_path / "folder")), tmp_path / "marker"

    class Evil:
        def __reduce__(self) -> Any:
            return open, (str(marker), "w")

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**tensors, "evil": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(PruneError, match="no weights in safetensors"):
        load_gated(folder)
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    load_gated(folder)
    assert not marker.exists()
