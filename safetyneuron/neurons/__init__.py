"""Core: what a neuron is, in which module it lives, and how a set of them is switched off, fixed or patched."""
