"""Self-Transcendence as a plug-in regularizer for diffusion transformers."""

__version__ = "0.1.0"
