"What was done to every layer, as a table, a picture and in sentences."
from .plots import name_rows
from .report import LSUVReport, NoReport
from .rows import STATUSES, Row

__all__ = ['LSUVReport', 'NoReport', 'Row', 'STATUSES', 'name_rows']
