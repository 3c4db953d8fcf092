"""What the end-to-end tests share: the binary, a checkpoint with golden results, and a running server."""

import json
import os
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import openai
import pytest

ROOT = Path(__file__).resolve().parents[2]
READY = re.compile(r"ready: http://([\w.]+):(\d+)(?:, gRPC [\w.]+:(\d+))?, model (\S+)")
START_TIMEOUT = 120
STOP_TIMEOUT = 15


def pytest_addoption(parser):
    parser.addoption("--binary", default=ROOT / "build/release/cachalot", type=Path, help="the cachalot to test")
    parser.addoption("--checkpoint", default=ROOT / "tests/golden/data/v3_like", type=Path, help="has golden.safetensors")


class Server:
    """`cachalot serve` on free ports. Its log lines are in `log`; stop() returns its exit code. Its limits:
    `max_files`, one number or (soft, hard), `max_address_space`. `closed`: descriptors 0 to 2 are, and it is not awaited."""

    def __init__(self, binary, checkpoint, *arguments, env=None, max_files=None, max_address_space=None, closed=False):
        command = [binary, "serve", "--model", checkpoint, "--port", "0", "--grpc-port", "0", "--device", "cpu", *arguments]
        self.log = []

        def prepare():
            if max_files:
                limits = (max_files, max_files) if isinstance(max_files, int) else max_files
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            if max_address_space:
                resource.setrlimit(resource.RLIMIT_AS, (max_address_space, max_address_space))
            if closed:
                os.closerange(0, 3)

        command = [str(word) for word in command]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, env=env, preexec_fn=prepare)
        if closed:
            return
        match = self._wait_for_ready()
        self.port, self.model = int(match[2]), match[4]
        self.grpc_address = f"127.0.0.1:{match[3]}" if match[3] else None
        self.url = f"http://127.0.0.1:{self.port}"

    def _wait_for_ready(self):
        deadline, text = time.monotonic() + START_TIMEOUT, b""
        while time.monotonic() < deadline:
            if select.select([self.process.stderr], [], [], 0.2)[0]:
                piece = self.process.stderr.read1()
                if not piece:
                    break
                text += piece
                self.log = text.decode().splitlines()
                if match := READY.search(text.decode()):
                    return match
        self.process.kill()
        pytest.fail(f"the server did not become ready:\n{text.decode()}")

    def client(self, **options):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120, **options)

    def stop(self, with_signal=signal.SIGTERM):
        self.process.send_signal(with_signal)
        try:
            return self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@pytest.fixture(scope="session")
def binary(request):
    path = request.config.getoption("--binary").resolve()
    if not path.exists():
        pytest.fail(f"{path} does not exist: build it first")
    return path


@pytest.fixture(scope="session")
def checkpoint(request):
    return request.config.getoption("--checkpoint").resolve()


@pytest.fixture(scope="session")
def golden(checkpoint):
    """golden.safetensors as {name: array}."""
    data = (checkpoint / "golden.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    types = {"F64": np.float64, "F32": np.float32, "I32": np.int32}
    arrays = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            arrays[name] = np.frombuffer(data[begin:end], types[entry["dtype"]]).reshape(entry["shape"])
    return arrays


@pytest.fixture(scope="session")
def server(binary, checkpoint):
    server = Server(binary, checkpoint)
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="session")
def client(server):
    return server.client()


@pytest.fixture
def start(binary, checkpoint):
    """Starts servers of the test's own: start(*arguments, model_dir=...). They are killed after it if still running."""
    servers = []

    def start(*arguments, model_dir=checkpoint, **options):
        servers.append(Server(binary, model_dir, *arguments, **options))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()


@pytest.fixture(scope="session")
def proto(tmp_path_factory):
    """The generated modules of proto/cachalot/v1/cachalot.proto: (messages, services)."""
    from grpc_tools import protoc

    directory = tmp_path_factory.mktemp("proto")
    arguments = [f"-I{ROOT / 'proto'}", f"--python_out={directory}", f"--grpc_python_out={directory}"]
    assert protoc.main(["protoc", *arguments, "cachalot/v1/cachalot.proto"]) == 0
    sys.path.insert(0, str(directory))
    from cachalot.v1 import cachalot_pb2, cachalot_pb2_grpc

    return cachalot_pb2, cachalot_pb2_grpc
