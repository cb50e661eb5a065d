"""Tasks and a pretrained model for machines without a model hub: a seeded grammar and a small RoBERTa.

The grammar writes sentences of a small English-like language from meanings (:class:`_Clause`), so that the labels
follow from what was done to a meaning and are never noise. The model is pretrained on the same language by masked
language modelling, on single sentences and on pairs of related ones, and never sees a label.
"""

import functools
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import torch
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from fedkrso_app.config import ConfigError

TASKS: tuple[str, ...] = ("acceptability", "sentiment", "paraphrase", "entailment", "similarity")

_log = logging.getLogger("flwr")
_T = TypeVar("_T")

# Synonyms are joined by "/"; each kind of noun begins with its hypernym.
_NOUNS = {
    "P": "person doctor/physician lawyer/attorney teacher/tutor soldier/trooper king/ruler robber/bandit singer",
    "A": "animal dog/hound rabbit/hare horse/steed donkey/mule monkey/ape fox tiger",
    "V": "vehicle car/automobile ship/vessel bicycle/bike truck/lorry wagon/cart tractor",
    "F": "snack cookie/biscuit sausage/wiener pancake/crepe burger plum",
    "T": "tool hammer/mallet shovel/spade lamp/lantern bucket/pail ladder",
    "B": "building shop/store castle/fortress prison/jail barn school",
}
# Kinds of agents > kinds of patients: verbs; "~" stands between opposites.
_VERBS = """
PA > PA: chase/pursue help/assist~hinder/obstruct attack/assault~protect/defend scare/frighten
PA > PAVFTB: watch/observe love/adore~hate/despise
PA > VFTB: approach inspect~ignore
P > P: hire/employ~dismiss/fire praise~blame
PA > F: devour/consume taste
P > VFTB: purchase/acquire clean/wash~stain prepare
P > VTB: repair/fix~destroy/wreck
P > VT: lift/raise~lower
P > VB: enter~exit
"""
_ADJECTIVES = "big/large~small/little old/aged~new quick/swift~slow quiet/silent~noisy/loud strong~weak red blue"
_ADVERBS = "quickly/rapidly~slowly quietly/silently~loudly carefully/cautiously~recklessly often~rarely"
_ASPECTS = "plot acting music ending cast script mood camera"
_GOOD = "superb charming delightful brilliant touching witty gripping lovely clever"
_BAD = "awful boring clumsy dreadful tedious stale shallow messy lifeless"
_DEGREES = "very really quite truly rather"
_ADVISE = (
    ("watch it", "i recommend it", "i left happy", "see it twice"),
    ("skip it", "i regret it", "i left early", "avoid it"),
)
# How the second sentence of a pair may begin in the corpus, by what the first one makes of it.
_LINKS = {
    "same": ("namely", "indeed"),
    "weaker": ("so", "thus"),
    "open": ("maybe", "perhaps"),
    "false": ("instead", "wrongly"),
}
_FUNCTION_WORDS = """namely indeed so thus maybe perhaps instead wrongly the a an some every all no that is are does do not
  by and but although while nobody everyone thinks says never i it left happy early see twice skip regret recommend
  avoid watch who"""

_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # RoBERTa's order, so that pad is 1 as its config expects
_ENDINGS = ("##s", "##es", "##d", "##ed")
_ROWS = {"train": 6000, "validation": 1000}
_STEPS, _BATCH, _DOCUMENTS, _RATE, _MASKED = 2000, 32, 24000, 2e-3, 0.2
_MODEL = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 384,
          "max_position_embeddings": 130,
          "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.03}  # fmt: skip

Words = tuple[str, ...]  # synonyms: one concept


@dataclass(frozen=True)
class _Noun:
    kind: str
    words: Words


@dataclass(frozen=True)
class _Verb:
    words: Words
    opposite: Words | None
    agents: str  # the kinds of nouns it takes
    patients: str


@dataclass(frozen=True)
class _Lexicon:
    nouns: dict[str, list[_Noun]]
    hypernyms: dict[str, _Noun]
    verbs: list[_Verb]
    adjectives: list[Words]
    adverbs: list[Words]
    opposites: dict[Words, Words]  # of adverbs


