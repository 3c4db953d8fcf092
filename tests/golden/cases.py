"""The cases: config.json and weight options of each small checkpoint under data/."""

from dataclasses import dataclass, field

from checkpoint import FP8, YARN_V3, make_config


@dataclass
class Case:
    config: dict
    seed: int
    weights: dict = field(default_factory=dict)  # options of checkpoint.random_tensors
    num_shards: int = 0
    lengths: tuple = (3, 37, 150, 300)
    act_quant: bool = False  # a second reference with quantised activations
    tokenizer: bool = False


SMALL_HEADS = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
V2_YARN = {**YARN_V3, "mscale": 0.707, "mscale_all_dim": 0.707}
NO_GROUPS = {"n_group": 1, "topk_group": 1}

V3_LIKE = dict(
    **SMALL_HEADS, hidden_size=256, num_hidden_layers=3, num_nextn_predict_layers=1, num_attention_heads=4, q_lora_rank=128,
    kv_lora_rank=128, intermediate_size=384, moe_intermediate_size=32, n_routed_experts=16, num_experts_per_tok=4, vocab_size=320,
    max_position_embeddings=2560, rope_scaling={**YARN_V3, "original_max_position_embeddings": 64}, quantization_config=FP8,
)  # fmt: skip

V3_HEADS = dict(
    hidden_size=128, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=192, kv_lora_rank=512, qk_nope_head_dim=128,
    qk_rope_head_dim=64, v_head_dim=128, intermediate_size=256, moe_intermediate_size=128, n_routed_experts=16, num_experts_per_tok=4,
    vocab_size=256, max_position_embeddings=163840, rope_scaling=YARN_V3, quantization_config=FP8,
)  # fmt: skip

MOONLIGHT = dict(
    **SMALL_HEADS, **NO_GROUPS, hidden_size=96, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=None, kv_lora_rank=64,
    intermediate_size=192, moe_intermediate_size=32, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3, vocab_size=192,
    max_position_embeddings=8192, rope_theta=50000.0, rms_norm_eps=1e-05, routed_scaling_factor=2.446,
)  # fmt: skip

V2 = dict(
    **SMALL_HEADS, model_type="deepseek_v2", architectures=["DeepseekV2ForCausalLM"], num_hidden_layers=2, num_attention_heads=2,
    kv_lora_rank=64, n_shared_experts=2, vocab_size=128, max_position_embeddings=163840, rope_scaling=V2_YARN, scoring_func="softmax",
    norm_topk_prob=False, num_nextn_predict_layers=...,
)  # fmt: skip

V2_LITE = dict(
    **{**V2, **NO_GROUPS}, hidden_size=192, q_lora_rank=None, intermediate_size=96, moe_intermediate_size=32, n_routed_experts=6,
    num_experts_per_tok=3, topk_method="greedy", routed_scaling_factor=1.0,
)  # fmt: skip

V2_GROUPS = dict(
    **V2, hidden_size=96, q_lora_rank=48, intermediate_size=160, moe_intermediate_size=32, n_routed_experts=12, num_experts_per_tok=3,
    n_group=4, topk_group=2, topk_method="group_limited_greedy", routed_scaling_factor=16.0,
)  # fmt: skip

KIMI = dict(
    **SMALL_HEADS, **NO_GROUPS, model_type="kimi_k2", hidden_size=128, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=96,
    kv_lora_rank=128, intermediate_size=192, moe_intermediate_size=32, n_routed_experts=12, num_experts_per_tok=4, vocab_size=192,
    max_position_embeddings=131072, routed_scaling_factor=2.827, quantization_config=FP8, rope_theta=..., rope_scaling=...,
    rope_parameters={
        "rope_theta": 50000.0, "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 1.0,
        "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    },
)  # fmt: skip

V31_YARN = {key: value for key, value in V3_LIKE["rope_scaling"].items() if key != "type"}
V31 = dict(
    **SMALL_HEADS, hidden_size=128, num_hidden_layers=2, num_nextn_predict_layers=1, num_attention_heads=2, q_lora_rank=128,
    kv_lora_rank=128, intermediate_size=192, moe_intermediate_size=64, n_routed_experts=8, num_experts_per_tok=3, n_group=4,
    topk_group=2, vocab_size=192, max_position_embeddings=2560, rope_scaling={**V31_YARN, "rope_type": "yarn"},
    quantization_config={**FP8, "scale_fmt": "ue8m0"},
)  # fmt: skip

LONG = dict(
    **SMALL_HEADS, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, q_lora_rank=48, kv_lora_rank=64, intermediate_size=128,
    moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, vocab_size=128,
    first_k_dense_replace=2, max_position_embeddings=163840, rope_scaling=YARN_V3,
)  # fmt: skip

ODD = dict(
    hidden_size=72, num_hidden_layers=2, num_nextn_predict_layers=..., num_attention_heads=3, q_lora_rank=26, kv_lora_rank=36,
    qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=7, intermediate_size=50, moe_intermediate_size=17, n_routed_experts=6,
    n_shared_experts=3, num_experts_per_tok=3, n_group=2, topk_group=1, vocab_size=131, max_position_embeddings=512,
    first_k_dense_replace=0, quantization_config=FP8,
)  # fmt: skip

DENSE = {**ODD, "num_hidden_layers": 1, "first_k_dense_replace": 3, "q_lora_rank": None}


def v2_dtype(name):
    """Every dtype a loader meets besides FP8 and BF16."""
    if name.endswith(("norm.weight", "layernorm.weight", "mlp.gate.weight", "kv_b_proj.weight")):
        return "F32"
    return "BF16" if "self_attn" in name else "F16"


CASES = {
    "v3_like": Case(make_config(**V3_LIKE), 1, num_shards=3, act_quant=True, tokenizer=True),
    "v3_heads": Case(make_config(**V3_HEADS), 2, act_quant=True),
    "moonlight": Case(make_config(**MOONLIGHT), 3, num_shards=2),
    "v2_lite": Case(make_config(**V2_LITE), 4, {"routed_gain": 3.0}),
    "v2": Case(make_config(**V2_GROUPS), 5, {"routed_gain": 0.5, "dtype": v2_dtype}),
    "kimi": Case(make_config(**KIMI), 6, num_shards=2),
    "v31": Case(make_config(**V31), 7, {"mtp_copies": False}, num_shards=2, act_quant=True),
    "odd": Case(make_config(**ODD), 9),
    "dense": Case(make_config(**DENSE), 10),
    "long": Case(make_config(**LONG), 8, {"attention_std": 2.6}, lengths=(20480,)),
}
