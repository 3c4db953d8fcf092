"""Experts spread over several processes: the answers of one, and what is said when they do not meet or one is lost."""

import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from conftest import Server
from test_ranks import DEMO, QUESTIONS, by_engine


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def node_options(port, nodes, node, *arguments):
    return ["--nodes", str(nodes), "--node-rank", str(node), "--leader", f"127.0.0.1:{port}", "--threads", "2", *map(str, arguments)]


def start_nodes(start, nodes, *arguments, port=None):
    port = port or free_port()
    with ThreadPoolExecutor(nodes) as pool:
        jobs = [pool.submit(start, *node_options(port, nodes, node, *arguments), model_dir=DEMO) for node in range(nodes)]
        return [job.result() for job in jobs]


def fail(binary, port, nodes, node, *arguments):
    """What a node that cannot join says at last."""
    command = [binary, "serve", "--model", DEMO, "--port", "0", "--grpc-port", "0", "--device", "cpu"]
    command += node_options(port, nodes, node, *arguments)
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("cachalot: ")]
    assert errors == result.stderr.splitlines()[-1:], result.stderr
    return errors[0]


def answer(server, question, temperature=0.0, **options):
    messages = [{"role": "user", "content": question}]
    ask = server.client().chat.completions.create
    choices = ask(model=server.model, messages=messages, temperature=temperature, seed=7, max_tokens=48, **options).choices
    return choices[0].message.content


@pytest.fixture(scope="module")
def expected(binary):
    server = Server(binary, DEMO, "--max-model-len", "1024")
    answers = {(question, temperature): answer(server, question, temperature) for question in QUESTIONS for temperature in (0.0, 1.0)}
    assert server.stop() == 0
    return answers


@pytest.mark.parametrize("nodes, ranks, drafts", [(2, 1, 0), (2, 2, 1), (4, 1, 1)])
def test_answers_are_those_of_one_process(start, expected, nodes, ranks, drafts):
    servers = start_nodes(start, nodes, "--ranks", ranks, "--speculative-tokens", drafts, "--max-model-len", "1024")
    jobs = list(expected)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: answer(servers[i % nodes], *jobs[i]), range(len(jobs))))
    assert answers == [expected[job] for job in jobs]
    for server in servers:  # the others have nothing to do
        assert answer(server, *jobs[0]) == expected[jobs[0]]
    for node, server in enumerate(servers):
        tokens = by_engine(server, "vllm:generation_tokens_total")
        assert sorted(tokens) == list(range(node * ranks, (node + 1) * ranks)) and min(tokens.values()) > 0
    # One is told to stop: nobody goes on without it, and each says so.
    assert servers[-1].stop() == 0
    for server in servers[:-1]:
        assert server.process.wait(15) == 1
        assert "has left, and so all do" in server.process.stderr.read().decode()


class Load:
    """Requests without end; `error` is what the first that fails is told, `when` its time."""

    def __init__(self, server):
        self.server, self.error, self.when = server, None, None
        self.begun = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        client = self.server.client()
        messages = [{"role": "user", "content": "What is a whale?"}]
        try:
            while True:
                options = {"max_tokens": 900, "stream": True, "extra_body": {"ignore_eos": True}}
                for _ in client.chat.completions.create(model=self.server.model, messages=messages, **options):
                    self.begun.set()
        except openai.OpenAIError as error:
            self.error, self.when = error, time.monotonic()


@pytest.mark.parametrize("with_signal, words", [(signal.SIGKILL, "rank 1 (127.0.0.1:"), (signal.SIGSTOP, "not been heard of for 4s")])
def test_a_node_that_is_lost_under_load(start, with_signal, words):
    servers = start_nodes(start, 4, "--max-model-len", "1024")
    loads = [Load(servers[node]) for node in (0, 2, 3)]
    for load in loads:
        assert load.begun.wait(60)
    begin = time.monotonic()
    servers[1].process.send_signal(with_signal)
    for load in loads:
        load.thread.join(30)
        assert "rank 1 (127.0.0.1:" in str(load.error), load.error
    print(f"found after {max(load.when for load in loads) - begin:.2f} s")
    for node in (0, 2, 3):
        assert servers[node].process.wait(15) == 1
        assert words in servers[node].process.stderr.read().decode()
    if with_signal == signal.SIGSTOP:
        servers[1].process.send_signal(signal.SIGCONT)
        assert servers[1].process.wait(15) == 1  # it hears that it was lost
    else:
        servers[1].process.wait(15)


