"""Core: how much the residual stream changes when a neuron is taken away, by four rules, and which neurons are selected."""
