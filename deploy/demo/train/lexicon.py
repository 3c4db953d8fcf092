"""Chooses the words of the pocket dictionary and writes down what the model shall answer about each."""

import re
from dataclasses import dataclass, field

from wordnet import NAMES, shorten

UNWANTED = re.compile(r"offensive|obscene|vulgar|slur|disparag|sexual|copulat|prostitut|genital|penis|vagina|intercourse|slang", re.I)
MAX_LISTED = 4
VOWEL = re.compile(r"(?!uni|use|usu|eu|one|ut|ubi)[aeiou]|hour|honest|honor|heir", re.I)


@dataclass
class Entry:
    word: str  # as written
    pos: str  # n v a r, or name
    gloss: str
    also: str = ""  # a second sentence, for a second sense
    answers: dict = field(default_factory=dict)  # question kind -> answer; missing: nothing is known

    @property
    def definition(self):
        pos = "name" if self.pos == "name" else NAMES[self.pos]
        return f"The {pos} {self.word} means: {self.gloss}.{self.also}"


def with_article(word):
    return word if word[0].isupper() else ("an " if VOWEL.match(word) else "a ") + word


def plural(word, irregular):
    if word in irregular:
        return irregular[word]
    if re.search(r"(s|x|z|ch|sh)$", word):
        return word + "es"
    return word[:-1] + "ies" if re.search(r"[^aeiou]y$", word) else word + "s"


def irregular_plurals(directory):
    pairs = (line.split()[:2] for line in open(f"{directory}/noun.exc", encoding="latin-1"))
    return {base: form for form, base in pairs if "_" not in form}


def listed(words):
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def relations(net, key, lemma, word, is_name):
    synset, answers = net.synsets[key], {}
    synonyms = [w for w in synset.words if w.lower() != lemma][:3]
    if synonyms:
        answers["synonym"] = f"Another word for {word} is {listed(synonyms).replace(' and ', ' or ')}."
    opposites = net.related(key, lemma, ["!"])
    if opposites:
        answers["opposite"] = f"The opposite of {word} is {opposites[0]}."
    examples = [e for e in synset.examples if 3 <= len(e.split()) <= 14 and re.search(re.escape(lemma[:4]), e, re.I)]
    if examples:
        answers["example"] = f'Here is an example: "{examples[0]}".'
    if key[0] != "n":
        return answers
    wider = net.related(key, lemma, ["@", "@i"])
    if wider:
        article = with_article(word)
        answers["class"] = f"{article[0].upper()}{article[1:]} is a kind of {wider[0]}."
        if is_name:
            answers["class"] = f"{word} is {with_article(wider[0])}."
    kinds = net.related(key, lemma, ["~"])
    if len(kinds) >= 2 and not is_name:
        best = sorted(range(len(kinds)), key=lambda i: (-sum(c for c, _ in net.ranked_senses(kinds[i].lower())), i))
        answers["kinds"] = f"Kinds of {word} are: {listed([kinds[i] for i in sorted(best[:MAX_LISTED])])}."
    parts = net.related(key, lemma, ["%p"])[:MAX_LISTED]
    if parts:
        answers["parts"] = f"Parts of {with_article(word)} are: {listed(parts)}."
    return answers


def make_entry(net, lemma):
    """None: no sense of the word has a gloss that a pocket dictionary can hold."""
    ranked = [(weight, key, shorten(net.synsets[key].gloss)) for weight, key in net.ranked_senses(lemma)[:4]]
    if any(UNWANTED.search(net.synsets[key].gloss) for _, key, _ in ranked):
        return None
    top = ranked[0][0]
    usable = [(weight, key, gloss) for weight, key, gloss in ranked if gloss and weight * 2 >= top]
    if not usable:
        return None
    weight, key, gloss = usable[0]
    word, pos = net.written(key, lemma), key[0]
    is_name = pos == "n" and word[0].isupper()
    entry = Entry(word, "name" if is_name else pos, gloss)
    for other_weight, other, other_gloss in usable[1:2]:
        if other_weight * 2 >= weight and other_weight >= 4 and len(other_gloss.split()) <= 12 and not net.written(other, lemma)[0].isupper():
            name = NAMES[other[0]]
            entry.also = f" It can also mean: {other_gloss}." if other[0] == pos else f" As {with_article(name)}, it means: {other_gloss}."
    entry.answers = relations(net, key, lemma, word, is_name)
    entry.answers["definition"] = entry.definition
    return entry


def choose_words(net, count, rng):
    """-> entries of the `count` weightiest words, and the other lemmas in random order."""
    lemmas = sorted({lemma for lemma, _ in net.senses if re.fullmatch(r"[a-z][a-z'-]+( [a-z][a-z'-]+)?", lemma)})
    weight = {lemma: sum(w for w, _ in net.ranked_senses(lemma)) - (6 if " " in lemma else 0) for lemma in lemmas}
    order = sorted(lemmas, key=lambda lemma: (-weight[lemma], rng.random()))
    entries, taken = [], set()
    for lemma in order:
        if len(entries) == count:
            break
        entry = make_entry(net, lemma)
        if entry:
            entries.append(entry)
            taken.add(lemma)
    rest = [lemma for lemma in lemmas if lemma not in taken and " " not in lemma and "'" not in lemma and len(lemma) > 3]
    rng.shuffle(rest)
    return entries, rest
