"""Packs the texts of data.npz into rows of fixed length, in a new random order and grouping every epoch."""

import queue
import threading
from dataclasses import dataclass

import numpy as np

BOS, USER, ASSISTANT = 0, "<｜User｜>", "<｜Assistant｜>"
TEXT, SYSTEM, CHAT = 0, 1, 2
GROUP_SIZES, GROUP_ODDS = [1, 2, 3, 4, 6], [0.58, 0.2, 0.1, 0.06, 0.06]
SYSTEM_ODDS = 0.08


@dataclass
class Texts:
    """tokens: of all texts, then one BOS. is_target: tokens that are learned: answers with their end, and plain texts."""

    tokens: np.ndarray
    offsets: np.ndarray
    kinds: np.ndarray
    is_target: np.ndarray


def load_texts(path, user_id, assistant_id):
    data = np.load(path)
    tokens, offsets, kinds = data["tokens"].astype(np.int32), data["offsets"].astype(np.int64), data["kinds"]
    is_user, is_assistant = tokens == user_id, tokens == assistant_id
    in_answer = np.cumsum(is_assistant.astype(np.int32) - is_user) == 0  # in a chat User subtracts one, Assistant adds it back
    is_target = in_answer & ~is_assistant & np.repeat(kinds != SYSTEM, np.diff(offsets))
    return Texts(np.append(tokens, BOS), offsets, kinds, np.append(is_target, False))


def documents_of(texts, rng):
    """Documents as pieces in order: (start, length, document number) arrays. A document is BOS, perhaps a system prompt, then a few
    chats, or one plain text."""
    chats, plain = rng.permutation(np.flatnonzero(texts.kinds == CHAT)), np.flatnonzero(texts.kinds == TEXT)
    system = np.flatnonzero(texts.kinds == SYSTEM)
    sizes = rng.choice(GROUP_SIZES, len(chats), p=GROUP_ODDS)
    sizes = sizes[: np.searchsorted(np.cumsum(sizes), len(chats))]
    groups = np.repeat(np.arange(len(sizes)), sizes)
    chats = chats[: len(groups)]
    num_documents = len(sizes) + len(plain)
    prompted = np.flatnonzero(rng.random(len(sizes)) < (SYSTEM_ODDS if len(system) else 0))
    bos = len(texts.tokens) - 1
    lengths = np.diff(texts.offsets)
    parts = [
        (np.full(num_documents, bos), np.ones(num_documents, np.int64), np.arange(num_documents)),
        *(
            (texts.offsets[pick], lengths[pick], document)
            for pick, document in [
                (rng.choice(system, len(prompted)) if len(system) else prompted, prompted),
                (chats, groups),
                (plain, len(sizes) + np.arange(len(plain))),
            ]
        ),
    ]
    start, length, document = (np.concatenate(column) for column in zip(*parts))
    order = np.argsort(rng.permutation(num_documents)[document], kind="stable")
    return start[order], length[order], document[order]


def pack(texts, row_length, rng):
    """-> arrays [rows, row_length]: tokens, positions, documents (-1: padding), is_target."""
    start, length, document = documents_of(texts, rng)
    first = np.flatnonzero(np.r_[True, document[1:] != document[:-1]])
    sizes = np.add.reduceat(length, first)
    keep = sizes <= row_length
    pieces = np.repeat(keep, np.diff(np.r_[first, len(document)]))
    start, length, sizes = start[pieces], length[pieces], sizes[keep]
    per_document = np.diff(np.r_[first, len(document)])[keep]

    ends, rows, begin = np.cumsum(sizes), [], 0
    while begin < len(sizes):
        rows.append(begin)
        begin = int(np.searchsorted(ends, (ends[begin - 1] if begin else 0) + row_length, side="right"))
    row = np.repeat(np.arange(len(rows)), np.diff([*rows, len(sizes)]))
    before = ends - sizes
    place = row * row_length + before - before[rows][row]  # where each document goes

    piece_begin = np.cumsum(length) - length
    piece_place = np.repeat(place - before, per_document) + piece_begin
    within = np.arange(length.sum()) - np.repeat(piece_begin, length)
    source, target = np.repeat(start, length) + within, np.repeat(piece_place, length) + within

    def spread(values, fill, dtype):
        out = np.full(len(rows) * row_length, fill, dtype)
        out[target] = values
        return out.reshape(len(rows), row_length)

    position = np.arange(len(target)) - np.repeat(before, sizes)
    number = np.repeat(np.arange(len(sizes)), sizes)
    return {
        "tokens": spread(texts.tokens[source], BOS, np.int32),
        "positions": spread(position, 0, np.int32),
        "documents": spread(number, -1, np.int32),
        "is_target": spread(texts.is_target[source], False, bool),
    }


def epochs(texts, row_length, seed, first=0):
    """Epochs without end, each packed while the one before is in use."""
    ready = queue.Queue(maxsize=1)

    def work():
        epoch = first
        while True:
            ready.put((epoch, pack(texts, row_length, np.random.default_rng([seed, epoch]))))
            epoch += 1

    threading.Thread(target=work, daemon=True).start()
    while True:
        yield ready.get()
