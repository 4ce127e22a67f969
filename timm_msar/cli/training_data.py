from itertools import pairwise

from timm.utils import natural_key

from .card_data import training_data  # noqa: F401


def equal_names(names):
    ordered = sorted(names, key=natural_key)
    return next((pair for pair in pairwise(ordered) if natural_key(pair[0]) == natural_key(pair[1])), None)
