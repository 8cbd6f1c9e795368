"""Writes the reference corpus as Parquet files for recipes: the documents of ``packing.build_corpus``, split alike.

The documents are read again from the installed packages when these still give the corpus's data hash; otherwise they are
decoded from its tokens (each document is bos + text + eos). Columns: ``text``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vllm_prune_training import data
from vllm_prune_training.packing import Corpus, build_corpus

SPLITS = ("train", "held_out")
ROWS = 1024
"""Documents of a row group."""


def decoded(corpus: Corpus, split: str) -> Iterator[str]:
    """Documents of a split out of its tokens."""
    tokens = np.asarray(corpus.tokens(split))
    bos, eos = corpus.tokenizer.bos_token_id, corpus.tokenizer.eos_token_id
    backend = corpus.tokenizer.backend_tokenizer
    start = 0
    for end in np.flatnonzero(tokens == eos):
        ids = tokens[start:end].tolist()
        if not ids or ids[0] != bos:
            raise ValueError(f"{split}.bin: no bos at token {start}")
        yield backend.decode(ids[1:], skip_special_tokens=False)
        start = int(end) + 1


def write_split(path: Path, texts: Iterator[str]) -> int:
    """One Parquet file; returns the number of documents."""
    schema = pa.schema([("text", pa.string())])
    made = path.with_name(path.name + ".unfinished")
    count = 0
    with pq.ParquetWriter(made, schema, compression="zstd") as writer:
        rows: list[str] = []
        for text in texts:
            rows.append(text)
            count += 1
            if len(rows) == ROWS:
                writer.write_table(pa.table({"text": rows}, schema))
                rows = []
        if rows:
            writer.write_table(pa.table({"text": rows}, schema))
    made.replace(path)
    return count


def main() -> None:
    """Writes ``train.parquet`` and ``held_out.parquet`` into the corpus folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, default=Path("build/reference/corpus"), help="corpus cache")
    parser.add_argument("--model", type=Path, help="a model folder whose tokenizer encodes a new corpus")
    options = parser.parse_args()
    corpus = build_corpus(options.corpus, model=options.model)
    documents = sorted(data.read_documents(data.find_sources()), key=lambda document: document.sha256)
    same = data.corpus_hash(documents) == corpus.record["data_hash"]
    counts = {}
    for split in SPLITS:
        held_out = split == "held_out"
        read = (d.text for d in documents if data.is_held_out(d.sha256) == held_out)
        counts[split] = write_split(options.corpus / f"{split}.parquet", read if same else decoded(corpus, split))
    print(json.dumps({"from": "packages" if same else "tokens", **counts}))


if __name__ == "__main__":
    main()
