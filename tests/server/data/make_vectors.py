#!/usr/bin/env python3
# Makes the test data of the tokenizer beside this file: a small tokenizer of our own, in the form of
# DeepSeek-V3's, and what Hugging Face's `tokenizers` and Python make of many texts.
#
#   python3 -m venv /tmp/venv && /tmp/venv/bin/pip install tokenizers==0.23.3
#   /tmp/venv/bin/python tests/server/data/make_vectors.py
#
# The output is the same in each run of the same version.
import json
import pathlib
import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).parent
PATTERNS = [
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^CRLF\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r" ?[\p{P}\p{S}]+[CRLF]*|\s*[CRLF]+|\s+(?!\S)|\s+",
]
PATTERNS[2] = PATTERNS[2].replace("CRLF", "\r\n")  # the characters themselves, as in the official file

CORPUS = """
The sperm whale dives deeper than any other toothed whale and comes back with stories of squid. It
sleeps upright, it speaks in clicks, and its families keep dialects that their neighbours do not use.
Counting 1 2 3, 10, 100, 1000 and 12345; it's theirs, isn't it? They're here, we've seen them.

    def dive(depth, speed=1.5):
        while depth > 0 and speed != 0:
            depth -= speed * 0.25
        return {"depth": depth, "ok": True}

抹香鲸是体型最大的齿鲸，能潜入两千米以下的深海。鲸鱼在海里睡觉，鲸鱼在海里说话。
マッコウクジラは深い海にもぐる。クジラは海で歌う。
향유고래는 깊은 바다로 잠수한다. 고래는 바다에서 노래한다.
Кашалот ныряет глубже других китов. Ο φυσητήρας βουτά βαθιά. Le cachalot plonge très profondément.
""" * 2

# (content, id, special, normalized): ids with holes, one token found before another it overlaps with.
ADDED = [
    ("<｜begin▁of▁sentence｜>", 0, True, False),
    ("<｜end▁of▁sentence｜>", 1, True, False),
    ("<｜▁pad▁｜>", 2, True, False),
    ("<｜User｜>", 900, False, True),
    ("<｜Assistant｜>", 901, False, True),
    ("<|EOT|>", 905, True, True),
    ("<|EOT|><|EOT|>", 906, True, True),
    ("<think>", 910, False, False),
    ("nk><｜", 911, False, True),
    ("｜>x", 912, False, False),
]

TEXTS = [
    "", " ", "  ", "\n", "\n\n\n", " \n", "\n ", "\t", "\t\t\tx", "hello", "  hello", "hello  ", "a b", "a  b",
    "a  1", "a 1", "1  a", "1234567890", "1 234 5678", "٣٤٥٦", "１２３４", "²½Ⅷ", "x1y22z333w4444", "it's we're I'll",
    "!hello ?World .txt", "--flag=--x", "a\u0000b", "\u0000", "\u0000\u0000", "\u200d", "a\u200db", "\u200d\u200d",
    "e\u0301", "\u0301", " \u0301", "1\u0301", "café", "cafe\u0301", "\u0085", "a\u0085b", "\u0085\u0085 b",
    "\ufeff", "\ufeffa", "a \ufeff b", "\u180e", "a\u180eb", " \u180e ", "\u180e \u180e\n", "\u00a0", "a\u00a0 b",
    "\u3000\u3000鲸", "\u2028\u2029x", "\u001c\u001d\u001e\u001f x", "\u000b\u000c\r\n x", "\r\n\r\n", "a\r\n b",
    "鲸鱼hello鲸鱼", "鲸1鱼", "クジラ。クジラ", "\u3040\u309f\u30a0\u30ff\u3100", "\u9fa5\u9fa6", "㐀𠀀", "고래는 바다",
    "\u1100\u1161\u11a8", "Кашалот ныряет", "😀", "😀😀 x", "👨‍👩‍👧", "🇫🇷", "☎️", "\U0001fae8", "a\U0001fae9b",
    "\U0002ebf0鲸", "\U00010d40\U00010d41", "\u0897a", "\u1b4e!", "\U00016d40b", "\u0378", "\U0010ffff", "\ufffd\ufffe",
    "<｜User｜>", "<｜User｜>hi<｜Assistant｜>", "a <｜User｜> b", " <｜User｜>", "<｜User｜>  ", "x  <｜User｜>", "<｜User",
    "<<｜User｜>>", "<|EOT|>", "<|EOT|><|EOT|>", "<|EOT|><|EOT|><|EOT|>", "<|EOT|", "<think><｜User｜>", "<thin",
    "<think>x</think>", "<thi<think>nk><｜", "nk><｜User｜>", "<｜User｜>x", "<｜User｜>xy", "｜>x",
    "<｜begin▁of▁sentence｜>The whale<｜end▁of▁sentence｜>", "<｜▁pad▁｜><｜▁pad▁｜>", "{\"depth\": depth}\n\n    return",
    "    def dive(depth):\n\treturn 1.5\n", "\\[x\\]^_`{|}~", "'''", "a'b'c", " ?!\n\n", "?!\r\n\r\n?", "x \n\n \n y",
    "qxj", "a qxj xj qxjqxj", CORPUS[:400],
]


def official_form(vocab, merges):
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            dict(id=i, content=c, single_word=False, lstrip=False, rstrip=False, normalized=n, special=s)
            for c, i, s, n in sorted(ADDED, key=lambda token: token[1])
        ],
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in PATTERNS
            ]
            + [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}],
        },
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": merges,
        },
    }


