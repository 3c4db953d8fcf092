"""The demo checkpoint that the quickstart serves: it is whole, it is small enough to ship, and it answers with sense."""

import json

import pytest

from conftest import ROOT

DEMO = ROOT / "deploy/demo"
WHALES = "Kinds of whale are: baleen whale, toothed whale, narwhal and spouter."


def test_size():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= 28 << 20
    shards = sorted(DEMO.glob("*.safetensors"))
    assert len(shards) > 1 and all(path.stat().st_size < 16 << 20 for path in shards)
    index = json.loads((DEMO / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}


@pytest.mark.parametrize("kv_cache", ["f32", "bf16", "fp8"])
def test_it_knows_its_whales(start, kv_cache):
    server = start("--max-model-len", "2048", "--kv-cache-dtype", kv_cache, model_dir=DEMO)
    ask = server.client().chat.completions.create
    messages = [{"role": "user", "content": "What kinds of whale are there?"}]
    answer = ask(model=server.model, messages=messages, temperature=0).choices[0]
    assert answer.message.content == WHALES and answer.finish_reason == "stop"


def test_definitions_in_unseen_phrasings(start):
    """A sample of deploy/demo/eval/eval_definitions.py: most answers are the gloss, word for word."""
    server = start("--max-model-len", "2048", model_dir=DEMO)
    ask = server.client().chat.completions.create
    questions = json.loads((DEMO / "eval/definitions.json").read_text())[:40]
    right = 0
    for question in questions:
        messages = [{"role": "user", "content": question["question"]}]
        answer = ask(model=server.model, messages=messages, temperature=0, max_tokens=96).choices[0]
        right += answer.message.content == question["expected"]
    print(f"{right} of {len(questions)} as expected")
    assert right >= 0.75 * len(questions)
