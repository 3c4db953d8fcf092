"""How answers end and how they are drawn, as the files of a checkpoint say."""

import json
import shutil
import subprocess

import httpx
import pytest

from conftest import ROOT

DEMO = ROOT / "deploy/demo"
QUESTION = {"messages": [{"role": "user", "content": "What kinds of whale are there?"}]}
NONSENSE = [{"role": "user", "content": "qz xv"}]
WHALES = "Kinds of whale are: baleen whale, toothed whale, narwhal and spouter."
OPTIONS = ("--max-model-len", "256", "--max-sequences", "4")


@pytest.fixture
def demo(tmp_path):
    """The demo checkpoint, its small files to be changed."""
    for path in DEMO.iterdir():
        if path.suffix == ".safetensors":
            (tmp_path / path.name).symlink_to(path)
        elif path.is_file():
            shutil.copy(path, tmp_path)
    return tmp_path


def rewrite(path, **changes):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def ask(server, **fields):
    response = httpx.post(f"{server.url}/v1/chat/completions", json={**QUESTION, **fields}, timeout=60)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


def test_the_tokenizer_ends_answers_that_the_config_does_not(start, demo):
    rewrite(demo / "config.json", eos_token_id=None)
    server = start(*OPTIONS, model_dir=demo)
    assert ask(server, temperature=0) == (WHALES, "stop")
    assert not [line for line in server.log if "warning" in line]


def test_without_any_end_token_there_is_a_warning(start, demo):
    rewrite(demo / "config.json", eos_token_id=None)
    rewrite(demo / "tokenizer_config.json", eos_token=None)
    server = start(*OPTIONS, model_dir=demo)
    assert [line for line in server.log if "warning" in line and "generation_config.json" in line]
    assert ask(server, temperature=0, max_tokens=40)[1] == "length"
    server.stop()
    # The third place to say it.
    rewrite(demo / "generation_config.json", eos_token_id=[2, 1])
    server = start(*OPTIONS, "--generation-config", "none", model_dir=demo)
    assert not [line for line in server.log if "warning" in line]
    assert ask(server, temperature=0) == (WHALES, "stop")


def test_requests_that_say_nothing_are_drawn_as_the_checkpoint_says(start, demo, binary):
    rewrite(demo / "generation_config.json", do_sample=True, temperature=0.0, eos_token_id=1)
    server = start(*OPTIONS, model_dir=demo)
    assert [line for line in server.log if "drawn with temperature 0 " in line]
    assert {ask(server, seed=seed) for seed in range(5)} == {(WHALES, "stop")}
    assert len({ask(server, seed=seed, messages=NONSENSE, max_tokens=20) for seed in range(5)}) == 1
    assert len({ask(server, seed=seed, messages=NONSENSE, max_tokens=20, temperature=1) for seed in range(5)}) > 1
    server.stop()
    server = start(*OPTIONS, "--generation-config", "none", model_dir=demo)
    plain = [ask(server, seed=seed, messages=NONSENSE, max_tokens=20) for seed in range(5)]
    assert plain == [ask(server, seed=seed, messages=NONSENSE, max_tokens=20, temperature=1) for seed in range(5)]
    assert len(set(plain)) > 1
    server.stop()
    chat = [str(binary), "chat", "--model", str(demo), "--device", "cpu", "--max-model-len", "256"]
    said = subprocess.run(chat, input="What kinds of whale are there?\n", capture_output=True, text=True, timeout=60)
    assert said.stdout == WHALES + "\n", said.stderr
    report = subprocess.run([str(binary), "inspect", "--model", str(demo)], capture_output=True, text=True, timeout=60)
    assert report.returncode == 0 and report.stderr == ""
    assert "end at token 1; temperature 0 by default" in report.stdout and "answers end at token 1\n" in report.stdout


@pytest.mark.parametrize(
    "text, said",
    [("{", "generation_config.json: "), ('{"temperature": 5}', "temperature: found 5"), ('{"eos_token_id": -2}', "eos_token_id")],
)
def test_a_malformed_file_is_one_line(binary, demo, text, said):
    (demo / "generation_config.json").write_text(text)
    command = [str(binary), "serve", "--model", str(demo), "--port", "0", "--grpc-port", "0", "--device", "cpu"]
    for words in (command, [str(binary), "inspect", "--model", str(demo)]):
        result = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1 and said in result.stderr, result.stderr
