"""Random-weight checkpoints in the official layout: tensor names, shapes, dtypes, FP8 block scales, shards, index, config.json.

The random numbers are chosen so that a mistake shows: activations stay near 1, attention is neither flat nor a single token,
router scores spread over (0, 1), norms differ from 1 and from each other, block scales differ from block to block.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import formats
from reference import softmax_scale

YARN_V3 = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

OFFICIAL_CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "deepseek_v3",
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
}


def make_config(**fields):
    """The official fields with `fields` over them; a field set to ... is left out."""
    config = {**OFFICIAL_CONFIG, **fields, "num_key_value_heads": fields["num_attention_heads"]}
    return dict(sorted((key, value) for key, value in config.items() if value is not ...))


@dataclass
class Tensor:
    name: str
    shape: tuple
    kind: str  # embedding | head | norm | linear (FP8 where the checkpoint is FP8) | eh_proj | gate | bias


def mlp_tensors(name, width, hidden):
    yield Tensor(name + "gate_proj.weight", (width, hidden), "linear")
    yield Tensor(name + "up_proj.weight", (width, hidden), "linear")
    yield Tensor(name + "down_proj.weight", (hidden, width), "linear")


def layer_tensors(config, i):
    name, hidden = f"model.layers.{i}.", config["hidden_size"]
    num_heads, rank, rope = config["num_attention_heads"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, v_dim, q_rank = config["qk_nope_head_dim"], config["v_head_dim"], config["q_lora_rank"]
    attention = name + "self_attn."
    yield Tensor(name + "input_layernorm.weight", (hidden,), "norm")
    if q_rank is None:
        yield Tensor(attention + "q_proj.weight", (num_heads * (nope + rope), hidden), "linear")
    else:
        yield Tensor(attention + "q_a_proj.weight", (q_rank, hidden), "linear")
        yield Tensor(attention + "q_a_layernorm.weight", (q_rank,), "norm")
        yield Tensor(attention + "q_b_proj.weight", (num_heads * (nope + rope), q_rank), "linear")
    yield Tensor(attention + "kv_a_proj_with_mqa.weight", (rank + rope, hidden), "linear")
    yield Tensor(attention + "kv_a_layernorm.weight", (rank,), "norm")
    yield Tensor(attention + "kv_b_proj.weight", (num_heads * (nope + v_dim), rank), "linear")
    yield Tensor(attention + "o_proj.weight", (hidden, num_heads * v_dim), "linear")
    yield Tensor(name + "post_attention_layernorm.weight", (hidden,), "norm")
    if i < config["first_k_dense_replace"]:
        yield from mlp_tensors(name + "mlp.", config["intermediate_size"], hidden)
        return
    yield Tensor(name + "mlp.gate.weight", (config["n_routed_experts"], hidden), "gate")
    if config["topk_method"] == "noaux_tc":
        yield Tensor(name + "mlp.gate.e_score_correction_bias", (config["n_routed_experts"],), "bias")
    for e in range(config["n_routed_experts"]):
        yield from mlp_tensors(f"{name}mlp.experts.{e}.", config["moe_intermediate_size"], hidden)
    yield from mlp_tensors(name + "mlp.shared_experts.", config["n_shared_experts"] * config["moe_intermediate_size"], hidden)


def tensor_list(config, mtp_copies=True):
    """Every tensor but the block scales, in the order of the official files. mtp_copies: the MTP layer's embedding and head."""
    hidden, num_layers, table = config["hidden_size"], config["num_hidden_layers"], (config["vocab_size"], config["hidden_size"])
    yield Tensor("model.embed_tokens.weight", table, "embedding")
    for i in range(num_layers):
        yield from layer_tensors(config, i)
    yield Tensor("model.norm.weight", (hidden,), "norm")
    yield Tensor("lm_head.weight", table, "head")
    for i in range(num_layers, num_layers + config.get("num_nextn_predict_layers", 0)):
        name = f"model.layers.{i}."
        yield Tensor(name + "enorm.weight", (hidden,), "norm")
        yield Tensor(name + "hnorm.weight", (hidden,), "norm")
        yield Tensor(name + "eh_proj.weight", (hidden, 2 * hidden), "eh_proj")
        yield Tensor(name + "shared_head.norm.weight", (hidden,), "norm")
        if mtp_copies:
            yield Tensor(name + "embed_tokens.weight", table, "embedding")
            yield Tensor(name + "shared_head.head.weight", table, "head")
        yield from layer_tensors(config, i)


