"""Conversations in every format are the same turns; what is learned is what the assistant says, wherever it is."""

import json

import datasets
import pytest
from helpers import default_config, text_batch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedkrso_app import data
from fedkrso_app.config import ConfigError
from fedkrso_app.data import files, pairs
from fedkrso_app.strategies import parse

CHATML = "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
TEMPLATES = {
    # what it is -> template; the text of USER, ANSWER, USER, ANSWER with what is learned in brackets
    "chatml": (CHATML, "<s> user w1 </s> <s> assistant [w2 w3 </s>] <s> user w4 </s> <s> assistant [w5 </s>]"),
    "end only at the very end": (
        "{% for m in messages %}{{ 'Q ' if m.role == 'user' else 'A ' }}{{ m.content | trim }} {% endfor %}</s>",
        "Q w1 A [w2 w3] Q w4 A [w5 </s>]",
    ),
    "a tag before the last answer alone": (
        "{% for m in messages %}{{ 'Q ' if m.role == 'user' else 'A think ' if loop.last else 'A ' }}"
        "{{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}A think think {% endif %}",
        "Q w1 </s> A [w2 w3 </s>] Q w4 </s> A think [w5 </s>]",
    ),
}
TURNS = [("user", "w1"), ("assistant", "w2 w3"), ("user", "w4"), ("assistant", "w5")]


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for cached in (data.load, data.resolve, files.warn):
        cached.cache_clear()


