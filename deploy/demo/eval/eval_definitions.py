"""Asks a running server 500 definitions in phrasings it was not trained on, and 200 words it was not trained on; greedy.

Usage: eval_definitions.py [--url http://127.0.0.1:8000] [--concurrency 16] [--out FILE]
F1: overlap of the answer's words, after "means:", with the gloss's, as multisets. An answer to an unknown word should be a sentence
or two and end by itself.
"""

import argparse
import json
import re
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
MAX_TOKENS = 96


def ask(url, messages):
    """-> text, finish reason, number of tokens"""
    body = json.dumps({"messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}).encode()
    request = urllib.request.Request(url + "/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        answer = json.load(response)
    choice = answer["choices"][0]
    return choice["message"]["content"], choice["finish_reason"], answer["usage"]["completion_tokens"]


def ask_all(url, questions, concurrency):
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda q: ask(url, [{"role": "user", "content": q}]), questions))


def words(text):
    return Counter(re.findall(r"[a-z0-9']+", text.split(" means: ", 1)[-1].lower()))


def f1(answer, expected):
    a, e = words(answer), words(expected)
    common = (a & e).total()
    return 2 * common / (a.total() + e.total()) if common else 0.0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--out", type=Path, help="every answer, as JSON lines")
    args = parser.parse_args()

    known = json.loads((HERE / "definitions.json").read_text(encoding="utf-8"))
    answers = ask_all(args.url, [item["question"] for item in known], args.concurrency)
    rows = [{**item, "answer": a, "finish": finish, "f1": round(f1(a, item["expected"]), 3)} for item, (a, finish, _) in zip(known, answers)]
    scores = [row["f1"] for row in rows]
    print(f"known words: {len(rows)}, mean F1 {sum(scores) / len(scores):.3f}, F1 >= 0.8: {sum(s >= 0.8 for s in scores) / len(scores):.1%}, "
          f"exact: {sum(r['answer'] == r['expected'] for r in rows) / len(rows):.1%}, "
          f"'do not know': {sum('do not know' in r['answer'] for r in rows) / len(rows):.1%}")  # fmt: skip

    strange = json.loads((HERE / "unknown.json").read_text(encoding="utf-8"))
    answers = ask_all(args.url, [item["question"] for item in strange], args.concurrency)
    others = [{**item, "answer": a, "finish": finish, "tokens": n} for item, (a, finish, n) in zip(strange, answers)]
    lengths = sorted(row["tokens"] for row in others)
    print(f"unknown words: {len(others)}, 'do not know': {sum('do not know' in r['answer'] for r in others) / len(others):.1%}, "
          f"ended by themselves: {sum(r['finish'] == 'stop' for r in others) / len(others):.1%}, "
          f"tokens: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}, "
          f"at most two sentences: {sum(r['answer'].count('. ') <= 1 for r in others) / len(others):.1%}")  # fmt: skip
    if args.out:
        args.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows + others), encoding="utf-8")


if __name__ == "__main__":
    main()
