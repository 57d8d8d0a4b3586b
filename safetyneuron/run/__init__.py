"""Notebooks executed with parameters, their results read back, and what an edition needs before it starts."""
