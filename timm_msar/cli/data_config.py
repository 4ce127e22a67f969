from .trained_run import data_config  # noqa: F401
