"""Learned samplers for discrete diffusion. The name is reserved; there is nothing in this package yet."""

__all__: list[str] = []