@dataclass(frozen=True)
class _Clause:
    """What a sentence means, but for its choice among synonyms. A quantifier is the, some, every or no."""

    quantifier: str
    adjective: Words | None
    subject: _Noun
    plural: bool
    relative: str  # a finished "that ..." or nothing
    verb: _Verb
    negated: bool
    object_quantifier: str
    object_adjective: Words | None
    object: _Noun
    object_plural: bool
    adverb: Words | None
    passive: bool


def _pairs(text: str) -> list[list[Words]]:
    """``"a/b~c d"`` -> ``[[("a", "b"), ("c",)], [("d",)]]``"""
    return [[tuple(side.split("/")) for side in item.split("~")] for item in text.split()]


@functools.cache
def _lexicon() -> _Lexicon:
    nouns = {kind: [_Noun(kind, tuple(item.split("/"))) for item in text.split()] for kind, text in _NOUNS.items()}
    hypernyms = {kind: group.pop(0) for kind, group in nouns.items()}
    verbs = []
    for line in _VERBS.strip().splitlines():
        frame, body = line.split(":")
        agents, patients = frame.split(" > ")
        for sides in _pairs(body):
            for words, other in zip(sides, sides[1:] + sides[:-1] if len(sides) > 1 else [None], strict=True):
                verbs.append(_Verb(words, other, agents, patients))
    adverbs = _pairs(_ADVERBS)
    opposites = {words: other for a, b in adverbs for words, other in ((a, b), (b, a))}
    adjectives = [words for sides in _pairs(_ADJECTIVES) for words in sides]
    return _Lexicon(nouns, hypernyms, verbs, adjectives, list(opposites), opposites)


def _plural(word: str) -> str:
    """The plural of a noun and the third person of a verb: both add s."""
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    return word + "s"


def _participle(word: str) -> str:
    return word + ("d" if word.endswith("e") else "ed")


def _vocabulary() -> list[str]:
    """Every word that the grammar can write, in a fixed order behind the special tokens."""
    lexicon = _lexicon()
    words = set(f"{_FUNCTION_WORDS} {_ASPECTS} {_GOOD} {_BAD} {_DEGREES}".split())
    nouns = [*lexicon.hypernyms.values(), *(noun for nouns in lexicon.nouns.values() for noun in nouns)]
    words |= {word for item in [*nouns, *lexicon.verbs] for word in item.words}
    words |= {word for concept in lexicon.adjectives + lexicon.adverbs for word in concept}
    return [*_SPECIAL, *_ENDINGS, *sorted(words)]


