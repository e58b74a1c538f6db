"""Mixtures of experts: LoRA next to the products of experts, experts in 4 bit. Opt-in; 4 bit needs bitsandbytes."""

from scao_hf.moe.fused import fuse_moe_lora, unfuse_moe_lora
from scao_hf.moe.nf4 import Quantization, dequantize_experts, quantize_experts

__all__ = ["Quantization", "dequantize_experts", "fuse_moe_lora", "quantize_experts", "unfuse_moe_lora"]
