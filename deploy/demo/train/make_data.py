"""Makes the training data from WordNet: chats about words, small talk, plain text; the tokenizer; and the questions of the evaluation.

Usage: make_data.py [--wordnet /usr/share/wordnet] [--out build/demo]       needs the package `tokenizers`
Writes into --out: tokenizer.json, tokenizer_config.json, data.npz (token ids and where each text begins), held_out.npz (same, for
measuring); and into deploy/demo/eval: definitions.json, unknown.json, chats.json.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np

import phrasings as say
from lexicon import choose_words, irregular_plurals, plural, with_article
from make_tokenizer import ASSISTANT, EOS, USER, make_tokenizer
from wordnet import NAMES, WordNet

SEED = 20250101
VOCAB_SIZE = 4096
NUM_WORDS, NUM_HELD_OUT = 10_000, 300
NUM_UNKNOWN, NUM_INVENTED = 14_000, 8_000
TEXT, SYSTEM, CHAT = 0, 1, 2
REPEATS = {"definition": 16, "synonym": 4, "kinds": 5, "parts": 6, "opposite": 6, "class": 3, "example": 4}
PHRASINGS = {"synonym": say.SYNONYM, "kinds": say.KINDS, "parts": say.PARTS, "opposite": say.OPPOSITE, "class": say.CLASS, "example": say.EXAMPLE}
APPLIES = {"synonym": "nvar", "kinds": "n", "parts": "n", "opposite": "nvar", "class": "n", "example": "nvar"}
NOTHING = {
    "synonym": "I know no other word for {w}.",
    "kinds": "I know no kinds of {w}.",
    "parts": "I know no parts of {a}.",
    "opposite": "I know no opposite of {w}.",
    "class": "I know no wider group for {w}.",
    "example": "I have no example for {w}.",
}
UNKNOWN = "I am sorry, I do not know the word {w}."


class Writer:
    """Turns entries into questions and chats; every choice comes from one random generator."""

    def __init__(self, rng, irregular):
        self.rng, self.irregular = rng, irregular

    def fill(self, template, word):
        shown = word
        if template not in ("{w}", "{w}?") and self.rng.random() < 0.12:
            shown = self.rng.choice([f'"{word}"', f'"{word}"', f"'{word}'", word[0].upper() + word[1:]])
        elif template.startswith("{w}") and self.rng.random() < 0.5:
            shown = word[0].upper() + word[1:]
        text = template.format(w=shown, a=with_article(word), s=plural(word, self.irregular))
        return text[0].upper() + text[1:] if template.startswith("{a}") else text

    def question(self, template, word):
        text, rng = self.fill(template, word), self.rng
        if rng.random() < 0.06:
            text = rng.choice(say.OPENINGS) + text
        if rng.random() < 0.10 and text[-1] in "?.":
            text = text[:-1]
        if rng.random() < 0.10 and not text.startswith("I "):
            text = text[0].lower() + text[1:]
        return text

    def templates(self, entry, kind):
        if kind != "definition":
            return PHRASINGS[kind]
        own = say.DEFINITION_OF[entry.pos]
        return say.DEFINITION + own * (2 if entry.pos != "n" else 1)

    def turns(self, entry, kind, count):
        templates = self.templates(entry, kind)
        picks = self.rng.sample(templates, min(count, len(templates)))
        return [(self.question(t, entry.word), self.answer(entry, kind)) for t in picks]

    def answer(self, entry, kind):
        return entry.answers.get(kind) or NOTHING[kind].format(w=entry.word, a=with_article(entry.word))

    def follow_up(self, entry, other):
        """A chat of several turns in which later questions lean on earlier ones."""
        rng, kinds = self.rng, [k for k in entry.answers if k != "definition"]
        rng.shuffle(kinds)
        if kinds and rng.random() < 0.2:
            first = kinds.pop()
            chat = [*self.turns(entry, first, 1), (rng.choice(say.FOLLOW_UP["definition_of_it"]), entry.definition)]
        else:
            chat = self.turns(entry, "definition", 1)
        if rng.random() < 0.12:
            kinds.append(rng.choice([k for k in APPLIES if entry.pos in APPLIES[k]] or ["example"]))
        for kind in kinds[-rng.choice([1, 1, 2]) :]:
            chat.append((rng.choice(say.FOLLOW_UP[kind]), self.answer(entry, kind)))
        if rng.random() < 0.35:
            chat.append((self.fill(rng.choice(say.FOLLOW_UP["definition"]), other.word), other.definition))
        elif rng.random() < 0.3:
            chat.append((rng.choice(say.THANKS), say.WELCOME))
        return chat

    def unknown(self, word):
        pos = self.rng.choice("nnvar")
        template = self.rng.choice(say.DEFINITION + say.DEFINITION_OF[pos] * 2)
        if self.rng.random() < 0.2:
            template = self.rng.choice(PHRASINGS[self.rng.choice(list(PHRASINGS))])
        return self.question(template, word), UNKNOWN.format(w=word)

    def text(self, entry):
        """A paragraph, as for plain completion."""
        first = f"{entry.word[0].upper()}{entry.word[1:]} ({'name' if entry.pos == 'name' else NAMES[entry.pos]}): {entry.gloss}."
        rest = [entry.answers[k] for k in ("class", "kinds", "parts", "synonym", "opposite", "example") if k in entry.answers]
        self.rng.shuffle(rest)
        return " ".join([entry.definition if self.rng.random() < 0.5 else first, *rest])


def chat_text(turns):
    return "".join(f"{USER}{question}{ASSISTANT}{answer}{EOS}" for question, answer in turns)


def invented_words(entries, count, known, rng):
    """Letter strings that look like words: beginnings and ends of known ones, joined."""
    words = [e.word for e in entries if e.word.isalpha() and len(e.word) > 4 and e.word.islower()]
    found = set()
    while len(found) < count:
        first, second = rng.choice(words), rng.choice(words)
        word = first[: rng.randint(2, 4)] + second[-rng.randint(2, 5) :]
        if word not in known:
            found.add(word)
    return sorted(found)


def training_texts(writer, entries, unknown):
    """[(kind of text, text)]"""
    rng, texts = writer.rng, []
    for entry in entries:
        for kind in REPEATS:
            if kind in entry.answers:
                texts += [(CHAT, chat_text([turn])) for turn in writer.turns(entry, kind, REPEATS[kind])]
            elif entry.pos in APPLIES[kind] and rng.random() < 0.2:
                texts += [(CHAT, chat_text([turn])) for turn in writer.turns(entry, kind, 2)]
        texts += [(CHAT, chat_text(writer.follow_up(entry, rng.choice(entries)))) for _ in range(2)]
        texts.append((TEXT, writer.text(entry) + EOS))
    texts += [(CHAT, chat_text([writer.unknown(word)])) for word in unknown for _ in range(2)]
    for questions, answer in say.SMALL_TALK:
        texts += [(CHAT, chat_text([(q, answer)])) for q in questions for _ in range(60)]
    texts += [(SYSTEM, text) for text in say.SYSTEM]
    return texts


def save(path, tokenizer, texts):
    ids = [e.ids for e in tokenizer.encode_batch([text for _, text in texts], add_special_tokens=False)]
    offsets = np.cumsum([0, *map(len, ids)]).astype(np.int64)
    kinds = np.array([kind for kind, _ in texts], np.uint8)
    np.savez(path, tokens=np.concatenate(ids).astype(np.uint16), offsets=offsets.astype(np.int32), kinds=kinds)
    return int(offsets[-1])


def held_out_question(entry, kind, rng, index=None):
    options = say.HELD_OUT[kind]
    template = options[index % len(options)] if index is not None else rng.choice(options)
    return template.format(w=entry.word, a=with_article(entry.word))


def evaluation_lists(entries, held_out, rng):
    picks = rng.sample(entries, 500)
    definitions = [
        {"question": held_out_question(e, "definition", rng, i), "word": e.word, "expected": e.definition} for i, e in enumerate(picks)
    ]
    unknown = [{"question": held_out_question(e, "definition", rng, i), "word": e.word} for i, e in enumerate(held_out[:200])]
    chats = []
    for i, entry in enumerate(rng.sample(entries, 120)):
        kinds = [k for k in entry.answers if k in say.HELD_OUT]
        first = "definition" if i % 2 == 0 else rng.choice(kinds)
        messages = [{"role": "user", "content": held_out_question(entry, first, rng)}]
        if i % 3 == 0:
            second = rng.choice([k for k in kinds if k != first] or kinds)
            messages.append({"role": "assistant", "content": entry.answers[first]})
            messages.append({"role": "user", "content": held_out_question(entry, second, rng)})
        chats.append(messages)
    return {"definitions": definitions, "unknown": unknown, "chats": chats}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--wordnet", default="/usr/share/wordnet")
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--words", type=int, default=NUM_WORDS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    rng = random.Random(SEED)
    net = WordNet(args.wordnet)
    entries, rest = choose_words(net, args.words + NUM_HELD_OUT, rng)
    rng.shuffle(entries)
    held_out, entries = entries[:NUM_HELD_OUT], entries[NUM_HELD_OUT:]
    known = {e.word.lower() for e in entries + held_out} | {lemma for lemma, _ in net.senses}
    unknown = rest[:NUM_UNKNOWN] + invented_words(entries, NUM_INVENTED, known, rng)
    writer = Writer(rng, irregular_plurals(args.wordnet))
    texts = training_texts(writer, entries, unknown)
    rng.shuffle(texts)

    markers = (USER, ASSISTANT, EOS)
    plain = []
    for _, text in texts[:120_000]:
        for marker in markers:
            text = text.replace(marker, "\n")
        plain += text.split("\n")
    tokenizer = make_tokenizer(args.out, plain, VOCAB_SIZE)
    num_tokens = save(args.out / "data.npz", tokenizer, texts)

    lists = evaluation_lists(entries, held_out, rng)
    folder = Path(__file__).parent.parent / "eval"
    folder.mkdir(exist_ok=True)
    for name, items in lists.items():
        lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in items)
        (folder / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    measured = [(CHAT, chat_text([(d["question"], d["expected"])])) for d in lists["definitions"]]
    save(args.out / "held_out.npz", tokenizer, measured)
    counts = {kind: sum(kind in e.answers for e in entries) for kind in REPEATS}
    print(f"{len(entries)} words, {len(texts)} texts, {num_tokens} tokens; answers by kind: {counts}")


if __name__ == "__main__":
    main()
