"""Compares the golden log-probs with transformers' DeepseekV3ForCausalLM (and its MTP layer) on the same stored weights.

Usage: check_transformers.py [case ...]      needs torch and transformers 5.x besides numpy; runs on the CPU in float64
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpLayer

import formats
from reference import Weights

HERE = Path(__file__).parent
CASES = ["v3_like", "v3_heads", "moonlight", "kimi", "v31", "long"]


def load_state(module, weights, prefix, num_experts, renames=()):
    """Fills a module from checkpoint names below `prefix`; routed experts are stacked as transformers keeps them."""

    def value(name):
        for new, old in renames:
            name = name.replace(new, old)
        if ".experts." not in name:
            return weights[prefix + name]
        base, leaf = name.rsplit(".", 1)
        parts = {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]}[leaf]
        experts = [np.concatenate([weights[f"{prefix}{base}.{e}.{part}.weight"] for part in parts]) for e in range(num_experts)]
        return np.stack(experts)

    state = {name: torch.from_numpy(np.array(value(name))) for name in module.state_dict()}
    module.load_state_dict(state, strict=True)


def load_model(directory):
    raw = json.loads((directory / "config.json").read_text())
    for name in ("quantization_config", "architectures", "model_type", "torch_dtype"):
        raw.pop(name, None)
    config = DeepseekV3Config(**raw, attn_implementation="sdpa", experts_implementation="eager", dtype="float64")
    weights = Weights(directory)
    model = DeepseekV3ForCausalLM(config).double().eval()
    load_state(model, weights, "", config.n_routed_experts)
    return model, weights


def load_mtp(model, weights):
    decoder, config = model.model, model.config
    layer = MtpLayer(config.get_mtp_config(), type(decoder.layers[-1]), type(decoder.norm), 0).double().eval()
    prefix = f"model.layers.{config.num_hidden_layers}."
    load_state(layer, weights, prefix, config.n_routed_experts, [("mtp_block.", ""), ("post_norm", "shared_head.norm")])
    return layer


def log_probs(logits):
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def worst(actual, expected):
    return float(np.abs(actual - expected).max())


def check_prompt(model, mtp, golden, i):
    """-> largest differences in log-probs of the prompt, of the whole last row, and of the MTP layer."""
    tokens = golden[f"prompt.{i}"].astype(np.int64)
    rows = np.arange(len(tokens) - 1)
    out = model(torch.from_numpy(tokens)[None], use_cache=False)
    table = log_probs(out.logits[0])
    result = [worst(table[rows, tokens[1:]], golden[f"logprobs.{i}"]), worst(table[-1], golden[f"last_logits.{i}"])]
    if mtp:
        hidden = model.model(torch.from_numpy(tokens)[None], use_cache=False).last_hidden_state[:, :-1]
        embedding, positions = model.model.embed_tokens(torch.from_numpy(tokens[1:])[None]), torch.arange(len(tokens) - 1)[None]
        mask = torch.full((len(rows), len(rows)), -torch.inf, dtype=torch.float64).triu(1)[None, None]
        y = mtp(embedding, hidden, model.model.rotary_emb(embedding, positions), mask, positions, None)
        table = log_probs(model.lm_head(y)[0])
        result.append(worst(table[rows[:-1], tokens[2:]], golden[f"mtp_logprobs.{i}"]))
    return result


@torch.no_grad()
def main():
    torch.set_num_threads(2)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}; largest absolute differences of log-probabilities")
    for case in sys.argv[1:] or CASES:
        directory = HERE / "data" / case
        model, weights = load_model(directory)
        mtp = load_mtp(model, weights) if model.config.num_mtp_layers else None
        golden = {name: t.raw for name, t in formats.read_safetensors(directory / "golden.safetensors").items()}
        count = sum(name.startswith("prompt.") for name in golden)
        results = np.array([check_prompt(model, mtp, golden, i) for i in range(count)])
        labels = ["prompt", "last row", "MTP"]
        print(f"{case}: " + ", ".join(f"{label} {value:.2e}" for label, value in zip(labels, results.max(axis=0))))


if __name__ == "__main__":
    main()
