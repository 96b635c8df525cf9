"""Texts with something to remember, and questions on them.

A text reads like English. Facts ("ada keeps amber .") stand between filler sentences. After the
text, questions on the facts ("what does ada keep ? amber .") follow in any order, and each fact is
asked once. Three things make this more than a search for rare words:

- names and values of the facts also occur in the filler;
- some facts are decoys: a cue announces that they are never asked ("idle note : ...");
- some facts are corrected later ("correction : ada keeps silver ."), and the last value counts.

So a reader can tell when a word is worth a slot, but not from the word alone. Everything follows
from the seed: the same arguments give the same text on every machine.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

Kind = Literal["fact", "decoy", "correction"]

PAD, UNK, EOS = "<pad>", "<unk>", "</s>"
SPECIAL_TOKENS = (PAD, UNK, EOS)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    """
    ada agnes albert alice alma amos anna anton arthur astrid august aurora basil beatrice bella
    benedict bernard bertha boris bridget bruno camille carl casper cecil celia charles clara claude
    clement colin conrad cora cyril daisy daniel daphne david dennis diana dora edgar edith edmund
    edward eleanor elias elsa emil emma enid eric ernest esther ethel eugene eva evelyn fanny felix
    fergus fiona flora frances frank freda frederick gabriel george gerald gilbert gladys gordon
    grace greta gustav hannah harold harriet harvey hazel hector helen henry herbert hilda horace
    howard hubert hugo ida igor ingrid irene iris isaac isabel ivan ivy jacob james jane jasper jean
    joan john jonas joseph judith julia julian karen klara konrad laura lawrence leo leonard leslie
    lewis lionel lottie louis lucas lucy luther lydia mabel magnus marcus margaret maria martha
    martin matilda maud maurice max melvin mildred milo miriam mona morris muriel nathan nell nina
    noah nora norman olga oliver olive oscar otto pamela patrick paul pearl percy peter philip
    phoebe quentin rachel ralph raymond rebecca robert roger roland rosa rufus rupert ruth samuel
    sarah
    """
)
VALUES = _words(
    """
    amber anchors apples arrows baskets beads bells blankets bones books bottles bowls boxes bread
    bricks bronze brushes buckles buttons candles cards carpets chains chalk cheese chisels cinnamon
    clocks cloth coal coins combs copper coral corn cotton crystals cups daggers diamonds dolls
    drums emeralds feathers figs flags flutes garlic garnets ginger glass gloves gold grain granite
    hammers harps hats helmets herbs honey hooks horns ink iron ivory jade jars jewels keys kites
    knives lamps lanterns lace leather lemons lenses letters linen locks maps marble masks medals
    mirrors nails needles nuts oil onions pearls pepper
    """
)
_NOUNS = _words(
    """
    baker barn bridge captain castle cat chapel child city clerk cloud cook cottage courtyard crow
    dancer doctor dog door farmer field fisher forest fox garden gate goose guard harbour hill horse
    house hunter inn island king lake market mason merchant mill miller miner monk mountain orchard
    owl painter palace path pilot poet pond porter queen river road sailor school shepherd shop
    singer soldier stable station stranger street teacher tower traveller valley village wagon well
    widow wolf wood
    """
)
_VERBS = _words(
    """
    asked called carried chose counted crossed drew dropped feared followed forgot found guarded
    heard hid knew left liked loved met missed moved noticed passed praised reached remembered saw
    served sketched sold thanked touched visited wanted washed watched weighed
    """
)
_ADJECTIVES = _words(
    """
    ancient bright broad calm clever cold dark distant dusty empty gentle golden green grey happy
    hidden humble large lonely narrow noble old pale patient plain proud quick quiet red rich silent
    small steep strange tall tired warm white wide young
    """
)
_ADVERBS = _words(
    "again alone early gladly late now often once quickly seldom slowly soon today twice"
)
_PREPOSITIONS = _words("above behind beside beyond inside near outside under")

# Values also follow names here ("ada sold amber today ."): only the verb tells a fact from filler.
_FORMS = tuple(
    tuple(form.split())
    for form in (
        "NAME VERB NAME .",
        "the NOUN VERB VALUE .",
        "NAME VERB VALUE ADVERB .",
        "the ADJECTIVE NOUN VERB NAME .",
        "NAME VERB the ADJECTIVE NOUN .",
        "the NOUN VERB VALUE PREPOSITION NAME .",
        "NAME ADVERB VERB the ADJECTIVE VALUE .",
        "PREPOSITION the NOUN , NAME VERB VALUE .",
        "the NOUN and the NOUN ADVERB VERB NAME .",
        "ADVERB NAME and NAME VERB the ADJECTIVE NOUN .",
        "the ADJECTIVE NOUN VERB the NOUN PREPOSITION the NOUN .",
    )
)
_SHORTEST = min(map(len, _FORMS))
_FILLER_WORDS: dict[str, tuple[str, ...]] = {
    "NOUN": _NOUNS,
    "VERB": _VERBS,
    "ADJECTIVE": _ADJECTIVES,
    "ADVERB": _ADVERBS,
    "PREPOSITION": _PREPOSITIONS,
}
_CUES: dict[Kind, tuple[str, ...]] = {
    "fact": (),
    "decoy": ("idle", "note", ":"),
    "correction": ("correction", ":"),
}
_LONGEST_STATEMENT = max(map(len, _CUES.values())) + 4
_GRAMMAR = (".", ",", ":", "?", "the", "and", "keeps", "keep", "what", "does")

VOCABULARY: tuple[str, ...] = (
    *SPECIAL_TOKENS,
    *_GRAMMAR,
    *dict.fromkeys(word for cue in _CUES.values() for word in cue if word != ":"),
    *NAMES,
    *VALUES,
    *(word for words in _FILLER_WORDS.values() for word in words),
)
"""Every word of every text, special tokens first; a word's place here is its token id."""

