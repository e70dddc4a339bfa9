"""Latent diffusion for few-label histology classification."""

__version__ = "0.1.0"
