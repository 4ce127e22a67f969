"""Multi-Scale Spatially-Asymmetric Recalibration (MS-SAR) networks for timm; importing this registers them."""

from .recalibration import MultiScaleRecalibration

__version__ = '0.1.0'

__all__ = ['MultiScaleRecalibration', '__version__']
