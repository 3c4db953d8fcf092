"""Packs the texts of data.npz into rows of fixed length, in a new random order and grouping every epoch."""

import queue
import threading
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

BOS, USER, ASSISTANT = 0, "<｜User｜>", "<｜Assistant｜>"
TEXT, SYSTEM, CHAT = 0, 1, 2
GROUP_SIZES, GROUP_ODDS = [1, 2, 3, 4, 6], [0.58, 0.2, 0.1, 0.06, 0.06]
SYSTEM_ODDS = 0.08
OPEN_ROWS = 64


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


def assign_rows(sizes, row_length):
    """Best fit among the rows still open. -> the row of each document"""
    space, numbers, rows, count = [], [], [], 0  # of the open rows, by rising space
    for size in sizes.tolist():
        i = bisect_left(space, size)
        if i < len(space):
            left, row = space.pop(i), numbers.pop(i)
        else:
            left, row, count = row_length, count, count + 1
            del space[: len(space) == OPEN_ROWS], numbers[: len(numbers) == OPEN_ROWS]
        i = bisect_left(space, left - size)
        space.insert(i, left - size)
        numbers.insert(i, row)
        rows.append(row)
    return np.array(rows)


def pack(texts, row_length, rng):
    """-> arrays [rows, row_length]: tokens, positions, documents (-1: padding), is_target."""
    start, length, document = documents_of(texts, rng)
    first = np.flatnonzero(np.r_[True, document[1:] != document[:-1]])
    count, sizes = np.diff(np.r_[first, len(document)]), np.add.reduceat(length, first)
    keep = np.flatnonzero(sizes <= row_length)
    row = assign_rows(sizes[keep], row_length)
    order = np.argsort(row, kind="stable")
    keep, row = keep[order], row[order]
    sizes, per_document = sizes[keep], count[keep]
    pieces = np.repeat(first[keep] - (np.cumsum(per_document) - per_document), per_document) + np.arange(per_document.sum())
    start, length = start[pieces], length[pieces]

    num_rows = row[-1] + 1
    before = np.cumsum(sizes) - sizes
    row_begin = before[np.searchsorted(row, np.arange(num_rows))]
    place = row * row_length + before - row_begin[row]  # where each document goes

    piece_begin = np.cumsum(length) - length
    piece_place = np.repeat(place - before, per_document) + piece_begin
    within = np.arange(length.sum()) - np.repeat(piece_begin, length)
    source, target = np.repeat(start, length) + within, np.repeat(piece_place, length) + within

    def spread(values, fill, dtype):
        out = np.full(num_rows * row_length, fill, dtype)
        out[target] = values
        return out.reshape(num_rows, row_length)

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
            ready.put((epoch, pack(texts, row_length, np.random.default_rng([*seed, epoch]))))
            epoch += 1

    threading.Thread(target=work, daemon=True).start()
    while True:
        yield ready.get()
