"""fastvae: sampling and loss of variational autoencoders at the cost of a copy."""

from . import integrations as integrations
from . import likelihoods as likelihoods
from . import parametrizations as parametrizations
from . import regularizers as regularizers
from . import schedules as schedules
from ._backend import set_backend as set_backend
from ._backend import use_backend as use_backend
from .capture import CapturedStep as CapturedStep
from .capture import capture_step as capture_step
from .distributions import DiagonalGaussian as DiagonalGaussian
from .functional import VAELossTerms as VAELossTerms
from .functional import gaussian_kl as gaussian_kl
from .functional import philox_normal as philox_normal
from .functional import reconstruction_loss as reconstruction_loss
from .functional import reparameterize as reparameterize
from .functional import reparameterize_kl as reparameterize_kl
from .functional import vae_loss as vae_loss
from .input_checks import InputReport as InputReport
from .input_checks import check_inputs as check_inputs
from .iwae import iwae_loss as iwae_loss
from .loss import VAELoss as VAELoss
from .noise_state import NoiseState as NoiseState
from .statistics import LatentStats as LatentStats
from .statistics import latent_stats as latent_stats

__version__ = "0.1.0"
