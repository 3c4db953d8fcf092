"""The model in PyTorch: DeepSeek-V3's architecture with its MTP layer, for training on packed rows of short documents.

Weights are kept as the checkpoint holds them, apart from the experts: those of a layer, the shared one last, are one tensor each
for gate, up and down [(E+1)F, D] (down transposed). With so few and small experts, computing all of them for every token and
multiplying by the routing weights, mostly zero, is faster than gathering tokens.
Key: B rows, L tokens a row, D hidden, H heads, E routed experts, F expert width, G groups, K experts per token, W vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 384,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 128,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 256,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 4096,
}


def yarn_frequencies(config):
    """inv_freq [R/2]: slow rotations are stretched by `factor`, fast ones kept, over a ramp in between."""
    dim, base, yarn = config["qk_rope_head_dim"], config["rope_theta"], config["rope_scaling"]
    freq = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def correction(rotations):
        return dim * math.log(yarn["original_max_position_embeddings"] / (2 * math.pi * rotations)) / (2 * math.log(base))

    low, high = max(math.floor(correction(yarn["beta_fast"])), 0), min(math.ceil(correction(yarn["beta_slow"])), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return (freq / yarn["factor"] * ramp + freq * (1 - ramp)).float()


def softmax_scale(config):
    mscale = 0.1 * config["rope_scaling"]["mscale_all_dim"] * math.log(config["rope_scaling"]["factor"]) + 1
    return (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5 * mscale**2


def rotate(x, cos, sin):
    """x [B, H, L, R] with interleaved pairs; cos, sin [B, 1, L, R/2] fp32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def weight(rows, columns, gain=1.0):
    return nn.Parameter(torch.randn(rows, columns) * (gain / math.sqrt(columns)))


