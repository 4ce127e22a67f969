"""Multi-Scale Spatially-Asymmetric Recalibration (MS-SAR) networks for timm; importing this registers them."""

__version__ = '0.1.0'
