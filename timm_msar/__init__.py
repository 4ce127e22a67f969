"""Multi-Scale Spatially-Asymmetric Recalibration (MS-SAR) networks for timm; importing this registers them."""

from . import cifar_densenet, cifar_resnet, resnet_msar
from .gate_maps import asymmetry, gates
from .recalibration import MultiScaleRecalibration
from .warm_start import start_from_plain

__version__ = '0.1.0'

__all__ = [
    'MultiScaleRecalibration',
    '__version__',
    'asymmetry',
    'cifar_densenet',
    'cifar_resnet',
    'gates',
    'resnet_msar',
    'start_from_plain',
]
