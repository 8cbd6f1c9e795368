"""Token memmaps of the corpus and datasets of fixed length T on top of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vllm_prune.errors import PruneError

from . import data, recall, tasks
from .tokenizer import train_tokenizer

Sample = dict[str, torch.Tensor]
FILLER_CHARS = {"train": 6_000_000, "held_out": 1_000_000}
TOKENIZER_CHARS = 40_000_000


@dataclass(frozen=True)
class Corpus:
    """A corpus cache folder: tokenizer, one uint16 token memmap and filler lines per split, record."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    record: dict[str, object]

    def tokens(self, split: str) -> np.memmap:
        """All tokens of ``split`` (``train`` or ``held_out``): uint16 [N]; each file is bos + text + eos."""
        return np.memmap(self.folder / f"{split}.bin", dtype=np.uint16, mode="r")

    def filler(self, split: str) -> list[str]:
        """Lines of real code of ``split``, each with its line break."""
        return (self.folder / f"filler_{split}.txt").read_text(encoding="utf-8").splitlines(keepends=True)


def build_corpus(folder: Path, vocab_size: int = 4096, model: Path | None = None) -> Corpus:
    """Builds the corpus cache in ``folder`` from the installed packages, or loads it when complete.

    Args:
        vocab_size: of the tokenizer that is trained for it.
        model: a model folder whose tokenizer is taken instead.
    """
    if (folder / "corpus.json").exists():
        return load_corpus(folder, *([] if model is None else [model]))
    folder.mkdir(parents=True, exist_ok=True)
    sources = data.find_sources()
    documents = sorted(data.read_documents(sources), key=lambda document: document.sha256)
    record = data.corpus_record(sources, documents)
    splits = {
        "train": [d.text for d in documents if not data.is_held_out(d.sha256)],
        "held_out": [d.text for d in documents if data.is_held_out(d.sha256)],
    }
    if model is None:
        tokenizer = train_tokenizer(_up_to(splits["train"], TOKENIZER_CHARS), vocab_size)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokenizer.save_pretrained(folder / "tokenizer")
    for split, texts in splits.items():
        record[f"{split}_tokens"] = write_tokens(folder / f"{split}.bin", texts, tokenizer)
        filler = "".join(_up_to(texts, FILLER_CHARS[split]))
        (folder / f"filler_{split}.txt").write_text(_plain_lines(filler), encoding="utf-8")
    (folder / "corpus.json").write_text(json.dumps(record, indent=1) + "\n")
    return load_corpus(folder)