@pytest.fixture
def tokenizer(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_tokens(["user", "assistant", "Q", "A", "think", "c"])
    return tokenizer


def messages(turns=TURNS, role="role", content="content", **names):
    return [{role: names.get(said, said), content: text} for said, text in turns]


def read(folder, **keys):
    keys = {key.replace("_", "-"): value for key, value in keys.items()}
    config = parse(default_config() | {"task": "instruction", "data-dir": str(folder)} | keys)
    found = data.resolve(config)
    return found, data.load(found, config.data_dir, "train")


def write(folder, rows, kind="jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        if kind == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
        elif kind == "csv":
            cells = [['"' + json.dumps(value).replace('"', '""') + '"' for value in row.values()] for row in rows]
            (folder / f"{split}.csv").write_text("\n".join([",".join(rows[0]), *map(",".join, cells)]))
        else:
            (folder / f"{split}.{kind}").write_text("\n".join(map(json.dumps, rows)))


def learned(batch, tokenizer):
    """The texts of a batch's rows, with what is learned in brackets."""
    rows = []
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        words, open_ = [], False
        for id, label in zip(ids, labels, strict=True):
            word = tokenizer.convert_ids_to_tokens(id)
            if open_ and label == -100:
                words[-1] += "]"
            words.append(("[" if label != -100 and not open_ else "") + word)
            assert label in (-100, id)
            open_ = label != -100
        rows.append(" ".join(words) + ("]" if open_ else ""))
    return rows


SHAPES = {
    "messages": {"messages": messages()},
    "sharegpt": {"conversations": messages(TURNS, "from", "value", user="human", assistant="gpt")},
    "parts of text": {"messages": [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages()]},
    "prompt and completion": {"prompt": messages(TURNS[:3]), "completion": messages(TURNS[3:])},
    "a text after the list": {"prompt": messages(TURNS[:3]), "completion": "w5"},
    "with what nobody reads": {"id": 7, "messages": messages(), "tools": None, "source": ["x"]},
    "a question at the end": {"messages": messages([*TURNS, ("user", "w9")])},
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_turns(tmp_path, shape, kind):
    row = SHAPES[shape]
    if kind == "csv" and len(row) > 1:
        pytest.skip("of a list in a csv cell nobody knows that it is no text, but where one column is all")
    write(tmp_path, [row] * 3, kind)
    found, train = read(tmp_path)
    assert train[found.columns[-1]][:] == [messages()] * 3
    assert train.column_names == [found.columns[-1]]


def test_alpaca_is_a_question_of_two_parts_and_an_answer(tmp_path, tokenizer):
    write(
        tmp_path,
        [{"instruction": "w1", "input": "w2", "output": "w3"}, {"instruction": "w1", "input": "", "output": "w4"}],
    )
    found, train = read(tmp_path)
    tokenizer.chat_template = CHATML
    (batch,) = data.evaluation_batches(train, found, tokenizer, 999, 32)
    rows = [" ".join(row.replace("<pad>", "").split()) for row in learned(batch, tokenizer)]
    assert rows == ["<s> user w1 w2 </s> <s> assistant [w3 </s>]", "<s> user w1 </s> <s> assistant [w4 </s>]"]


def test_a_system_turn_is_the_templates(tokenizer):
    tokenizer.chat_template = CHATML.replace("m.role", "'Q' if m.role == 'system' else m.role")
    batch = text_batch([[messages([("system", "w7"), *TURNS[:2]])]], tokenizer, 64)
    assert learned(batch, tokenizer) == ["<s> Q w7 </s> <s> user w1 </s> <s> assistant [w2 w3 </s>]"]


@pytest.mark.parametrize("case", TEMPLATES)
def test_all_that_the_assistant_says_is_learned_with_the_mark_of_its_end(tokenizer, case):
    tokenizer.chat_template, expected = TEMPLATES[case]
    assert learned(text_batch([[messages()]], tokenizer, 64), tokenizer) == [expected]


def test_without_a_template_each_answer_ends_with_the_end_token(tokenizer):
    batch = text_batch([[messages()]], tokenizer, 64)
    assert learned(batch, tokenizer) == ["<s> w1 [w2 w3 </s>] w4 [w5 </s>]"]


@pytest.mark.parametrize("answer", ["c", "a", "Q", "think"])
def test_an_answer_is_found_where_it_is_and_not_where_its_letters_are(tokenizer, answer):
    """Its letters are in the tag that ends the generation's prompt, in the marks and in the question."""
    tokenizer.add_tokens(["a"])
    tokenizer.chat_template = TEMPLATES["a tag before the last answer alone"][0]
    turns = [("user", f"w1 {answer}"), ("assistant", answer)]
    batch = text_batch([[messages(turns)]], tokenizer, 64)
    assert learned(batch, tokenizer) == [f"Q w1 {answer} </s> A think [{answer} </s>]"]


def test_a_token_that_has_a_letter_of_the_answer_is_learned(tokenizer):
    """ "x:w2" is one word of this tokenizer: its letters are the mark's and the answer's."""
    tokenizer.chat_template = "{% for m in messages %}w9 x:{{ m.content }} {% endfor %}</s>"
    batch = text_batch([[messages(TURNS[:2])]], tokenizer, 64)
    assert learned(batch, tokenizer) == ["w9 <unk> w9 [<unk> w3 </s>]"]


BAD = {
    "no answer": ([("user", "w1")], "no turn is the assistant's"),
    "an unknown role": ([("user", "w1"), ("critic", "w2"), ("assistant", "w3")], "turn 2 has the role 'critic'"),
    "a tool": ([("user", "w1"), ("tool", "w2"), ("assistant", "w3")], "turn 2 calls a tool or is a tool's"),
    "an empty answer": ([("user", "w1"), ("assistant", " ")], "turn 2 is empty"),
    "no text": ([("user", "w1"), ("assistant", None)], "turn 2 has no text"),
    "no turns": ([], "no turn is the assistant's"),
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("case", BAD)
def test_a_row_that_is_no_conversation_is_named_with_the_reason_or_left_out(tmp_path, case, kind):
    turns, why = BAD[case]
    write(tmp_path, [{"messages": rows} for rows in (messages(), messages(turns), messages())], kind)
    where = "line 2" if kind == "jsonl" else "row 2"
    with pytest.raises(
        ConfigError, match=rf"is no conversation to learn \({why}.*in 1 of 3 rows \(the first: .*{where}\)"
    ):
        read(tmp_path)
    assert len(read(tmp_path, bad_rows="skip")[1]) == 2


def test_a_call_of_a_tool_and_a_weight_of_zero_are_named(tmp_path):
    called = [*messages(TURNS[:1]), {"role": "assistant", "content": "w2", "tool_calls": [{"id": "1"}]}]
    ignored = [*messages(TURNS[:1]), {"role": "assistant", "content": "w2", "weight": 0}]
    for row, why in ((called, "turn 2 calls a tool"), (ignored, "turn 2 has weight 0")):
        write(tmp_path, [{"messages": row}] * 2)
        with pytest.raises(ConfigError, match=why):
            read(tmp_path)


def test_a_text_that_is_a_list_by_its_letters_stays_a_text(tmp_path):
    """An answer in JSON is an answer."""
    answer = json.dumps(messages())
    write(tmp_path, [{"question": "w1", "answer": answer}] * 2)
    assert read(tmp_path)[1]["answer"][:] == [answer] * 2


# --- before round 1 ---

REFUSING = {
    "a template that wants turns to alternate": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }} {% endfor %}",
        r"refuses these turns \(roles must alternate\)",
    ),
    "a template that knows no assistant": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} {% endif %}{% endfor %}",
        "does not show the answer of turn 2",
    ),
}


