"""Export: one folder of links, gates and provenance; the base untouched; what does not belong together is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_language as tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner
from vllm_prune_training.calibrate import CalibrateOptions, calibrate
from vllm_prune_training.export import Exported, ExportOptions, export
from vllm_prune_training.masked import load_gated

from vllm_prune.checkpoint import add_gates
from vllm_prune.cli import app
from vllm_prune.config import GATE_FILE, SECTION
from vllm_prune.errors import PruneError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    tiny.save_base(folder / "base")
    tiny.save_base(folder / "sharded", max_shard_size="60KB")
    shutil.copytree(folder / "base", folder / "gated")
    add_gates(folder / "gated", tiny.gates(), {"params": tiny.PARAMS["dcp"], "provenance": {"recipe": "tiny"}})
    (folder / "gated" / "record.json").write_text("{}")
    (folder / "text.py").write_text(tiny.text())
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "models", copy_function=shutil.copyfile))


def run(folder: Path, gates: str | None = "gated", base: str = "base", **more: Any) -> Exported:
    return export(
        ExportOptions(
            **{
                "base": folder / base,
                "out": folder / "out",
                "gates": gates and folder / gates,
                "command": "test",
                **more,
            }
        )
    )


def contents(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Of every file: hash, mode, time of its last change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            stat = path.stat()
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(folder))] = (digest, stat.st_mode, stat.st_mtime_ns)
    return found


def nothing_left(folder: Path) -> bool:
    return not [path for path in folder.iterdir() if path.name.startswith(".")]


@torch.no_grad()
@pytest.mark.parametrize("base", ["base", "sharded"])
def test_linked_and_equal_to_its_twin(folder: Path, base: str) -> None:
    before = contents(folder / base)
    exported = run(folder, base=base)
    weights = sorted(path.name for path in (folder / base).glob("*.safetensors"))
    assert (len(weights) > 2) == (base == "sharded")
    assert exported.placed.linked == weights and not exported.placed.copied
    for name in weights:
        assert (folder / "out" / name).samefile(folder / base / name)
    for name in ("tokenizer.json", "generation_config.json", "config.json"):
        assert not (folder / "out" / name).samefile(folder / base / name)
    ids = torch.randint(3, tiny.VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    twin, served = load_gated(folder / "gated")(ids), load_gated(folder / "out")(ids)
    assert torch.equal(twin.logits, served.logits) and torch.equal(twin.expiry, served.expiry)  # type: ignore[arg-type]
    dense = AutoModelForCausalLM.from_pretrained(folder / base)(ids).logits
    assert not torch.equal(dense, served.logits)
    text = "def f(x):"
    tokenizers = [AutoTokenizer.from_pretrained(folder / name) for name in (base, "out")]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
    assert contents(folder / base) == before and nothing_left(folder)


def test_config_and_provenance(folder: Path) -> None:
    run(folder, strength=0.5)
    config = json.loads((folder / "out" / "config.json").read_text())
    base = json.loads((folder / "base" / "config.json").read_text())
    section = config.pop(SECTION)
    assert config.pop("architectures") == ["PrunedQwen3ForCausalLM"]
    base.pop("architectures")
    assert config == base
    assert section["strength"] == 0.5 and section["expected_keep"] == 1.0  # weaker than trained, not calibrated
    export_, training = section["provenance"]["export"], section["provenance"]["training"]
    assert training == {"recipe": "tiny"} and export_["command"] == "test"
    digest = hashlib.sha256((folder / "base" / "model.safetensors").read_bytes()).hexdigest()
    assert export_["base_weights_sha256"] == {"model.safetensors": digest}
    assert export_["versions"]["torch"] == torch.__version__ and export_["date"].startswith("20")
    assert (folder / "out" / "record.json").exists()
    card = (folder / "out" / "README.md").read_text()
    assert "dcp drop gates" in card and "1 files hard-linked, 0 copied" in card


def test_calibration_travels_with_its_gates_and_not_to_other_weights(folder: Path) -> None:
    table = calibrate(CalibrateOptions(folder / "gated", folder / "text.py", 64, (1.0,), 64))
    assert run(folder).section.calibration == table
    assert load_gated(folder / "out").section.expected_keep == pytest.approx(table.keep_at(1.0))
    weights = load_file(folder / "base" / "model.safetensors")
    first = sorted(weights)[3]
    changed = {name: w * 1.01 if name == first else w for name, w in weights.items()}
    save_file(changed, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PruneError, match=rf"trained on other weights .*'{first}' has other values"):
        run(folder, overwrite=True)
    moved = run(folder, overwrite=True, other_weights=True).section
    assert moved.calibration is None and moved.expected_keep == 1.0
    assert moved.provenance["export"]["trained_on_other_weights"] is True
    assert "trained on other weights" in (folder / "out" / "README.md").read_text()


def test_a_gate_file_alone_says_what_it_is(folder: Path) -> None:
    section = run(folder, gates=f"gated/{GATE_FILE}").section
    assert section.method == "dcp" and section.params == tiny.PARAMS["dcp"]
    with pytest.raises(PruneError, match="the gate file has its own"):
        run(folder, gates=f"gated/{GATE_FILE}", method="dcp", overwrite=True)
    bare = folder / "bare.safetensors"
    save_file(load_file(folder / "gated" / GATE_FILE), bare)
    with pytest.raises(PruneError, match="does not say what its gates are"):
        run(folder, gates=bare.name, overwrite=True)
    told = run(folder, gates=bare.name, method="dcp", params=tiny.PARAMS["dcp"], overwrite=True).section
    assert told.params == section.params
    with pytest.raises(PruneError, match="has shape"):
        run(folder, gates=bare.name, method="dcp", params={"rank": 4}, overwrite=True)


@torch.no_grad()
def test_gates_without_training(folder: Path) -> None:
    exported = run(folder, None, method="window", params={"window": 16}, protect={"sinks": 2})
    expiry = load_gated(folder / "out")(torch.arange(3, 43)).expiry
    assert expiry is not None
    live = (expiry[0, 0] >= 40).nonzero().flatten().tolist()
    assert live[:2] == [0, 1] and 14 <= len(live) - 2 <= 18 and exported.section.protect.sinks == 2
    assert exported.section.provenance["training"] == "none"
    with pytest.raises(PruneError, match="must be trained"):
        run(folder, None, method="dcp", overwrite=True)


def test_a_gated_folder_as_the_base_is_taken_for_its_weights(folder: Path) -> None:
    assert run(folder, base="gated").placed.linked == ["model.safetensors"]
    assert json.loads((folder / "out" / "config.json").read_text())["architectures"] == ["PrunedQwen3ForCausalLM"]


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EPERM])
def test_copies_where_links_cannot_be_made(folder: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "link", refuse)
    placed = run(folder).placed
    assert placed.copied == ["model.safetensors"] and not placed.linked
    assert contents(folder / "out")["model.safetensors"][0] == contents(folder / "base")["model.safetensors"][0]


def test_symbolic_links_of_a_hub_cache(folder: Path) -> None:
    snapshot = folder / "snapshot"
    snapshot.mkdir()
    for path in (folder / "base").iterdir():
        (snapshot / path.name).symlink_to(path)
    run(folder, base="snapshot")
    target = folder / "out" / "model.safetensors"
    assert not target.is_symlink() and target.samefile(folder / "base" / "model.safetensors")


def test_a_disk_that_fills_leaves_the_old_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder)
    before = contents(folder / "out")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("fsync", "link"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, full)
            with pytest.raises(PruneError, match="No space left on device"):
                run(folder, overwrite=True)
        assert contents(folder / "out") == before and nothing_left(folder)
    with monkeypatch.context() as patched:
        rename, calls = os.rename, []

        def second_fails(*args: Any) -> None:
            calls.append(args)
            if len(calls) == 2:
                raise OSError(errno.EIO, "broken")
            rename(*args)

        patched.setattr(os, "rename", second_fails)
        with pytest.raises(PruneError, match="broken"):
            run(folder, overwrite=True)
    assert contents(folder / "out") == before and nothing_left(folder)


def spoil(folder: Path, case: str) -> dict[str, Any]:
    base, gated = folder / "base", folder / "gated"
    config = json.loads((base / "config.json").read_text())
    if case == "out holds something":
        (folder / "out").mkdir()
        (folder / "out" / "mine.txt").write_text("keep")
    elif case == "out is a file":
        (folder / "out").write_text("keep")
        return {"overwrite": True}
    elif case == "out is the base":
        return {"out": base, "overwrite": True}
    elif case == "out holds the base":
        return {"out": folder, "overwrite": True}
    elif case == "out in the gates":
        return {"out": gated / "deep", "overwrite": True}
    elif case == "no base":
        return {"base": folder / "none"}
    elif case == "no gates":
        return {"gates": folder / "none"}
    elif case == "neither":
        return {"gates": None}
    elif case == "other sizes":
        shutil.rmtree(base)
        tiny.save_base(base, layers=3)
        return {"other_weights": True}
    elif case == "gates truncated":
        (gated / GATE_FILE).write_bytes((gated / GATE_FILE).read_bytes()[:-8])
    elif case == "gates gone":
        (gated / GATE_FILE).unlink()
    elif case == "no section":
        (gated / "config.json").write_text(json.dumps(config))
    elif case == "section broken":
        (gated / "config.json").write_text(json.dumps({**config, SECTION: {"method": "dcp", "strength": 99}}))
    elif case == "config broken":
        (base / "config.json").write_text("{")
    elif case == "no weights":
        (base / "model.safetensors").rename(base / "pytorch_model.bin")
    elif case == "shard gone":
        sorted((folder / "sharded").glob("*.safetensors"))[1].unlink()
        return {"base": folder / "sharded"}
    elif case == "weights broken":
        (base / "model.safetensors").write_bytes(b"x" * 100)
    elif case == "strength":
        return {"strength": 17.0}
    elif case == "params of a folder":
        return {"params": {"rank": 8}}
    elif case == "protect of a folder":
        return {"protect": {"sinks": 1}}
    elif case == "stale table":
        calibrate(CalibrateOptions(gated, folder / "text.py", 64, (1.0,), 64))
        save_file(
            {k: v * 2 for k, v in load_file(gated / GATE_FILE).items()}, gated / GATE_FILE, metadata={"format": "pt"}
        )
    return {}


CASES = {
    "out holds something": "exists and is not empty", "out is a file": "exists and is not empty",
    "out is the base": "lie in each other", "out holds the base": "lie in each other",
    "out in the gates": "lie in each other", "no base": "has no config.json", "no gates": "does not exist",
    "neither": "neither --gates nor --method", "other sizes": "num_layers is 2 but the base model has 3",
    "gates truncated": "cannot be read", "gates gone": f"{GATE_FILE} is missing", "no section": "has no 'drop_gate'",
    "section broken": "drop_gate.strength is invalid", "config broken": "cannot be read",
    "no weights": "no weights in safetensors", "shard gone": "lacks the weight file",
    "weights broken": "cannot be read", "strength": r"must lie in 0\.\.16", "params of a folder": "bare gate file",
    "protect of a folder": "--protect", "stale table": "measured with other gates",
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refusals_change_nothing(folder: Path, case: str) -> None:
    options = spoil(folder, case)
    before = contents(folder)
    with pytest.raises(PruneError, match=CASES[case]):
        run(folder, **options)
    assert contents(folder) == before and nothing_left(folder)


def test_command(folder: Path) -> None:
    arguments = ["export", "--base", str(folder / "base"), "--out", str(folder / "out")]
    runner = CliRunner()
    done = runner.invoke(app, [*arguments, "--gates", str(folder / "gated")])
    assert done.exit_code == 0 and "1 weight files linked, dcp gates" in done.output
    again = runner.invoke(app, [*arguments, "--gates", str(folder / "gated")])
    assert again.exit_code == 2 and "--overwrite" in again.output
    wrong = runner.invoke(app, [*arguments, "--method", "window", "--params", "{", "--overwrite"])
    assert wrong.exit_code == 2 and "not JSON" in wrong.output
