"""Streams of documents, packed to sequences of T tokens, and the batches of a run: the same ones after a resume.

Documents are streamed by ``datasets``, shuffled within blocks, tokenised one at a time, joined as bos + text + eos and
cut. Every sequence begins with bos, where the tokenizer has one. Which source a sequence comes from, and the synthetic
tasks in it, follow from (seed, step, row) alone; where each stream stands is a small state that a checkpoint keeps.

Dimension letters: B batch, T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from vllm_prune.errors import PruneError

from .data_recipe import Data, Source
from .prompt_recipe import Prompts
from .recipe import Training
from .tasks import RECALL, TASKS, counter, make_sample
from .text_files import Files, documents, find_files

State = dict[str, Any]
FILLER_CHARS = 1_000_000
LEAST_TASK = 136
"""Tokens below which no further task is begun: ``make_sample`` wants 128, and bos and eos."""


class Stream:
    """An endless stream of tokens out of one source: bos + document + eos after another, epoch after epoch.

    Args:
        files: of the source.
        tokenizer: a Hugging Face tokenizer with an eos or a bos token.
        shuffle_rows: documents are permuted within blocks of this many; 1 keeps their order.
        seed: of the permutations.
    """

    def __init__(self, files: Files, tokenizer: PreTrainedTokenizerBase, shuffle_rows: int, seed: int) -> None:
        self.files, self.tokenizer, self.rows, self.seed = files, tokenizer, shuffle_rows, seed
        if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
            raise PruneError("the tokenizer has neither a bos nor an eos token.", "Documents need one between them.")
        self.state: State = {"epoch": 0, "block": 0, "at": None, "document": 0, "offset": 0}
        self._tokens = self._run()

    def _dataset(self) -> IterableDataset:
        f = self.files
        return IterableDataset.from_generator(
            documents,
            gen_kwargs={"files": list(f.paths), "format": f.format, "field": f.field,
                        "max_line_chars": f.max_line_chars},
        )  # fmt: skip

    def _encode(self, text: str) -> list[int]:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [*([] if bos is None else [bos]), *ids, *([] if eos is None else [eos])]

    def _blocks(self) -> Iterator[list[str]]:
        """Blocks of documents in the order in which they are used, from the state's block on."""
        state = self.state
        dataset = self._dataset()
        if state["at"] is not None:
            dataset.load_state_dict(copy.deepcopy(state["at"]))
        rows = iter(dataset)
        while block := [row["text"] for row in islice(rows, self.rows)]:
            after = dataset.state_dict()
            order = np.random.default_rng([self.seed, state["epoch"], state["block"]]).permutation(len(block))
            yield [block[i] for i in order]
            state.update(block=state["block"] + 1, at=after, document=0, offset=0)

    def _run(self) -> Iterator[list[int]]:
        """What is left of one document after another."""
        while True:
            seen = self.state["block"] > 0 or self.state["document"] > 0
            for block in self._blocks():
                while self.state["document"] < len(block):
                    ids = self._encode(block[self.state["document"]])
                    seen = seen or len(ids) > 2
                    while self.state["offset"] < len(ids):
                        yield ids[self.state["offset"] :]
                    self.state.update(document=self.state["document"] + 1, offset=0)
            if not seen:
                raise PruneError(f"data files {self.files.paths[0]} ... hold no text.", "Name other files.")
            self.state.update(epoch=self.state["epoch"] + 1, block=0, at=None, document=0, offset=0)

    def take(self, number: int) -> list[int]:
        """The next ``number`` tokens."""
        out: list[int] = []
        while len(out) < number:
            piece = next(self._tokens)[: number - len(out)]
            out += piece
            self.state["offset"] += len(piece)
        return out

    def sequence(self, length: int) -> list[int]:
        """The next sequence of T = ``length`` tokens, which begins with bos if there is one."""
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return self.take(length)
        out = self.take(length - 1)
        return out + self.take(1) if out[0] == bos else [bos, *out]

    def load(self, state: State) -> None:
        """Go on from a state that ``state`` had."""
        self.state = copy.deepcopy(state)
        self._tokens = self._run()


def open_sources(sources: Sequence[Source], data: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Stream]:
    """One stream a source."""
    return [
        Stream(find_files(source, data.max_line_chars), tokenizer, data.shuffle_rows, seed + 7919 * i)
        for i, source in enumerate(sources)
    ]


def filler_lines(source: Source, data: Data) -> list[str]:
    """Lines of the first documents of a source, each with its line break, to hide synthetic tasks in."""
    files = find_files(source, data.max_line_chars)
    lines: list[str] = []
    chars = 0
    for row in documents(files.paths, files.format, files.field, files.max_line_chars):
        new = [line + "\n" for line in row["text"].split("\n") if line.strip() and line.isprintable()]
        lines += new
        chars += sum(map(len, new))
        if chars >= FILLER_CHARS:
            break
    return lines


