#!/usr/bin/env python3
# Makes published/ beside this file: what the published tokenizer and chat templates make of texts and conversations.
#
#   /tmp/venv/bin/pip install tokenizers==0.23.3
#   /tmp/venv/bin/python tests/server/data/make_published.py VECTORS
#
# VECTORS holds deepseek-v3/ (the published tokenizer_config.json and tokenizer.json, 8 MB), tokenizer_vectors.json,
# chat_vectors.json and templates/*.jinja. Of tokenizer.json what the texts need is kept, under the same ids: every token
# whose characters stand together in one of them, and every merge of such tokens. Others could not be applied there, so
# that the texts have the same tokens.
import json
import pathlib
import shutil
import sys

from tokenizers import Tokenizer

HERE = pathlib.Path(__file__).parent / "published"
MORE_TEXTS = ["How are you doing?"]


def alphabet():
    """Of a byte-level vocabulary: the character that stands for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(0x100 + i) for i, byte in enumerate(others)}}


def cut(spec, texts):
    characters = alphabet()
    vocab, longest = spec["model"]["vocab"], max(map(len, spec["model"]["vocab"]))
    kept = {token for token in vocab if len(token) == 1}
    for text in texts:
        written = "".join(characters[byte] for byte in text.encode())
        for begin in range(len(written)):
            kept.update(written[begin:end] for end in range(begin + 1, min(begin + longest, len(written)) + 1))
    added = {token["content"] for token in spec["added_tokens"]}
    spec["model"]["vocab"] = {token: id for token, id in vocab.items() if token in kept or token in added}

    def is_kept(merge):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        return {left, right, left + right} <= kept

    spec["model"]["merges"] = [merge for merge in spec["model"]["merges"] if is_kept(merge)]
    return spec


def main(source):
    vectors = json.loads((source / "tokenizer_vectors.json").read_text())
    texts = [vector["text"] for vector in vectors["vectors"]] + MORE_TEXTS
    whole = (source / "deepseek-v3/tokenizer.json").read_text()
    part = json.dumps(cut(json.loads(whole), texts), ensure_ascii=False, indent=0)
    tokenizers = [Tokenizer.from_str(spec) for spec in (whole, part)]
    for text in texts:
        # NOTE: `tokenizers` numbers added tokens anew where ids below are missing; our tests compare the ids.
        tokens, same = (tokenizer.encode(text, add_special_tokens=False).tokens for tokenizer in tokenizers)
        assert tokens == same, text
    for folder in ("deepseek-v3", "templates"):
        (HERE / folder).mkdir(parents=True, exist_ok=True)
    (HERE / "deepseek-v3/tokenizer.json").write_text(part + "\n")
    for path in ["deepseek-v3/tokenizer_config.json", "tokenizer_vectors.json", "chat_vectors.json"]:
        shutil.copyfile(source / path, HERE / path)
    for path in sorted((source / "templates").glob("*.jinja")):
        shutil.copyfile(path, HERE / "templates" / path.name)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
