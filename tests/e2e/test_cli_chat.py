"""`cachalot chat`: lines in, answers out."""

import subprocess


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


def test_it_loads_a_model_itself(binary, checkpoint):
    result = chat(binary, ["Hello"], "--model", checkpoint, "--max-tokens", "4", "--system", "Be brief.")
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
    result = chat(binary, ["Hello"], "--model", tmp_path)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    result = chat(binary, ["Hello"])
    assert result.returncode == 1 and "--model or --url" in result.stderr
