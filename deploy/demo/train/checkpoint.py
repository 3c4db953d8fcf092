"""Writes the trained model as a DeepSeek-V3 checkpoint, and reads one back into the PyTorch model. Needs torch and numpy only."""

import json
import struct
from pathlib import Path

import numpy as np
import torch

import fp8
from model import CONFIG, Model

MAX_SHARD_BYTES = 15 << 20
PARTS = {"gate_proj": "expert_gate", "up_proj": "expert_up", "down_proj": "expert_down"}
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}
FROM_NAME = {name: dtype for dtype, name in DTYPES.items()}


def checkpoint_name(name, num_layers):
    """The official name of a parameter of model.py that has one."""
    name = name.replace("mtp.layer.", f"layers.{num_layers}.").replace("mtp.norm.", f"layers.{num_layers}.shared_head.norm.")
    name = name.replace("mtp.", f"layers.{num_layers}.")
    if name.endswith("e_score_correction_bias"):
        return "model." + name.replace("e_score_correction_bias", "gate.e_score_correction_bias")
    name = name if name.endswith(".weight") else name + ".weight"
    return name if name.startswith("lm_head") else "model." + name


def official_tensors(model, values):
    """{official name: fp32 tensor} of all tensors. values: {parameter name: fp32 tensor}, e.g. the master weights."""
    config, tensors = model.config, {}
    num_layers, width = config["num_hidden_layers"], config["moe_intermediate_size"]
    values = {**values, **{name: b for name, b in model.named_buffers() if name.endswith("correction_bias")}}
    for name, value in values.items():
        leaf = name.rsplit(".", 1)[-1]
        if leaf not in PARTS.values():
            tensors[checkpoint_name(name, num_layers)] = value.detach().float().cpu()
            continue
        part = next(part for part, stacked in PARTS.items() if stacked == leaf)
        prefix = checkpoint_name(name, num_layers).removesuffix(f"{leaf}.weight")
        for e, expert in enumerate(value.detach().float().cpu().split(width)):
            expert = expert.T if part == "down_proj" else expert
            owner = f"experts.{e}" if e < config["n_routed_experts"] else "shared_experts"
            tensors[f"{prefix}{owner}.{part}.weight"] = expert.contiguous()
    return tensors


def is_linear(name):
    """Stored as FP8."""
    return name.endswith(("_proj.weight", "_with_mqa.weight")) and "eh_proj" not in name


def stored_tensors(tensors):
    """fp32 tensors in the types of the official checkpoint, with block scales."""
    stored = {}
    for name, value in tensors.items():
        if is_linear(name):
            stored[name], stored[name + "_scale_inv"] = fp8.quantise(value)
        else:
            stored[name] = value if name.endswith("correction_bias") else value.bfloat16()
    return {name: value.contiguous() for name, value in stored.items()}


def raw(tensor):
    return tensor.view(torch.uint8 if tensor.element_size() == 1 else torch.int16 if tensor.element_size() == 2 else torch.int32).numpy().tobytes()


def write_safetensors(path, tensors):
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for t in tensors.values():
            f.write(raw(t))


def read_safetensors(path):
    data = Path(path).read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header, tensors = json.loads(data[8 : 8 + size]), {}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        begin, end = (8 + size + o for o in entry["data_offsets"])
        flat = torch.from_numpy(np.frombuffer(data[begin:end], np.uint8).copy())
        tensors[name] = flat.view(FROM_NAME[entry["dtype"]]).view(entry["shape"])
    return tensors


def export(model, values, directory):
    """Writes config.json, the shards and their index. -> bytes written."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    stored = stored_tensors(official_tensors(model, values))
    shards, size = [{}], 0
    for name, value in stored.items():
        if size + value.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    for old in directory.glob("model-*.safetensors"):
        old.unlink()
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):06d}.safetensors"
        write_safetensors(directory / file, shard)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(t.nbytes for t in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, separators=(",", ":")) + "\n")
    (directory / "config.json").write_text(json.dumps(dict(sorted(model.config.items())), indent=2) + "\n")
    return sum(f.stat().st_size for f in [*directory.glob("model*"), directory / "config.json"])


def load_values(directory):
    """{official name: fp32 tensor}, dequantised."""
    stored = {}
    for path in sorted(Path(directory).glob("model-*.safetensors")):
        stored.update(read_safetensors(path))
    values = {}
    for name, value in stored.items():
        if not name.endswith("_scale_inv"):
            values[name] = fp8.dequantise(value, stored[name + "_scale_inv"]) if name + "_scale_inv" in stored else value.float()
    return values


@torch.no_grad()
def load_model(directory, config=None):
    """The model of an export, in fp32 on the CPU."""
    config = config or json.loads((Path(directory) / "config.json").read_text())
    model, values, num_layers = Model({**CONFIG, **config}), load_values(directory), config["num_hidden_layers"]
    owners = [f"experts.{e}" for e in range(config["n_routed_experts"])] + ["shared_experts"]
    for name, p in [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n.endswith("correction_bias"))]:
        leaf = name.rsplit(".", 1)[-1]
        if leaf not in PARTS.values():
            p.copy_(values[checkpoint_name(name, num_layers)])
            continue
        part = next(part for part, stacked in PARTS.items() if stacked == leaf)
        prefix = checkpoint_name(name, num_layers).removesuffix(f"{leaf}.weight")
        experts = [values[f"{prefix}{owner}.{part}.weight"] for owner in owners]
        p.copy_(torch.cat([e.T if part == "down_proj" else e for e in experts]))
    return model.eval()
