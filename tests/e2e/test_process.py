"""The program: start, stop, mistakes, checkpoints that cannot be served."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time

import grpc
import httpx
import openai
import pytest


def run(binary, *arguments, timeout=60):
    return subprocess.run([str(word) for word in (binary, *arguments)], capture_output=True, text=True, timeout=timeout)


def serve_and_fail(binary, model_dir, *arguments):
    """The one line that `serve` says of what it cannot do."""
    result = run(binary, "serve", "--model", model_dir, "--port", "0", "--grpc-port", "0", "--device", "cpu", *arguments)
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy of the checkpoint to spoil."""
    return shutil.copytree(checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("golden.safetensors"))


def first_shard(model_dir):
    return sorted(model_dir.glob("model*.safetensors"))[0]


def rewrite_header(path, change):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


@pytest.mark.parametrize("with_signal", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_it_cleanly(start, with_signal):
    server = start()
    assert httpx.get(f"{server.url}/readyz").status_code == 200
    begin = time.monotonic()
    assert server.stop(with_signal) == 0
    assert time.monotonic() - begin < 10
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1)


def test_what_is_in_flight_after_the_drain_ends_with_an_error(start):
    server = start("--drain-timeout", "0.2")
    stream = server.client().completions.create(
        model=server.model, prompt="Hello", max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    errors = []

    def read():
        try:
            for _ in stream:
                pass
        except openai.APIError as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert server.stop() == 0
    reader.join(10)
    assert len(errors) == 1
    assert errors[0].body["type"] == "server_error"


def stand_in(binary, fault):
    """The environment in which the CUDA backend is the one of tests/e2e/faulty_backend.cc."""
    folder = binary.parent / "tests/e2e" / fault
    if not (folder / "libcachalot_cuda.so").exists():
        pytest.skip("the CUDA backend was not built, and so its stand-ins were not")
    return {**os.environ, "LD_LIBRARY_PATH": str(folder)}


@pytest.mark.parametrize("fault, words", [("dying", "as it was told to"), ("hanging", "a step has not ended within 5")])
def test_a_dead_device_ends_the_process_after_the_last_error(start, binary, fault, words):
    """Its stand-in hangs whoever touches it once it is dead."""
    server = start("--device", "cuda", env=stand_in(binary, fault))
    with pytest.raises(openai.APIError) as died:
        for _ in server.client().completions.create(
            model=server.model, prompt="Hello", max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
        ):
            pass
    begin = time.monotonic()
    assert died.value.body["type"] == "server_error"
    assert server.process.wait(10) == 1
    assert time.monotonic() - begin < 1.5
    log = server.process.stderr.read().decode()
    assert "rank 0 is dead" in log and words in log


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_a_backend_of_another_build_is_refused(binary, checkpoint, device):
    words = [binary, "serve", "--model", checkpoint, "--port", "0", "--grpc-port", "0", "--device", device]
    result = subprocess.run(words, env=stand_in(binary, "stale"), capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "is of another build than this program (0123456789abcdef" in result.stderr


def test_a_drain_lets_requests_in_flight_end(start):
    server = start("--drain-timeout", "60")
    options = {"model": server.model, "prompt": "Hello", "max_tokens": 2500, "seed": 1, "extra_body": {"ignore_eos": True}}
    client = server.client()  # takes a while to make, when the machine is busy longer than the answer does
    stream = client.completions.create(stream=True, stream_options={"include_usage": True}, **options)
    next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 10
    while httpx.get(f"{server.url}/readyz").status_code != 503:
        assert time.monotonic() < deadline
    assert httpx.get(f"{server.url}/livez").status_code == 200
    with pytest.raises(openai.APIStatusError) as refused:
        client.completions.create(**options)
    assert refused.value.status_code == 503
    usages = [chunk.usage for chunk in stream]
    assert usages[-1].completion_tokens == 2500
    assert server.process.wait(10) == 0


def test_a_second_signal_ends_it_at_once(start):
    server = start("--drain-timeout", "600")
    stream = server.client().completions.create(
        model=server.model, prompt="Hello", max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert server.process.poll() is None
    begin = time.monotonic()
    assert server.stop() == -signal.SIGTERM
    assert time.monotonic() - begin < 2


def test_a_log_that_nobody_reads_stops_nothing(start):
    """A pipe holds 64 KiB, the queue before it a MiB: what is more is dropped and counted."""
    server = start("--log-requests", "summary")
    client, dropped = server.client(), 0
    deadline = time.monotonic() + 60
    while dropped == 0:
        assert time.monotonic() < deadline
        for _ in range(10):
            client.completions.create(model=server.model, prompt="Hello", max_tokens=1, n=128)
        page = httpx.get(f"{server.url}/metrics").text
        dropped = int(re.search(r"^cachalot:log_messages_dropped_total\{.*\} (\d+)$", page, re.MULTILINE)[1])
    client.completions.create(model=server.model, prompt="Hello", max_tokens=1)
    assert server.stop() == 0


def test_libraries_write_to_our_log(start):
    """Protobuf complains of a request's text, by itself on stderr."""
    server = start("--log-format", "json", "--log-level", "debug")
    with grpc.insecure_channel(server.grpc_address) as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/cachalot.v1.Cachalot/Tokenize")(b"\x0a\x01\xff", timeout=20)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert server.stop() == 0
    lines = [json.loads(line) for line in server.log + server.process.stderr.read().decode().splitlines()]
    assert any(line["message"].startswith("Protobuf: ") for line in lines)


def test_descriptors_that_are_closed_at_start_are_not_taken_by_sockets(start):
    """What is printed to descriptor 2 must go nowhere; there is nobody then to tell the ports, so they are given."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = start("--grpc-port", "-1", "--port", str(port), closed=True)
    deadline = time.monotonic() + 60
    while True:
        try:
            assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
            break
        except httpx.TransportError:
            assert time.monotonic() < deadline and server.process.poll() is None
            time.sleep(0.05)
    links = [os.readlink(f"/proc/{server.process.pid}/fd/{fd}") for fd in range(3)]
    assert links == ["/dev/null"] * 3
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("limit", "arguments", "expected"),
    [
        # Threads' stacks are 8 MiB each of address space.
        (4 << 30, ["--threads", "2000"], "threads"),
        (300 << 20, [], ""),
    ],
)
def test_what_the_system_refuses_at_start_is_one_line(binary, checkpoint, limit, arguments, expected):
    command = [str(binary), "serve", "--model", str(checkpoint), "--port", "0", "--grpc-port", "0", "--device", "cpu", *arguments]
    set_limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # noqa: E731
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=set_limit)
    assert result.returncode == 1, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("cachalot: ") and expected in result.stderr


def test_the_cache_fits_the_address_space(start):
    """A quarter of what is free, of an address space of 3 GB."""
    server = start(max_address_space=3_000_000_000)
    tokens = int(re.search(r"KV cache (\d+) tokens", "\n".join(server.log))[1])
    page = httpx.get(f"{server.url}/metrics").text
    bytes_per_token = int(re.search(r'kv_bytes_per_token="(\d+)"', page)[1])
    assert 0 < tokens * bytes_per_token < 3_000_000_000 / 4
    server.client().completions.create(model=server.model, prompt="Hello", max_tokens=4)
    assert server.stop() == 0


def test_logs_are_json_and_hold_no_prompts_unless_asked(start):
    secret = "a secret prompt"
    for asked, holds in (("summary", False), ("prompts", True)):
        server = start("--log-format", "json", "--log-requests", asked)
        server.client().completions.create(model=server.model, prompt=secret, max_tokens=3, extra_body={"ignore_eos": True})
        assert server.stop() == 0
        lines = [json.loads(line) for line in server.log + server.process.stderr.read().decode().splitlines()]
        assert all(set(line) >= {"time", "level", "message"} for line in lines)
        requests = [line for line in lines if "prompt_tokens" in line]
        assert len(requests) == 1 and requests[0]["generated_tokens"] == 3 and requests[0]["finish_reason"] == "length"
        assert any(secret in json.dumps(line) for line in lines) == holds


def test_names_and_limits_are_options(start):
    server = start("--served-model-name", "my/model", "--max-model-len", "64", "--max-sequences", "2")
    client = server.client()
    assert client.models.retrieve("my/model").max_model_len == 64
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="my/model", prompt=[5] * 64)
    assert error.value.body["code"] == "context_length_exceeded"
    answer = client.completions.create(model="my/model", prompt=[5] * 60, max_tokens=50, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 64
    assert answer.choices[0].finish_reason == "length"


def test_without_a_tokenizer_there_are_token_ids(start, copy, golden):
    (copy / "tokenizer.json").unlink()
    server = start(model_dir=copy)
    assert any("warn" in line and "tokenizer.json" in line for line in server.log), server.log
    client = server.client()
    answer = client.completions.create(
        model=server.model, prompt=golden["greedy.prompt"].tolist(), max_tokens=8, temperature=0
    )
    assert answer.choices[0].text == ""
    assert answer.choices[0].token_ids == golden["greedy.tokens"][:8].tolist()
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=server.model, prompt="Hello")
    assert error.value.body["param"] == "prompt"


def test_a_port_that_is_taken_is_told_before_loading(binary, checkpoint):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in serve_and_fail(binary, checkpoint, "--port", port)
        assert str(port) in serve_and_fail(binary, checkpoint, "--grpc-port", port)


def test_a_directory_without_a_checkpoint(binary, tmp_path):
    assert "config.json" in serve_and_fail(binary, tmp_path)
    assert "nowhere" in serve_and_fail(binary, tmp_path / "nowhere")


def test_a_config_that_is_no_json(binary, copy):
    (copy / "config.json").write_text("{")
    assert "config.json" in serve_and_fail(binary, copy)


def test_a_model_of_another_kind(binary, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    assert "llama" in serve_and_fail(binary, copy).lower()


def test_drafts_without_an_mtp_layer(binary, checkpoint):
    message = serve_and_fail(binary, checkpoint.parent / "v2_lite", "--speculative-tokens", "1")
    assert "speculative-tokens" in message and "no MTP layer" in message


def test_a_shard_that_is_missing(binary, copy):
    shard = first_shard(copy)
    shard.unlink()
    assert shard.name in serve_and_fail(binary, copy)


def test_a_shard_that_is_cut_short(binary, copy):
    shard = first_shard(copy)
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert shard.name in serve_and_fail(binary, copy)


def test_a_tensor_of_another_shape(binary, copy):
    def change(header):
        header["model.embed_tokens.weight"]["shape"] = list(reversed(header["model.embed_tokens.weight"]["shape"]))

    shards = [path for path in copy.glob("model*.safetensors") if b"model.embed_tokens.weight" in path.read_bytes()]
    rewrite_header(shards[0], change)
    line = serve_and_fail(binary, copy)
    assert "model.embed_tokens.weight" in line
    assert "256" in line and "320" in line


def test_a_tensor_that_is_missing(binary, copy):
    name = "model.norm.weight"
    shards = [path for path in copy.glob("model*.safetensors") if name.encode() in path.read_bytes()]
    rewrite_header(shards[0], lambda header: header.update({name + "x": header.pop(name)}))
    assert name in serve_and_fail(binary, copy)


def test_a_tokenizer_that_is_damaged(binary, copy):
    (copy / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in serve_and_fail(binary, copy)


def test_inspect_reports_a_good_checkpoint(binary, checkpoint):
    for arguments in ([], ["--deep"]):
        result = run(binary, "inspect", "--model", checkpoint, *arguments)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        assert "deepseek_v3" in result.stdout


def test_inspect_reports_problems(binary, copy):
    first_shard(copy).unlink()
    result = run(binary, "inspect", "--model", copy)
    assert result.returncode == 1
    assert first_shard(copy).name != "" and result.stderr


def test_help_and_mistakes(binary):
    assert "--kv-cache-memory" in run(binary, "serve", "--help").stdout
    assert run(binary, "--version").stdout.startswith("cachalot ")
    for arguments in ([], ["nonsense"], ["serve"], ["serve", "--model", "x", "--port", "-5"]):
        result = run(binary, *arguments)
        assert result.returncode == 1
        assert result.stderr and not result.stdout