def gain(tensor, config, attention_std=1.6, routed_gain=1.5, gate_gain=1.5):
    """Standard deviation of a linear's output for inputs of size 1; attention_std is that of the attention scores."""
    name, kind = tensor.name, tensor.kind
    if kind != "linear":
        return {"head": 0.8, "gate": gate_gain, "eh_proj": 1.0}[kind]
    if name.endswith(("q_proj.weight", "q_b_proj.weight")):
        yarn = config.get("rope_parameters") or config.get("rope_scaling")
        head_dim = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
        return attention_std / (softmax_scale({**config, "yarn": yarn}) * math.sqrt(head_dim))
    if name.endswith("o_proj.weight"):
        return 1.2
    if name.endswith("down_proj.weight"):
        return routed_gain if ".experts." in name else 1.5
    return 1.0


def random_values(tensor, config, rng, **gains):
    shape = tensor.shape
    if tensor.kind == "norm":
        return rng.uniform(0.7, 1.4) * rng.uniform(0.6, 1.4, shape)
    if tensor.kind == "bias":
        return rng.uniform(-0.9, 0.3, shape)
    if tensor.kind == "embedding":
        return rng.standard_normal(shape)
    values = rng.standard_normal(shape) * (gain(tensor, config, **gains) / math.sqrt(shape[1]))
    if tensor.kind == "linear":
        blocks = 2.0 ** rng.uniform(-0.7, 0.7, formats.scale_shape(shape))
        values *= np.repeat(np.repeat(blocks, formats.BLOCK, 0)[: shape[0]], formats.BLOCK, 1)[:, : shape[1]]
    return values


def random_tensors(config, seed, dtype="BF16", mtp_copies=True, **gains):
    """{name: Stored}. dtype: of what is neither FP8 nor the bias, or a function of the tensor's name; gains: see gain()."""
    rng = np.random.default_rng(seed)
    fp8 = config.get("quantization_config")
    tensors = {}
    for tensor in tensor_list(config, mtp_copies):
        values = random_values(tensor, config, rng, **gains)
        if tensor.kind == "linear" and fp8:
            codes, scale = formats.quantise_weight(values, fp8.get("scale_fmt") == "ue8m0")
            tensors[tensor.name] = formats.Stored("F8_E4M3", codes)
            tensors[tensor.name + "_scale_inv"] = formats.Stored("F32", scale)
        elif tensor.kind == "bias":
            tensors[tensor.name] = formats.store(values, "F32")
        else:
            tensors[tensor.name] = formats.store(values, dtype if isinstance(dtype, str) else dtype(tensor.name))
    for name in tensors:  # the MTP layer's copies are copies
        if ".embed_tokens." in name and ".layers." in name:
            tensors[name] = tensors["model.embed_tokens.weight"]
        if name.endswith("shared_head.head.weight"):
            tensors[name] = tensors["lm_head.weight"]
    return tensors


def shard_names(count):
    return [f"model-{i + 1:05d}-of-{count:06d}.safetensors" for i in range(count)]


def write_index(directory, weight_map, total_size):
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (Path(directory) / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def write_checkpoint(directory, config, tensors, num_shards=0):
    """num_shards 0: one model.safetensors without an index. Else every third block scale lies one file after its weight."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if not num_shards:
        formats.write_safetensors(directory / "model.safetensors", tensors)
        return
    names, total = shard_names(num_shards), sum(t.raw.nbytes for t in tensors.values())
    weight_map, size, scales = {}, 0, 0
    for name, tensor in tensors.items():
        shard = min(size * num_shards // total, num_shards - 1)
        size += tensor.raw.nbytes
        if name.endswith("_scale_inv"):
            scales += 1
            shard = (shard + (scales % 3 == 0)) % num_shards
        weight_map[name] = names[shard]
    for name in names:
        formats.write_safetensors(directory / name, {key: t for key, t in tensors.items() if weight_map[key] == name})
    write_index(directory, weight_map, total)
