"Layer-sequential unit-variance initialization for fastai and PyTorch."
__version__ = '0.1.0'

from .lsuv import layer_stats, lsuv_init
from .report import LSUVReport

__all__ = ['lsuv_init', 'layer_stats', 'LSUVReport']
