"""HTTP as other clients speak it: bytes on a socket, and the endpoints beside OpenAI's."""

import json
import socket

import httpx


def raw(server, data, timeout=20):
    """Everything the server answers to `data` until it closes or falls silent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout) as connection:
        connection.sendall(data)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


def post(path, body):
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def test_server_sent_events_byte_for_byte(server):
    body = json.dumps({"prompt": "Hello", "max_tokens": 3, "temperature": 0, "stream": True, "ignore_eos": True}).encode()
    with httpx.stream("POST", f"{server.url}/v1/completions", content=body) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        text = response.read().decode()
    assert text.endswith("\n\ndata: [DONE]\n\n")
    events = text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    chunks = [json.loads(event[6:]) for event in events[:-1]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "text_completion" for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_nonsense_is_refused_and_the_server_lives(server):
    assert raw(server, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert raw(server, b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n").startswith(b"HTTP/1.1 431 ")
    deep = b'{"prompt": ' + b"[" * 10_000
    assert raw(server, post("/v1/completions", deep)).startswith(b"HTTP/1.1 400 ")
    assert raw(server, post("/v1/completions", b'{"prompt": "\xff"}')).startswith(b"HTTP/1.1 400 ")
    large = httpx.post(f"{server.url}/v1/completions", content=b"x" * (20 << 20))
    assert large.status_code == 413
    assert set(large.json()["error"]) == {"message", "type", "param", "code"}
    assert httpx.get(f"{server.url}/readyz").status_code == 200


def test_health_and_version(server):
    for path in ("/livez", "/readyz", "/health"):
        assert httpx.get(f"{server.url}{path}").status_code == 200
    assert httpx.get(f"{server.url}/version").json()["version"]
    wrong = httpx.get(f"{server.url}/v1/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST, OPTIONS"


def test_tokenize_and_back(server):
    text = "Hello world, <｜User｜> 123 中文 é\n"
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert tokens["count"] == len(tokens["tokens"])
    with_bos = httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"]
    assert with_bos == [0, *tokens["tokens"]]
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert back == {"prompt": text}
