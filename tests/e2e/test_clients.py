"""Clients other than OpenAI's own, as their users have them: whole answers, streams, histories.

They are imported where they are used: it takes seconds, which tests of other things need not wait for.
"""

import json
import re

import httpx
import pytest

from conftest import ROOT, Server

pytestmark = pytest.mark.filterwarnings("ignore")  # of the clients about themselves
QUESTION = "What kinds of whale are there?"
WHALES = "Kinds of whale are: baleen whale, toothed whale, narwhal and spouter."
HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What does"}, {"type": "text", "text": "whale mean?"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "1", "content": "a mammal"},
    {"role": "assistant", "content": "A mammal."},
    {"role": "user", "content": QUESTION},
]


@pytest.fixture(scope="module")
def demo(binary):
    server = Server(binary, ROOT / "deploy/demo", "--max-model-len", "1024", "--max-sequences", "4")
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def langchain(demo):
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=demo.model, base_url=f"{demo.url}/v1", api_key="none", temperature=0, max_retries=0, timeout=60)


def test_langchain(langchain):
    answer = langchain.invoke(QUESTION)
    assert answer.content == WHALES
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["output_tokens"] > 5
    pieces = list(langchain.stream(QUESTION, stream_usage=True))
    assert len(pieces) > 5 and "".join(piece.content for piece in pieces) == WHALES
    assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) == answer.usage_metadata["output_tokens"]
    assert [answer.content for answer in langchain.batch([QUESTION] * 3)] == [WHALES] * 3


def test_langchain_histories(langchain, demo):
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
    from langchain_openai import OpenAI

    messages = [
        SystemMessage("Be brief."),
        HumanMessage([{"type": "text", "text": "What does"}, {"type": "text", "text": "whale mean?"}]),
        AIMessage("", tool_calls=[{"id": "1", "name": "look", "args": {}}]),
        ToolMessage("a mammal", tool_call_id="1"),
        AIMessage("A mammal."),
        HumanMessage(QUESTION),
    ]
    whole = langchain.invoke(messages, max_tokens=8, logprobs=True, top_logprobs=2)
    assert whole.usage_metadata["output_tokens"] == len(whole.response_metadata["logprobs"]["content"])
    completions = OpenAI(model=demo.model, base_url=f"{demo.url}/v1", api_key="none", temperature=0, max_tokens=5)
    assert completions.invoke("A whale is") == "".join(completions.stream("A whale is"))


def test_litellm(demo, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the internet when it is imported
    import litellm

    options = {"model": f"openai/{demo.model}", "api_base": f"{demo.url}/v1", "api_key": "none", "temperature": 0}
    question = [{"role": "user", "content": QUESTION}]
    answer = litellm.completion(messages=question, **options)
    assert answer.choices[0].message.content == WHALES and answer.choices[0].finish_reason == "stop"
    pieces = list(litellm.completion(messages=question, stream=True, stream_options={"include_usage": True}, **options))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == WHALES
    assert pieces[-1].usage.completion_tokens == answer.usage.completion_tokens
    assert litellm.completion(messages=HISTORY, max_tokens=8, seed=-1, **options).usage.completion_tokens > 0
    assert litellm.text_completion(prompt="A whale is", max_tokens=5, **options).usage.completion_tokens == 5
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(messages=question, **{**options, "temperature": 5})


def test_load_generators(binary):
    """The requests of guidellm and `vllm bench serve`, which are too large to install here: tests/bench/results has their runs."""
    server = Server(binary, ROOT / "deploy/demo", "--max-model-len", "1024", "--speculative-tokens", "2")
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").json()["data"][0]["id"] == server.model
        tokens = client.post("/tokenize", json={"model": server.model, "prompt": QUESTION, "add_special_tokens": False}).json()
        assert tokens["count"] == len(tokens["tokens"]) > 0
        messages, options = [{"role": "user", "content": QUESTION}], {"model": server.model, "stream": True, "ignore_eos": True}
        usage = {"include_usage": True, "continuous_usage_stats": True}
        for path, body in (
            ("/v1/chat/completions", {"messages": messages, "max_completion_tokens": 16, "stream_options": usage}),
            ("/v1/completions", {"prompt": QUESTION, "max_tokens": 16, "stream_options": usage}),
            ("/v1/completions", {"prompt": QUESTION, "max_tokens": 16, "repetition_penalty": 1.0, "logprobs": None, "stream_options": {"include_usage": True}}),
        ):
            events = client.post(path, json={**body, **options}, headers={"x-request-id": "bench-0"}).text.split("\n\n")
            assert events[-2:] == ["data: [DONE]", ""]
            last = json.loads(events[-3].removeprefix("data: "))
            assert last["choices"] == [] and last["usage"]["completion_tokens"] == 16
        assert client.post("/start_profile").status_code == 404
        samples = re.findall(r"^vllm:spec_decode_num_(\w+)_total{(.*)} (\d+)$", client.get("/metrics").text, re.MULTILINE)
    counts = {(name, *re.findall(r'position="(\d)"', labels)): int(count) for name, labels, count in samples}
    print(counts)
    assert 0 < counts["drafts",] < counts["draft_tokens",] <= 2 * counts["drafts",]
    places = [count for (name, *place), count in counts.items() if name == "accepted_tokens_per_pos"]
    assert sum(places) == counts["accepted_tokens",] > 0 and len(places) <= 2
    assert server.stop() == 0