class Norm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, self.heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
        self.nope, self.rope, self.v_dim = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
        self.rank, self.scale = rank, softmax_scale(config)
        self.q_a_proj = weight(config["q_lora_rank"], hidden)
        self.q_a_layernorm = Norm(config["q_lora_rank"], 1e-6)
        self.q_b_proj = weight(self.heads * (self.nope + self.rope), config["q_lora_rank"])
        self.kv_a_proj_with_mqa = weight(rank + self.rope, hidden)
        self.kv_a_layernorm = Norm(rank, 1e-6)
        self.kv_b_proj = weight(self.heads * (self.nope + self.v_dim), rank)
        self.o_proj = weight(hidden, self.heads * self.v_dim, 0.3)

    def forward(self, x, cos, sin, mask):
        q = F.linear(self.q_a_layernorm(F.linear(x, self.q_a_proj)), self.q_b_proj)
        q_nope, q_pe = q.unflatten(-1, (self.heads, -1)).transpose(1, 2).split([self.nope, self.rope], dim=-1)
        latent, k_pe = F.linear(x, self.kv_a_proj_with_mqa).split([self.rank, self.rope], dim=-1)
        kv = F.linear(self.kv_a_layernorm(latent), self.kv_b_proj)
        k_nope, v = kv.unflatten(-1, (self.heads, -1)).transpose(1, 2).split([self.nope, self.v_dim], dim=-1)
        k_pe = rotate(k_pe.unsqueeze(1), cos, sin).expand(-1, self.heads, -1, -1)
        q, k = torch.cat([q_nope, rotate(q_pe, cos, sin)], dim=-1), torch.cat([k_nope, k_pe], dim=-1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return F.linear(out.transpose(1, 2).flatten(2), self.o_proj)


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, width = config["hidden_size"], config["intermediate_size"]
        self.gate_proj, self.up_proj, self.down_proj = weight(width, hidden), weight(width, hidden), weight(hidden, width, 0.3)

    def forward(self, x, real):
        return F.linear(F.silu(F.linear(x, self.gate_proj)) * F.linear(x, self.up_proj), self.down_proj), None


class Moe(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, self.experts, self.width = config["hidden_size"], config["n_routed_experts"], config["moe_intermediate_size"]
        self.groups, self.top_groups = config["n_group"], config["topk_group"]
        self.top_k, self.factor = config["num_experts_per_tok"], config["routed_scaling_factor"]
        rows = (self.experts + 1) * self.width
        self.gate = weight(self.experts, hidden)
        self.register_buffer("e_score_correction_bias", torch.zeros(self.experts))
        self.expert_gate, self.expert_up = weight(rows, hidden), weight(rows, hidden)
        self.expert_down = nn.Parameter(torch.randn(rows, hidden) * (0.3 / math.sqrt(self.width)))

    def route(self, x):
        """-> routing weights [T, E] fp32, zero where not chosen; chosen [T, E] bool. The bias chooses but does not weigh."""
        scores = torch.sigmoid(F.linear(x.float(), self.gate.float()))
        choice = (scores.detach() + self.e_score_correction_bias).unflatten(1, (self.groups, -1))
        best = choice.topk(2, dim=-1).values.sum(-1).topk(self.top_groups, dim=-1).indices
        allowed = torch.zeros_like(choice[:, :, 0], dtype=torch.bool).scatter(1, best, True)
        choice = choice.masked_fill(~allowed[:, :, None], -math.inf).flatten(1)
        chosen = torch.zeros_like(choice, dtype=torch.bool).scatter(1, choice.topk(self.top_k, dim=-1).indices, True)
        weights = scores * chosen
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.factor, chosen

    def forward(self, x, real):
        """real [B, L]: no padding. -> output and tokens of each expert [E]."""
        shape, x = x.shape, x.flatten(0, 1)
        weights, chosen = self.route(x)
        weights = F.pad(weights, (0, 1), value=1.0).to(x.dtype)
        h = F.silu(F.linear(x, self.expert_gate)) * F.linear(x, self.expert_up)
        h = (h.unflatten(1, (self.experts + 1, -1)) * weights[:, :, None]).flatten(1)
        return (h @ self.expert_down).view(shape), (chosen & real.flatten()[:, None]).float().sum(0)


class Layer(nn.Module):
    def __init__(self, config, i):
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm, self.post_attention_layernorm = Norm(hidden, eps), Norm(hidden, eps)
        self.self_attn = Attention(config)
        self.mlp = Mlp(config) if i < config["first_k_dense_replace"] else Moe(config)

    def forward(self, h, cos, sin, mask, real):
        h = h + self.self_attn(self.input_layernorm(h), cos, sin, mask)
        out, load = self.mlp(self.post_attention_layernorm(h), real)
        return h + out, load


class Mtp(nn.Module):
    """Layer N: from h of position i (after the final norm) and token i + 1 to what predicts token i + 2."""

    def __init__(self, config):
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.enorm, self.hnorm, self.norm = Norm(hidden, eps), Norm(hidden, eps), Norm(hidden, eps)
        self.eh_proj = weight(hidden, 2 * hidden)
        self.layer = Layer(config, config["num_hidden_layers"])

    def forward(self, hidden, embedding, *context):
        x = F.linear(torch.cat([self.enorm(embedding), self.hnorm(hidden)], dim=-1), self.eh_proj)
        y, load = self.layer(x, *context)
        return self.norm(y), load


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        vocabulary, hidden = config["vocab_size"], config["hidden_size"]
        self.embed_tokens = nn.Parameter(torch.randn(vocabulary, hidden) * 0.5)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config["num_hidden_layers"]))
        self.norm = Norm(hidden, config["rms_norm_eps"])
        self.lm_head = nn.Parameter(torch.zeros(vocabulary, hidden))
        self.mtp = Mtp(config)
        self.register_buffer("inv_freq", yarn_frequencies(config), persistent=False)

    def context(self, positions, documents):
        """What all layers share. positions [B, L] within documents; documents [B, L]: a number a document, -1 is padding."""
        angle = positions[:, None, :, None].float() * self.inv_freq
        causal = torch.ones(positions.shape[1], positions.shape[1], dtype=torch.bool, device=positions.device).tril()
        mask = (documents[:, :, None] == documents[:, None, :]) & causal
        mask = torch.zeros_like(mask, dtype=self.embed_tokens.dtype).masked_fill(~mask, -math.inf)
        return angle.cos(), angle.sin(), mask[:, None], documents >= 0

    def forward(self, tokens, positions, documents):
        """-> hidden after the final norm [B, L, D], hidden of the MTP layer [B, L, D], expert loads [MoE layers, E]."""
        context, loads = self.context(positions, documents), []
        embedding = F.embedding(tokens, self.embed_tokens)
        h = embedding
        for layer in self.layers:
            h, load = layer(h, *context)
            loads += [] if load is None else [load]
        hidden = self.norm(h)
        draft, load = self.mtp(hidden, embedding.roll(-1, dims=1), *context)
        return hidden, draft, torch.stack([*loads, load])

    def logits(self, hidden):
        return F.linear(hidden, self.lm_head)

    def moe_layers(self):
        return [m for m in self.modules() if isinstance(m, Moe)]