def make_tokenizer():
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(p), "isolated") for p in PATTERNS]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    trained.train_from_iterator([CORPUS], trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    # Ids from 3, with a hole of 5 before each 100th; added tokens are in the vocabulary, as ids 0 to 2 of
    # DeepSeek-V3 are, because `tokenizers` numbers others itself.
    vocab = {content: i for content, i, _, _ in ADDED}
    vocab.update({token: 3 + i + 5 * (i // 100) for i, token in enumerate(tokens)})
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    # A token that its own bytes never become: "qx" is made before "xj", and "qx" + "j" has no rule.
    vocab.update({"qx": 920, "xj": 921, "qxj": 922})
    assert not {"q x", "x j", "q xj"} & set(merges)
    merges += ["q x", "x j", "q xj"]
    return official_form(vocab, merges)


def random_text(rng, letters):
    parts = []
    for _ in range(rng.randrange(1, 7)):
        kind = rng.randrange(8)
        if kind == 0:
            parts.append("".join(chr(rng.choice(letters)) for _ in range(rng.randrange(1, 5))))
        elif kind == 1:
            parts.append(rng.choice(ADDED)[0])
        elif kind == 2:
            parts.append("".join(rng.choice(" \t\n\r\u0085\u00a0\u3000\u180e\u200b\ufeff") for _ in range(3)))
        elif kind == 3:
            parts.append("".join(rng.choice("0123456789٣४９Ⅷ") for _ in range(rng.randrange(1, 8))))
        elif kind == 4:
            parts.append("".join(rng.choice("!'#-.<>|｜。，\u0301\u200d\u0000") for _ in range(rng.randrange(1, 5))))
        else:
            begin = rng.randrange(len(CORPUS))
            parts.append(CORPUS[begin : begin + rng.randrange(1, 20)])
    return "".join(parts)


def random_bytes(rng):
    parts = []
    for _ in range(rng.randrange(1, 7)):
        character = chr(rng.choice([0x41, 0xE9, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x1F433, 0x10FFFF]))
        encoded = bytearray(character.encode())
        kind = rng.randrange(4)
        if kind == 0:
            encoded = encoded[: rng.randrange(len(encoded) + 1)]
        elif kind == 1:
            encoded[rng.randrange(len(encoded))] = rng.randrange(256)
        elif kind == 2:
            encoded = bytes(rng.choice([0x80, 0xBF, 0xC0, 0xC2, 0xE0, 0xED, 0xA0, 0xF0, 0x90, 0xF4, 0xF5, 0xFF])
                            for _ in range(rng.randrange(1, 5)))
        parts.append(bytes(encoded))
    return b"".join(parts)


def ranges_of(regex):
    """The code points that `regex` matches, as "first-last,…" in hexadecimal."""
    split = pre_tokenizers.Split(Regex(regex), "removed")
    ranges = []
    for begin in range(0, 0x110000, 0x1000):
        block = [c for c in range(begin, begin + 0x1000) if not 0xD800 <= c <= 0xDFFF]
        others = set("".join(piece for piece, _ in split.pre_tokenize_str("".join(map(chr, block)))))
        for c in block:
            if chr(c) in others:
                continue
            if ranges and ranges[-1][1] == c - 1:
                ranges[-1][1] = c
            else:
                ranges.append([c, c])
    return ",".join(f"{first:X}-{last:X}" for first, last in ranges)


def main():
    spec = make_tokenizer()
    (HERE / "tokenizer").mkdir(exist_ok=True)
    (HERE / "tokenizer" / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False, indent=1) + "\n")
    bos, eos = ADDED[0][0], ADDED[1][0]
    config = {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "LlamaTokenizerFast",
              "bos_token": {"__type": "AddedToken", "content": bos, "normalized": True}, "eos_token": eos,
              "pad_token": eos, "unk_token": None, "clean_up_tokenization_spaces": False}
    (HERE / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=1) + "\n")

    matching = Tokenizer.from_str(json.dumps(spec))
    plain = Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))
    for content, i, _, _ in ADDED:
        assert matching.token_to_id(content) == i
    rng = random.Random(20250101)
    letters = [c for c in range(0x20, 0x3000) if c != 0x7F]
    letters += [*range(0x1F300, 0x1FAFF), *range(0xAC00, 0xAC80)]
    texts = TEXTS + [random_text(rng, letters) for _ in range(400)]
    encoded = [
        {"text": t, "ids": matching.encode(t, add_special_tokens=False).ids,
         "plain_ids": plain.encode(t, add_special_tokens=False).ids} for t in texts
    ]
    every_id = sorted(matching.get_vocab().values())
    decoded = []
    for _ in range(100):
        ids = [rng.choice(every_id) for _ in range(rng.randrange(1, 12))]
        decoded.append({"ids": ids, "text": matching.decode(ids, skip_special_tokens=False),
                        "text_without_special": matching.decode(ids, skip_special_tokens=True)})
    lossy = [{"hex": b.hex(), "text": b.decode("utf-8", "replace")} for b in (random_bytes(rng) for _ in range(300))]
    classes = {c: ranges_of(c) for c in [r"\p{L}", r"\p{M}", r"\p{N}", r"\p{P}", r"\p{S}", r"\p{Z}", r"\s"]}
    for name, value in [("tokenizer_vectors", {"encode": encoded, "decode": decoded, "lossy_utf8": lossy}),
                        ("oniguruma_classes", classes)]:
        lines = json.dumps(value).replace("}, {", "},\n{").replace('", "', '",\n"')
        (HERE / f"{name}.json").write_text(lines + "\n")


if __name__ == "__main__":
    main()
