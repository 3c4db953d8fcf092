"""The model's forward pass in float64 on the stored weight values, written from its equations: no batching, no tricks.

Everything is float64 except the RoPE table, which is rounded to fp32 as in every implementation. Attention is the naive
(not absorbed) form. Dimension key: T new tokens, L all tokens so far, D hidden, H heads, N nope, R rope, V v, C kv_lora, E experts.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import formats
from formats import bf16_decode, bf16_encode

LATENT_NORM_EPS = 1e-6  # q_a and kv_a layernorms, whatever rms_norm_eps says
QUERY_BLOCK = 512


# ---- Checkpoint --------------------------------------------------------------------------------------------------------


def read_config(directory):
    config = json.loads((Path(directory) / "config.json").read_text())
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    config["rope_theta"] = rope.pop("rope_theta", config.get("rope_theta"))
    rope["type"] = rope.get("rope_type", rope.get("type", "default"))
    config["yarn"] = rope if rope["type"] == "yarn" else None
    return config


class Weights:
    """Dequantised tensors by checkpoint name. `is_fp8(name)`: the linear takes quantised activations in that mode."""

    def __init__(self, directory):
        self.stored = {}
        for path in sorted(Path(directory).glob("model*.safetensors")):
            self.stored.update(formats.read_safetensors(path))
        self.values = {}

    def __contains__(self, name):
        return name in self.stored

    def is_fp8(self, name):
        return self.stored[name].dtype == "F8_E4M3"

    def __getitem__(self, name):
        if name not in self.values:
            tensor = self.stored[name]
            if self.is_fp8(name):
                self.values[name] = formats.dequantise_weight(tensor.raw, self.stored[name + "_scale_inv"].raw)
            else:
                self.values[name] = formats.load(tensor)
        return self.values[name]


# ---- Pieces ------------------------------------------------------------------------------------------------------------


def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def mscale(factor, m):
    return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0


def rope_frequencies(dim, theta, yarn):
    """inv_freq [R/2], computed in double; YaRN blends f_i and f_i / factor over a ramp."""
    freq = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if not yarn:
        return freq
    original = yarn["original_max_position_embeddings"]

    def correction(rotations):
        return dim * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = max(math.floor(correction(yarn.get("beta_fast", 32))), 0)
    high = min(math.ceil(correction(yarn.get("beta_slow", 1))), dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    return freq / yarn["factor"] * ramp + freq * (1 - ramp)


def rope_table(positions, dim, theta, yarn):
    """cos, sin [T, R/2] fp32: the angle is an fp32 product, its cosine and sine are exact and then rounded."""
    inv_freq = rope_frequencies(dim, theta, yarn).astype(np.float32)
    angle = (np.asarray(positions, np.float32)[:, None] * inv_freq).astype(np.float64)
    ratio = 1.0
    if yarn:
        ratio = mscale(yarn["factor"], yarn.get("mscale", 1)) / mscale(yarn["factor"], yarn.get("mscale_all_dim", 0))
    return (np.cos(angle) * ratio).astype(np.float32), (np.sin(angle) * ratio).astype(np.float32)


def rotate(x, cos, sin):
    """x [..., T, R], interleaved pairs (x[2i], x[2i+1])."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def softmax_scale(config):
    scale = (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5
    yarn = config["yarn"]
    if yarn and yarn.get("mscale_all_dim", 0):
        scale *= mscale(yarn["factor"], yarn["mscale_all_dim"]) ** 2
    return scale


def select(scores, count):
    """Indices of the `count` largest of each row, the lower index first among equals, and the gap to the next one [T]."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    chosen = order[:, :count]
    ranked = np.take_along_axis(scores, order, axis=-1)
    with np.errstate(invalid="ignore"):
        gap = ranked[:, count - 1] - ranked[:, count] if count < scores.shape[1] else np.full(len(scores), np.inf)
    return chosen, gap


def route(scores, bias, config):
    """scores [T, E] (after sigmoid or softmax) -> experts [T, k], weights [T, k], selection margin [T]."""
    selection = scores if bias is None else scores + bias
    margin = np.full(len(scores), np.inf)
    num_groups = config.get("n_group") or 1
    if num_groups > 1 and config["topk_method"] != "greedy":
        grouped = selection.reshape(len(scores), num_groups, -1)
        if config["topk_method"] == "noaux_tc":
            group_scores = np.sort(grouped, axis=-1)[:, :, -2:].sum(axis=-1)
        else:
            group_scores = grouped.max(axis=-1)
        groups, margin = select(group_scores, config["topk_group"])
        allowed = np.zeros(group_scores.shape, bool)
        np.put_along_axis(allowed, groups, True, axis=-1)
        selection = np.where(allowed[:, :, None], grouped, -np.inf).reshape(scores.shape)
    experts, expert_margin = select(selection, config["num_experts_per_tok"])
    weights = np.take_along_axis(scores, experts, axis=-1)
    if config["norm_topk_prob"]:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return experts, weights * config["routed_scaling_factor"], np.minimum(margin, expert_margin)


def attend(q, k, v, scale):
    """q [H, T, d], k [H, L, d], v [H, L, V]: the last T of L positions are the queries. -> [H, T, V]"""
    (_, num_queries, _), num_keys = q.shape, k.shape[1]
    out = np.empty((q.shape[0], num_queries, v.shape[2]))
    for begin in range(0, num_queries, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, num_queries)
        visible = num_keys - num_queries + end
        scores = q[:, begin:end] @ k[:, :visible].transpose(0, 2, 1) * scale
        query = np.arange(visible - (end - begin), visible)
        scores = np.where(np.arange(visible) <= query[:, None], scores, -np.inf)
        out[:, begin:end] = softmax(scores) @ v[:, :visible]
    return out


# ---- The model ---------------------------------------------------------------------------------------------------------


@dataclass
class Output:
    hidden: np.ndarray  # [T, D] after the final norm (shared_head.norm for the MTP layer)
    logits: np.ndarray  # [T, W]
    router_margin: np.ndarray  # [T] minimum over the MoE layers passed
    cache: list  # one (k [H, L, N+R], v [H, L, V]) a layer


class Model:
    """quantise_activations: round the input of every FP8 linear to E4M3, 1x128 (see formats.quantise_activation), and kv_b,
    which takes its input as it is, to BF16: how FP8 tensor cores and an absorbed kv_b compute."""

    def __init__(self, directory, quantise_activations=False):
        self.config = read_config(directory)
        self.weights = Weights(directory)
        self.quantise_activations = quantise_activations
        quantisation = self.config.get("quantization_config") or {}
        self.ue8m0 = quantisation.get("scale_fmt") == "ue8m0"
        self.scale = softmax_scale(self.config)
        self.router_margin = None

    def forward(self, tokens, cache=None):
        """Runs `tokens` after the positions held by `cache`; the cache given is not changed."""
        config = self.config
        cache = cache or [None] * config["num_hidden_layers"]
        self.router_margin = np.full(len(tokens), np.inf)
        new_cache = []
        h = self.weights["model.embed_tokens.weight"][tokens]
        for i in range(config["num_hidden_layers"]):
            h, layer_cache = self.layer(i, h, cache[i])
            new_cache.append(layer_cache)
        hidden = rms_norm(h, self.weights["model.norm.weight"], config["rms_norm_eps"])
        return Output(hidden, hidden @ self.weights["lm_head.weight"].T, self.router_margin, new_cache)

    def forward_mtp(self, hidden, next_tokens):
        """Row i: hidden [D] of position i (after model.norm) and token i + 1 -> logits for token i + 2."""
        i, eps = self.config["num_hidden_layers"], self.config["rms_norm_eps"]
        name = f"model.layers.{i}."
        self.router_margin = np.full(len(next_tokens), np.inf)
        embedding = self.weights["model.embed_tokens.weight"][next_tokens]
        both = [rms_norm(embedding, self.weights[name + "enorm.weight"], eps), rms_norm(hidden, self.weights[name + "hnorm.weight"], eps)]
        y, cache = self.layer(i, self.linear(np.concatenate(both, axis=1), name + "eh_proj.weight"), None)
        y = rms_norm(y, self.weights[name + "shared_head.norm.weight"], eps)
        return Output(y, y @ self.weights["lm_head.weight"].T, self.router_margin, [cache])

    def layer(self, i, h, cache):
        name, eps = f"model.layers.{i}.", self.config["rms_norm_eps"]
        attention, cache = self.attention(name + "self_attn.", rms_norm(h, self.weights[name + "input_layernorm.weight"], eps), cache)
        h = h + attention
        x = rms_norm(h, self.weights[name + "post_attention_layernorm.weight"], eps)
        is_dense = i < self.config["first_k_dense_replace"]
        return h + (self.mlp(name + "mlp.", x) if is_dense else self.moe(name + "mlp.", x)), cache

    def linear(self, x, name):
        if self.quantise_activations and self.weights.is_fp8(name):
            x = formats.quantise_activation(x, self.ue8m0)
        return x @ self.weights[name].T

    def attention(self, name, x, cache):
        """x [T, D] -> [T, D] and the layer's keys and values with these positions added."""
        config = self.config
        num_heads, nope, rope = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        rank, v_dim, num_tokens = config["kv_lora_rank"], config["v_head_dim"], len(x)
        past = cache[0].shape[1] if cache else 0
        cos, sin = rope_table(np.arange(past, past + num_tokens), rope, config["rope_theta"], config["yarn"])

        if config["q_lora_rank"] is None:
            q = self.linear(x, name + "q_proj.weight")
        else:
            latent = rms_norm(self.linear(x, name + "q_a_proj.weight"), self.weights[name + "q_a_layernorm.weight"], LATENT_NORM_EPS)
            q = self.linear(latent, name + "q_b_proj.weight")
        q = q.reshape(num_tokens, num_heads, nope + rope).transpose(1, 0, 2)
        q = np.concatenate([q[:, :, :nope], rotate(q[:, :, nope:], cos, sin)], axis=2)

        kv = self.linear(x, name + "kv_a_proj_with_mqa.weight")
        latent = rms_norm(kv[:, :rank], self.weights[name + "kv_a_layernorm.weight"], LATENT_NORM_EPS)
        k_pe = np.broadcast_to(rotate(kv[:, rank:], cos, sin), (num_heads, num_tokens, rope))
        kv_b = self.weights[name + "kv_b_proj.weight"]
        if self.quantise_activations:
            kv_b = bf16_decode(bf16_encode(kv_b)).astype(np.float64)
        kv = (latent @ kv_b.T).reshape(num_tokens, num_heads, nope + v_dim).transpose(1, 0, 2)
        k, v = np.concatenate([kv[:, :, :nope], k_pe], axis=2), kv[:, :, nope:]
        if cache:
            k, v = np.concatenate([cache[0], k], axis=1), np.concatenate([cache[1], v], axis=1)

        out = attend(q, k, v, self.scale).transpose(1, 0, 2).reshape(num_tokens, num_heads * v_dim)
        return self.linear(out, name + "o_proj.weight"), (k, v)

    def mlp(self, name, x):
        gate, up = self.linear(x, name + "gate_proj.weight"), self.linear(x, name + "up_proj.weight")
        return self.linear(silu(gate) * up, name + "down_proj.weight")

    def moe(self, name, x):
        logits = x @ self.weights[name + "gate.weight"].T
        scores = softmax(logits) if self.config["scoring_func"] == "softmax" else 1 / (1 + np.exp(-logits))
        bias_name = name + "gate.e_score_correction_bias"
        bias = self.weights[bias_name] if self.config["topk_method"] == "noaux_tc" else None
        experts, weights, margin = route(scores, bias, self.config)
        self.router_margin = np.minimum(self.router_margin, margin)
        y = self.mlp(name + "shared_experts.", x)
        for e in np.unique(experts):
            token, rank = np.nonzero(experts == e)
            y[token] += weights[token, rank, None] * self.mlp(f"{name}experts.{e}.", x[token])
        return y
