"""Trains a byte-level BPE tokenizer in the form of DeepSeek-V3's files: same specials, markers, pre-tokenizers and decoder."""

import json
from pathlib import Path

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
MARKERS = [  # (text, special): ids 128800..128814 of the official tokenizer, in its order
    ("<｜fim▁hole｜>", False),
    ("<｜fim▁begin｜>", False),
    ("<｜fim▁end｜>", False),
    (USER, False),
    (ASSISTANT, False),
    ("<|EOT|>", True),
    ("<｜tool▁calls▁begin｜>", False),
    ("<｜tool▁calls▁end｜>", False),
    ("<｜tool▁call▁begin｜>", False),
    ("<｜tool▁call▁end｜>", False),
    ("<｜tool▁outputs▁begin｜>", False),
    ("<｜tool▁outputs▁end｜>", False),
    ("<｜tool▁output▁begin｜>", False),
    ("<｜tool▁output▁end｜>", False),
    ("<｜tool▁sep｜>", False),
]
SPLITS = [
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^""" + "\r\n" + r"""\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+["""
    + "\r\n" + r"""]*|\s*[""" + "\r\n" + r"""]+|\s+(?!\S)|\s+""",
]  # fmt: skip


def added_token(index, content, normalized, special):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized, "special": special}
    return {"id": index, "content": content, **flags}


def byte_level(add_prefix_space, trim_offsets, use_regex):
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": trim_offsets, "use_regex": use_regex}


def tokenizer_json(vocab, merges):
    """vocab: token -> id with the three specials first; the markers follow the last id."""
    specials = [added_token(i, token, False, True) for i, token in enumerate((BOS, EOS, PAD))]
    markers = [added_token(len(vocab) + i, token, True, special) for i, (token, special) in enumerate(MARKERS)]
    splits = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in SPLITS]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": vocab,
        "merges": merges,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": specials + markers,
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level(False, True, False)]},
        "post_processor": byte_level(True, False, True),
        "decoder": byte_level(True, True, True),
        "model": model,
    }


def special(content):
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def tokenizer_config():
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": special(BOS),
        "clean_up_tokenization_spaces": False,
        "eos_token": special(EOS),
        "legacy": True,
        "model_max_length": 131072,
        "pad_token": special(EOS),
        "sp_model_kwargs": {},
        "unk_token": None,
        "tokenizer_class": "LlamaTokenizerFast",
        "chat_template": (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8"),
    }


def make_tokenizer(directory, texts, vocab_size):
    """texts: without markers. vocab_size counts the specials and the markers. -> the tokenizer, as loaded from the file written."""
    from tokenizers import Tokenizer, models, trainers

    base = vocab_size - len(MARKERS)
    blank = tokenizer_json({BOS: 0, EOS: 1, PAD: 2}, [])
    blank["added_tokens"] = blank["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(blank))
    tokenizer.model = models.BPE()
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    trainer = trainers.BpeTrainer(
        vocab_size=base, special_tokens=[BOS, EOS, PAD], initial_alphabet=alphabet, limit_alphabet=256, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    assert list(vocab)[:259] == [BOS, EOS, PAD, *alphabet] and len(vocab) == base, len(vocab)
    for name, value in (("tokenizer.json", tokenizer_json(vocab, merges)), ("tokenizer_config.json", tokenizer_config())):
        (Path(directory) / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
