"""Number formats of a checkpoint (BF16, E4M3, 128x128 blocks) and the safetensors container, in plain numpy.

A stored tensor is a `Stored`: the safetensors dtype name plus an array of raw codes (uint8 for F8_E4M3, uint16 for BF16,
the native numpy type for the rest).
"""

import json
import struct
from dataclasses import dataclass

import numpy as np

BLOCK = 128
E4M3_MAX = 448.0
RAW_DTYPE = {"F8_E4M3": np.uint8, "BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F64": np.float64, "I32": np.int32}


@dataclass
class Stored:
    dtype: str
    raw: np.ndarray


# ---- BF16 --------------------------------------------------------------------------------------------------------------


def bf16_encode(x):
    """Finite values to BF16 codes, round to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_decode(raw):
    return (raw.astype(np.uint32) << 16).view(np.float32)


# ---- E4M3 (fn: no infinities, NaN = 0x7F and 0xFF) ---------------------------------------------------------------------


def _e4m3_table():
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    value[127] = np.nan
    return np.concatenate([value, -value])


E4M3_TABLE = _e4m3_table()


def e4m3_round(x):
    """Nearest E4M3 value of each finite number (ties to even, saturating at +-448), as float64."""
    x = np.asarray(x, np.float64)
    _, exponent = np.frexp(x)  # |x| = f * 2^exponent, f in [0.5, 1)
    step = np.ldexp(1.0, np.maximum(exponent - 1, -6) - 3)
    return np.clip(np.rint(x / step) * step, -E4M3_MAX, E4M3_MAX)


def e4m3_encode(x):
    value = e4m3_round(x)
    code = np.searchsorted(E4M3_TABLE[:127], np.abs(value))
    return (code | np.where(np.signbit(value), 0x80, 0)).astype(np.uint8)


def e4m3_decode(raw):
    return E4M3_TABLE[raw]


# ---- Scales ------------------------------------------------------------------------------------------------------------


def fp8_scale(amax, ue8m0):
    """amax / 448 in fp32, or for UE8M0 the least power of two not below it."""
    scale = np.asarray(amax, np.float32) / np.float32(E4M3_MAX)
    if not ue8m0:
        return scale
    fraction, exponent = np.frexp(scale)
    return np.ldexp(np.float32(1), np.where(fraction == 0.5, exponent - 1, exponent)).astype(np.float32)


def scale_shape(shape):
    """[ceil(out/128), ceil(in/128)]"""
    return tuple(-(-n // BLOCK) for n in shape)


def quantise_weight(w, ue8m0=False):
    """[out, in] -> (E4M3 codes [out, in], scale_inv F32). w is approximately code * scale_inv of its block."""
    rows, cols = w.shape
    row_blocks, col_blocks = scale_shape(w.shape)
    padded = np.zeros((row_blocks * BLOCK, col_blocks * BLOCK))
    padded[:rows, :cols] = w
    blocks = padded.reshape(row_blocks, BLOCK, col_blocks, BLOCK)
    scale = fp8_scale(np.abs(blocks).max(axis=(1, 3)), ue8m0)
    codes = e4m3_encode(blocks / scale[:, None, :, None].astype(np.float64)).reshape(padded.shape)
    return np.ascontiguousarray(codes[:rows, :cols]), scale


def dequantise_weight(codes, scale):
    rows, cols = codes.shape
    full = np.repeat(np.repeat(scale.astype(np.float64), BLOCK, 0)[:rows], BLOCK, 1)[:, :cols]
    return e4m3_decode(codes) * full


def quantise_activation(x, ue8m0=False):
    """x [T, K] after an E4M3 round trip with one scale for each token and 128 columns; a last shorter group is its own group."""
    out = np.empty(x.shape)
    x32 = np.asarray(x, np.float32)
    for start in range(0, x.shape[1], BLOCK):
        group = x32[:, start : start + BLOCK]
        amax = np.maximum(np.abs(group).max(axis=1, keepdims=True), np.float32(1e-4))
        scale = fp8_scale(amax, ue8m0)
        out[:, start : start + BLOCK] = e4m3_round(group / scale) * scale.astype(np.float64)
    return out


# ---- Stored tensors ----------------------------------------------------------------------------------------------------


def store(x, dtype):
    x = np.asarray(x)
    return Stored(dtype, bf16_encode(x) if dtype == "BF16" else np.ascontiguousarray(x, RAW_DTYPE[dtype]))


def load(tensor):
    """The stored values as float64 (F8_E4M3 without its block scales)."""
    if tensor.dtype == "BF16":
        return bf16_decode(tensor.raw).astype(np.float64)
    if tensor.dtype == "F8_E4M3":
        return e4m3_decode(tensor.raw)
    return tensor.raw.astype(np.float64)


def safetensors_header(layout):
    """layout: {name: (dtype, shape)} -> the bytes before the data; tensors follow in the given order without gaps."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in layout.items():
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(RAW_DTYPE[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_safetensors(path, tensors):
    """Widest types first, as the official writer does, so that every tensor is aligned to its element."""
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].raw.itemsize, item[0])))
    with open(path, "wb") as f:
        f.write(safetensors_header({name: (t.dtype, t.raw.shape) for name, t in tensors.items()}))
        for tensor in tensors.values():
            f.write(np.ascontiguousarray(tensor.raw).tobytes())


def read_safetensors(path):
    data = open(path, "rb").read()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + size + o for o in entry["data_offsets"])
        raw = np.frombuffer(data[begin:end], RAW_DTYPE[entry["dtype"]]).reshape(entry["shape"])
        tensors[name] = Stored(entry["dtype"], raw)
    return tensors
