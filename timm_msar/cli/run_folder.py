from .trained_run import read_arguments, read_summary  # noqa: F401


def read_text(path):
    return path.read_text(encoding='utf-8')
