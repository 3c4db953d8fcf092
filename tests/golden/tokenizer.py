"""A small byte-level BPE tokenizer in the form of the official DeepSeek files: three specials, 256 byte symbols, a few merges,
and the chat markers as added tokens on top."""

import json
from pathlib import Path

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
MARKERS = [  # (text, special): ids 128800..128814 of the official tokenizer, in its order
    ("<｜fim▁hole｜>", False),
    ("<｜fim▁begin｜>", False),
    ("<｜fim▁end｜>", False),
    ("<｜User｜>", False),
    ("<｜Assistant｜>", False),
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
MERGES = (
    "Ġ t|Ġ a|i n|Ġ Ġ|h e|e r|o n|r e|a t|Ġt he|o r|e n|Ġ s|Ġ w|Ġ o|e s|i t|a n|i s|in g|Ġ c|o u|e d|Ġ in|a l|Ġo f|n d|Ġa nd|"
    "Ġt o|l l|Ã ©|ä ¸|ä¸ Ń|ĠĠ ĠĠ|Ċ Ċ|= =|1 2|12 3|0 0|H e|He ll|Hell o|Ġw or|Ġwor l|Ġworl d|i on"
).split("|")
PRE_TOKENIZER = [
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^""" + "\r\n" + r"""\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+["""
    + "\r\n" + r"""]*|\s*[""" + "\r\n" + r"""]+|\s+(?!\S)|\s+""",
]


def byte_symbols():
    """The 256 byte symbols, printable bytes first, as in the official vocabulary (ids 3..258)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]


def added_token(index, content, normalized, special):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized, "special": special}
    return {"id": index, "content": content, **flags}


def byte_level(add_prefix_space, trim_offsets, use_regex):
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": trim_offsets, "use_regex": use_regex}


def build_tokenizer():
    tokens = [BOS, EOS, PAD, *byte_symbols(), *(merge.replace(" ", "") for merge in MERGES)]
    vocab = {token: i for i, token in enumerate(tokens)}
    assert len(vocab) == len(tokens)
    specials = [added_token(i, token, False, True) for i, token in enumerate(tokens[:3])]
    markers = [added_token(len(tokens) + i, token, True, special) for i, (token, special) in enumerate(MARKERS)]
    splits = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in PRE_TOKENIZER]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": specials + markers,
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level(False, True, False)]},
        "post_processor": byte_level(True, False, True),
        "decoder": byte_level(True, True, True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": MERGES,
        },
    }


def num_tokens():
    return 3 + 256 + len(MERGES) + len(MARKERS)


def special(content):
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def write_tokenizer(directory, chat_template):
    config = {
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
        "chat_template": chat_template,
    }
    for name, value in (("tokenizer.json", build_tokenizer()), ("tokenizer_config.json", config)):
        (Path(directory) / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
