"""Answers of the PyTorch model, whole rows at a time: slow, simple, for measuring."""

import torch

EOS_ID = 1


def padded(sequences):
    """-> tokens, positions, documents [B, L], padded on the right as the training rows are."""
    length = max(map(len, sequences))
    tokens, documents = torch.zeros(len(sequences), length, dtype=torch.long), torch.full((len(sequences), length), -1)
    for i, sequence in enumerate(sequences):
        tokens[i, : len(sequence)] = torch.tensor(sequence)
        documents[i, : len(sequence)] = i
    return tokens, torch.arange(length).expand(len(sequences), -1), documents


def on_device(tensors, model):
    return [t.to(model.embed_tokens.device) for t in tensors]


@torch.no_grad()
def generate(model, prompts, max_new, temperature=0.0, seed=0):
    """Continues every prompt to its end token or max_new tokens. Greedy at temperature 0, else sampled."""
    sequences, generator = [list(p) for p in prompts], torch.Generator().manual_seed(seed)
    running = list(range(len(sequences)))
    for _ in range(max_new):
        if not running:
            break
        hidden, _, _ = model(*on_device(padded([sequences[i] for i in running]), model))
        last = torch.tensor([len(sequences[i]) - 1 for i in running], device=hidden.device)
        logits = model.logits(hidden[torch.arange(len(running), device=hidden.device), last]).double().cpu()
        if temperature:
            uniform = torch.rand(logits.shape, generator=generator, dtype=torch.double).clamp_min(1e-300)
            logits = logits / temperature - torch.log(-torch.log(uniform))
        for i, token in zip(running, logits.argmax(-1).tolist()):
            sequences[i].append(token)
        running = [i for i in running if sequences[i][-1] != EOS_ID]
    return sequences
