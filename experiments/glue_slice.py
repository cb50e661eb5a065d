"""Cut GLUE down to what two cores can pay for: ``python experiments/glue_slice.py SOURCE TARGET``.

2000 training and 400 validation rows of each task, drawn with seed 0; both folders have <task>/<split>.parquet.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

source, target = map(Path, sys.argv[1:])
for task in ("cola", "mrpc", "sst2", "stsb"):
    (target / task).mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 2000), ("validation", 400)):
        table = pq.read_table(source / task / f"{split}.parquet")
        rows = np.sort(np.random.default_rng(0).permutation(len(table))[:count])
        pq.write_table(table.take(rows), target / task / f"{split}.parquet")
