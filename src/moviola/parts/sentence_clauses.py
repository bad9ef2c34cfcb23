"""From phrases to what links the things they name: the last step of `sentence_parser.RuleParser`.

One pass keeps the subject of the present clause, the verbs so far and the last noun phrase, and hangs each
new phrase on one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from moviola.parts import sentence_lexicon as lex
from moviola.parts.sentence_phrases import Piece, Thing, phrases
from moviola.parts.sentence_tags import Word, plural

__all__ = ["Link", "relate"]


@dataclass(frozen=True, slots=True)
class Link:
    subject: Thing
    verb: str
    object: Thing | None


@dataclass(slots=True, eq=False)
class _Verb:
    """A verb of the sentence: what it links is written when its objects are known."""

    text: str
    base: str
    form: str
    subjects: list[Thing]
    used: bool = False
    direct: list[int] = field(default_factory=list)  # where in the links its direct objects are


class _Clauses:
    """The state of the pass. A clause's `subjects` are its first noun phrase and what "and" joins to it."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self.things: list[Thing] = []
        self.links: list[Link] = []
        self.verbs: list[_Verb] = []
        self.fronted: list[tuple[str, Thing]] = []  # "in the park, ...": waits for its verb
        self.subjects: list[Thing] = []
        self.last: list[Thing] = []
        self.hung: list[tuple[list[Thing], str]] = []  # what the last noun phrase hangs on, by which words
        self.clause()

    def clause(self) -> None:
        """End a clause, and begin a main or subordinate one."""
        for prep, thing in self.fronted:  # "on the table there is a vase"
            self.link(self.subjects, prep, thing)
        self.fronted.clear()
        self.subjects = []
        self.finite = False
        self.verb: _Verb | None = None  # the clause's latest
        self.copula = ""
        self.antecedent: list[Thing] = []  # what "who" or "that" stands for, until its verb
        self.relative: list[Thing] = []  # the subject within "that the boy throws"
        self.relative_prep = ""
        self.role = ""  # how the last noun phrase came in: subject, relative, object, prep
        self.prep: tuple[str, list[Thing], _Verb | None] | None = None  # waits for its noun phrase
        self.last_prep: tuple[str, list[Thing], _Verb | None] | None = None

    def kind(self, i: int) -> str:
        return self.pieces[i].kind if 0 <= i < len(self.pieces) else "."

    # -- links ------------------------------------------------------------------------------------

    def link(self, subjects: list[Thing], verb: str, target: Thing | None) -> range:
        """Link each subject to the target; the places of the new links."""
        start = len(self.links)
        self.links += [Link(subject, verb, target) for subject in subjects if subject is not target]
        self.hung.append((subjects, verb))
        return range(start, len(self.links))

    def begin_verb(self, word: Word, subjects: list[Thing]) -> None:
        self.verb = _Verb(word.text, word.base, word.form, subjects)
        self.verbs.append(self.verb)
        self.finite = self.finite or bool(self.copula) or word.form in ("s", "base")
        for prep, thing in self.fronted:
            self.link(subjects, f"{word.text} {prep}", thing)
            self.verb.used = True
        self.fronted.clear()

    # -- noun phrases -----------------------------------------------------------------------------

    def noun_phrase(self, i: int, piece: Piece) -> None:
        assert piece.thing is not None
        before = self.kind(i - 1)
        thing = self.meant(piece)
        hung, self.hung = self.hung, []
        if self.prep is not None:
            self.after_prep(thing)
        elif before in ("C", ",") and (self.verb_of_own(i) or self.gapped(i, thing)):
            self.clause()
            self.subjects, self.role = [thing], "subject"
        elif before == "," and self.fronted:
            self.subjects, self.role = [thing], "subject"
        elif before in ("C", ",") and self.role and self.last:
            self.joined(thing, hung)
            return
        elif self.verb is None and self.copula and (self.antecedent or self.subjects):
            self.link(self.antecedent or self.subjects, self.copula, thing)
            self.role, self.copula, self.antecedent = "object", "", []
        elif self.antecedent and self.verb is None:
            self.role = "relative"
            self.relative = [thing]
        elif self.verb is None and not self.subjects:
            self.subjects, self.role = [thing], "subject"
        elif self.verb is not None:
            self.role = "object"
            self.verb.direct += self.link(self.verb.subjects, self.verb.text, thing)
            self.verb.used = True
        self.last = [thing]

    def after_prep(self, thing: Thing) -> None:
        assert self.prep is not None
        prep, governors, verb = self.prep
        self.last_prep, self.prep, self.role = self.prep, None, "prep"
        if verb is not None:
            verb.used = True
            self.link(verb.subjects, f"{verb.text} {prep}", thing)
        elif governors:
            self.link(governors, prep, thing)
        else:
            self.fronted.append((prep, thing))

    def joined(self, thing: Thing, hung: list[tuple[list[Thing], str]]) -> None:
        """A noun phrase after "and" or a comma: it stands where the one before it stands."""
        if self.role == "subject":
            self.subjects.append(thing)
        elif self.role == "relative":
            self.relative.append(thing)
        else:
            for subjects, verb in hung:
                places = self.link(subjects, verb, thing)
                if self.role == "object" and self.verb is not None:
                    self.verb.direct += places
        self.last = [*self.last, thing]

    def verb_of_own(self, i: int) -> bool:
        """Whether the noun phrase at i begins a clause: its verb follows, and the clause before has one."""
        if self.verb is None and not self.copula:
            return False
        k = i + 1
        while self.kind(k) in ("C", "P", "NP", "owner", "K") and k < i + 12:
            if self.kind(k) == "C" and self.kind(k + 1) not in ("NP", "owner"):
                return False
            k += 1
        form = self.pieces[k].word.form if self.kind(k) == "V" else ""
        if self.finite:
            return self.kind(k) == "X" or form in ("s", "base", "ed")
        return form in ("ing", "ed") and k == i + 1

    def gapped(self, i: int, thing: Thing) -> bool:
        """A clause whose verb is left out: "she sits on the floor and the boy on the chair"."""
        places = self.role == "prep" and not any(one.animate for one in self.last)
        return places and thing.animate and self.kind(i + 1) == "P"

    def meant(self, piece: Piece) -> Thing:
        """The thing itself, or for a pronoun the thing before it that it can stand for."""
        thing = piece.thing
        assert thing is not None
        if piece.word.tag == "O":
            form, subject = piece.word.text, self.verb.subjects if self.verb else []
            thing.noun = lex.PRONOUNS[form]
            if form.endswith(("self", "selves")) and subject:
                return subject[0]
            for one in reversed(self.things) if self.verb else self.things:
                if one.noun == thing.noun:
                    return one
                if one not in subject and lex.agree(thing.noun, one.noun, plural(one.noun)):
                    return one
        self.things.append(thing)
        return thing

    # -- verbs ------------------------------------------------------------------------------------

    def verb_phrase(self, i: int, word: Word) -> None:
        before = self.kind(i - 1)
        if self.antecedent:
            self.relative_verb(word)
        elif before == "T":
            self.infinitive_verb(word)
        elif self.copula and self.verb is None:
            self.begin_verb(word, self.subjects)
        elif before in ("C", "V", "K") and self.verbs and self.verb is not None:
            alike = next((v for v in reversed(self.verbs) if v.form == word.form), None)
            last = self.verb
            if before == "V" and last.base in lex.CATENATIVES and not last.used:
                self.verbs.pop()
            self.begin_verb(word, alike.subjects if before == "C" and alike else self.main() or last.subjects)
        elif word.form == "ing" or (word.form == "ed" and not self.reads_finite(i)):
            self.begin_verb(word, self.participle_subject(before, word.form))
        elif not self.finite and self.subjects and not self.lets(word, before):
            self.begin_verb(word, self.subjects)
        else:
            self.begin_verb(word, self.last if self.role in ("object", "prep") else self.main())
        self.copula = ""

    def lets(self, word: Word, before: str) -> bool:
        """Whether a base form belongs to the object before it: "watching a bird fly"."""
        causative = self.verb is not None and self.verb.base in lex.CAUSATIVES
        return causative and word.form == "base" and before == "NP" and self.role == "object"

    def infinitive_verb(self, word: Word) -> None:
        """ "begins to climb" is one verb; "jumps to catch" is two."""
        finite, last = self.finite, self.verb
        if last is None:
            self.begin_verb(word, self.subjects)
        elif last.base in lex.CATENATIVES and not last.used:
            self.verbs.pop()
            self.begin_verb(word, last.subjects)
        else:
            helped = last.base in lex.CAUSATIVES and self.role == "object"
            self.begin_verb(word, self.last if helped else last.subjects)
        self.finite = finite

    def main(self) -> list[Thing]:
        """The subjects of the clause, or in a clause without them ("while riding") those of the last verb."""
        if self.subjects:
            return self.subjects
        return next((v.subjects for v in reversed(self.verbs) if v.subjects), [])

    def reads_finite(self, i: int) -> bool:
        """Whether a past form after a noun phrase is the clause's verb: it has an object and no rival."""
        return not self.finite and self.kind(i + 1) in ("NP", "owner")

    def participle_subject(self, before: str, form: str) -> list[Thing]:
        if before in (",", "B", "V", "K", "C") or not self.last:
            return self.main()
        if form == "ed" or self.role == "subject":
            return self.last
        prep, governors, _ = self.last_prep or ("", [], None)
        if self.role == "prep" and prep == "with" and governors == self.subjects:
            return governors  # "a vase with flowers sitting on a table"
        if any(thing.animate for thing in self.last):
            return self.last
        doers = self.verb.subjects if self.verb else self.subjects
        return doers if any(thing.animate for thing in doers) else self.last

    def relative_verb(self, word: Word) -> None:
        antecedent, self.antecedent = self.antecedent, []
        copula, finite, subjects = self.copula, self.finite, self.subjects
        if self.role != "relative":
            self.begin_verb(word, antecedent)
        else:
            self.begin_verb(word, self.relative)
            assert self.verb is not None
            text = f"{word.text} {self.relative_prep}".strip()
            for thing in antecedent:
                self.link(self.relative, text, thing)
            self.verb.used = True
        self.relative_prep, self.role = "", "relative verb"
        self.copula, self.finite, self.subjects = copula, finite, subjects

    # -- prepositions -----------------------------------------------------------------------------

    def preposition(self, i: int, prep: str) -> None:
        before = self.kind(i - 1)
        after = self.pieces[i + 1] if i + 1 < len(self.pieces) else None
        verb: _Verb | None = None
        governors = self.last if self.role == "subject" else self.last[-1:]
        if prep == "than" and before == "A":  # "taller than"
            prep = f"{self.pieces[i - 1].word.text} than"
        if after is not None and after.kind == "W":
            self.relative_prep = prep
            return
        barefoot = before == "A" and self.verb is not None and self.verb.base not in lex.COPULAS
        if (before in ("V", "K", "X") or barefoot) and self.verb is not None and not self.copula:
            verb = self.verb
        elif self.copula and self.verb is None:
            governors, self.antecedent = self.antecedent or self.subjects, []
        elif before in ("C", ",") and self.last_prep is not None:
            _, governors, verb = self.last_prep
        elif before in (".", "B") or not self.last:
            governors = []
        elif self.verb is not None and self.role in ("object", "prep"):
            doer = any(thing.animate for thing in self.verb.subjects)
            own = after is not None and after.thing is not None and after.thing.owned
            place = self.role == "prep" and not self.last[-1].animate
            tool = after is not None and after.thing is not None and after.thing.noun in lex.INSTRUMENTS
            tool = tool and self.verb.base not in lex.HOLDERS and self.role == "object"
            by = prep == "by" and self.role == "object"
            if prep in lex.MOTION or by or (prep == "with" and doer and (own or place or tool)):
                verb = self.verb
            else:
                governors = self.last[-1:]
        self.prep = (prep, governors, verb)

    # -- the pass ---------------------------------------------------------------------------------

    def adjective(self, i: int, word: Word) -> None:
        """An adjective said of something: "the dog is brown", "looks happy", "a man alone"."""
        if self.copula or self.kind(i - 1) not in ("NP", "owner"):
            own = self.antecedent or self.subjects
            targets = self.verb.subjects if self.verb and not self.copula else own
            self.antecedent = []
            if self.verb is not None and self.verb.base in lex.COPULAS:
                self.verb.used = True
        else:
            targets = self.last
        for thing in targets:
            thing.said.append(word.text)

    def run(self) -> tuple[list[Thing], list[Link]]:
        for i, piece in enumerate(self.pieces):
            word = piece.word
            match piece.kind:
                case "NP":
                    self.noun_phrase(i, piece)
                case "owner":
                    assert piece.thing is not None
                    self.things.append(piece.thing)
                case "V":
                    self.verb_phrase(i, word)
                case "A":
                    self.adjective(i, word)
                case "P":
                    self.preposition(i, word.text)
                case "K" if self.verb is not None and self.kind(i - 1) in ("V", "NP"):
                    self.add_particle(word.text)
                case "X":
                    self.auxiliary(i, word)
                case "W":
                    self.antecedent = self.last
                    self.verb = None
                case "B" | ".":
                    self.clause()
        for verb in self.verbs:
            if not verb.used:
                self.link(verb.subjects, verb.text, None)
        return self.things, self.links

    def add_particle(self, particle: str) -> None:
        """A particle right after the verb, "sits down", or after its object, "takes his jacket off"."""
        assert self.verb is not None
        self.verb.text += f" {particle}"
        for at in self.verb.direct:
            self.links[at] = replace(self.links[at], verb=self.verb.text)

    def auxiliary(self, i: int, word: Word) -> None:
        if word.text in lex.BE | lex.HAVE:
            self.copula = {"'s": "is", "'re": "are", "'m": "am", "'ve": "have"}.get(word.text, word.text)
        if self.antecedent:
            return
        if self.verb is not None:  # "the man holding a dog is ...": back to the clause's own subject
            self.verb = None
        self.finite = True


def relate(words: list[Word]) -> tuple[list[Thing], list[Link]]:
    """The things a sentence names, in its order, and the links between them."""
    return _Clauses(phrases(words)).run()
