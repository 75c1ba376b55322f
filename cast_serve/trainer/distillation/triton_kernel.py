"""One token's loss and gradient a program, over a block of logits that stays in the dtype it has.

    Shapes   z_CV, t_CV bf16, fp16 or fp32, rows of contiguous entries; labels_C int64
    Bytes    z and t are read twice, the gradient is written once, over z if asked
    Needs    Triton; any vocabulary

Both softmaxes and the KL take one pass, since the KL follows from running sums: with s, l and m the
running sum of exp(t - m) * (t - z), of exp(t - m), and the maximum,

    KL = s/l - logsumexp(t) + logsumexp(z).

The second pass writes the gradient.
"""

# Triton's types are its own: arguments are tensors inside and pointers outside.
# mypy: ignore-errors

import torch
import triton
import triton.language as tl

BLOCK = 4096
WARPS = 16


@triton.jit
def distill_kernel(
    z_ptr,
    t_ptr,
    labels_ptr,
    scale_ptr,
    ce_ptr,
    kl_ptr,
    out_ptr,
    vocab,
    z_stride,
    t_stride,
    out_stride,
    eta,
    temperature,
    TEACHER: tl.constexpr,
    TEMPERED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid [tokens]. TEMPERED: the temperature is not 1, so CE has a softmax of its own."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
    t_ptr += row * t_stride
    out_ptr += row * out_stride
    label = tl.load(labels_ptr + row)
    columns = tl.arange(0, BLOCK)
    beta = 1 / temperature

    if label < 0:
        tl.store(ce_ptr + row, 0.0)
        tl.store(kl_ptr + row, 0.0)
        if GRADIENT:
            for start in range(0, vocab, BLOCK):
                nothing = tl.zeros((BLOCK,), tl.float32).to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + start + columns, nothing, mask=start + columns < vocab)
        return

    # Before the second pass, which may write over it.
    z_label = tl.load(z_ptr + label).to(tl.float32)
    z_max = -float("inf")
    z_sum = 0.0
    a_sum = 0.0
    t_max = -float("inf")
    t_sum = 0.0
    s = 0.0
    for start in range(0, vocab, BLOCK):
        live = start + columns < vocab
        z = tl.load(z_ptr + start + columns, mask=live, other=-float("inf")).to(tl.float32)
        top = tl.maximum(z_max, tl.max(z))
        z_sum = z_sum * tl.exp(z_max - top) + tl.sum(tl.exp(z - top))
        if TEMPERED:
            a_sum = a_sum * tl.exp((z_max - top) * beta)
            a_sum += tl.sum(tl.exp((z - top) * beta))
        z_max = top
        if TEACHER:
            t = tl.load(t_ptr + start + columns, mask=live, other=-float("inf")).to(tl.float32)
            top = tl.maximum(t_max, tl.max(t))
            keep = tl.exp((t_max - top) * beta)
            e = tl.exp((t - top) * beta)
            t_sum = t_sum * keep + tl.sum(e)
            # Beyond the vocabulary both are -inf.
            s = s * keep + tl.sum(tl.where(e > 0, e * (t - z), 0.0))
            t_max = top

    z_lse = z_max + tl.log(z_sum)
    a_lse = z_lse
    if TEMPERED:
        a_lse = z_max * beta + tl.log(a_sum)
    tl.store(ce_ptr + row, z_lse - z_label)
    t_lse = 0.0
    kl = 0.0
    if TEACHER:
        t_lse = t_max * beta + tl.log(t_sum)
        kl = (s / t_sum * beta - t_lse + a_lse) * temperature * temperature
    tl.store(kl_ptr + row, kl)

    if GRADIENT:
        scale = tl.load(scale_ptr)
        for start in range(0, vocab, BLOCK):
            live = start + columns < vocab
            z = tl.load(z_ptr + start + columns, mask=live, other=0.0).to(tl.float32)
            q = tl.exp(z - z_lse)
            g = (1 - eta) * (q - tl.where(start + columns == label, 1.0, 0.0))
            if TEACHER:
                t = tl.load(t_ptr + start + columns, mask=live, other=0.0).to(tl.float32)
                if TEMPERED:
                    q = tl.exp(z * beta - a_lse)
                g += eta * temperature * (q - tl.exp(t * beta - t_lse))
            g *= scale
            tl.store(out_ptr + start + columns, g.to(out_ptr.dtype.element_ty), mask=live)


def distill_rows(
    z_CV: torch.Tensor,
    t_CV: torch.Tensor | None,
    labels_C: torch.Tensor,
    scale: torch.Tensor,
    *,
    eta: float,
    temperature: float,
    out_CV: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(CE, KL), fp32 [C], 0 where the label is negative; see `distill_block.block_loss`."""
    tokens, vocab = z_CV.shape
    ce_C = torch.empty(tokens, dtype=torch.float32, device=z_CV.device)
    kl_C = torch.empty_like(ce_C)
    # Without a teacher, or a gradient to write, any address does: neither is touched.
    t = z_CV if t_CV is None else t_CV
    out = z_CV if out_CV is None else out_CV
    assert z_CV.stride(1) == t.stride(1) == out.stride(1) == 1, "rows must be contiguous"
    assert t.shape == out.shape == z_CV.shape
    if tokens:
        distill_kernel[(tokens,)](
            z_CV,
            t,
            labels_C,
            scale,
            ce_C,
            kl_C,
            out,
            vocab,
            z_CV.stride(0),
            t.stride(0),
            out.stride(0),
            eta,
            temperature,
            TEACHER=t_CV is not None,
            TEMPERED=temperature != 1,
            GRADIENT=out_CV is not None,
            BLOCK=min(BLOCK, triton.next_power_of_2(vocab)),
            num_warps=WARPS,
        )
    return ce_C, kl_C
