"""The demo checkpoint that the quickstart serves: it is whole, it is small enough to ship, and it answers with sense."""

import json
import re
import shutil
import struct
import urllib.request
from concurrent.futures import ThreadPoolExecutor

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


def metric(server, name):
    text = urllib.request.urlopen(f"{server.url}/metrics", timeout=30).read().decode()
    return float(re.search(rf"^vllm:{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)[1])


def flip_draft_norm(model_dir):
    """Turns the sign of the MTP layer's last norm: its drafts prefer what they should avoid."""
    path = next(p for p in model_dir.glob("*.safetensors") if b"shared_head.norm" in p.read_bytes())
    data = bytearray(path.read_bytes())
    size = struct.unpack("<Q", data[:8])[0]
    entry = next(e for name, e in json.loads(data[8 : 8 + size]).items() if name.endswith("shared_head.norm.weight"))
    assert entry["dtype"] == "BF16"
    begin, end = (8 + size + offset for offset in entry["data_offsets"])
    for i in range(begin + 1, end, 2):
        data[i] ^= 0x80
    path.write_bytes(data)


def test_drafts_change_no_answer(start, tmp_path):
    """Greedy and sampled, with one draft and with two, right ones and wrong ones. Prints how many were right."""
    broken = shutil.copytree(DEMO, tmp_path / "demo", ignore=shutil.ignore_patterns("train", "eval"))
    flip_draft_norm(broken)
    questions = json.loads((DEMO / "eval/definitions.json").read_text())[40:90]
    answers, accepted = {}, {}
    for name, model_dir, k in (("none", DEMO, 0), ("one", DEMO, 1), ("two", DEMO, 2), ("broken", broken, 1)):
        server = start("--max-model-len", "2048", "--served-model-name", "demo", "--speculative-tokens", str(k), model_dir=model_dir)
        ask = server.client().chat.completions.create
        for temperature in (0, 1.0):
            before = [metric(server, f"spec_decode_num_{what}_tokens_total") for what in ("accepted", "draft")]

            def answer(question):
                messages = [{"role": "user", "content": question["question"]}]
                return ask(model="demo", messages=messages, temperature=temperature, seed=7, max_tokens=96).choices[0].message.content

            with ThreadPoolExecutor(8) as pool:
                answers[name, temperature] = list(pool.map(answer, questions))
            after = [metric(server, f"spec_decode_num_{what}_tokens_total") for what in ("accepted", "draft")]
            num_accepted, num_drafts = (b - a for a, b in zip(before, after))
            assert (num_drafts > 0) == (k > 0)
            accepted[name, temperature] = num_accepted / max(num_drafts, 1)
            assert answers[name, temperature] == answers["none", temperature], (name, temperature)
        assert server.stop() == 0
    print("drafts accepted:", {f"{name}, temperature {t}": f"{share:.1%}" for (name, t), share in accepted.items()})
    assert len(set(answers["none", 0])) > 40 and answers["none", 0] != answers["none", 1.0]
    assert accepted["one", 0] > 0.9 and accepted["one", 1.0] > 0.9
    assert accepted["two", 0] > 0.5
    assert accepted["broken", 0] < 0.1
