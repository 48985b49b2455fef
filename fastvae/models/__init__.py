"""Variational autoencoders to train, sample from and save."""

from .config import VAEConfig as VAEConfig
from .vae import VAE as VAE
from .vae import VAEOutput as VAEOutput
