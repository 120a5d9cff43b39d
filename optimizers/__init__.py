"""Pure-function optax transformations for research optimizers."""
