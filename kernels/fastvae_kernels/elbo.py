"""The loss of a VAE: its plan, its forward and its backward pass."""

from .elbo_bwd import elbo_bwd as elbo_bwd
from .elbo_fwd import elbo_fwd as elbo_fwd
from .plan import plan_elbo as plan_elbo
from .plan import seen_numbers as seen_numbers
