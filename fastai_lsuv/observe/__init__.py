"What shows the units as a model runs: a mode that sees the functions it calls, and hooks on blocks."
from .blocks import cloned
from .conditions import Functions, measuring
from .discovery import Discovery, Use, unused_slices
from .norms import NORMS, NormWatch
from .operations import COPIES, OPERATIONS
from .watch import Observer, Watch, shown

__all__ = ['COPIES', 'Discovery', 'Functions', 'NORMS', 'NormWatch', 'OPERATIONS', 'Observer', 'Use', 'Watch', 'cloned',
           'measuring', 'shown', 'unused_slices']
