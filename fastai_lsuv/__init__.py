"""Layer-sequential unit-variance initialization for fastai and PyTorch.

Names are imported when they are first used: `lsuv_init` and `layer_stats` need torch alone."""
from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .learner import LSUVCallback
    from .lsuv import layer_stats, lsuv_init
    from .recorder import ActivationStatsRecorder
    from .report import LSUVReport

__version__ = '0.1.0'
__all__ = ['LSUVCallback', 'ActivationStatsRecorder', 'lsuv_init', 'layer_stats', 'LSUVReport']

_ROOMS = {'LSUVCallback': 'learner', 'ActivationStatsRecorder': 'recorder', 'lsuv_init': 'lsuv',
          'layer_stats': 'lsuv', 'LSUVReport': 'report'}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f'.{_ROOMS[name]}', __name__), name)


def __dir__() -> list[str]: return sorted(__all__)


# Whoever has loaded fastai may call `learn.lsuv_init()`, which comes with the callback.
if 'fastai.learner' in sys.modules: import_module('.learner', __name__)
