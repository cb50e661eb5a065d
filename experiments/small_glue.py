"""GLUE and a MiniLM that two cores can pay for: ``python experiments/small_glue.py MODEL DATA TARGET``.

MODEL is all-MiniLM-L6-v2 as on the hub; DATA has <task>/<split>.parquet. TARGET/data gets the rows of at most 24 word
pieces, 2000 and 400 of them at most, drawn with seed 0; TARGET/model the model with the
embeddings of those pieces alone that occur in these rows, which are split into the same pieces as before.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from torch import nn
from transformers import AutoModel, BertTokenizer

TASKS = {"cola": "validation", "mnli": "validation_mismatched_1k", "sst2": "validation", "stsb": "validation"}
LENGTH = 24


source, data, target = (Path(argument).expanduser() for argument in sys.argv[1:])
tokenizer = BertTokenizer.from_pretrained(source)
kept = set(tokenizer.all_special_ids)
for task, validation in TASKS.items():
    (target / "data" / task).mkdir(parents=True, exist_ok=True)
    for split, file, count in (("train", "train", 2000), ("validation", validation, 400)):
        table = pq.read_table(data / task / f"{file}.parquet")
        texts = [table[name].to_pylist() for name in table.column_names if name not in ("label", "idx")]
        pieces = tokenizer(*texts)["input_ids"]
        short = np.flatnonzero([len(ids) <= LENGTH for ids in pieces])
        rows = np.sort(np.random.default_rng(0).permutation(short)[:count])
        pq.write_table(table.take(rows), target / "data" / task / f"{split}.parquet")
        kept |= {piece for row in rows for piece in pieces[row]}

rows = sorted(kept)
model = AutoModel.from_pretrained(source)
embeddings = model.embeddings.word_embeddings
model.embeddings.word_embeddings = nn.Embedding.from_pretrained(embeddings.weight[rows], padding_idx=0)

model.config.vocab_size = len(rows)
model.save_pretrained(target / "model")
names = tokenizer.convert_ids_to_tokens(rows)
(target / "model" / "vocab.txt").write_text("".join(f"{name}\n" for name in names))
small = BertTokenizer(str(target / "model" / "vocab.txt"), do_lower_case=True, model_max_length=512)
assert small.pad_token_id == 0 and small.convert_ids_to_tokens(range(len(rows))) == names
small.save_pretrained(target / "model")