@pytest.mark.parametrize("case", REFUSING)
def test_an_answer_that_cannot_be_placed_is_named_by_its_row_before_round_1(tmp_path, tokenizer, case):
    tokenizer.chat_template, why = REFUSING[case]
    twice = messages([("user", "w1"), ("assistant", "w2"), ("assistant", "w3")])
    write(tmp_path, [{"messages": messages()}, {"messages": None}, {"messages": twice}])
    found, _ = read(tmp_path, bad_rows="skip")
    line = 3 if "alternate" in case else 1
    with pytest.raises(ConfigError, match=rf"train\.jsonl, line {line} of train: .*{why}"):
        data.check(found, str(tmp_path), "train", 0.0, tokenizer)
    tokenizer.chat_template = CHATML
    data.check(found, str(tmp_path), "train", 0.0, tokenizer)


# --- the border of a pair ---

PAIR, OTHER = ("the soup was", "good"), ("the soup", "was good")


def bytewise(**special):
    """The tokenizer of a decoder: bytes, merged into nothing, and nothing between the texts of a pair."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id for id, token in enumerate(["<end>", "<begin>", *alphabet])}
    bytes_ = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bytes_.decoder, bytes_.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    if "bos_token" in special:
        bytes_.post_processor = processors.TemplateProcessing(
            single="<begin> $A", pair="<begin> $A $B:1", special_tokens=[("<begin>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, **special)


@pytest.mark.parametrize("special", [{}, {"bos_token": "<begin>"}])
def test_pairs_that_are_cut_in_another_place_are_other_ids(special, tmp_path):
    tokenizer = bytewise(eos_token="<end>", pad_token="<end>", **special)
    single, before = tokenizer(PAIR[0])["input_ids"], tokenizer(*PAIR)["input_ids"]
    assert before == tokenizer(*OTHER)["input_ids"]  # so it is without a border
    pairs.add_border(tokenizer)
    one, other = tokenizer(*PAIR)["input_ids"], tokenizer(*OTHER)["input_ids"]
    assert one != other and one == [*single, 0, *before[len(single) :]]
    assert tokenizer(PAIR[0])["input_ids"] == single
    cut = tokenizer("a" * 50, "b" * 50, truncation=True, max_length=20)["input_ids"]
    assert len(cut) == 20 and 0 in cut
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(*PAIR)["input_ids"] == one  # and so with the exported model


def test_a_tokenizer_with_a_border_stays_as_it_is(tokenizer):
    before = tokenizer.backend_tokenizer.to_str()
    pairs.add_border(tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_without_any_token_for_it_a_pair_is_refused_before_round_1():
    tokenizer, task = bytewise(), data.task("glue/mrpc")
    pairs.add_border(tokenizer)
    with pytest.raises(ConfigError, match="no token to put between them"):
        data.check(task, "", "train", 0.0, tokenizer)
    data.check(data.task("glue/sst2"), "", "train", 0.0, tokenizer)
