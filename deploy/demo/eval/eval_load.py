"""How evenly the experts of the exported model are used on chats in phrasings that were not trained on: maximum / mean a layer.

Usage: eval_load.py [--model deploy/demo]
"""

import argparse
import json
from pathlib import Path

import torch

from common import HERE, chat_text, load_model, load_tokenizer, on_device, padded


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=HERE.parent)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(args.model).to(device), load_tokenizer(args.model)
    items = json.loads((HERE / "definitions.json").read_text(encoding="utf-8"))
    chats = [[{"role": "user", "content": i["question"]}, {"role": "assistant", "content": i["expected"]}] for i in items]
    sequences = [tokenizer.encode(chat_text(chat), add_special_tokens=False).ids for chat in chats]
    loads = 0
    for begin in range(0, len(sequences), 50):
        loads = loads + model(*on_device(padded(sequences[begin : begin + 50]), model))[2]
    ratios = (loads.max(1).values / loads.mean(1)).tolist()
    print(f"{sum(map(len, sequences))} tokens; maximum / mean load: " + ", ".join(f"{r:.2f}" for r in ratios) + " (the last: MTP layer)")
    for i, load in enumerate(loads):
        print(f"  MoE layer {i + 1}: " + " ".join(f"{share:.1%}" for share in (load / load.sum()).tolist()))


if __name__ == "__main__":
    main()
