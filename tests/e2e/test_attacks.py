"""Attacks on a server: it stays small, goes on serving others, and is itself again afterwards."""

import contextlib
import json
import resource
import socket
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import grpc
import httpx
import http2_attack
import pytest

MAX_RSS = 512 << 20


def ask(server, proto, timeout=20):
    """A new client's answers on both ports."""
    assert httpx.get(f"{server.url}/v1/models", timeout=timeout).status_code == 200
    with grpc.insecure_channel(server.grpc_address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        proto[1].CachalotStub(channel).ModelInfo(proto[0].ModelInfoRequest(), timeout=timeout, wait_for_ready=True)


@pytest.fixture(scope="module")
def attacked(binary, checkpoint):
    from conftest import Server

    server = Server(binary, checkpoint)
    yield server
    assert server.stop() == 0


@pytest.mark.parametrize("name", http2_attack.ATTACKS)
def test_grpc_floods(attacked, proto, name):
    port = int(attacked.grpc_address.rpartition(":")[2])
    outcome = http2_attack.run(name, port, attacked.process.pid, seconds=0.5, connections=4)
    assert outcome.sent > 0
    assert outcome.peak_rss < MAX_RSS
    # What piles up within gRPC, gRPC refuses; resets are slowed down first; everything else is cut.
    assert outcome.num_cut > 0 or name in ("bodies", "errors", "rapid_reset", "reset_without_data")
    ask(attacked, proto)


def post_head(path, size):
    return f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {size}\r\n\r\n".encode()


def test_bodies_that_do_not_end(attacked):
    """40 of 15 MB: those that fit are held, the others told to come again; small requests go on."""
    with contextlib.ExitStack() as open_connections:
        connections = []
        for _ in range(40):
            connection = socket.create_connection(("127.0.0.1", attacked.port), timeout=20)
            connections.append(open_connections.enter_context(connection))
            with contextlib.suppress(ConnectionError):
                connection.sendall(post_head("/v1/completions", 15_000_001) + b"x" * 15_000_000)
        assert http2_attack.rss(attacked.process.pid) < MAX_RSS
        attacked.client().completions.create(model=attacked.model, prompt="Hello", max_tokens=2)
        answers = []
        for connection in connections:
            connection.setblocking(False)
            with contextlib.suppress(OSError):
                answers.append(connection.recv(4096))
    assert any(answer.startswith(b"HTTP/1.1 503 ") and b"Retry-After" in answer for answer in answers)
    assert len(answers) < 40


def test_memory_comes_back(start):
    """What a flood of calls held is the system's again soon after it, not kept for the next flood."""
    server = start()
    before, most = http2_attack.rss(server.process.pid), 0
    for name in ("reset_without_data", "errors", "bodies"):
        outcome = http2_attack.run(name, int(server.grpc_address.rpartition(":")[2]), server.process.pid, 0.5, connections=4)
        most = max(most, outcome.peak_rss)
    assert most > before + (100 << 20), "this shows nothing"
    deadline = time.monotonic() + 20
    while (now := http2_attack.rss(server.process.pid)) > before + (48 << 20) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert now <= before + (48 << 20)


def test_large_bodies_at_once(start):
    """What is made of them is many times their size: one at a time."""
    server = start()
    text = json.dumps({"prompt": "x" * 15_700_000})
    ids = '{"max_tokens": 1, "prompt": [' + ",".join(["7"] * 7_000_000) + "]}"
    bodies = [("/tokenize", text, 200)] * 2 + [("/v1/completions", ids, 400)] * 2

    def post(request):
        return httpx.post(server.url + request[0], content=request[1], timeout=120).status_code

    with ThreadPoolExecutor(len(bodies)) as pool:
        results = [pool.submit(post, body) for body in bodies]
        peak = 0
        while not all(result.done() for result in results):
            peak = max(peak, http2_attack.rss(server.process.pid))
            wait(results, timeout=0.02, return_when=FIRST_COMPLETED)
    assert [result.result() for result in results] == [status for _, _, status in bodies]
    assert peak < MAX_RSS


def idle_connections(port, count):
    """As many as the system lets wait, of `count`."""
    connections = []
    for _ in range(count):
        connection = socket.socket()
        connection.settimeout(2)
        connection.connect(("127.0.0.1", port))
        connections.append(connection)
    return connections


def test_both_ports_outlive_a_shortage_of_descriptors(start, proto):
    server = start(max_files=64)
    ports = (server.port, int(server.grpc_address.rpartition(":")[2]))
    for port in ports:
        connections = idle_connections(port, 80)
        # Those of one port leave the other its own.
        if port == ports[0]:
            with grpc.insecure_channel(server.grpc_address) as channel:
                proto[1].CachalotStub(channel).ModelInfo(proto[0].ModelInfoRequest(), timeout=20)
        else:
            assert httpx.get(f"{server.url}/readyz", timeout=20).status_code == 200
        for connection in connections:
            connection.close()
        ask(server, proto)
    # Connect and reset, over and over.
    for port in ports:
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            for connection in idle_connections(port, 20):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                connection.close()
        ask(server, proto)
    assert server.stop() == 0


def test_the_limit_of_open_files_is_raised(start):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    server = start(max_files=(256, hard))
    with open(f"/proc/{server.process.pid}/limits") as limits:
        line = next(line for line in limits if line.startswith("Max open files"))
    assert line.split()[3] == line.split()[4] == str(hard)