FIRST_HELD_OUT_SEED = 1_000_000_000
"""The embedded model was trained only on texts with smaller seeds."""


@dataclass(frozen=True)
class Statement:
    """One "NAME keeps VALUE ." of a text, its cue included.

    Attributes:
        kind: `"fact"`, `"decoy"` (never asked) or `"correction"` (of an earlier fact).
        name: who keeps it.
        value: what is kept.
        start: index of the statement's first word, which is the cue's where there is one.
    """

    kind: Kind
    name: str
    value: str
    start: int

    @property
    def words(self) -> tuple[str, ...]:
        """The statement as it stands in the text."""
        return (*_CUES[self.kind], self.name, "keeps", self.value, ".")

    @property
    def value_position(self) -> int:
        """Index of the value's word in the text."""
        return self.start + len(_CUES[self.kind]) + 2


@dataclass(frozen=True)
class Question:
    """A question on one fact of a text.

    Attributes:
        name: who is asked about.
        answer: the last value stated for this name, one word.
        source: index of the word in the text that gives the answer.
    """

    name: str
    answer: str
    source: int

    @property
    def prompt(self) -> tuple[str, ...]:
        """The words after which the answer is the next one."""
        return ("what", "does", self.name, "keep", "?")

    @property
    def words(self) -> tuple[str, ...]:
        """The question with its answer and the end of the turn."""
        return (*self.prompt, self.answer, ".", EOS)


@dataclass(frozen=True)
class RecallText:
    """A text and the questions on it. One word is one token of the embedded model.

    Attributes:
        words: the context, questions not included.
        statements: facts, decoys and corrections in the order of the text.
        questions: in the order in which they are asked.
    """

    words: tuple[str, ...]
    statements: tuple[Statement, ...]
    questions: tuple[Question, ...]

    @property
    def text(self) -> str:
        """The context as one string."""
        return " ".join(self.words)

    def prompt(self, question: Question) -> str:
        """The context and one open question, ready for a tokenizer and `generate`."""
        return " ".join((*self.words, *question.prompt))


