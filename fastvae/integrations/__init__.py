"""fastvae inside other packages, one line each; `undo()` of what it returns, or the end of a `with` block, puts back
what was there.
"""

from ._patch import Patch as Patch
from .diffusers import patch_diffusers as patch_diffusers
from .pythae import patch_pythae as patch_pythae
from .scvi import patch_scvi as patch_scvi
from .torch_kl import register_torch_kl as register_torch_kl
