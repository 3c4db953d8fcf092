"""Makes known mistakes on purpose in the reference and prints how far the log-probs move: the golden files must notice each one.

Usage: sensitivity.py [case ...]     per mistake: median and largest change of a log-prob (0 means: does not apply to this case)
"""

import sys
from pathlib import Path
from unittest import mock

import numpy as np

import formats
import reference
from reference import Model, log_softmax

HERE = Path(__file__).parent
original = {name: getattr(reference, name) for name in ("rotate", "route", "rms_norm", "rope_table", "attend")}


def config_with(**fields):
    return lambda model: model.config.update({key: f(model.config) for key, f in fields.items()})


def yarn_with(**fields):
    return lambda model: model.config["yarn"] and model.config["yarn"].update({key: f(model.config) for key, f in fields.items()})


def patch(name, function):
    return lambda model: mock.patch.object(reference, name, function).start()


def set_scale(model):
    model.scale = (model.config["qk_nope_head_dim"] + model.config["qk_rope_head_dim"]) ** -0.5


def no_bias(model):
    model.weights.values.update({name: model.weights[name] * 0 for name in model.weights.stored if name.endswith("correction_bias")})


def transposed_scales(model):
    for name, tensor in model.weights.stored.items():
        if name.endswith("_scale_inv"):
            model.weights.stored[name] = formats.Stored("F32", tensor.raw.T.reshape(tensor.raw.shape))


def last_scale_row_lost(model):
    for name, tensor in model.weights.stored.items():
        if name.endswith("_scale_inv") and len(tensor.raw) > 1:
            model.weights.stored[name] = formats.Stored("F32", np.concatenate([tensor.raw[:-1], tensor.raw[-2:-1]]))


def rotate_halves(x, cos, sin):
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def route_with(mask=-np.inf, biased=False, other_family=False):
    """The router rewritten with one rule changed."""

    def route(scores, bias, config):
        selection = scores if bias is None else scores + bias
        chosen_from = selection
        if (config.get("n_group") or 1) > 1:
            grouped = selection.reshape(len(scores), config["n_group"], -1)
            uses_sum = (config["topk_method"] == "noaux_tc") != other_family
            rank = np.sort(grouped, axis=-1)[:, :, -2:].sum(axis=-1) if uses_sum else grouped.max(axis=-1)
            threshold = np.sort(rank, axis=-1)[:, -config["topk_group"], None]
            chosen_from = np.where((rank >= threshold)[:, :, None], grouped, mask).reshape(scores.shape)
        experts, margin = reference.select(chosen_from, config["num_experts_per_tok"])
        weights = np.take_along_axis(selection if biased else scores, experts, axis=-1)
        if config["norm_topk_prob"]:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return experts, weights * config["routed_scaling_factor"], margin

    return patch("route", route)


def windowed(size):
    """Keys older than one to two windows are not seen."""

    def attend(q, k, v, scale):
        begins = range(0, q.shape[1], size)
        parts = [slice(max(0, begin - size), begin + size) for begin in begins]
        return np.concatenate([original["attend"](q[:, b : b + size], k[:, p], v[:, p], scale) for b, p in zip(begins, parts)], axis=1)

    return patch("attend", attend)


def rounded(dtype, quantised=False):
    """Not a mistake but the noise of an implementation that keeps every linear's output in this type."""

    def apply(model):
        linear = model.linear
        model.linear = lambda x, name: formats.load(formats.store(linear(x, name), dtype))
        model.quantise_activations = quantised

    return apply


def with_quantisation(model):
    model.quantise_activations = True


