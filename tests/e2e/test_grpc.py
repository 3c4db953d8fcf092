"""The gRPC endpoint through Python's client: the same answers, cancellation, health, reflection."""

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(server.grpc_address) as channel:
        yield channel


@pytest.fixture(scope="module")
def complete(channel, proto):
    return proto[1].CachalotStub(channel).Complete


def greedy_request(proto, golden, **fields):
    messages = proto[0]
    return messages.CompleteRequest(
        token_ids=messages.TokenIds(ids=golden["greedy.prompt"].tolist()),
        sampling=messages.SamplingParams(temperature=0, max_tokens=len(golden["greedy.tokens"]), ignore_eos=True),
        **fields,
    )


def test_greedy_tokens_are_the_references(complete, proto, golden, client, server):
    responses = list(complete(greedy_request(proto, golden), timeout=120))
    tokens = [token for response in responses for token in response.token_ids]
    assert tokens == golden["greedy.tokens"].tolist()
    assert responses[-1].finish_reason == proto[0].FINISH_REASON_LENGTH
    assert responses[-1].usage.completion_tokens == len(tokens)
    text = "".join(response.text for response in responses)
    whole = client.completions.create(
        model=server.model,
        prompt=golden["greedy.prompt"].tolist(),
        max_tokens=len(tokens),
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert text == whole.choices[0].text


def test_echoed_logprobs_are_the_references(complete, proto, golden):
    messages = proto[0]
    request = messages.CompleteRequest(
        token_ids=messages.TokenIds(ids=golden["prompt.2"].tolist()),
        sampling=messages.SamplingParams(max_tokens=0),
        echo=True,
        logprobs=1,
    )
    scores = [score for response in complete(request, timeout=120) for score in response.logprobs]
    assert [score.token_id for score in scores] == golden["prompt.2"].tolist()
    assert not scores[0].HasField("logprob")
    np.testing.assert_allclose([score.logprob for score in scores[1:]], golden["logprobs.2"], atol=2e-3, rtol=0)


def test_wrong_requests_are_invalid_arguments(complete, proto):
    messages = proto[0]
    request = messages.CompleteRequest(text="Hello", sampling=messages.SamplingParams(temperature=-1))
    with pytest.raises(grpc.RpcError) as error:
        list(complete(request, timeout=20))
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "temperature" in error.value.details()
    with pytest.raises(grpc.RpcError) as error:
        list(complete(messages.CompleteRequest(text="Hello", model="other"), timeout=20))
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


def test_deadlines_and_cancellation(complete, proto, server, client):
    messages = proto[0]
    sampling = messages.SamplingParams(max_tokens=2000, ignore_eos=True)
    for _ in range(40):
        call = complete(messages.CompleteRequest(text="Hello", sampling=sampling), timeout=60)
        next(call)
        call.cancel()
    with pytest.raises(grpc.RpcError) as error:
        list(complete(messages.CompleteRequest(text="Hello", sampling=sampling), timeout=0.3))
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    client.with_options(timeout=5).completions.create(model=server.model, prompt="Hello", max_tokens=1)


def test_health(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", "cachalot.v1.Cachalot"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_describes_the_service(channel):
    database = ProtoReflectionDescriptorDatabase(channel)
    assert "cachalot.v1.Cachalot" in database.get_services()
    names = {message.name for message in database.FindFileByName("cachalot/v1/cachalot.proto").message_type}
    assert {"CompleteRequest", "CompleteResponse"} <= names
