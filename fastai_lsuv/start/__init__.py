"The weights before the loops: kept, orthonormal, or a function's."
from .orthogonal import orthonormal
from .start import Start, orthogonal_

__all__ = ['Start', 'orthogonal_', 'orthonormal']
