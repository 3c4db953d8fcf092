"""POST /v1/completions through the official client, against the reference's tokens and log-probabilities."""

import re
import threading
import time

import httpx
import numpy as np
import openai
import pytest

MAX_LOGPROB_ERROR = 2e-3


def greedy(client, model, golden, **options):
    return client.completions.create(
        model=model,
        prompt=golden["greedy.prompt"].tolist(),
        max_tokens=len(golden["greedy.tokens"]),
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
        **options,
    )


def test_greedy_tokens_are_the_references(client, server, golden):
    answer = greedy(client, server.model, golden)
    assert answer.choices[0].token_ids == golden["greedy.tokens"].tolist()
    assert answer.choices[0].prompt_token_ids == golden["greedy.prompt"].tolist()
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(golden["greedy.prompt"])
    assert answer.usage.completion_tokens == len(golden["greedy.tokens"])


def test_a_stream_says_the_same(client, server, golden):
    whole = greedy(client, server.model, golden)
    text, tokens, reasons, usage = "", [], [], None
    for chunk in greedy(client, server.model, golden, stream=True, stream_options={"include_usage": True}):
        if chunk.choices:
            assert usage is None and chunk.usage is None
            text += chunk.choices[0].text
            tokens += chunk.choices[0].token_ids
            reasons.append(chunk.choices[0].finish_reason)
        else:
            usage = chunk.usage
    assert text == whole.choices[0].text
    assert tokens == golden["greedy.tokens"].tolist()
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert usage == whole.usage


@pytest.mark.parametrize("index", range(4))
def test_echoed_logprobs_are_the_references(client, server, golden, index):
    prompt = golden[f"prompt.{index}"].tolist()
    answer = client.completions.create(model=server.model, prompt=prompt, max_tokens=0, echo=True, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.top_logprobs) == len(logprobs.text_offset) == len(prompt)
    assert logprobs.token_logprobs[0] is None
    np.testing.assert_allclose(logprobs.token_logprobs[1:], golden[f"logprobs.{index}"], atol=MAX_LOGPROB_ERROR, rtol=0)
    # The likeliest alternative is the reference's, wherever it is clear.
    is_clear = golden[f"top1_margin.{index}"][:-1] > 0.01
    assert is_clear.sum() > 0.5 * len(is_clear)
    for i in np.flatnonzero(is_clear):
        top = max(logprobs.top_logprobs[i + 1], key=logprobs.top_logprobs[i + 1].get)
        is_top = golden[f"top1.{index}"][i] == prompt[i + 1]
        assert (top == logprobs.tokens[i + 1]) == is_top


def test_generated_logprobs_continue_the_prompts(client, server, golden):
    """Generated with log-probabilities, then echoed as a prompt: the same numbers."""
    options = {"model": server.model, "logprobs": 2, "temperature": 0}
    prompt = golden["greedy.prompt"].tolist()
    first = client.completions.create(prompt=prompt, max_tokens=16, extra_body={"return_token_ids": True}, **options)
    tokens = first.choices[0].token_ids
    again = client.completions.create(prompt=prompt + tokens, max_tokens=0, echo=True, **options)
    echoed = again.choices[0].logprobs.token_logprobs[len(prompt) :]
    np.testing.assert_allclose(first.choices[0].logprobs.token_logprobs, echoed, atol=1e-4, rtol=0)


def test_text_prompts_are_tokenized_with_bos(client, server):
    answer = client.completions.create(
        model=server.model, prompt="Hello world", max_tokens=1, echo=True, extra_body={"return_token_ids": True}
    )
    assert answer.choices[0].text.startswith("Hello world")
    assert answer.choices[0].prompt_token_ids[0] == 0
    assert len(answer.choices[0].prompt_token_ids) == 3


def test_seeds_and_choices(client, server):
    def texts(seed):
        answer = client.completions.create(model=server.model, prompt=["Hello", "world"], n=3, seed=seed, max_tokens=12)
        assert [choice.index for choice in answer.choices] == list(range(6))
        return [choice.text for choice in answer.choices]

    first = texts(1)
    assert first == texts(1)
    assert first != texts(2)
    assert len(set(first)) == 6


def test_stop_strings(client, server, golden):
    whole = greedy(client, server.model, golden).choices[0].text
    stop = whole[5:9]
    answer = greedy(client, server.model, golden, stop=[stop])
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < len(golden["greedy.tokens"])


def test_requests_together_answer_as_alone(client, server, golden):
    """Twelve clients at once: greedy tokens do not depend on the company."""
    expected, answers = golden["greedy.tokens"].tolist(), []
    threads = [
        threading.Thread(target=lambda: answers.append(greedy(client, server.model, golden).choices[0].token_ids))
        for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 12


def test_a_client_that_leaves_frees_the_server(client, server):
    """Long answers are abandoned after their first token; the next one does not queue behind them."""
    for _ in range(80):
        with client.completions.create(
            model=server.model, prompt="Hello", max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
        ) as stream:
            next(iter(stream))
    start = time.monotonic()
    client.completions.create(model=server.model, prompt="Hello", max_tokens=1)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "options, param, code",
    [
        ({"temperature": -1}, "temperature", None),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"logprobs": 21}, "logprobs", None),
        ({"prompt": []}, "prompt", None),
        ({"prompt": [100_000]}, "prompt", None),
        ({"prompt": [5] * 100_000}, "prompt", "context_length_exceeded"),
        ({"stop": [""]}, "stop", None),
    ],
)
def test_wrong_requests_name_the_field(client, server, options, param, code):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**{"model": server.model, "prompt": "Hello", **options})
    assert error.value.body["param"] == param
    assert error.value.body["code"] == code
    assert error.value.body["type"] == "invalid_request_error"


def test_unknown_models_are_not_found(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="gpt-4", prompt="Hello")
    assert error.value.body["code"] == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_models(client, server, checkpoint):
    (model,) = client.models.list().data
    assert model.id == server.model == checkpoint.name
    assert model.root == str(checkpoint)
    assert model.max_model_len > 0
    assert client.models.retrieve(server.model).id == server.model


def test_a_thousand_answers_of_one_connection_keep_no_other_waiting(start):
    server = start("--max-sequences", "4")
    has_ended = threading.Event()

    def ask_for_a_thousand():
        with pytest.raises(openai.APIError):  # the server is stopped before
            server.client().completions.create(
                model=server.model, prompt=["crowd"] * 8, n=128, max_tokens=1000, extra_body={"ignore_eos": True}
            )
        has_ended.set()

    crowd = threading.Thread(target=ask_for_a_thousand)
    crowd.start()

    def num_waiting():
        return int(re.search(r"vllm:num_requests_waiting{.*} (\d+)", httpx.get(f"{server.url}/metrics").text)[1])

    while num_waiting() < 900:
        time.sleep(0.01)
    for priority in (0, 0, -1000):
        server.client().completions.create(model=server.model, prompt="me", max_tokens=5, extra_body={"priority": priority})
    assert num_waiting() > 500, "the thousand wait still"
    assert not has_ended.is_set()
    server.process.kill()
    crowd.join()
