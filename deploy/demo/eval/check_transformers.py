"""Compares a running server's greedy answers with those of transformers' DeepseekV3ForCausalLM on the same export.

Usage: check_transformers.py [--url http://127.0.0.1:8000] [--model deploy/demo] [--prompts 50]      needs transformers 5.17
transformers gets the weights dequantised to float32, without the MTP layer; so should the server compute: --activation f32 on the CPU.
Where two answers part, the difference of the two tokens' logits says whether it was a near tie.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from common import HERE, committed_prompts, load_tokenizer
from checkpoint import load_values
from eval_definitions import MAX_TOKENS, ask


def load_reference(directory):
    raw = json.loads((directory / "config.json").read_text())
    for name in ("quantization_config", "architectures", "model_type", "torch_dtype"):
        raw.pop(name, None)
    config = DeepseekV3Config(**raw, attn_implementation="eager", experts_implementation="eager", dtype="float32")
    model, values = DeepseekV3ForCausalLM(config).float().eval(), load_values(directory)
    parts = {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]}

    def value(name):
        if ".experts." not in name:
            return values[name]
        base, leaf = name.rsplit(".", 1)
        experts = range(config.n_routed_experts)
        return torch.stack([torch.cat([values[f"{base}.{e}.{part}.weight"] for part in parts[leaf]]) for e in experts])

    model.load_state_dict({name: value(name) for name in model.state_dict()}, strict=True)
    return model


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", type=Path, default=HERE.parent)
    parser.add_argument("--prompts", type=int, default=50)
    args = parser.parse_args()
    model, tokenizer = load_reference(args.model), load_tokenizer(args.model)
    chats = json.loads((HERE / "chats.json").read_text(encoding="utf-8"))[: args.prompts]
    prompts = committed_prompts(tokenizer)[: args.prompts]
    with ThreadPoolExecutor(16) as pool:
        served = [text for text, _, _ in pool.map(lambda chat: ask(args.url, chat), chats)]
    same = 0
    for prompt, text in zip(prompts, served):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_TOKENS, eos_token_id=1, pad_token_id=1)
        expected = out[0, len(prompt) :].tolist()
        if tokenizer.decode(expected) == text:
            same += 1
            continue
        got = tokenizer.encode(text, add_special_tokens=False).ids + [1]
        at = next((i for i, (a, b) in enumerate(zip(got, expected)) if a != b), min(len(got), len(expected)) - 1)
        logits = model(torch.tensor([prompt + expected[:at]])).logits[0, -1]
        gap = (logits[expected[at]] - logits[got[at]]).item()
        print(f"differs at token {at}, logits {gap:.4f} apart\n  transformers: {tokenizer.decode(expected)}\n  server:       {text}")
    print(f"{same} of {len(prompts)} answers are the same")


if __name__ == "__main__":
    main()