def load_corpus(folder: Path, *models: Path) -> Corpus:
    """Loads a corpus cache that ``build_corpus`` wrote.

    Args:
        models: folders of all models that will be given the corpus's tokens.

    Raises:
        PruneError: a model has another tokenizer: the tokens would be noise to it.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    for model in models:
        other = PreTrainedTokenizerFast.from_pretrained(model)
        texts = ["def f(x):\n    return x + 1\n", "The quick brown fox, 0123456789."]
        if other.get_vocab() != tokenizer.get_vocab() or any(other.encode(t) != tokenizer.encode(t) for t in texts):
            raise PruneError(
                f"{model} has another tokenizer than the corpus in {folder}.",
                "Give the corpus that it was trained on, or make one: "
                f"python training/reference/make_corpus.py --corpus NEW --model {model}",
            )
    return Corpus(folder, tokenizer, json.loads((folder / "corpus.json").read_text()))


def _up_to(texts: Sequence[str], chars: int) -> Iterator[str]:
    for text in texts:
        if chars <= 0:
            return
        chars -= len(text)
        yield text


def _plain_lines(text: str) -> str:
    return "".join(line + "\n" for line in text.split("\n") if line.strip() and line.isprintable())


def write_tokens(path: Path, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> int:
    """Writes bos + tokens + eos of each text to a uint16 file; returns the number of tokens."""
    backend = tokenizer.backend_tokenizer
    total = 0
    with path.open("wb") as file:
        for start in range(0, len(texts), 256):
            for encoding in backend.encode_batch(list(texts[start : start + 256]), add_special_tokens=False):
                ids = [tokenizer.bos_token_id, *encoding.ids, tokenizer.eos_token_id]
                file.write(np.asarray(ids, dtype=np.uint16).tobytes())
                total += len(ids)
    return total


def encode_recall(task: recall.Recall, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[range]]:
    """Token ids of bos + task and, for each answer, the range of positions its tokens take."""
    ids, spans = tasks.encode(tokenizer, task.text, [(answer.start, answer.end) for answer in task.answers])
    return [tokenizer.bos_token_id, *ids], [range(span.start + 1, span.stop + 1) for span in spans]


class MixedWindows(Dataset[Sample]):
    """Sequences of length T: windows of code with a share of recall tasks, deterministic by (seed, index).

    ``names``: of the tasks (``tasks.make_sample``); without them, the recall tasks of ``recall.make_recall``.

    Each item: ``input_ids`` int64 [T], starting with bos; ``answer_mask`` bool [T], the tokens of recall
    answers; ``is_recall`` bool [].
    """

    def __init__(
        self,
        corpus: Corpus,
        length: int,
        size: int,
        *,
        split: str = "train",
        seed: int = 0,
        recall_share: float = 0.15,
        chat_share: float = 0.1,
        names: Sequence[str] = (),
    ) -> None:
        self.corpus, self.length, self.size, self.seed = corpus, length, size, seed
        self.recall_share, self.chat_share = recall_share, chat_share
        self.tokens = corpus.tokens(split)
        self.filler = corpus.filler(split)
        self.count = tasks.counter(corpus.tokenizer)
        self.names = names

    def __len__(self) -> int:
        return self.size

    def window(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """A random window of the corpus: int64 [length]."""
        start = int(rng.integers(0, len(self.tokens) - length))
        return self.tokens[start : start + length].astype(np.int64)

    def _fill_with_tasks(self, rng: np.random.Generator, ids: np.ndarray, mask: np.ndarray) -> None:
        """Writes one to several recall tasks, and code in what is left, into ids and mask of [T]."""
        tokenizer = self.corpus.tokenizer
        largest = self.length // int(rng.choice((1, 1, 2, 4)))
        at = 0
        while self.length - at >= 96:
            budget = min(largest, self.length - at) - 8
            if self.names and budget >= 128:
                encoded, spans = tasks.make_sample(
                    tokenizer, self.names, budget, int(rng.integers(2**62)), filler=self.filler, count=self.count
                )
                encoded = [tokenizer.bos_token_id, *encoded, tokenizer.eos_token_id][: self.length - at]
                ids[at : at + len(encoded)] = encoded
                for span in spans:
                    mask[at + 1 + span.start : at + 1 + span.stop] = True
                at += len(encoded)
                continue
            task = recall.make_recall(int(rng.integers(2**62)), budget, self.filler, count=self.count)
            if rng.random() < self.chat_share:
                task = recall.as_chat(task)
            encoded, spans = encode_recall(task, tokenizer)
            encoded = [*encoded, tokenizer.eos_token_id][: self.length - at]
            ids[at : at + len(encoded)] = encoded
            for span in spans:
                mask[at + span.start : at + span.stop] = True
            at += len(encoded)
        if self.length - at > 1:
            ids[at + 1 :] = self.window(rng, self.length - at - 1)

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng([self.seed, self.length, index])
        ids = np.full(self.length, self.corpus.tokenizer.bos_token_id, dtype=np.int64)
        mask = np.zeros(self.length, dtype=bool)
        is_recall = bool(rng.random() < self.recall_share)
        if is_recall:
            self._fill_with_tasks(rng, ids, mask)
        else:
            ids[1:] = self.window(rng, self.length - 1)
        return {
            "input_ids": torch.from_numpy(ids),
            "answer_mask": torch.from_numpy(mask),
            "is_recall": torch.tensor(is_recall),
        }


class TimedBatches(IterableDataset[Sample]):
    """Whole batches of ``batch_tokens`` tokens whose length T follows the progress of a clock.

    Yields ``input_ids`` int64 [B, T] and ``answer_mask`` bool [B, T] with B * T = batch_tokens. Use it with
    batch size 1 and ``first`` as the collator.
    """

    def __init__(
        self,
        make: Callable[[int], MixedWindows],
        phases: Sequence[tuple[float, int]],
        progress: Callable[[], float],
        batch_tokens: int,
        first_step: int = 0,
    ) -> None:
        self.phases, self.progress, self.batch_tokens = phases, progress, batch_tokens
        self.windows = {length: make(length) for _, length in phases}
        self.first_step = first_step

    def length_at(self, progress: float) -> int:
        """T at ``progress`` in [0, 1]: the first phase whose end lies behind it."""
        return next((length for end, length in self.phases if progress < end), self.phases[-1][1])

    def __iter__(self) -> Iterator[Sample]:
        step = self.first_step
        while True:
            length = self.length_at(self.progress())
            size = max(1, self.batch_tokens // length)
            items = [self.windows[length][step * size + i] for i in range(size)]
            yield {key: torch.stack([item[key] for item in items]) for key in ("input_ids", "answer_mask")}
            step += 1


def first(items: list[Sample]) -> Sample:
    """Collator for datasets that yield whole batches."""
    return items[0]


def held_out_blocks(corpus: Corpus, length: int, blocks: int) -> torch.Tensor:
    """Evenly spread held-out windows, each starting with bos: int64 [blocks, length]."""
    tokens = corpus.tokens("held_out")
    blocks = min(blocks, len(tokens) // length)
    starts = np.linspace(0, len(tokens) - length, blocks).astype(np.int64)
    rows = np.stack([tokens[start : start + length - 1].astype(np.int64) for start in starts])
    bos = np.full((len(rows), 1), corpus.tokenizer.bos_token_id, dtype=np.int64)
    return torch.from_numpy(np.concatenate([bos, rows], axis=1))
