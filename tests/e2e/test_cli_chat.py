"""`cachalot chat`: lines in, answers out."""

import http.server
import json
import subprocess
import threading

import pytest


def chat(binary, lines, *arguments):
    return subprocess.run(
        [str(word) for word in (binary, "chat", *arguments)], input="\n".join(lines), capture_output=True, text=True, timeout=120
    )


def test_with_a_server(binary, client, server):
    arguments = ("--url", server.url, "--max-tokens", "6", "--temperature", "0")
    result = chat(binary, ["Hello", "And more"], *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("tok/s") == 2
    options = {"model": server.model, "max_tokens": 6, "temperature": 0}
    messages = [{"role": "user", "content": "Hello"}]
    first = client.chat.completions.create(messages=messages, **options).choices[0].message.content
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And more"}]
    second = client.chat.completions.create(messages=messages, **options).choices[0].message.content
    assert result.stdout == f"{first}\n{second}\n"
    # /reset forgets.
    again = chat(binary, ["Hello", "/reset", "Hello", "/exit", "not said"], *arguments)
    assert again.stdout == f"{first}\n{first}\n"


def test_addresses(binary, server):
    """With or without what OpenAI's clients have at the end."""
    arguments = ("--max-tokens", "6", "--temperature", "0")
    answers = set()
    for end in ("", "/", "/v1", "/v1/", "//v1//"):
        result = chat(binary, ["Hello"], "--url", server.url + end, *arguments)
        assert result.returncode == 0, (end, result.stderr)
        answers.add(result.stdout)
    assert len(answers) == 1


def test_it_loads_a_model_itself(binary, checkpoint):
    result = chat(binary, ["Hello"], "--model", checkpoint, "--device", "cpu", "--max-tokens", "4", "--system", "Be brief.")
    assert result.returncode == 0, result.stderr
    assert "[4 tokens" in result.stderr or "tokens, " in result.stderr
    assert result.stdout


def test_failures(binary, server, tmp_path):
    result = chat(binary, ["Hello"], "--url", "http://127.0.0.1:1")
    assert result.returncode == 1 and "cannot reach 127.0.0.1:1" in result.stderr
    result = chat(binary, ["Hello"], "--url", "ftp://x")
    assert result.returncode == 1 and "http://HOST:PORT" in result.stderr
    result = chat(binary, ["Hello", "long " * 30000, "Hello"], "--url", server.url, "--max-tokens", "2")
    assert result.returncode == 1 and "context" in result.stderr
    assert result.stderr.count("tok/s") == 2  # the turns around the one that failed
    result = chat(binary, ["Hello"], "--model", tmp_path, "--device", "cpu")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    result = chat(binary, ["Hello"])
    assert result.returncode == 1 and "--model or --url" in result.stderr


@pytest.fixture
def strange_server():
    """A server whose answers are the test's to choose: (url, list of event texts)."""
    events = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, content_type, body):
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.answer("application/json", json.dumps({"data": [{"id": "m"}]}).encode())

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer("text/event-stream", "".join(events).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", events
    server.shutdown()


@pytest.mark.parametrize(
    "data, printed",
    [
        ('{"choices":[{"delta":null,"finish_reason":"stop"}]}', "\n"),
        ('{"choices":[5]}', "\n"),
        ('{"choices":[{"delta":"x"}]}', "\n"),
        ('{"choices":[],"usage":{"completion_tokens":null}}', "\n"),
        ('{"choices":[{"delta":{"content":"yes"}}],"usage":"none"}', "yes\n"),
    ],
)
def test_strange_events_do_no_harm(binary, strange_server, data, printed):
    url, events = strange_server
    events[:] = [f"data: {data}\r\n\r\n", "data: [DONE]\r\n\r\n"]
    result = chat(binary, ["Hello"], "--url", url)
    assert (result.returncode, result.stdout) == (0, printed), result.stderr


@pytest.mark.parametrize("data, said", [('{"error":"boom"}', "boom"), ("nonsense", "no JSON"), ("5", "no JSON")])
def test_strange_events_are_failures(binary, strange_server, data, said):
    url, events = strange_server
    events[:] = [f"data: {data}\n\n"]
    result = chat(binary, ["Hello"], "--url", url)
    assert result.returncode == 1 and said in result.stderr
