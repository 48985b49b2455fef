"""The loss of a VAE, reconstruction and KL in one node of the graph: autograd and dispatch.

Where it can be right, the forward pass writes recon's gradient along with the loss, so that images are read once; the
backward pass then only checks that the upstream gradient is 1.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import _backend, reference
from .._options import ElboOptions
from ._double import gradients_through


class ElboFunction(torch.autograd.Function):
    """(recon, target, mu, logvar, kl, beta, recon_weight), options -> (loss, recon term, KL term).

    beta and recon_weight are inputs only if they are tensors; options hold them in any case.
    """

    @staticmethod
    def forward(
        ctx: Any,
        recon: Tensor | None,
        target: Tensor | None,
        mu: Tensor | None,
        logvar: Tensor | None,
        kl: Tensor | None,
        beta: Tensor | None,
        recon_weight: Tensor | None,
        options: ElboOptions,
        one_pass: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        like = next(t for t in (recon, mu, kl) if t is not None)
        ctx.room = _backend.room(_backend.backend_of(like), "elbo")
        ctx.forward_gradient_is_whole = one_pass and _one_pass_is_right(
            recon, recon_weight, options, ctx.needs_input_grad
        )
        drecon = torch.empty_like(recon) if recon is not None and ctx.forward_gradient_is_whole else None
        loss, recon_term, kl_term, weights = ctx.room.elbo_fwd(recon, target, mu, logvar, kl, drecon, options)
        ctx.options = options
        ctx.save_for_backward(
            *(recon, target, mu, logvar, kl),
            *(t if t is not None and t.requires_grad else None for t in (beta, recon_weight)),
            *(drecon, weights, recon_term, kl_term),
        )
        return loss, recon_term, kl_term

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        recon, target, mu, logvar, kl, beta, recon_weight, drecon, weights, recon_term, kl_term = ctx.saved_tensors
        options = ctx.options
        if weights is not None:  # the values that the forward pass saw, whatever became of the tensors since
            seen = {"recon_weight": weights[0], "beta": weights[1]}
            options = replace(options, **{k: v for k, v in seen.items() if isinstance(getattr(options, k), Tensor)})
        inputs = (recon, target, mu, logvar, kl, beta, recon_weight)
        wanted = ctx.needs_input_grad[: len(inputs)]
        if torch.is_grad_enabled():  # create_graph=True: the kernels are not differentiable, the reference is
            if beta is not None:
                options = replace(options, beta=beta)
            if recon_weight is not None:
                options = replace(options, recon_weight=recon_weight)
            outputs = reference.elbo(recon, target, mu, logvar, kl, options)
            return *gradients_through(outputs, upstream, inputs, wanted), None, None

        # a forward gradient is handed out once, as a tensor with a version counter of its own: its new owner may do
        # with it what it likes, and a second backward pass still finds every saved tensor unmodified
        holds_forward_gradient = ctx.forward_gradient_is_whole and wanted[0]
        if holds_forward_gradient:
            ctx.forward_gradient_is_whole = False
        dloss, drecon_term, dkl_term = upstream
        reaches_recon, reaches_kl = (dloss is not None or d is not None for d in (drecon_term, dkl_term))
        reaches = (reaches_recon, reaches_recon, reaches_kl, reaches_kl, reaches_kl)
        gradients = [
            None if x is None or not (want and reach) else torch.empty_like(x)
            for x, want, reach in zip(inputs[:5], wanted, reaches, strict=False)
        ]
        if holds_forward_gradient and reaches_recon:
            gradients[0] = drecon.data
        if any(gradient is not None for gradient in gradients):
            ctx.room.elbo_bwd(
                *(recon, target, mu, logvar, upstream, tuple(gradients), options),
                holds_forward_gradient=holds_forward_gradient,
            )
        dbeta = _dot(dloss, kl_term, beta)
        drecon_weight = _dot(dloss, recon_term, recon_weight)
        return *gradients, dbeta, drecon_weight, None, None


def _dot(dloss: Tensor | None, term: Tensor, weight: Tensor | None) -> Tensor | None:
    """Gradient of a tensor weight: the term it multiplies."""
    return None if dloss is None or weight is None else (dloss * term).sum().to(weight.dtype)


def _one_pass_is_right(
    recon: Tensor | None, recon_weight: Tensor | None, options: ElboOptions, wanted: tuple[bool, ...]
) -> bool:
    """Whether the forward pass may write recon's gradient.

    Not in float16, where an unscaled gradient underflows before a loss scaler can help; not under a weight that is 0
    or lives on the device, because the backward pass divides by it; not for two gradients at once.
    """
    wants_drecon, wants_dtarget = wanted[:2]
    return bool(
        recon is not None
        and recon.dtype != torch.float16
        and wants_drecon
        and not wants_dtarget
        and recon_weight is None
        and options.recon_weight != 0
    )
