"""GLUE and a MiniLM that two cores can pay for: ``python experiments/small_glue.py MODEL DATA TARGET``.

MODEL is all-MiniLM-L6-v2 as on the hub; DATA has <task>/<split>.parquet. TARGET/data gets the rows of at most 24 word
pieces, ``--rows`` (2000) and 400 of them at most, drawn with seed 0; TARGET/model the model with its first ``--layers``
(6) and with the embeddings of those pieces alone that occur in these rows, which are split into the same pieces as
before.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from torch import nn
from transformers import AutoModel, BertTokenizer

TASKS = {"cola": "validation", "mnli": "validation_mismatched_1k", "sst2": "validation", "stsb": "validation"}
LENGTH = 24

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
for name in ("source", "data", "target"):
    parser.add_argument(name, type=lambda text: Path(text).expanduser())
parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
parser.add_argument("--rows", type=int, default=2000, help="training rows of a task, at most")
parser.add_argument("--layers", type=int, default=6, help="the first of MiniLM's layers")
a = parser.parse_args()

tokenizer = BertTokenizer.from_pretrained(a.source)
kept = set(tokenizer.all_special_ids)
for task in a.tasks:
    (a.target / "data" / task).mkdir(parents=True, exist_ok=True)
    for split, file, count in (("train", "train", a.rows), ("validation", TASKS[task], 400)):
        table = pq.read_table(a.data / task / f"{file}.parquet")
        texts = [table[name].to_pylist() for name in table.column_names if name not in ("label", "idx")]
        pieces = tokenizer(*texts)["input_ids"]
        short = np.flatnonzero([len(ids) <= LENGTH for ids in pieces])
        rows = np.sort(np.random.default_rng(0).permutation(short)[:count])
        pq.write_table(table.take(rows), a.target / "data" / task / f"{split}.parquet")
        kept |= {piece for row in rows for piece in pieces[row]}

rows = sorted(kept)
model = AutoModel.from_pretrained(a.source)
model.encoder.layer = model.encoder.layer[: a.layers]
model.config.num_hidden_layers = a.layers
embeddings = model.embeddings.word_embeddings
model.embeddings.word_embeddings = nn.Embedding.from_pretrained(embeddings.weight[rows], padding_idx=0)

model.config.vocab_size = len(rows)
model.save_pretrained(a.target / "model")
names = tokenizer.convert_ids_to_tokens(rows)
(a.target / "model" / "vocab.txt").write_text("".join(f"{name}\n" for name in names))
small = BertTokenizer(str(a.target / "model" / "vocab.txt"), do_lower_case=True, model_max_length=512)
assert small.pad_token_id == 0 and small.convert_ids_to_tokens(range(len(rows))) == names
small.save_pretrained(a.target / "model")
