"""Checks the number formats, YaRN, RoPE and the router of this folder against a file of independent numeric vectors.

Usage: check_vectors.py numeric_vectors.json
"""

import json
import sys

import numpy as np

import formats
import reference

V3 = {
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}


def scale(factor, mscale_all_dim):
    yarn = {"factor": factor, "mscale_all_dim": mscale_all_dim} if factor else None
    return reference.softmax_scale({"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "yarn": yarn})


def check_e4m3(table):
    codes = np.arange(256, dtype=np.uint8)
    finite = ~np.isnan(formats.e4m3_decode(codes))
    assert np.array_equal(formats.e4m3_decode(codes[:127]), table[:127])
    assert np.isnan(formats.e4m3_decode(np.uint8([0x7F, 0xFF]))).all()
    assert np.array_equal(formats.e4m3_encode(formats.e4m3_decode(codes[finite])), codes[finite])
    middle = (np.array(table[:126]) + table[1:127]) / 2
    lower = np.arange(126)
    assert np.array_equal(formats.e4m3_encode(middle), lower + lower % 2), "ties go to the even code"
    assert np.array_equal(formats.e4m3_encode(np.nextafter(middle, 0)), lower)
    assert np.array_equal(formats.e4m3_encode(np.nextafter(middle, 1e9)), lower + 1)
    assert np.array_equal(formats.e4m3_encode([1e9, -1e9]), [0x7E, 0xFE]), "saturates"


def check_scales():
    amax = np.float32([448, 449, 447, 1, 1e-4, 3.5, 7.1])
    power = formats.fp8_scale(amax, True)
    exact = np.log2(power.astype(np.float64))
    assert np.array_equal(exact, np.round(exact))
    ratio = power / formats.fp8_scale(amax, False)
    assert (ratio >= 1).all() and (ratio < 2).all() and power[0] == 1 and power[1] == 2


def check_router(example):
    scores, bias = np.array([example["scores"]]), np.array(example["bias"])
    experts, weights, _ = reference.route(scores, bias, V3)
    assert set(experts[0]) == set(example["experts"])
    expected = dict(zip(example["experts"], example["weights"]))
    np.testing.assert_allclose(weights[0], [expected[e] for e in experts[0]], rtol=1e-6)


def main():
    with open(sys.argv[1]) as f:
        vectors = json.load(f)
    check_e4m3(vectors["e4m3fn"]["table_0_127"])
    check_scales()
    yarn = {"factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
    np.testing.assert_allclose(reference.rope_frequencies(64, 10000, yarn), vectors["yarn"]["inv_freq"], rtol=1e-6)
    for name, factor, m in (("v3", 40, 1.0), ("no_yarn", None, 0), ("v2_lite", 40, 0.707)):
        np.testing.assert_allclose(scale(factor, m), vectors["softmax_scale_" + name], rtol=1e-12)
    np.testing.assert_allclose(scale(32, 1.0), vectors["softmax_scale_kimi_k2_factor32"], rtol=1e-12)
    example = vectors["rope_example"]
    x = (np.arange(64) + 1) / 64
    rotated = reference.rotate(x[None], *reference.rope_table([example["pos"]], 64, 10000, yarn))[0]
    np.testing.assert_allclose(rotated, example["interleaved_out(official layout)"], atol=1e-6)
    check_router(vectors["router_example"])
    print("e4m3, scales, YaRN, softmax scale, RoPE and router agree with", sys.argv[1])


if __name__ == "__main__":
    main()
