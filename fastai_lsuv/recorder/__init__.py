"""The recorder of activation statistics: `ActivationStatsRecorder`, in parts of one purpose each.

`callback` tells `recording` what a Learner does. `recording` measures the `layers` with a `meter`, and `operations`
sees weights that no layer applies. `records` keeps what they measure, and bounds it. `tables`, `diagnosis` and `plots`
show it; `files` writes it. `options` checks the arguments."""
from .callback import ActivationStatsRecorder

__all__ = ['ActivationStatsRecorder']
