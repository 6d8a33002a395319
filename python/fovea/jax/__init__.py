"""Fovea for JAX: attention through XLA's foreign function interface, with gradients, on CPUs and GPUs."""

from fovea.jax._attention import attention

__all__ = ["attention"]
