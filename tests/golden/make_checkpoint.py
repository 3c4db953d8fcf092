"""Writes a large random checkpoint in the official layout: for trying the server out (tiny) and for benchmarks (bench; v3_slice: 8.9 GB at real dimensions).

Usage: make_checkpoint.py --out DIR --preset tiny|bench|v3_slice [--seed N]

Weights go to disk tensor by tensor. Each tensor has its own generator, seeded by its name: random bytes are mapped to the 256
quantiles of a normal distribution, so that activations stay sane at any size. There is no reference for these.
"""

import argparse
import json
import math
import time
import zlib
from pathlib import Path
from statistics import NormalDist

import numpy as np

import checkpoint
import formats
import tokenizer
from checkpoint import FP8, YARN_V3, Tensor, make_config

HERE = Path(__file__).parent
SHARD_BYTES = {"tiny": 8 << 20, "bench": 512 << 20, "v3_slice": 2 << 30}
REAL_HEADS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
V3 = {**REAL_HEADS, "num_nextn_predict_layers": 1, "max_position_embeddings": 163840, "rope_scaling": YARN_V3, "quantization_config": FP8}

PRESETS = {
    "tiny": make_config(
        **V3, hidden_size=512, num_hidden_layers=3, num_attention_heads=8, q_lora_rank=256, intermediate_size=1024,
        moe_intermediate_size=128, n_routed_experts=16, num_experts_per_tok=4, vocab_size=tokenizer.num_tokens(),
    ),
    "bench": make_config(
        **V3, hidden_size=2048, num_hidden_layers=8, num_attention_heads=16, q_lora_rank=768, intermediate_size=8192,
        moe_intermediate_size=1024, n_routed_experts=32, num_experts_per_tok=8, n_group=8, topk_group=4, vocab_size=32768,
    ),
    "v3_slice": make_config(
        **{**V3, "num_nextn_predict_layers": 0}, hidden_size=7168, num_hidden_layers=5, first_k_dense_replace=3, num_attention_heads=128,
        q_lora_rank=1536, intermediate_size=18432, moe_intermediate_size=2048, n_routed_experts=64, num_experts_per_tok=8, n_group=8,
        topk_group=4, vocab_size=32768,
    ),
}  # fmt: skip

QUANTILES = np.array([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)])
E4M3_UNIT = formats.E4M3_MAX / QUANTILES[-1]  # a code's size for a value of 1: the largest quantile is 448
E4M3_CODES = formats.e4m3_encode(QUANTILES * E4M3_UNIT).tobytes()


def stored_tensors(config):
    """Tensor and safetensors dtype in file order, block scales after their weights; the MTP layer shares embedding and head."""
    for tensor in checkpoint.tensor_list(config, mtp_copies=False):
        if tensor.kind == "linear":
            yield tensor, "F8_E4M3"
            yield Tensor(tensor.name + "_scale_inv", formats.scale_shape(tensor.shape), tensor), "F32"
        else:
            yield tensor, "F32" if tensor.kind == "bias" else "BF16"


def contents(tensor, dtype, config, seed):
    """The tensor's bytes."""
    rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    if dtype == "F8_E4M3":
        return rng.bytes(math.prod(tensor.shape)).translate(E4M3_CODES)
    if isinstance(tensor.kind, Tensor):  # the scale of that weight
        weight = tensor.kind
        size = checkpoint.gain(weight, config) / math.sqrt(weight.shape[1]) / E4M3_UNIT
        return formats.store(size * 2.0 ** rng.uniform(-0.5, 0.5, tensor.shape), dtype).raw.tobytes()
    if tensor.kind in ("norm", "bias"):
        return formats.store(checkpoint.random_values(tensor, config, rng), dtype).raw.tobytes()
    size = 1.0 if tensor.kind == "embedding" else checkpoint.gain(tensor, config) / math.sqrt(tensor.shape[1])
    codes = formats.bf16_encode(QUANTILES * size)
    return codes[np.frombuffer(rng.bytes(math.prod(tensor.shape)), np.uint8)].tobytes()


def num_bytes(tensor, dtype):
    return math.prod(tensor.shape) * np.dtype(formats.RAW_DTYPE[dtype]).itemsize


def shards(tensors, limit):
    """Cuts the list where a file would pass the limit; widest types first in each file, as formats.write_safetensors does."""
    files, size = [[]], 0
    for tensor, dtype in tensors:
        if size and size + num_bytes(tensor, dtype) > limit:
            files.append([])
            size = 0
        files[-1].append((tensor, dtype))
        size += num_bytes(tensor, dtype)
    return [sorted(f, key=lambda item: -np.dtype(formats.RAW_DTYPE[item[1]]).itemsize) for f in files]


def write(directory, config, seed, limit):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    files = shards(stored_tensors(config), limit)
    weight_map, total = {}, 0
    for name, tensors in zip(checkpoint.shard_names(len(files)), files):
        with open(directory / name, "wb") as f:
            f.write(formats.safetensors_header({t.name: (dtype, t.shape) for t, dtype in tensors}))
            for tensor, dtype in tensors:
                f.write(contents(tensor, dtype, config, seed))
                weight_map[tensor.name] = name
                total += num_bytes(tensor, dtype)
    checkpoint.write_index(directory, weight_map, total)
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.monotonic()
    total = write(args.out, PRESETS[args.preset], args.seed, SHARD_BYTES[args.preset])
    template = json.loads((HERE / "data/v3_like/tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    tokenizer.write_tokenizer(args.out, template)
    print(f"{args.out}: {total / 1e9:.3f} GB of tensors in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
