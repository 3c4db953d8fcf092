"""The demo's experts spread over several ranks of one process: the answers of one rank, load and metrics by rank."""

import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT
from test_process import serve_and_fail

DEMO = ROOT / "deploy/demo"

QUESTIONS = [f"What is a {animal}?" for animal in ("sperm whale", "kraken", "dolphin", "squid", "harbour", "ship", "wave", "harpoon")]


def by_engine(server, name):
    text = urllib.request.urlopen(f"{server.url}/metrics", timeout=30).read().decode()
    return {int(number): float(value) for number, value in re.findall(rf'^{name}{{[^}}]*engine="(\d+)"[^}}]*}} (\S+)$', text, re.M)}


@pytest.mark.parametrize("drafts", [0, 1])
def test_answers_are_those_of_one_rank(start, drafts):
    answers = {}
    for ranks in (1, 2, 4, 8):
        server = start("--ranks", str(ranks), "--speculative-tokens", str(drafts), "--max-model-len", "1024", model_dir=DEMO)
        ask = server.client().chat.completions.create
        model = server.client().models.list().data[0].id

        def answer(job):
            temperature, question = job
            messages = [{"role": "user", "content": question}]
            return ask(model=model, messages=messages, temperature=temperature, seed=7, max_tokens=48).choices[0].message.content

        jobs = [(temperature, question) for temperature in (0, 1.0) for question in QUESTIONS]
        with ThreadPoolExecutor(16) as pool:
            answers[ranks] = list(pool.map(answer, jobs))
        assert [answer(jobs[0]), answer(jobs[1])] == answers[ranks][:2]  # alone: the other ranks have nothing to do
        assert answers[ranks] == answers[1]
        tokens = by_engine(server, "vllm:generation_tokens_total")
        assert sorted(tokens) == list(range(ranks)) and min(tokens.values()) > 0
        deadline = time.monotonic() + 10  # the last step that names an answer ends after the answer
        while any(by_engine(server, "vllm:num_requests_running").values()):
            assert time.monotonic() < deadline
        assert server.stop() == 0


def test_ranks_that_do_not_divide_the_experts(binary):
    message = serve_and_fail(binary, DEMO, "--ranks", "5")
    assert "ranks: found 5" in message and "expected one of 1, 2, 4, 8, 16" in message
