"""jax-mps: run JAX programs on MLX."""
