"""The recorder of activation statistics: `ActivationStatsRecorder`, in parts of one purpose each.

`callback` tells `fit` what a Learner does. `hooks` and `meter` measure the `layers`, and `operations` sees weights that
no layer applies. `records` keeps what they measure, and bounds it. `tables`, `diagnosis` and `plots` (with `drawing`)
show it; `files` writes it. `options` checks the arguments."""
from .callback import ActivationStatsRecorder

__all__ = ['ActivationStatsRecorder']
