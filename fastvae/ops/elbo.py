"""The loss of a VAE, reconstruction and KL in one node of the graph: autograd and dispatch.

Where it can be right, the forward pass writes recon's gradient along with the loss, so that images are read once; the
backward pass then only checks that the upstream gradient is 1.
"""

from typing import Any

import torch
from torch import Tensor

from .. import _backend, reference
from .._checks import one_pass_is_right
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
        inplace: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        like = next(t for t in (recon, mu, kl) if t is not None)
        ctx.room = _backend.room(_backend.backend_of(like), "elbo")
        drecon = None
        wants_drecon, wants_dtarget = ctx.needs_input_grad[:2]
        one_pass = one_pass and wants_drecon
        if one_pass and recon is not None and one_pass_is_right(recon, wants_dtarget, options.recon_weight):
            drecon = recon.data if inplace else torch.empty_like(recon)
        loss, recon_term, kl_term, weights = ctx.room.elbo_fwd(recon, target, mu, logvar, kl, drecon, options)
        ctx.options, ctx.holds_forward_gradient = options, drecon is not None
        ctx.inplace = inplace and drecon is not None
        if recon is not None and ctx.inplace:
            # who saved recon finds another version, and autograd says so; nothing else tells it of a kernel's stores
            torch.autograd.graph.increment_version(recon)
            recon = target = None
        ctx.save_for_backward(
            *(recon, target, mu, logvar, kl),
            *(t if t is not None and t.requires_grad else None for t in (beta, recon_weight)),
            *(drecon, weights),
            *((None, None) if beta is None and recon_weight is None else (recon_term, kl_term)),
        )
        return loss, recon_term, kl_term

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        recon, target, mu, logvar, kl, beta, recon_weight, drecon, weights, recon_term, kl_term = ctx.saved_tensors
        options = ctx.options
        if weights is not None:  # the values that the forward pass saw, whatever became of the tensors since
            seen = {"recon_weight": weights[0], "beta": weights[1]}
            options = options._replace(**{k: v for k, v in seen.items() if isinstance(getattr(options, k), Tensor)})
        inputs = (recon, target, mu, logvar, kl, beta, recon_weight)
        wanted = ctx.needs_input_grad[: len(inputs)]
        if ctx.inplace and (torch.is_grad_enabled() or not ctx.holds_forward_gradient):
            raise RuntimeError(
                "inplace=True serves one backward pass without create_graph: the gradient has taken recon's memory. "
                "Use inplace=False for retained graphs and second derivatives."
            )
        if torch.is_grad_enabled():  # create_graph=True: the kernels are not differentiable, the reference is
            if beta is not None:
                options = options._replace(beta=beta)
            if recon_weight is not None:
                options = options._replace(recon_weight=recon_weight)
            outputs = reference.elbo(recon, target, mu, logvar, kl, options)
            return *gradients_through(outputs, upstream, inputs, wanted), None, None, None

        # a forward gradient is handed out once, as a tensor with a version counter of its own: its new owner may do
        # with it what it likes, and a second backward pass still finds every saved tensor unmodified
        holds_forward_gradient = ctx.holds_forward_gradient and wanted[0]
        if holds_forward_gradient:
            ctx.holds_forward_gradient = False
        dloss, drecon_term, dkl_term = upstream
        reaches_recon, reaches_kl = (dloss is not None or d is not None for d in (drecon_term, dkl_term))
        reaches = (reaches_recon, reaches_recon, reaches_kl, reaches_kl, reaches_kl)
        held = drecon.data if holds_forward_gradient and reaches_recon else None
        buffers = (held, None, None, None, None)
        gradients = [
            buffer if buffer is not None or x is None or not (want and reach) else torch.empty_like(x)
            for x, want, reach, buffer in zip(inputs, wanted, reaches, buffers, strict=False)
        ]
        if any(gradient is not None for gradient in gradients):
            ctx.room.elbo_bwd(
                *(recon, target, mu, logvar, upstream, tuple(gradients), options),
                holds_forward_gradient=held is not None,
            )
        dbeta = _dot(dloss, kl_term, beta)
        drecon_weight = _dot(dloss, recon_term, recon_weight)
        return *gradients, dbeta, drecon_weight, None, None, None


def _dot(dloss: Tensor | None, term: Tensor, weight: Tensor | None) -> Tensor | None:
    """Gradient of a tensor weight: the term it multiplies."""
    return None if dloss is None or weight is None else (dloss * term).sum().to(weight.dtype)
