"""The prefix cache as clients and operators see it: usage, salts, the reset route, metrics, and the same answers."""

import re

import httpx
import pytest

PROMPT = [3 + i * i % 200 for i in range(200)]  # three full blocks of 64 tokens, and eight tokens


def complete(server, prompt=PROMPT, **fields):
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **fields}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def cached(answer):
    usage = answer["usage"]
    hit = usage["prompt_tokens_details"]["cached_tokens"]
    assert usage["prompt_cache_hit_tokens"] == hit
    assert usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"] - hit
    return hit


def metric(server, name, labels=""):
    page = httpx.get(f"{server.url}/metrics").text
    return float(re.search(rf"^{re.escape(name)}{{[^}}]*{labels}[^}}]*}} (\S+)$", page, re.MULTILINE)[1])


@pytest.fixture
def fresh(start):
    return start()


def test_a_prompt_is_found_again_and_answered_the_same(fresh):
    first, second = complete(fresh), complete(fresh)
    assert (cached(first), cached(second)) == (0, 192)
    assert second["choices"][0]["token_ids"] == first["choices"][0]["token_ids"]
    assert cached(complete(fresh, PROMPT[:150] + [7] * 50)) == 128
    assert cached(complete(fresh, [7] + PROMPT)) == 0
    assert cached(complete(fresh, PROMPT[:192])) == 128  # at least one token is computed, with its block


def test_an_answer_is_found_by_the_next_turn(fresh):
    first = complete(fresh, max_tokens=70)
    conversation = PROMPT + first["choices"][0]["token_ids"] + [9]
    assert cached(complete(fresh, conversation)) == 256


def test_salts_share_nothing(fresh):
    assert cached(complete(fresh, cache_salt="a")) == 0
    assert cached(complete(fresh, cache_salt="b")) == 0
    assert cached(complete(fresh)) == 0
    assert cached(complete(fresh, cache_salt="b")) == 192


def test_streams_tell_usage_too(fresh):
    complete(fresh)
    body = {"prompt": PROMPT, "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
    text = httpx.post(f"{fresh.url}/v1/completions", json=body).text
    assert '"prompt_tokens_details":{"cached_tokens":192}' in text


def test_several_answers_read_their_prompt_once(fresh):
    answer = complete(fresh, n=4, seed=1, temperature=1)
    assert answer["usage"]["prompt_tokens"] == 200 and cached(answer) == 0
    assert metric(fresh, "vllm:prompt_tokens_total") == 800
    assert metric(fresh, "vllm:prefix_cache_hits_total") == 3 * 192


def test_echoed_logprobs_are_computed(fresh):
    complete(fresh)
    answer = complete(fresh, echo=True, logprobs=1, max_tokens=1)
    assert cached(answer) == 0
    assert len(answer["choices"][0]["logprobs"]["token_logprobs"]) == 201


def test_the_reset_route_forgets(fresh):
    complete(fresh)
    assert metric(fresh, "cachalot:prefix_cache_idle_blocks") == 3
    assert httpx.post(f"{fresh.url}/reset_prefix_cache").status_code == 200
    assert cached(complete(fresh)) == 0
    assert cached(complete(fresh)) == 192


def test_metrics_count_tokens(fresh):
    complete(fresh)
    complete(fresh)
    assert metric(fresh, "vllm:prefix_cache_queries_total") == 400
    assert metric(fresh, "vllm:prefix_cache_hits_total") == 192
    assert metric(fresh, "vllm:prompt_tokens_cached_total") == 192
    assert metric(fresh, "vllm:prompt_tokens_by_source_total", 'source="local_compute"') == 208
    assert metric(fresh, "vllm:kv_cache_usage_perc") == 0


def test_it_can_be_off(start):
    server = start("--no-prefix-cache")
    complete(server)
    assert cached(complete(server)) == 0
    assert metric(server, "vllm:prefix_cache_queries_total") == 0


def test_grpc_tells_and_takes_the_same(fresh, proto):
    import grpc

    messages, services = proto
    with grpc.insecure_channel(fresh.grpc_address) as channel:
        stub = services.CachalotStub(channel)

        def ask(salt="", n=1):
            request = messages.CompleteRequest(
                token_ids=messages.TokenIds(ids=PROMPT), sampling=messages.SamplingParams(max_tokens=2), cache_salt=salt, n=n
            )
            return stub.CompleteUnary(request).usage

        assert ask().cached_tokens == 0
        assert ask().cached_tokens == 192
        assert ask("tenant", n=3).cached_tokens == 0
        usage = ask("tenant", n=2)
        assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (200, 4, 192)


@pytest.mark.parametrize("drafts", [0, 2])
def test_drafts_and_the_cache_change_nothing(start, drafts, golden):
    plain, server = start("--no-prefix-cache"), start("--speculative-tokens", str(drafts))
    for temperature in (0, 0.8):
        for repeat in range(3):
            fields = {"temperature": temperature, "seed": 5, "max_tokens": 40, "frequency_penalty": 0.5, "logprobs": 2}
            expected, answer = complete(plain, **fields), complete(server, **fields)
            assert answer["choices"] == expected["choices"]
            assert cached(answer) == (192 if (temperature, repeat) != (0, 0) else 0)
