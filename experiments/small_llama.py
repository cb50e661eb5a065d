"""A Llama of a twentieth of the 3B's width, and instructions for it: ``python experiments/small_llama.py TARGET``.

Both come from the embedded language, so that nothing is downloaded. TARGET/model has learned to continue its running
text; TARGET/data has 2000 and 400 instructions, "who SENTENCE", answered by what kind of thing the sentence's subject
is (animal, person). One core takes about a minute.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedkrso_app.data.embedded import grammar, pretraining

STEPS, BATCH, RATE = 800, 32, 2e-3

target = Path(sys.argv[1]).expanduser()
(target / "data").mkdir(parents=True, exist_ok=True)
writer = grammar.Writer(seed=6)
rows: dict[str, str] = {}
while len(rows) < 2400:
    clause = writer.clause(p_relative=0.3)
    sentence = writer.sentence(writer.voice(clause))
    rows[f"who {sentence}"] = writer.lexicon.hypernyms[clause.subject.kind].words[0]
pairs = [{"instruction": question, "output": answer} for question, answer in rows.items()]
for split, part in (("train", pairs[:2000]), ("validation", pairs[2000:])):
    (target / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))

torch.set_num_threads(1)
torch.manual_seed(0)
tokenizer = pretraining._tokenizer()
writer = grammar.Writer(seed=grammar.CORPUS_SEED)
documents = sorted((" ".join(writer.document()) for _ in range(24000)), key=len)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=160, intermediate_size=416, num_hidden_layers=4, num_attention_heads=5,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
).train()  # fmt: skip
optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
for step in range(1, STEPS + 1):
    at = int(torch.randint(len(documents) - BATCH, ()))
    batch = tokenizer(documents[at : at + BATCH], padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 100 == 0:
        print(f"step {step}/{STEPS}, loss {loss.item():.2f}", flush=True)
model.save_pretrained(target / "model")
tokenizer.save_pretrained(target / "model")
