#!/usr/bin/env python3
"""A server on a GPU, from outside: how long it takes to be ready, how fast it reads weights, how busy it keeps the GPU.

Usage: gpu_serving.py [--build build/release] [--demo deploy/demo] cold_start
       gpu_serving.py ... loading --model DIR        a large checkpoint in the page cache: tests/golden/make_checkpoint.py --preset v3_slice
       gpu_serving.py ... idle [--model DIR] [--batch 64] [--steps 1000] [-- FURTHER OPTIONS OF THE SERVER]
"""

import argparse
import http.client
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PORT = 8123
CHUNK = 8 << 20


class Server:
    def __init__(self, build, model, options=(), environment=None):
        self.begin = time.monotonic()
        command = [f"{build}/cachalot", "serve", "--model", str(model), "--device", "cuda", "--port", str(PORT), "--grpc-port", str(PORT + 1)]
        self.process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})})
        self.log = []
        self.reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True)
        self.reader.start()

    def wait(self):
        """-> seconds from the process's start until /readyz says 200."""
        while self.process.poll() is None:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=5)
                connection.request("GET", "/readyz")
                if connection.getresponse().status == 200:
                    return time.monotonic() - self.begin
            except OSError:
                pass
            time.sleep(0.002)
        sys.exit("the server ended: " + "".join(self.log))

    def stop(self):
        self.process.terminate()
        self.process.wait(60)
        self.reader.join(5)


def cold_start(args):
    bare, ready = [], []
    for _ in range(5):
        begin = time.monotonic()
        subprocess.run([f"{args.build}/tests/bench/bare_context"], check=True)
        bare.append(time.monotonic() - begin)
        server = Server(args.build, args.demo)
        ready.append(server.wait())
        server.stop()
    print(f"bare CUDA context {statistics.median(bare):.3f} s ({min(bare):.3f} to {max(bare):.3f}); "
          f"demo ready {statistics.median(ready):.3f} s ({min(ready):.3f} to {max(ready):.3f}) after its process began")  # fmt: skip


def read_all(files, threads=16):
    """Plain reads of the files by some threads into buffers of their own; -> seconds, bytes."""
    pieces = [(path, at) for path in files for at in range(0, path.stat().st_size, CHUNK)]
    lock = threading.Lock()
    total = 0

    def read():
        nonlocal total
        buffer = bytearray(CHUNK)
        while True:
            with lock:
                if not pieces:
                    return
                path, at = pieces.pop()
            fd = os.open(path, os.O_RDONLY)
            count = os.preadv(fd, [buffer], at)
            os.close(fd)
            with lock:
                total += count

    begin = time.monotonic()
    workers = [threading.Thread(target=read) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.monotonic() - begin, total


def loading(args):
    files = sorted(Path(args.model).glob("*.safetensors"))
    read_all(files)  # into the page cache
    for _ in range(3):
        seconds, count = read_all(files)
        server = Server(args.build, args.model, ["--max-model-len", "1024"])
        ready = server.wait()
        server.stop()
        line = re.search(r"([\d.]+ GB of weights in .*)", "".join(server.log))
        print(f"plain reads {count / 1e9:.2f} GB in {seconds:.2f} s: {count / seconds / 1e9:.2f} GB/s; server: {line and line[1]}; ready {ready:.2f} s")


def stream(prompt, tokens):
    """Takes a stream as it comes, some milliseconds at a time and unread: clients must not compete with what is measured."""
    body = json.dumps({"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", PORT), timeout=600) as connection:
        connection.sendall((head + body).encode())
        reply = connection.recv(1 << 16)
        if not reply.startswith(b"HTTP/1.1 200"):
            sys.exit(reply.decode())
        end = b""
        while reply:
            end = (end + reply)[-200:]
            time.sleep(0.02)
            reply = connection.recv(1 << 20)
    if b"[DONE]" not in end:
        sys.exit("a stream ended early: " + end.decode())


def idle(args):
    with tempfile.TemporaryDirectory() as folder:
        trace = f"{folder}/trace.txt"
        environment = {"CUDA_INJECTION64_PATH": str(Path(args.build).resolve() / "libcachalot_trace.so"), "CACHALOT_TRACE": trace}
        server = Server(args.build, args.model or args.demo, ["--served-model-name", "m", "--max-sequences", str(args.batch), *args.options], environment)
        server.wait()
        with ThreadPoolExecutor(args.batch) as pool:
            list(pool.map(lambda i: stream(f"word {i}", args.steps + 200), range(args.batch)))  # ends where one of them does
        server.stop()
        subprocess.run([sys.executable, Path(__file__).with_name("trace_idle.py"), trace, "--steps", str(args.steps)], check=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--build", default="build/release")
    parser.add_argument("--demo", default="deploy/demo")
    commands = parser.add_subparsers(required=True)
    commands.add_parser("cold_start").set_defaults(run=cold_start)
    command = commands.add_parser("loading")
    command.add_argument("--model", required=True)
    command.set_defaults(run=loading)
    command = commands.add_parser("idle")
    command.add_argument("--model")
    command.add_argument("--batch", type=int, default=64)
    command.add_argument("--steps", type=int, default=1000)
    command.add_argument("options", nargs="*")
    command.set_defaults(run=idle)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
