"""How often the MTP layer's draft is the token that the model itself takes next, over the answers to the committed chats.

Usage: eval_mtp.py [--model deploy/demo] [--max-new 64]        in PyTorch, from the exported weights
Row i of the MTP layer sees the model's output at position i and token i + 1, and drafts token i + 2. Counted are the drafts of the
answers' tokens from the second on: the first comes from the prompt's own step. `coupled`: both pick by the same Gumbel noise, which
accepts with probability sum_x 1 / sum_y max(p_y / p_x, q_y / q_x), measured here by drawing the noise; `rejection`: sum_x min(p, q).
"""

import argparse
from pathlib import Path

import torch

from common import committed_prompts, generate, load_model, load_tokenizer, on_device, padded

DRAWS = 64


@torch.no_grad()
def rows(model, prompts, sequences):
    """-> logits of the model and of the MTP layer for the same tokens [N, W], and those tokens [N]"""
    hidden, draft, _ = model(*on_device(padded(sequences), model))
    main, mtp, tokens = [], [], []
    for b, (prompt, sequence) in enumerate(zip(prompts, sequences)):
        places = torch.arange(len(prompt) + 1, len(sequence), device=hidden.device)  # tokens whose draft is looked at
        main.append(hidden[b, places - 1])
        mtp.append(draft[b, places - 2])
        tokens += sequence[len(prompt) + 1 :]
    return model.logits(torch.cat(main)).float(), model.logits(torch.cat(mtp)).float(), torch.tensor(tokens, device=hidden.device)


def coupled(main, mtp, seed):
    """Share of picks that agree when both add the same noise."""
    generator, agree = torch.Generator(main.device).manual_seed(seed), 0.0
    for _ in range(DRAWS):
        uniform = torch.rand(main.shape, generator=generator, device=main.device).clamp(1e-30, 1 - 1e-7)
        noise = -torch.log(-torch.log(uniform))
        agree += ((main + noise).argmax(-1) == (mtp + noise).argmax(-1)).float().mean().item()
    return agree / DRAWS


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--max-new", type=int, default=64)
    parser.add_argument("--prompts", type=int, help="only the first so many")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(args.model).to(device)
    prompts = committed_prompts(load_tokenizer(args.model))[: args.prompts]

    sequences = generate(model, prompts, args.max_new)
    target, draft, tokens = rows(model, prompts, sequences)
    assert (target.argmax(-1) == tokens).float().mean() > 0.99, "the rows are not those of the greedy path"
    print(f"greedy: {len(tokens)} drafts over {len(prompts)} answers, accepted {(draft.argmax(-1) == tokens).float().mean():.1%}")

    sequences = generate(model, prompts, args.max_new, temperature=1.0, seed=1)
    target, draft, tokens = rows(model, prompts, sequences)
    p, q = target.softmax(-1), draft.softmax(-1)
    print(f"temperature 1: {len(tokens)} drafts, arg-max draft is the sampled token {(draft.argmax(-1) == tokens).float().mean():.1%}, "
          f"coupled {coupled(target, draft, 2):.1%}, rejection {torch.minimum(p, q).sum(-1).mean():.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
