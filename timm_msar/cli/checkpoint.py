from .trained_run import load_network, load_trained  # noqa: F401
