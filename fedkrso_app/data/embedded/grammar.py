"""A seeded grammar of a small English-like language: the embedded tasks, and running text to pretrain on.

It writes sentences from meanings (:class:`Clause`), so that a label follows from what was done to a meaning and is
never noise. The running text has single sentences and pairs of related ones. It holds no labels, but the word that
joins a pair ("so", "perhaps", "instead") goes with how the two are related: entailment is the task closest to that.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

TASKS = {"acceptability": 0, "entailment": 3, "similarity": 4}  # and the seeds of their rows
CORPUS_SEED = 5

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
# Kinds of agents > kinds of patients: verbs; "~" separates opposites.
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
LINKS = {
    "same": ("namely", "indeed"),
    "weaker": ("so", "thus"),
    "open": ("maybe", "perhaps"),
    "false": ("instead", "wrongly"),
}
FUNCTION_WORDS = """namely indeed so thus maybe perhaps instead wrongly the a an some every all no that is are
  does do not by and but although while nobody everyone thinks says never i it left happy early see twice skip regret
  recommend avoid watch who"""

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # RoBERTa's order, so that pad is 1 as its config expects
ENDINGS = ("##s", "##es", "##d", "##ed")

Words = tuple[str, ...]  # synonyms: one concept


@dataclass(frozen=True)
class Noun:
    kind: str
    words: Words


@dataclass(frozen=True)
class Verb:
    words: Words
    agents: str  # the kinds of nouns it takes
    patients: str


@dataclass(frozen=True)
class Lexicon:
    nouns: dict[str, list[Noun]]
    hypernyms: dict[str, Noun]
    verbs: list[Verb]
    adjectives: list[Words]
    adverbs: list[Words]
    opposites: dict[Words, Words]  # of verbs and adverbs

    def groups(self) -> list[list[Words]]:
        """Concepts that may stand for one another without breaking a sentence, most of the time."""
        nouns = [[noun.words for noun in group] for group in self.nouns.values()]
        return [*nouns, [verb.words for verb in self.verbs], self.adjectives, self.adverbs]


@dataclass(frozen=True)
class Clause:
    """What a sentence means, except for its choice among synonyms. A quantifier is the, some, every or no."""

    quantifier: str
    adjective: Words | None
    subject: Noun
    plural: bool
    relative: str  # a finished "that ..." or nothing
    verb: Verb
    negated: bool
    object_quantifier: str
    object_adjective: Words | None
    object: Noun
    object_plural: bool
    adverb: Words | None
    passive: bool


def _pairs(text: str) -> list[list[Words]]:
    """``"a/b~c d"`` -> ``[[("a", "b"), ("c",)], [("d",)]]``"""
    return [[tuple(side.split("/")) for side in item.split("~")] for item in text.split()]


@functools.cache
def the_lexicon() -> Lexicon:
    nouns = {kind: [Noun(kind, tuple(item.split("/"))) for item in text.split()] for kind, text in _NOUNS.items()}
    hypernyms = {kind: group.pop(0) for kind, group in nouns.items()}
    verbs, opposed = [], _pairs(_ADVERBS)
    for line in _VERBS.strip().splitlines():
        frame, body = line.split(": ")
        agents, patients = frame.split(" > ")
        verbs += [Verb(words, agents, patients) for sides in _pairs(body) for words in sides]
        opposed += [sides for sides in _pairs(body) if len(sides) == 2]
    opposites = {words: other for a, b in opposed for words, other in ((a, b), (b, a))}
    adjectives = [words for sides in _pairs(_ADJECTIVES) for words in sides]
    adverbs = [words for sides in _pairs(_ADVERBS) for words in sides]
    return Lexicon(nouns, hypernyms, verbs, adjectives, adverbs, opposites)


def _plural(word: str) -> str:
    """The plural of a noun and the third person of a verb: both add s."""
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def _participle(word: str) -> str:
    return word + ("d" if word.endswith("e") else "ed")


def vocabulary() -> list[str]:
    """Every stem and ending, in a fixed order behind the special tokens."""
    lexicon = the_lexicon()
    words = set(f"{FUNCTION_WORDS} {_ASPECTS} {_GOOD} {_BAD} {_DEGREES}".split())
    words |= {word for group in lexicon.groups() for concept in group for word in concept}
    words |= {word for noun in lexicon.hypernyms.values() for word in noun.words}
    return [*SPECIAL, *ENDINGS, *sorted(words)]


class Writer:
    """Draws meanings and writes them down. ``skew`` 1 draws words evenly, more makes the late ones of a list rare."""

    def __init__(self, seed: int, skew: float = 1.0):
        self.rng, self.skew, self.lexicon = np.random.default_rng(seed), skew, the_lexicon()
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

    def clause(self, p_modifier: float = 0.3, p_relative: float = 0.0) -> Clause:
        self.said.clear()
        lexicon = self.lexicon
        verb = self.word(lexicon.verbs)
        quantifier = self.pick(("the", "some") * 4 + ("every", "no"))
        plain = quantifier in ("the", "some")
        negated = plain and self.chance(0.25)
        kind, plural = self.pick(verb.agents), quantifier != "no" and self.chance(0.5)
        return Clause(
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

    def voice(self, c: Clause) -> Clause:
        """``c`` in either voice, where both mean the same: "every" and "no" would change their scope."""
        same = c.quantifier == "the" or (c.quantifier == "some" and not c.negated)
        return replace(c, passive=same and self.chance(0.15))

    def noun_phrase(self, quantifier: str, adjective: Words | None, noun: Noun, plural: bool) -> str:
        words = [self.say(adjective)] if adjective else []
        word = self.say(noun.words)
        words.append(_plural(word) if plural else word)
        one = "an" if words[0][0] in "aeiou" else "a"
        determiners = {"some": (one, "some"), "every": ("every", "all")}
        return " ".join([determiners.get(quantifier, (quantifier, quantifier))[plural], *words])

    def sentence(self, c: Clause, mistake: str = "") -> str:
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

    def edits(self, c: Clause) -> dict[str, list[dict[str, Any]]]:
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
        found[up if c.adjective else down].append({"adjective": None if c.adjective else self.word(lexicon.adjectives)})
        found["weaker" if c.object_adjective else "open"].append(
            {"object_adjective": None if c.object_adjective else self.word(lexicon.adjectives)}
        )
        found["weaker" if bool(c.adverb) != denied else "open"].append(
            {"adverb": None if c.adverb else self.word(lexicon.adverbs)}
        )
        if c.quantifier == "every":
            found["weaker"].append({"quantifier": "some"})
            found["false"] += [{"quantifier": "no"}, {"quantifier": "some", "negated": True}]
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
            if opposite := lexicon.opposites.get(c.verb.words):
                found["false"].append({"verb": replace(c.verb, words=opposite)})
            if c.adverb:
                found["false"].append({"adverb": lexicon.opposites[c.adverb]})
        if swapped := self.swapped(c):
            found["open"].append(swapped)
        return found

    def stranger(self, noun: Noun, kinds: str) -> Noun:
        """Another noun, mostly of another kind where ``kinds`` has one: those of one kind are harder to tell apart."""
        others = kinds.replace(noun.kind, "")
        kind = self.pick(others) if others and self.chance(0.8) else noun.kind
        return self.word(self.lexicon.nouns[kind], but=noun)

    def other_verb(self, c: Clause) -> Verb | None:
        """One that takes the nouns of ``c``, neither the same nor its opposite; None where there is none."""
        fits = [v for v in self.lexicon.verbs if c.subject.kind in v.agents and c.object.kind in v.patients]
        others = [v for v in fits if v != c.verb and v.words != self.lexicon.opposites.get(c.verb.words)]
        return self.word(others) if others else None

    def swapped(self, c: Clause) -> dict[str, Any]:
        """The edit that exchanges subject and object, empty where the verb does not allow it."""
        if c.object.kind not in c.verb.agents or c.subject.kind not in c.verb.patients or c.relative:
            return {}
        return {"subject": c.object, "object": c.subject, "plural": c.object_plural, "object_plural": c.plural,
                "adjective": c.object_adjective, "object_adjective": c.adjective}  # fmt: skip

    def edited(self, c: Clause, kind: str) -> Clause:
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
            kinds = [kind for kind in lexicon.nouns if kind not in c.verb.patients]
            c = replace(c, object=self.word(lexicon.nouns[self.pick(kinds or ["B"])]))
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
        changes: dict[str, Any] = {slot: value for slot, value in fresh.items() if self.chance(share)}
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
            return self.opinion(good), self.pick(_ADVISE[not good])
        kind = self.pick(tuple(LINKS))
        if draw < 0.6:  # entries are short: which words go together is learned early and cheaply
            first, second = (self.pick(concept) for concept in self.entry(kind))
        else:
            c = self.clause()
            other = c if kind == "same" else self.edited(c, kind)
            first, second = self.sentence(self.voice(c)), self.sentence(self.voice(other))
        return first, f"{self.pick(LINKS[kind])} {second}"

    def entry(self, kind: str) -> tuple[Words, Words]:
        """Two concepts, as a thesaurus lists them."""
        lexicon, group = self.lexicon, self.pick(self.lexicon.groups())
        concept = self.pick(group)
        if kind == "false":
            return self.pick(list(lexicon.opposites.items()))
        if kind == "weaker":
            noun = self.pick(lexicon.nouns[self.pick(tuple(_NOUNS))])
            return noun.words, lexicon.hypernyms[noun.kind].words
        return concept, concept if kind == "same" else self.word(group, but=concept)