def test_a_node_that_is_lost_while_all_are_idle(start):
    servers = start_nodes(start, 2, "--max-model-len", "256")
    assert urllib.request.urlopen(f"{servers[0].url}/readyz", timeout=30).status == 200
    servers[1].process.kill()
    assert servers[0].process.wait(15) == 1
    assert "rank 1 (127.0.0.1:" in servers[0].process.stderr.read().decode()


def test_nodes_that_do_not_fit(start, binary, tmp_path):
    secret, other, empty = (tmp_path / name for name in ("secret", "other", "empty"))
    secret.write_text("of the sea\n")
    other.write_text("of the sky\n")
    empty.write_text("\n")
    port = free_port()
    with_secret = ("--cluster-secret-file", secret, "--max-model-len", "256")
    with ThreadPoolExecutor(2) as pool:
        leader = pool.submit(start, *node_options(port, 2, 0, *with_secret), model_dir=DEMO)
        assert "node 1: max-sequences is 32, the leader's is 64" in fail(binary, port, 2, 1, *with_secret, "--max-sequences", 32)
        assert "node 1: nodes is 4, the leader's is 2" in fail(binary, port, 4, 1, *with_secret)
        assert "node 1: the cluster secret is not the leader's" in fail(binary, port, 2, 1, "--cluster-secret-file", other)
        assert "node 1: the cluster secret is not the leader's" in fail(binary, port, 2, 1)
        assert "cluster-secret-file: there is no secret in" in fail(binary, port, 2, 1, "--cluster-secret-file", empty)
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        strangers[0].sendall(b"GET / HTTP/1.1\r\nHost: leader\r\n\r\n")
        strangers[1].close()
        follower = pool.submit(start, *node_options(port, 2, 1, *with_secret), model_dir=DEMO)
        assert answer(leader.result(), QUESTIONS[0]) == answer(follower.result(), QUESTIONS[0])


def test_nodes_that_are_not_there(binary):
    port = free_port()
    missing = fail(binary, port, 4, 0, "--join-timeout", 1)
    assert "3 of 4 nodes have not joined within 1s: 1, 2, 3" in missing
    assert "node 1 has not joined at 127.0.0.1" in (alone := fail(binary, port, 2, 1, "--join-timeout", 1))
    assert "Connection refused" in alone
    assert "ranks: found 3, which do not divide the model's 16 experts" in fail(binary, port, 3, 0)
    assert "leader: found" in fail(binary, 0, 2, 0)


@pytest.fixture
def cables(binary, tmp_path):
    """Two network namespaces joined by a cable: the binary within each, and what cuts the cable."""

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)

    names = [f"cachalot{free_port()}{side}" for side in "ab"]
    try:
        ip("netns", "add", names[0])
        ip("netns", "add", names[1])
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
    except (OSError, subprocess.CalledProcessError):
        if shutil.which("ip"):
            for name in names:
                subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30)
        pytest.skip("needs the right to make network namespaces; SIGSTOP, above, is as silent")
    wrappers = []
    for i, name in enumerate(names):
        ip("-n", name, "addr", "add", f"10.99.0.{i + 1}/24", "dev", "cable")
        ip("-n", name, "link", "set", "cable", "up")
        ip("-n", name, "link", "set", "lo", "up")
        wrappers.append(tmp_path / name)
        wrappers[-1].write_text(f'#!/bin/sh\nexec ip netns exec {name} "{binary}" "$@"\n')
        wrappers[-1].chmod(0o755)
    yield wrappers, lambda: ip("-n", names[1], "link", "set", "cable", "down")
    for name in names:
        ip("netns", "del", name)


def test_a_node_that_is_cut_off(cables):
    wrappers, cut = cables
    options = ["--nodes", "2", "--leader", "10.99.0.1:29500", "--max-model-len", "256"]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(Server, wrappers[node], DEMO, *options, "--node-rank", str(node)) for node in (0, 1)]
        servers = [job.result() for job in jobs]
    begin = time.monotonic()
    cut()
    for node, server in enumerate(servers):
        assert server.process.wait(15) == 1
        assert f"rank {1 - node} (10.99.0.{2 - node}:" in server.process.stderr.read().decode()
    print(f"found after {time.monotonic() - begin:.2f} s")
