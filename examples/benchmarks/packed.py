"""Llama- and Qwen2-style models, with LoRA on all seven targets or trained whole, computed for speed on a processor.

The values are those of PEFT's and transformers' own forward up to rounding. What is saved: rows lie one after the other
without padding, attention is taken row by row, a projection and its factors are one operation that neither casts its
input to float32 nor adds up gradients in passes of their own, and the loss makes its gradient chunk by chunk while it
has the logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from models import TARGETS
from torch import Tensor, nn

CHUNK = 64  # tokens whose logits exist at a time


class Projections(torch.autograd.Function):
    """``x W^T + x (scale A)^T B^T`` for each of several projections of the same input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, *parts: Tensor) -> tuple[Tensor, ...]:
        weights, ups = parts[0::3], [up.to(x.dtype) for up in parts[2::3]]
        down = torch.cat(parts[1::3]).mul(scale).to(x.dtype)
        inner = x @ down.T
        ctx.save_for_backward(x, down, inner, *weights, *ups)
        ctx.scale = scale
        pieces = inner.chunk(len(ups), dim=1)
        return tuple((x @ weight.T).addmm_(piece, up.T) for weight, up, piece in zip(weights, ups, pieces, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, down, inner, *rest = ctx.saved_tensors
        weights, ups = rest[: len(grads)], rest[len(grads) :]
        inner_grad = torch.cat([grad @ up for grad, up in zip(grads, ups, strict=True)], dim=1)
        down_grads = (inner_grad.T @ x).float().mul_(ctx.scale).chunk(len(grads))
        up_grads = [
            (piece.T @ grad).T.float() for piece, grad in zip(inner.chunk(len(grads), dim=1), grads, strict=True)
        ]
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = inner_grad @ down
            for grad, weight in zip(grads, weights, strict=True):
                x_grad.addmm_(grad, weight)
        return x_grad, None, *(g for pair in zip(down_grads, up_grads, strict=True) for g in (None, *pair))


class Norm(torch.autograd.Function):
    """RMSNorm with a frozen weight, computed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = inverse.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x.float() * inverse).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        normed, grad = x.float() * inverse, (grad * weight).float()
        along = (grad * normed).mean(-1, keepdim=True)
        return grad.addcmul_(normed, along, value=-1).mul_(inverse).to(x.dtype), None, None


class CausalAttention(torch.autograd.Function):
    """Attention within each of the rows that lie one after the other; its scores and softmax are in float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
        out, saved, heads = torch.empty_like(q), [], k.shape[1]
        for q_row, k_row, v_row, out_row in zip(*(t.split(lengths) for t in (q, k, v, out)), strict=True):
            tokens, width = len(q_row), q.shape[2]
            # The query heads of a key head lie below each other, so that keys and values are not repeated for them.
            query, key, value = (t.transpose(0, 1).reshape(heads, -1, width) for t in (q_row, k_row, v_row))
            future = torch.full((tokens, tokens), -math.inf).triu_(1).repeat(q.shape[1] // heads, 1)
            scores = torch.baddbmm(future, query.float(), key.float().mT, alpha=scale)
            chances = scores.softmax(-1).to(q.dtype)
            out_row.copy_((chances @ value).view(-1, tokens, width).transpose(0, 1))
            saved += [query, key, value, chances]
        ctx.save_for_backward(*saved)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, q_grads, k_grads, v_grads = iter(ctx.saved_tensors), [], [], []
        for row, query, key, value, chances in zip(grad.split(ctx.lengths), saved, saved, saved, saved, strict=True):
            row = row.transpose(0, 1).reshape(query.shape)
            scores = torch.ops.aten._softmax_backward_data(row @ value.mT, chances, -1, row.dtype)
            for grads, part in (
                (q_grads, scores @ key * ctx.scale),
                (k_grads, scores.mT @ query * ctx.scale),
                (v_grads, chances.mT @ row),
            ):
                grads.append(part.view(-1, key.shape[1], key.shape[2]).transpose(0, 1))
        return torch.cat(q_grads), torch.cat(k_grads), torch.cat(v_grads), None, None


class SummedLoss(torch.autograd.Function):
    """The summed cross-entropy of a frozen output layer, its gradient made with it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        total, grads = torch.zeros(()), []
        for part, label in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
            logits, at = (part @ weight.T).float(), label[:, None]
            chances = logits.softmax(-1)
            # logsumexp is the largest logit less the logarithm of its probability, which never underflows
            total += (logits.amax(-1) - chances.amax(-1).log() - logits.gather(1, at)[:, 0]).sum()
            if ctx.needs_input_grad[0]:
                chances.scatter_add_(1, at, torch.full_like(at, -1, dtype=chances.dtype))
                grads.append(chances.to(part.dtype) @ weight)
        if grads:
            ctx.save_for_backward(torch.cat(grads))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grad, None, None


def supports(model: Any, targets: Sequence[str]) -> bool:
    """Whether this Llama or Qwen2, before LoRA, can be computed here: its weights are dense and all have factors."""
    dense = all(type(module) is nn.Linear for name, module in model.named_modules() if name.split(".")[-1] in TARGETS)
    return dense and set(targets) == set(TARGETS) and model.config.model_type in ("llama", "qwen2")


def project(x: Tensor, *modules: Any) -> tuple[Tensor, ...]:
    """The outputs of linear layers, or of PEFT's LoRA layers of one scaling, for the same input."""
    if not hasattr(modules[0], "lora_A"):
        biases = (None if module.bias is None else module.bias.to(x.dtype) for module in modules)
        return tuple(F.linear(x, m.weight.to(x.dtype), bias) for m, bias in zip(modules, biases, strict=True))
    parts = [
        part
        for module in modules
        for part in (module.weight, module.lora_A["default"].weight, module.lora_B["default"].weight)
    ]
    outs = Projections.apply(x, modules[0].scaling["default"], *parts)
    return tuple(out if module.bias is None else out + module.bias for out, module in zip(outs, modules, strict=True))


def summed_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The summed cross-entropy of an output layer."""
    if not weight.requires_grad:
        return SummedLoss.apply(hidden, weight, labels)  # type: ignore[no-any-return]
    return F.cross_entropy((hidden @ weight.to(hidden.dtype).T).float(), labels, reduction="sum")


def hidden(body: Any, rows: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """The last hidden states of the rows' tokens, one row after the other, computed in ``dtype`` (None: the weights')."""
    lengths = [len(row) for row in rows]
    x = body.embed_tokens(torch.cat(list(rows)))
    x = x if dtype is None else x.to(dtype)
    positions = torch.cat([torch.arange(length) for length in lengths])
    cos, sin = (part.transpose(0, 1) for part in body.rotary_emb(x, positions[None]))
    half = cos.shape[-1] // 2
    turn = torch.eye(2 * half, dtype=x.dtype).roll(half, 1)  # x @ turn is (-second half, first half)
    turn[half:] *= -1

    def norm(x: Tensor, module: Any) -> Tensor:
        if module.weight.requires_grad:
            return F.rms_norm(x, x.shape[-1:], module.weight.to(x.dtype), module.variance_epsilon)
        return Norm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-any-return]

    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        projected = project(norm(x, layer.input_layernorm), attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (out.view(len(x), -1, 2 * half) for out in projected)
        q, k = (torch.addcmul(part * cos, part @ turn, sin) for part in (q, k))
        mixed = CausalAttention.apply(q, k, v, lengths, attention.scaling)
        x = x + project(mixed.flatten(1), attention.o_proj)[0]
        gate, up = project(norm(x, layer.post_attention_layernorm), mlp.gate_proj, mlp.up_proj)
        x = x + project(mlp.act_fn(gate) * up, mlp.down_proj)[0]
    return norm(x, body.norm)
