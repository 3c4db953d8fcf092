"""Reads WordNet's database (the files index.* and data.* of Debian's wordnet-base; format: wndb(5WN))."""

import re
from dataclasses import dataclass, field
from pathlib import Path

PARTS_OF_SPEECH = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
NAMES = {"n": "noun", "v": "verb", "a": "adjective", "r": "adverb"}
MAX_GLOSS_WORDS = 16
CLAUSE_STARTS = "that which who whose where when because having with containing used by".split()
NO_CLAUSE_END = "a an the of in to for and or by with on from at as is are be not being used having especially usually".split()
THINGS = {"05", "06", "08", "13", "17", "19", "20", "27"}  # lexicographer files: animals, artifacts, body, food, objects, ...


@dataclass
class Synset:
    pos: str
    words: list  # as written, spaces for underscores
    gloss: str
    examples: list
    is_thing: bool
    pointers: dict = field(default_factory=dict)  # symbol -> [(pos, offset, source word number, target word number)]
    is_instance: bool = False


def shorten(gloss):
    """The first clause of a gloss, without parentheses, cut where a clause ends if it is long; None if it stays too long."""
    gloss = re.sub(r"\([^()]*\)", " ", gloss).split(";")[0]
    gloss = re.sub(r"\s+([,.:])", r"\1", " ".join(gloss.split())).strip(" ,.:-")
    words = gloss.split()
    if len(words) > MAX_GLOSS_WORDS:
        cuts = [i + 1 for i, word in enumerate(words) if word[-1] in ",:"]
        cuts += [i for i, word in enumerate(words) if word in CLAUSE_STARTS]
        cuts = [i for i in cuts if 5 <= i <= MAX_GLOSS_WORDS and words[i - 1].strip(",:") not in NO_CLAUSE_END]
        if cuts:
            return " ".join(words[: max(cuts)]).strip(" ,:")
        return None if len(words) > MAX_GLOSS_WORDS + 6 else gloss
    return gloss if words and "(" not in gloss and ")" not in gloss and '"' not in gloss else None


def parse_gloss(text):
    examples = [e.strip(" ,;.") for e in re.findall(r'"([^"]+)"', text)]
    return re.sub(r'"[^"]*"?', "", text).strip(" ;"), examples


def parse_synset(line):
    fields, _, gloss = line.partition("|")
    fields = fields.split()
    pos = "a" if fields[2] == "s" else fields[2]
    count, at = int(fields[3], 16), 4
    words = [re.sub(r"\((a|p|ip)\)$", "", w).replace("_", " ") for w in fields[at : at + 2 * count : 2]]
    at += 2 * count
    definition, examples = parse_gloss(gloss)
    synset = Synset(pos, words, definition, examples, pos == "n" and fields[1] in THINGS)
    for i in range(int(fields[at])):
        symbol, offset, target_pos, ends = fields[at + 1 + 4 * i : at + 5 + 4 * i]
        pointer = ("a" if target_pos == "s" else target_pos, int(offset), int(ends[:2], 16), int(ends[2:], 16))
        synset.pointers.setdefault(symbol, []).append(pointer)
    synset.is_instance = "@i" in synset.pointers
    return synset


class WordNet:
    def __init__(self, directory="/usr/share/wordnet"):
        directory = Path(directory)
        self.synsets, self.senses, self.counts = {}, {}, {}
        for name, pos in PARTS_OF_SPEECH.items():
            for line in open(directory / f"data.{name}", encoding="latin-1"):
                if not line.startswith(" "):
                    self.synsets[pos, int(line[:8])] = parse_synset(line)
            for line in open(directory / f"index.{name}", encoding="latin-1"):
                if not line.startswith(" "):
                    fields = line.split()
                    offsets = [int(f) for f in fields[-int(fields[2]) :]]
                    self.senses[fields[0].replace("_", " "), pos] = [(pos, o) for o in offsets]
        types = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}
        for line in open(directory / "cntlist.rev", encoding="latin-1"):
            key, number, count = line.split()
            lemma, _, rest = key.partition("%")
            entry = (lemma.replace("_", " "), types[rest[0]], int(number) - 1)
            self.counts[entry] = max(int(count), self.counts.get(entry, 0))

    def ranked_senses(self, lemma):
        """(weight, synset id) of a lemma, the most frequent first; parts of speech mixed. The weight is the tag count, and a little
        for things that come in kinds: the tagged texts hardly speak of whales and pianos, people do."""
        found = []
        for pos in "nvar":
            for i, key in enumerate(self.senses.get((lemma, pos), [])):
                synset = self.synsets[key]
                bonus = 3 if synset.is_thing and len(synset.pointers.get("~", [])) >= 2 else 0
                found.append((self.counts.get((lemma, pos, i), 0) + bonus, i, "nvar".index(pos), key))
        return [(count, key) for count, _, _, key in sorted(found, key=lambda s: (-s[0], s[1], s[2]))]

    def written(self, key, lemma):
        """The lemma with its capitals."""
        return next((w for w in self.synsets[key].words if w.lower() == lemma), lemma)

    def related(self, key, lemma, symbols):
        """First words of the synsets that pointers of `key` lead to; lexical pointers only from the lemma itself."""
        synset, found = self.synsets[key], []
        for symbol in symbols:
            for pos, offset, source, target in synset.pointers.get(symbol, []):
                if source and synset.words[source - 1].lower() != lemma:
                    continue
                word = self.synsets[pos, offset].words[max(target - 1, 0)]
                if word.lower() != lemma and word not in found:
                    found.append(word)
        return found
