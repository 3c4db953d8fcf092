#!/usr/bin/env python3
# Makes chat_vectors.json beside this file: random conversations, and what Jinja makes of them with the shipped templates.
#
#   python3 -m venv /tmp/venv && /tmp/venv/bin/pip install jinja2==3.1.6
#   /tmp/venv/bin/python tests/server/data/make_chat_vectors.py TEMPLATES [--all]
#
# TEMPLATES has v3.jinja, v3_0324.jinja, r1.jinja, r1_0528.jinja and v3_1.jinja. Of 4000 conversations those are kept in
# which a neighbourhood of messages or a way of failing occurs that no earlier one had; with --all, every one. The output
# is the same in each run.
import argparse
import json
import pathlib
import random

from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = pathlib.Path(__file__).parent
NAMES = ["v3", "v3_0324", "r1", "r1_0528", "v3_1"]
BOS = "<｜begin▁of▁sentence｜>"
CONTENTS = [
    "", " ", "\n", "Hi", "Dive deep.", "a\n\nb", " padded ", "鲸鱼在海里", "{\"ok\": true}", "<think>Hmm</think>Well", "</think>",
    "<think>\nA\n</think>\n\nB", "x</think>y</think>z", "<think>open", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁sep｜>", "{{ 1 }}{% x %}",
    "'quoted' \"twice\"", "back\\slash\\n", "😀", "a<", "｜>",
]
TYPES, CALLED = ["function", "function", "custom", ""], ["get_weather", "dive", ""]
ARGUMENTS = ["{}", "{\"depth\": 2000}", "", "{\"a\": \"</think>\"}", "[1,\n2]"]


def sources(directory):
    """The templates; r1_0528 with the guard that it lacks: it looks into content before it asks whether there is any."""
    texts = {name: (directory / f"{name}.jinja").read_text() for name in NAMES}
    unguarded, guarded = "{% if '</think>' in content %}", "{% if content is not none and '</think>' in content %}"
    assert texts["r1_0528"].count(unguarded) == 1
    texts["r1_0528"] = texts["r1_0528"].replace(unguarded, guarded)
    return texts


def random_message(rng):
    role = rng.choice(["system", "user", "user", "assistant", "assistant", "assistant", "tool"])
    message = {"role": role, "content": None if rng.random() < 0.015 else rng.choice(CONTENTS)}
    if role == "assistant" and rng.random() < 0.5:
        message["tool_calls"] = [
            {
                "type": rng.choice(TYPES),
                "function": {"name": rng.choice(CALLED), "arguments": rng.choice(ARGUMENTS)},
            }
            for _ in range(rng.choice([1, 1, 2, 3]))
        ]
        if rng.random() < 0.6:
            message["content"] = None
    if role == "assistant" and rng.random() < 0.2:
        message["prefix"] = rng.random() < 0.8
    return message


def kind(message):
    """What of a message the templates look at."""
    content = message["content"]
    shape = "null" if content is None else "think" if "</think>" in content else "blank" if not content.strip() else "text"
    return (message["role"], shape, min(len(message.get("tool_calls", [])), 2), message.get("prefix", False))


def render(template, messages, gen, thinking):
    try:
        return template.render(messages=messages, add_generation_prompt=gen, thinking=thinking, bos_token=BOS)
    except TypeError:  # null where text is written
        return None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("templates", type=pathlib.Path)
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    templates = {name: environment.from_string(text) for name, text in sources(arguments.templates).items()}
    rng = random.Random(1)
    seen, cases, num_failures = set(), [], 0
    for _ in range(4000):
        messages = [random_message(rng) for _ in range(rng.randrange(1, 9))]
        flags = [(gen, thinking) for gen in (False, True) for thinking in (False, True)]
        rendered = {(name, *flag): render(templates[name], messages, *flag) for name in NAMES for flag in flags}
        roles = ["begin", *((role, min(calls, 1), shape == "null") for role, shape, calls, _ in map(kind, messages)), "end"]
        news = {(a, b) for a, b in zip(roles, roles[1:])} | set(map(kind, messages))
        news |= {(name, text is None, len(messages) == 1) for (name, *_), text in rendered.items()}
        if not arguments.all:
            rendered = {(name, *rng.choice(flags)): None for name in NAMES}
            rendered = {key: render(templates[key[0]], messages, *key[1:]) for key in rendered}
            is_failure = all(text is None for text in rendered.values())
            if news <= seen or (is_failure and num_failures >= 10):
                continue
            num_failures += is_failure
        seen |= news
        cases.append({"messages": messages, "rendered": [[*key, text] for key, text in rendered.items()]})
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    note = "rendered: [template, add_generation_prompt, thinking, text or null where it fails]"
    (HERE / "chat_vectors.json").write_text(f'{{"note": "{note}", "cases": [\n{lines}\n]}}\n')
    print(len(cases), "conversations,", sum(len(case["rendered"]) for case in cases), "renderings")


main()
