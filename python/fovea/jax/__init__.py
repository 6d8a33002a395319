"""Fovea for JAX: attention through XLA's foreign function interface, with gradients, under jit, on CPUs and CUDA GPUs."""

from fovea.jax._attention import attention

__all__ = ["attention"]