class Batches:
    """The batches of a run, step after step.

    Each step is a list of ``accumulation`` dicts: ``input_ids`` int64 [B, T]; ``loss_weight`` float32 [B, T], the weight
    of predicting that token (1; ``answer_weight`` in answers of tasks; 0 at the first position); ``weight_total``
    float32 [B], the sum of all weights of the whole step, by which every loss is divided; ``row_key`` int64 [B], which
    names the row in the run. With ``prompts`` also ``prompt`` int64 [B], where each sequence's prompt ends: predicting a
    token of it weighs nothing.
    """

    def __init__(
        self, data: Data, training: Training, tokenizer: PreTrainedTokenizerBase, answer_weight: float,
        prompts: Prompts | None = None,
    ) -> None:  # fmt: skip
        self.prompts = prompts
        self.data, self.training, self.tokenizer, self.answer_weight = data, training, tokenizer, answer_weight
        self.streams = open_sources(data.train, data, tokenizer, training.seed)
        weights = np.array([source.weight for source in data.train])
        self.shares = weights / weights.sum()
        self.step = 0
        self.filler: list[str] = []
        if data.tasks is not None:
            unknown = sorted(set(data.tasks.names) - {*RECALL, *TASKS})
            if unknown:
                raise PruneError(
                    f"data.tasks.names has '{unknown[0]}', which is no task.",
                    f"Known: {', '.join([*RECALL, *TASKS])}.",
                )
            shortest = min(length for _, length in training.phases)
            if shortest < LEAST_TASK:
                raise PruneError(f"tasks need at least {LEAST_TASK} tokens, training.lengths has {shortest}.",
                                 "Raise training.lengths, or leave data.tasks out.")  # fmt: skip
            self.filler = filler_lines(data.train[0], data)
            self.count = counter(tokenizer)

    def _with_tasks(self, rng: np.random.Generator, stream: Stream, length: int) -> tuple[list[int], list[int]]:
        """A sequence of tasks with text in what is left, and the positions of answers."""
        assert self.data.tasks is not None
        begin = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        ids: list[int] = []
        answers: list[int] = []
        largest = length // int(rng.choice((1, 1, 2, 4)))
        while length - len(ids) >= LEAST_TASK:
            budget = max(128, min(largest, length - len(ids)) - 8)
            task, spans = make_sample(self.tokenizer, self.data.tasks.names, budget, int(rng.integers(2**60)),
                                      filler=self.filler, count=self.count)  # fmt: skip
            first = len(ids) + len(begin)
            answers += [first + at for span in spans for at in span]
            ids += [*begin, *task, *end]
        ids += stream.take(max(0, length - len(ids)))
        return ids[:length], [at for at in answers if at < length]

    def _row(self, step: int, row: int, length: int) -> tuple[list[int], np.ndarray, int]:
        """Tokens, weights, and the length of the prompt (0 without prompts)."""
        rng = np.random.default_rng([self.training.seed, step, row])
        stream = self.streams[int(rng.choice(len(self.streams), p=self.shares))]
        weight = np.ones(length, dtype=np.float32)
        answers: list[int] = []
        if self.data.tasks is not None and rng.random() < self.data.tasks.share:
            ids, answers = self._with_tasks(rng, stream, length)
            weight[answers] = self.answer_weight
        else:
            ids = stream.sequence(length)
        weight[0] = 0.0
        prompt = 0
        if self.prompts is not None:
            prompt = self.prompts.length(rng, length, answers)
            weight[:prompt] = 0.0
        return ids, weight, prompt

    def next_step(self) -> list[dict[str, torch.Tensor]]:
        """The global batches of the next step."""
        length = self.training.length_at(self.step / self.training.steps)
        size, parts = self.training.batch_tokens // length, self.training.accumulation
        rows = [self._row(self.step, i, length) for i in range(size * parts)]
        ids = torch.tensor([row[0] for row in rows])
        weight = torch.from_numpy(np.stack([row[1] for row in rows]))
        total = weight.sum().clamp_min(1e-6).expand(size * parts)
        key = torch.arange(size * parts) + self.step * size * parts
        self.step += 1
        whole = {"input_ids": ids, "loss_weight": weight, "weight_total": total, "row_key": key}
        if self.prompts is not None:
            whole["prompt"] = torch.tensor([row[2] for row in rows])
        return [{name: value[i * size : (i + 1) * size] for name, value in whole.items()} for i in range(parts)]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        # Finite: the Trainer would do one step more of a run that it resumes at its end.
        while self.step < self.training.steps:
            yield from self.next_step()

    def state(self) -> State:
        """Where the run stands: plain values, for JSON."""
        return {"step": self.step, "streams": [copy.deepcopy(stream.state) for stream in self.streams]}

    def load(self, state: State) -> None:
        """Go on from a state, before the first batch is drawn."""
        self.step = state["step"]
        for stream, saved in zip(self.streams, state["streams"], strict=True):
            stream.load(saved)


def held_out_windows(data: Data, tokenizer: PreTrainedTokenizerBase, length: int, tokens: int) -> torch.Tensor:
    """The first ``tokens`` held-out tokens as windows, sources in turn: int64 [tokens // T, T], at least one."""
    streams = open_sources(data.held_out, data, tokenizer, seed=0)
    rows = [streams[i % len(streams)].sequence(length) for i in range(max(1, tokens // length))]
    return torch.tensor(rows)
