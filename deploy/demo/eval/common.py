"""What the scripts here share: the committed chats as token ids, and the way to the model in ../train. Needs `tokenizers`."""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "train"))

from checkpoint import load_model  # noqa: E402, F401
from generate import generate, on_device, padded  # noqa: E402, F401


def load_tokenizer(directory):
    return Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))


def chat_text(messages):
    """The V3-0324 template for plain chats, with the opening of the answer where the last turn is the user's."""
    text = "<｜begin▁of▁sentence｜>"
    for message in messages:
        user = message["role"] == "user"
        text += f"<｜User｜>{message['content']}<｜Assistant｜>" if user else f"{message['content']}<｜end▁of▁sentence｜>"
    return text


def committed_prompts(tokenizer):
    chats = json.loads((HERE / "chats.json").read_text(encoding="utf-8"))
    return [tokenizer.encode(chat_text(chat), add_special_tokens=False).ids for chat in chats]
