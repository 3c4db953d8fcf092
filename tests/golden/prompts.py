"""Draws the prompts: repetitive token sequences on which no router decision is close, and prompts with a clear greedy continuation.

A token is kept only if the selection margin at its position is at least MIN_ROUTER_MARGIN in every MoE layer of every model
given; otherwise it is drawn again. So a test needs to exclude almost nothing, and the weights stay plain random.
"""

import numpy as np

MIN_ROUTER_MARGIN = 0.02
FIRST_TOKEN = 3  # 0..2 are the specials
CHUNK = 512
ATTEMPTS = 400


def structured_tokens(length, num_tokens, rng):
    """A few frequent tokens, many rare ones, and runs copied from earlier."""
    alphabet = rng.permutation(np.arange(FIRST_TOKEN, num_tokens))
    tokens = []
    while len(tokens) < length:
        if len(tokens) > 8 and rng.random() < 0.15:
            start = rng.integers(0, len(tokens) - 4)
            tokens += tokens[start : start + rng.integers(3, 12)]
        else:
            tokens.append(int(alphabet[int(len(alphabet) * rng.random() ** 2)]))
    return np.array(tokens[:length])


def margins(model, tokens, cache):
    """Router margin by token, and the cache after them. The MTP layer at position i - 1 is token i's doing."""
    out = model.forward(tokens, cache)
    margin = out.router_margin
    if model.config.get("num_nextn_predict_layers") and not cache and len(tokens) > 1:
        margin[1:] = np.minimum(margin[1:], model.forward_mtp(out.hidden[:-1], tokens[1:]).router_margin)
    return margin, out.cache


def draw_prompt(models, length, num_tokens, rng):
    tokens, caches = structured_tokens(length, num_tokens, rng), [None] * len(models)
    for begin in range(0, length, CHUNK):
        chunk = tokens[begin : begin + CHUNK]  # a view: corrected in place
        for _ in range(ATTEMPTS):
            results = [margins(model, chunk, cache) for model, cache in zip(models, caches)]
            close = np.flatnonzero(np.min([margin for margin, _ in results], axis=0) < MIN_ROUTER_MARGIN)
            if len(close) == 0:
                break
            chunk[close] = rng.integers(FIRST_TOKEN, num_tokens, len(close))
        caches = [cache for _, cache in results]
    return tokens


def greedy(model, prompt, count):
    """-> tokens, margin of the best over the second logit, router margin of the position each was chosen at."""
    tokens, top_margins, router_margins, cache, step = [], [], [], None, prompt
    for _ in range(count):
        out = model.forward(step, cache)
        cache, logits = out.cache, out.logits[-1]
        second, best = np.sort(logits)[-2:]
        tokens.append(int(logits.argmax()))
        top_margins.append(best - second)
        router_margins.append(out.router_margin[-1])
        step = np.array(tokens[-1:])
    return np.array(tokens), np.array(top_margins), np.array(router_margins)


def draw_greedy(model, num_tokens, rng, length=21, count=32, candidates=24):
    """The candidate whose 32 greedy tokens are clearest: no specials, not a short loop, the largest of the least margins."""
    best_score, best = -1.0, None
    for _ in range(candidates):
        prompt = draw_prompt([model], length, num_tokens, rng)
        tokens, top_margins, router_margins = greedy(model, prompt, count)
        if tokens.min() < FIRST_TOKEN or len(np.unique(tokens)) < 10:
            continue
        score = min(top_margins.min(), 10 * router_margins.min())
        if score > best_score:
            best_score, best = score, (prompt, tokens, top_margins, router_margins)
    return best
