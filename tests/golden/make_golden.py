"""Writes data/<case>/: a small random checkpoint, its prompts and the float64 reference results (see README.md).

Usage: make_golden.py [--chat-template FILE] [--out DIR] [case ...]
"""

import argparse
import json
from pathlib import Path

import numpy as np

import checkpoint
import formats
import prompts
import tokenizer
from cases import CASES
from reference import Model, log_softmax

HERE = Path(__file__).parent
LONG = 4096  # prompts beyond this many tokens store fp32 results


def by_chunks(model, tokens):
    """model.forward over a long prompt without a [T, W] array of logits alive twice."""
    cache = None
    for begin in range(0, len(tokens), prompts.CHUNK):
        out = model.forward(tokens[begin : begin + prompts.CHUNK], cache)
        cache = out.cache
        yield out


def prompt_results(model, tokens):
    """Everything golden about one prompt: {tensor name without index: array}."""
    outputs = list(by_chunks(model, tokens))
    logits, margin = np.concatenate([o.logits for o in outputs]), np.concatenate([o.router_margin for o in outputs])
    log_probs, ranked = log_softmax(logits), np.sort(logits, axis=1)
    results = {
        "logprobs": log_probs[np.arange(len(tokens) - 1), tokens[1:]],
        "top1": logits.argmax(axis=1).astype(np.int32),
        "top1_margin": (ranked[:, -1] - ranked[:, -2]).astype(np.float32),
        "router_margin": margin.astype(np.float32),
        "context_router_margin": np.minimum.accumulate(margin).astype(np.float32),
        "last_logits": log_probs[-1],
    }
    if model.config.get("num_nextn_predict_layers"):
        hidden = np.concatenate([o.hidden for o in outputs])
        mtp = model.forward_mtp(hidden[:-1], tokens[1:])
        log_probs = log_softmax(mtp.logits)
        results["mtp_logprobs"] = log_probs[np.arange(len(tokens) - 2), tokens[2:]]
        results["mtp_top1"] = mtp.logits.argmax(axis=1).astype(np.int32)
        results["mtp_router_margin"] = mtp.router_margin.astype(np.float32)
        results["mtp_last_logits"] = log_probs[-1]
    if len(tokens) > LONG:
        results = {name: value.astype(np.float32) if value.dtype == np.float64 else value for name, value in results.items()}
    return results


def quantiles(values, points=(0, 0.01, 0.1, 0.5)):
    return " ".join(f"{q:.3g}" for q in np.quantile(values, points))


def print_statistics(golden, prefix):
    def gathered(name):
        return np.concatenate([v for key, v in golden.items() if key.startswith(f"{prefix}{name}.")])

    print(f"  {prefix or 'plain'}: quantiles 0 1% 10% 50%")
    print(f"    router margin {quantiles(gathered('router_margin'))}, share below 1e-2: {(gathered('router_margin') < 1e-2).mean():.4f}")
    print(f"    top-1 margin {quantiles(gathered('top1_margin'))}, share below 0.05: {(gathered('top1_margin') < 0.05).mean():.4f}")
    print(f"    log-probs {quantiles(gathered('logprobs'))}, mean {gathered('logprobs').mean():.3f}")


def make_case(name, case, directory, chat_template):
    tensors = checkpoint.random_tensors(case.config, case.seed, **case.weights)
    checkpoint.write_checkpoint(directory, case.config, tensors, case.num_shards)
    if case.tokenizer:
        tokenizer.write_tokenizer(directory, chat_template)
        assert tokenizer.num_tokens() == case.config["vocab_size"]

    models = {"": Model(directory)}
    if case.act_quant:
        models["aq."] = Model(directory, quantise_activations=True)
    rng, num_tokens, golden = np.random.default_rng(1000 + case.seed), case.config["vocab_size"], {}
    for i, length in enumerate(case.lengths):
        tokens = prompts.draw_prompt(list(models.values()), length, num_tokens, rng)
        golden[f"prompt.{i}"] = tokens.astype(np.int32)
        for prefix, model in models.items():
            golden.update({f"{prefix}{key}.{i}": value for key, value in prompt_results(model, tokens).items()})
    if max(case.lengths) <= LONG:
        prompt, tokens, margin, router_margin = prompts.draw_greedy(models[""], num_tokens, rng)
        golden["greedy.prompt"], golden["greedy.tokens"] = prompt.astype(np.int32), tokens.astype(np.int32)
        golden["greedy.margin"], golden["greedy.router_margin"] = margin.astype(np.float32), router_margin.astype(np.float32)

    names = {np.dtype(np.int32): "I32", np.dtype(np.float32): "F32", np.dtype(np.float64): "F64"}
    stored = {key: formats.store(value, names[value.dtype]) for key, value in golden.items()}
    formats.write_safetensors(directory / "golden.safetensors", stored)

    size = sum(path.stat().st_size for path in directory.iterdir())
    print(f"{name}: {size} bytes, {len(tensors)} tensors")
    for prefix in models:
        print_statistics(golden, prefix)
    if "greedy.tokens" in golden:
        print(f"  greedy: least margin {margin.min():.3g}, least router margin {router_margin.min():.3g}, {len(set(tokens))} distinct")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chat-template", type=Path, help="Jinja file for tokenizer_config.json (default: keep the one there)")
    parser.add_argument("--out", type=Path, default=HERE / "data")
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="case")
    args = parser.parse_args()
    if args.chat_template:
        chat_template = args.chat_template.read_text(encoding="utf-8")
    else:
        chat_template = json.loads((HERE / "data/v3_like/tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    for name in args.cases:
        make_case(name, CASES[name], args.out / name, chat_template)


if __name__ == "__main__":
    main()