class _Writer:
    """Draws meanings and writes them down. ``skew`` 1 draws words evenly, more makes the late ones of a list rare."""

    def __init__(self, seed: int, skew: float = 1.0):
        self.rng, self.skew, self.lexicon = np.random.default_rng(seed), skew, _lexicon()
        self.said: dict[Words, str] = {}  # the words of this row's concepts

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def pick(self, items: Sequence[_T]) -> _T:
        return items[int(self.rng.random() * len(items))]

    def say(self, concept: Words) -> str:
        """One of the synonyms, mostly the one that this row has used before."""
        if concept not in self.said or self.chance(0.3):
            self.said[concept] = self.pick(concept)
        return self.said[concept]

    def word(self, items: Sequence[_T], but: Any = None) -> _T:
        while True:
            item = items[int(len(items) * self.rng.random() ** self.skew)]
            if item != but:
                return item

    def clause(self, p_modifier: float = 0.3, p_relative: float = 0.0) -> _Clause:
        self.said.clear()
        lexicon = self.lexicon
        verb = self.word(lexicon.verbs)
        quantifier = self.pick(("the", "some") * 4 + ("every", "no"))
        plain = quantifier in ("the", "some")
        negated = plain and self.chance(0.25)
        kind, plural = self.pick(verb.agents), quantifier != "no" and self.chance(0.5)
        return _Clause(
            quantifier=quantifier,
            adjective=self.word(lexicon.adjectives) if self.chance(p_modifier) else None,
            subject=self.word(lexicon.nouns[kind]),
            plural=plural,
            relative=self.relative(kind, plural) if self.chance(p_relative) else "",
            verb=verb,
            negated=negated,
            # Under a negation "a cat" would be ambiguous, so "the" it is.
            object_quantifier="the" if negated or not plain else self.pick(("the", "some")),
            object_adjective=self.word(lexicon.adjectives) if self.chance(p_modifier) else None,
            object=self.word(lexicon.nouns[self.pick(verb.patients)]),
            object_plural=self.chance(0.5),
            adverb=self.word(lexicon.adverbs) if self.chance(p_modifier) else None,
            passive=False,
        )

    def relative(self, kind: str, plural: bool) -> str:
        verb = self.word([verb for verb in self.lexicon.verbs if kind in verb.agents])
        patient = self.word(self.lexicon.nouns[self.pick(verb.patients)])
        word = self.pick(verb.words)
        phrase = self.noun_phrase("the", None, patient, self.chance(0.5))
        return f"that {word if plural else _plural(word)} {phrase}"

    def voice(self, c: _Clause) -> _Clause:
        """``c`` in either voice, where both mean the same: "every" and "no" would change their scope."""
        same = c.quantifier == "the" or (c.quantifier == "some" and not c.negated)
        return replace(c, passive=same and self.chance(0.15))

    def noun_phrase(self, quantifier: str, adjective: Words | None, noun: _Noun, plural: bool) -> str:
        words = [self.say(adjective)] if adjective else []
        word = self.say(noun.words)
        words.append(_plural(word) if plural else word)
        one = "an" if words[0][0] in "aeiou" else "a"
        determiners = {"some": (one, "some"), "every": ("every", "all")}
        return " ".join([determiners.get(quantifier, (quantifier, quantifier))[plural], *words])

    def sentence(self, c: _Clause, mistake: str = "") -> str:
        """``mistake`` "number": the verb disagrees with its subject, "form": it has the wrong ending."""
        subject = self.noun_phrase(c.quantifier, c.adjective, c.subject, c.plural) + " " + c.relative
        object_ = self.noun_phrase(c.object_quantifier, c.object_adjective, c.object, c.object_plural)
        plural = (c.object_plural if c.passive else c.plural) != (mistake == "number")
        negation = "not" if c.negated else ""
        base = self.say(c.verb.words)
        if c.passive:
            verb = base if mistake == "form" else _participle(base)
            parts = [object_, "are" if plural else "is", negation, verb, "by", subject]
        elif c.negated:
            verb = _plural(base) if mistake == "form" else base
            parts = [subject, "do" if plural else "does", negation, verb, object_]
        elif mistake == "form":
            parts = [subject, "are" if plural else "is", base, object_]
        else:
            parts = [subject, base if plural else _plural(base), object_]
        return " ".join(" ".join([*parts, self.say(c.adverb) if c.adverb else ""]).split())

    def edits(self, c: _Clause) -> dict[str, list[dict[str, Any]]]:
        """Changes of ``c`` by what they do to its truth: "weaker" (it follows from ``c``), "stronger" or otherwise
        left open by ``c`` ("open"), "false" (it cannot hold beside ``c``). Each maps fields to new values."""
        lexicon, hypernyms = self.lexicon, self.lexicon.hypernyms
        up, down = ("open", "weaker") if c.quantifier in ("every", "no") else ("weaker", "open")
        denied = c.negated or c.quantifier == "no"
        found: dict[str, list[dict[str, Any]]] = {"weaker": [], "open": [], "false": []}
        found[up].append({"subject": hypernyms[c.subject.kind]})
        found["weaker"].append({"object": hypernyms[c.object.kind]})
        found["open"] += [{"subject": self.stranger(c.subject, c.verb.agents)}] * 2
        found["open"] += [{"object": self.stranger(c.object, c.verb.patients)}] * 2
        found["open"] += [{"verb": verb}] * 2 if (verb := self.other_verb(c)) else []
        found[up if c.adjective else down].append(
            {"adjective": None if c.adjective else self.word(lexicon.adjectives)}
        )
        found["weaker" if c.object_adjective else "open"].append(
            {"object_adjective": None if c.object_adjective else self.word(lexicon.adjectives)}
        )
        found["weaker" if bool(c.adverb) != denied else "open"].append(
            {"adverb": None if c.adverb else self.word(lexicon.adverbs)}
        )
        if c.quantifier == "every":
            found["weaker"].append({"quantifier": "some"})
            found["false"] += [{"quantifier": "no"}, {"quantifier": "some", "negated": True, "object_quantifier": "the"}]
        elif c.quantifier == "no":
            found["false"] += [{"quantifier": "some"}, {"quantifier": "every"}]
        elif c.quantifier == "the":
            found["false"].append({"negated": not c.negated, "object_quantifier": "the"})
        elif c.negated:
            found["false"].append({"quantifier": "every", "negated": False})
        else:
            found["open"].append({"quantifier": "every", "object_quantifier": "the"})
            found["false"].append({"quantifier": "no", "plural": False, "object_quantifier": "the"})
        if not denied and c.quantifier != "some":
            if c.verb.opposite:
                found["false"].append({"verb": replace(c.verb, words=c.verb.opposite, opposite=c.verb.words)})
            if c.adverb:
                found["false"].append({"adverb": lexicon.opposites[c.adverb]})
        if swapped := self.swapped(c):
            found["open"].append(swapped)
        return found

    def stranger(self, noun: _Noun, kinds: str) -> _Noun:
        """Another noun, mostly of another kind where ``kinds`` has one: those of one kind are harder to tell apart."""
        others = kinds.replace(noun.kind, "")
        kind = self.pick(others) if others and self.chance(0.8) else noun.kind
        return self.word(self.lexicon.nouns[kind], but=noun)

    def other_verb(self, c: _Clause) -> _Verb | None:
        """One that takes the nouns of ``c``, neither the same nor its opposite; None where there is none."""
        fits = [v for v in self.lexicon.verbs if c.subject.kind in v.agents and c.object.kind in v.patients]
        others = [v for v in fits if v != c.verb and v.opposite != c.verb.words]
        return self.word(others) if others else None

    def swapped(self, c: _Clause) -> dict[str, Any]:
        """The edit that exchanges subject and object, empty where the verb does not allow it."""
        if c.object.kind not in c.verb.agents or c.subject.kind not in c.verb.patients or c.relative:
            return {}
        return {"subject": c.object, "object": c.subject, "plural": c.object_plural, "object_plural": c.plural,
                "adjective": c.object_adjective, "object_adjective": c.adjective}  # fmt: skip

    def edited(self, c: _Clause, kind: str) -> _Clause:
        """A sentence that follows from ``c`` ("weaker"), is left open ("open") or is denied ("false")."""
        edits = self.edits(c)
        decisive = self.pick(edits[kind]) if kind != "weaker" else {}
        c = replace(c, **decisive)
        for edit in edits["weaker"]:  # each is about another field, and keeps what the decisive one did
            if not edit.keys() & decisive.keys() and self.chance(0.2):
                c = replace(c, **edit)
        return c

    def acceptability(self) -> dict[str, Any]:
        c, lexicon = self.voice(self.clause(p_relative=0.5)), self.lexicon
        label = int(self.chance(0.5))
        mistake = "" if label else self.pick(("number", "number", "number", "form", "patient", "agent", "order"))
        if mistake == "patient":
            kinds = [kind for kind in lexicon.nouns if kind not in c.verb.patients + "PA"]
            c = replace(c, object=self.word(lexicon.nouns[self.pick(kinds)]))
        if mistake == "agent":
            c = replace(c, subject=self.word(lexicon.nouns[self.pick("VFTB")]))
        words = self.sentence(c, mistake).split()
        if mistake == "order":
            at = int(self.rng.integers(len(words) - 1))
            words[at], words[at + 1] = words[at + 1], words[at]
        return {"sentence": " ".join(words), "label": label}

    def opinion(self, good: bool) -> str:
        """One clause about a film, good or bad by its word, a "not" and "nobody thinks"."""
        negated, denied = self.chance(0.3), self.chance(0.2)
        word = self.word((_GOOD if good != (negated != denied) else _BAD).split())
        degree = self.pick(_DEGREES.split()) if self.chance(0.4) else ""
        frame = "nobody thinks that" if denied else "everyone says that" if self.chance(0.2) else ""
        aspect = self.word(_ASPECTS.split())
        return " ".join(f"{frame} the {aspect} is {'not' if negated else ''} {degree} {word}".split())

    def sentiment(self) -> dict[str, Any]:
        good = self.chance(0.5)
        main = self.opinion(good)
        frame = self.pick(("one", "and", "but", "although", "while"))
        if frame == "and":
            main = f"{main} and {self.opinion(good)}"
        elif frame == "but":
            main = f"{self.opinion(not good)} but {main}"
        elif frame != "one":
            main = self.pick((f"{frame} {self.opinion(not good)} {main}", f"{main} {frame} {self.opinion(not good)}"))
        return {"sentence": main, "label": int(good)}

    def paraphrase(self) -> dict[str, Any]:
        c, lexicon, label = self.clause(), self.lexicon, int(self.chance(0.5))
        other = c
        if not label:
            swapped = self.swapped(c)
            edits = self.edits(c)
            moved = {"adjective": c.object_adjective, "object_adjective": c.adjective}
            choices = [edit for kind in edits for edit in edits[kind]]
            if c.adjective != c.object_adjective:
                choices += [moved] * 3
            choices += [swapped] * 4 if swapped else []
            other = replace(c, **self.pick(choices))
        first, second = (c, other) if self.chance(0.5) else (other, c)
        return {"sentence1": self.sentence(self.voice(first)), "sentence2": self.sentence(self.voice(second)),
                "label": label}  # fmt: skip

    def entailment(self) -> dict[str, Any]:
        c, label = self.clause(), int(self.rng.integers(3))
        hypothesis = self.edited(c, ("weaker", "open", "false")[label])
        return {"sentence1": self.sentence(self.voice(c)), "sentence2": self.sentence(self.voice(hypothesis)),
                "label": label}  # fmt: skip

    def similarity(self) -> dict[str, Any]:
        """Five slots (subject, its adjective, verb, object, adverb); a noun of the same kind is half a match."""
        c, lexicon = self.clause(p_modifier=1.0, p_relative=0.0), self.lexicon
        verb = self.other_verb(c) or self.word(lexicon.verbs, but=c.verb)
        nouns = [lexicon.nouns[self.pick(kinds)] for kinds in (c.verb.agents, c.verb.patients)]
        fresh = {"subject": self.word(nouns[0], but=c.subject), "object": self.word(nouns[1], but=c.object),
                 "verb": verb, "adjective": self.word(lexicon.adjectives, but=c.adjective),
                 "adverb": self.word(lexicon.adverbs, but=c.adverb)}  # fmt: skip
        share = self.rng.random()
        changes = {slot: value for slot, value in fresh.items() if self.chance(share)}
        other = replace(c, object_adjective=None, **changes)
        c = replace(c, object_adjective=None)
        near = [slot for slot in ("subject", "object") if slot in changes
                and getattr(c, slot).kind == getattr(other, slot).kind]  # fmt: skip
        return {"sentence1": self.sentence(self.voice(c)), "sentence2": self.sentence(self.voice(other)),
                "label": 5.0 - len(changes) + 0.5 * len(near)}  # fmt: skip

    def document(self) -> tuple[str, ...]:
        """One or two sentences of the corpus for pretraining."""
        draw = self.rng.random()
        if draw < 0.1:
            return (self.sentence(self.voice(self.clause(p_relative=0.5))),)
        if draw < 0.25:
            good = self.chance(0.5)
            return self.sentiment_text(good), self.pick(_ADVISE[not good])
        if draw < 0.28:
            kind = self.pick(list(_NOUNS))
            noun, name = self.pick(self.lexicon.nouns[kind]), self.lexicon.hypernyms[kind]
            one = [self.noun_phrase(q, None, n, False) for q, n in (("every", noun), ("some", name))]
            return (" is ".join(one),)
        c, kind = self.clause(), self.pick(tuple(_LINKS))
        other = c if kind == "same" else self.edited(c, kind)
        first, second = self.sentence(self.voice(c)), self.sentence(self.voice(other))
        return first, f"{self.pick(_LINKS[kind])} {second}"

    def sentiment_text(self, good: bool) -> str:
        return f"{self.opinion(good)} and {self.opinion(good)}" if self.chance(0.5) else self.opinion(good)