MISTAKES = {
    "plain RoPE, no YaRN frequencies": patch("rope_table", lambda p, d, theta, yarn: original["rope_table"](p, d, theta, None)),
    "YaRN original length := max_position": yarn_with(original_max_position_embeddings=lambda c: c["max_position_embeddings"]),
    "softmax scale without m^2": set_scale,
    "cos/sin times mscale": patch("rope_table", lambda *a: tuple(t * np.float32(1.3689) for t in original["rope_table"](*a))),
    "RoPE on halves": patch("rotate", rotate_halves),
    "positions off in k and q": patch("rope_table", lambda p, *a: original["rope_table"](p * 2, *a)),
    "no RoPE": patch("rotate", lambda x, cos, sin: x),
    "attention window of 64": windowed(64),
    "correction bias ignored": no_bias,
    "weights from biased scores": route_with(biased=True),
    "groups masked with 0": route_with(mask=0.0),
    "group score by the other family's rule": route_with(other_family=True),
    "no groups": config_with(n_group=lambda c: 1),
    "norm_topk_prob flipped": config_with(norm_topk_prob=lambda c: not c["norm_topk_prob"]),
    "scaling factor 1": config_with(routed_scaling_factor=lambda c: 1.0),
    "rms eps 1e-3": config_with(rms_norm_eps=lambda c: 1e-3),
    "norm weights ignored": patch("rms_norm", lambda x, w, eps: original["rms_norm"](x, 1.0, eps)),
    "scales transposed": transposed_scales,
    "last scale row taken from the one before": last_scale_row_lost,
    "activations quantised": with_quantisation,
    "noise: linears rounded to fp32": rounded("F32"),
    "noise: linears rounded to bf16": rounded("BF16"),
}


def other_scale_rule(model):
    model.quantise_activations, model.ue8m0 = True, not model.ue8m0


QUANTISED = {
    "aq: the other scale rule": other_scale_rule,
    "aq noise: linears rounded to fp32": rounded("F32", True),
    "aq noise: linears rounded to bf16": rounded("BF16", True),
}


def concat_swapped(model):
    name = f"model.layers.{model.config['num_hidden_layers']}.eh_proj.weight"
    model.weights.values[name] = np.roll(model.weights[name], model.config["hidden_size"], axis=1)


def shared_norm(model):
    name = f"model.layers.{model.config['num_hidden_layers']}.shared_head.norm.weight"
    model.weights.values[name] = model.weights["model.norm.weight"]


def hidden_before_norm(model):
    """forward_mtp is given the hidden state before model.norm."""
    forward_mtp, norm = model.forward_mtp, model.weights["model.norm.weight"]
    model.forward_mtp = lambda hidden, tokens: forward_mtp(hidden / norm, tokens)


MTP_MISTAKES = {
    "MTP: hidden state first": concat_swapped,
    "MTP: shared_head.norm := model.norm": shared_norm,
    "MTP: h before model.norm": hidden_before_norm,
}


def log_probs(model, tokens):
    out = model.forward(tokens)
    main = log_softmax(out.logits)[np.arange(len(tokens) - 1), tokens[1:]]
    if not model.config.get("num_nextn_predict_layers"):
        return main, main
    return main, log_softmax(model.forward_mtp(out.hidden[:-1], tokens[1:]).logits)[np.arange(len(tokens) - 2), tokens[2:]]


def print_changes(directory, tokens, mistakes, result, base=None):
    """result: 0 for the main model's log-probs, 1 for the MTP layer's. base: what is changed first, for the truth too."""
    model = Model(directory)
    if base:
        base(model)
    truth = log_probs(model, tokens)[result]
    for label, mistake in mistakes.items():
        model = Model(directory)
        mistake(model)
        change = np.abs(log_probs(model, tokens)[result] - truth)
        mock.patch.stopall()
        print(f"  {label:42} {np.median(change):10.6f} {change.max():10.6f}")


def main():
    for case in sys.argv[1:] or ["v3_like", "v3_heads", "moonlight", "v2_lite", "v2", "kimi", "v31"]:
        directory = HERE / "data" / case
        golden = formats.read_safetensors(directory / "golden.safetensors")
        tokens = golden[max(name for name in golden if name.startswith("prompt."))].raw
        print(f"{case}: {len(tokens)} tokens")
        print_changes(directory, tokens, MISTAKES, 0)
        if "aq.logprobs.0" in golden:
            print_changes(directory, tokens, QUANTISED, 0, with_quantisation)
        if "mtp_logprobs.0" in golden:
            print_changes(directory, tokens, MTP_MISTAKES, 1)


if __name__ == "__main__":
    main()
