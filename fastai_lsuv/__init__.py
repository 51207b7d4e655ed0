"Layer-sequential unit-variance initialization for fastai and PyTorch."
__version__ = '0.1.0'

from .callback import LSUVCallback
from .lsuv import layer_stats, lsuv_init
from .recorder import ActivationStatsRecorder
from .report import LSUVReport

__all__ = ['LSUVCallback', 'ActivationStatsRecorder', 'lsuv_init', 'layer_stats', 'LSUVReport']