def load_task(name: str) -> datasets.DatasetDict:
    """The rows of task ``name``, the same on every machine.

    "train" has 6000 rows and "validation" 1000 others; columns "sentence" (acceptability, sentiment) or "sentence1" and
    "sentence2", and "label": int64, or float32 between 0 and 5 (similarity). Raises :class:`ConfigError` for a name
    that is not in ``TASKS``.
    """
    if name not in TASKS:
        raise ConfigError(f"task 'embedded/{name}' is unknown; the embedded tasks are {', '.join(TASKS)}.")
    writer = _Writer(seed=TASKS.index(name), skew=1.5)
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    while len(rows) < sum(_ROWS.values()):
        row = getattr(writer, name)()
        rows.setdefault(tuple(value for key, value in row.items() if key != "label"), row)
    unique = list(rows.values())
    features = {key: datasets.Value("string") for key in unique[0]}
    features["label"] = datasets.Value("float32" if name == "similarity" else "int64")
    parts = {"train": unique[: _ROWS["train"]], "validation": unique[_ROWS["train"] :]}
    return datasets.DatasetDict(
        {key: datasets.Dataset.from_list(part, features=datasets.Features(features)) for key, part in parts.items()}
    )


def model_path() -> Path:
    """A folder in the hub's format with the pretrained RoBERTa and its tokenizer; the first call trains it.

    The folder lies under ``$FEDKRSO_CACHE`` or ``~/.cache/fedkrso`` and is named after the recipe.
    """
    return _model_path(_STEPS)