def make_recall_text(
    num_tokens: int,
    *,
    seed: int,
    spacing: tuple[int, int] = (24, 90),
    decoy_share: float = 0.15,
    correction_share: float = 0.1,
    num_questions: int | None = None,
) -> RecallText:
    """Write a text of facts, decoys, corrections and filler, and the questions on it.

    Args:
        num_tokens: length of the context in words. The questions come on top, eight words each.
        seed: decides everything; equal arguments give equal texts.
        spacing: least and greatest distance from the start of one statement to the next, uniform.
        decoy_share: probability that a statement is a decoy.
        correction_share: probability that a statement corrects an earlier fact, if some fact was
            not corrected yet. A fact is corrected at most once.
        num_questions: how many facts are asked, chosen at random; `None` asks every fact once.

    Returns:
        The text. Each name has one fact or one decoy, and is asked at most once.

    Raises:
        ValueError: if a length, share or count is out of range, or if the text would need more
            names than there are.
    """
    _check_arguments(num_tokens, spacing, decoy_share, correction_share)
    rng = random.Random(seed)
    statements = _plan(rng, num_tokens, spacing, decoy_share, correction_share)
    words = _write(rng, num_tokens, statements)
    last = {statement.name: statement for statement in statements if statement.kind != "decoy"}
    if num_questions is None:
        num_questions = len(last)
    if not 0 <= num_questions <= len(last):
        raise ValueError(
            f"num_questions: expected 0 to {len(last)} (the facts of this text), "
            f"got {num_questions}"
        )
    asked = rng.sample(list(last.values()), num_questions)
    questions = tuple(Question(fact.name, fact.value, fact.value_position) for fact in asked)
    return RecallText(tuple(words), tuple(statements), questions)


def _check_arguments(
    num_tokens: int, spacing: tuple[int, int], decoy_share: float, correction_share: float
) -> None:
    if num_tokens < _SHORTEST + _LONGEST_STATEMENT + _SHORTEST:
        raise ValueError(
            f"num_tokens: expected at least {_SHORTEST + _LONGEST_STATEMENT + _SHORTEST}, "
            f"got {num_tokens}"
        )
    least = _LONGEST_STATEMENT + _SHORTEST
    if not least <= spacing[0] <= spacing[1]:
        raise ValueError(
            f"spacing: expected two ascending numbers of at least {least}, got {spacing}"
        )
    for name, share in (("decoy_share", decoy_share), ("correction_share", correction_share)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: expected a share between 0 and 1, got {share}")
    if decoy_share + correction_share > 1:
        raise ValueError(
            "decoy_share + correction_share: expected at most 1, "
            f"got {decoy_share} + {correction_share}"
        )


def _plan(
    rng: random.Random,
    num_tokens: int,
    spacing: tuple[int, int],
    decoy_share: float,
    correction_share: float,
) -> list[Statement]:
    """Choose where statements stand. Filler must fit before, between and after them."""
    names = iter(rng.sample(NAMES, len(NAMES)))
    statements: list[Statement] = []
    open_facts: list[Statement] = []
    start = rng.randint(_SHORTEST, min(spacing[0], num_tokens - _LONGEST_STATEMENT - _SHORTEST))
    while start + _LONGEST_STATEMENT + _SHORTEST <= num_tokens:
        draw = rng.random()
        value = rng.choice(VALUES)
        if draw < correction_share and open_facts:
            fact = open_facts.pop(rng.randrange(len(open_facts)))
            while value == fact.value:
                value = rng.choice(VALUES)
            statement = Statement("correction", fact.name, value, start)
        else:
            is_decoy = correction_share <= draw < correction_share + decoy_share
            name = next(names, None)
            if name is None:
                raise ValueError(
                    f"num_tokens: expected a text that needs at most {len(NAMES)} names, "
                    f"got {num_tokens} at spacing {spacing}"
                )
            statement = Statement("decoy" if is_decoy else "fact", name, value, start)
            if not is_decoy:
                open_facts.append(statement)
        statements.append(statement)
        start += rng.randint(*spacing)
    return statements


def _write(rng: random.Random, num_tokens: int, statements: Sequence[Statement]) -> list[str]:
    # Half of the names and values in the filler are those of this text's own statements.
    fillers: dict[str, Sequence[str]] = dict(_FILLER_WORDS)
    own_names = [statement.name for statement in statements]
    own_values = [statement.value for statement in statements]
    words: list[str] = []
    for start, sentence in [*((s.start, s.words) for s in statements), (num_tokens, ())]:
        while len(words) < start:
            form = rng.choice(_forms_for(start - len(words)))
            fillers["NAME"] = own_names if rng.random() < 0.5 else NAMES
            fillers["VALUE"] = own_values if rng.random() < 0.5 else VALUES
            words += [rng.choice(fillers[part]) if part in fillers else part for part in form]
        words += sentence
    return words


@cache
def _forms_for(room: int) -> tuple[tuple[str, ...], ...]:
    """The sentence forms that fill `room` words, or leave room for another sentence."""
    return tuple(form for form in _FORMS if len(form) == room or len(form) + _SHORTEST <= room)
