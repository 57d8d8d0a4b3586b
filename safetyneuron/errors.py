"""The one error type of the package: a single line naming the cause and the cure."""


class SafetyNeuronError(Exception):
    """A request that cannot be met; the message names the cause and the cure in one line."""


class UnsupportedArchitecture(SafetyNeuronError):
    """A model whose modules the architecture table does not place."""