def _model_path(steps: int) -> Path:
    cache = Path(os.environ.get("FEDKRSO_CACHE") or "~/.cache/fedkrso").expanduser()
    recipe = Path(__file__).read_bytes() + str(steps).encode()  # the grammar and the numbers: any edit, another model
    path = cache / f"embedded-{hashlib.sha256(recipe).hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # a second process waits here and finds the model finished
        if not path.is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                part = Path(scratch) / "model"
                tokenizer = _tokenizer()
                tokenizer.save_pretrained(part)
                _pretrained(tokenizer, steps).save_pretrained(part)
                os.replace(part, path)
    return path


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(_vocabulary())}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s>:1 $B:1 </s>:1",
        special_tokens=[(token, vocabulary[token]) for token in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", model_max_length=128,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def _pretrained(tokenizer: PreTrainedTokenizerFast, steps: int) -> RobertaForMaskedLM:
    """Masked language modelling on the corpus; PyTorch's global state is left as it was."""
    writer = _Writer(seed=len(TASKS))
    documents = [writer.document() for _ in range(min(_DOCUMENTS, steps * _BATCH))]
    ids = sorted((tokenizer(*document) for document in documents), key=lambda row: len(row["input_ids"]))  # little padding
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)  # sums, and so the weights, depend on it
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _train_mlm(tokenizer, ids, steps)
    finally:
        torch.set_num_threads(threads)


def _train_mlm(tokenizer: PreTrainedTokenizerFast, ids: list[list[int]], steps: int) -> RobertaForMaskedLM:
    model = RobertaForMaskedLM(RobertaConfig(vocab_size=len(tokenizer), type_vocab_size=2, **_MODEL))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps, pct_start=0.1)
    chances = torch.full((len(tokenizer),), _MASKED)
    chances[: len(_SPECIAL)] = 0.0
    chances[tokenizer.convert_tokens_to_ids(_FUNCTION_WORDS.split())] /= 2  # easy, there is little to learn from
    links = [word for words in _LINKS.values() for word in words]
    chances[tokenizer.convert_tokens_to_ids(links)] = 0.8  # a pair has one, and all of it bears on that word
    lx = _lexicon()
    kin = torch.arange(len(tokenizer))[:, None].repeat(1, 60)
    groups = [[w for n in g for w in n.words] for g in lx.nouns.values()] + [[w for v in lx.verbs for w in v.words]]
    groups += [[w for c in lx.adjectives for w in c], [w for c in lx.adverbs for w in c]]
    for g in groups:
        g = torch.tensor(tokenizer.convert_tokens_to_ids(g))
        kin[g] = g[torch.randint(len(g), (len(g), 60))]
    start = time.monotonic()
    for step in range(1, steps + 1):
        at = int(torch.randint(max(1, len(ids) - _BATCH), ()))
        batch = tokenizer.pad(ids[at : at + _BATCH], return_tensors="pt")  # (B, T) int64
        tokens = batch["input_ids"]
        hidden = torch.rand(tokens.shape) < chances[tokens]
        wrong = (torch.rand(tokens.shape) < 0.15) & ~hidden
        labels = tokens.where(tokens >= len(_SPECIAL), -100)
        inputs = tokens.where(~hidden, tokenizer.mask_token_id)
        second = batch["token_type_ids"] == 1
        draw = torch.randint(kin.shape[1], tokens.shape)
        inputs = torch.where(wrong & second, kin[tokens, draw], inputs)
        loss = model(input_ids=inputs, attention_mask=batch["attention_mask"], token_type_ids=batch["token_type_ids"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, steps // 10) == 0:
            left = (time.monotonic() - start) / step * (steps - step)
            _log.info("pretraining the embedded model: step %d/%d, loss %.2f, %.0f s left", step, steps, loss.item(), left)
    return model.eval()
