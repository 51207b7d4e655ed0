"""Where an activation recorder writes its records as training goes.

A `StatsFile` appends tables to a CSV or a Parquet file, so that an interrupted run keeps every finished epoch.
`log_scalars` sends records to TensorBoard and Weights & Biases, where fastai's own callbacks for them are attached.
`write_new_records` does both with the records of a store that were not written before."""
from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pandas as pd
from fastai.callback.core import Callback

from .records import PHASES, Record, RecordStore

__all__ = ['StatsFile', 'log_scalars', 'write_new_records']


class StatsFile:
    "A file that tables are appended to."
    def __init__(self,
        fname: str | Path  # `.parquet`, or else CSV; relative to the folder that the methods are given
    ):
        self.fname = Path(fname)
        self.is_parquet = self.fname.suffix == '.parquet'
        if self.is_parquet:
            _import_pyarrow()

    def prepare(self,
        folder: str | Path,
        append: bool  # Keep the file that is there
    ):
        "Make the folder, and remove the file of an earlier fit unless `append`."
        path = Path(folder)/self.fname
        path.parent.mkdir(parents=True, exist_ok=True)
        if not append:
            path.unlink(missing_ok=True)

    def append(self,
        table: pd.DataFrame,
        folder: str | Path
    ):
        "Append a table, and make sure that it is on disk."
        (_append_parquet if self.is_parquet else _append_csv)(table, Path(folder)/self.fname)


def _import_pyarrow() -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise ImportError("fname: a .parquet file needs pyarrow (`pip install pyarrow`); "
                          "name a .csv file to do without") from e
    return pyarrow


def _append_csv(table: pd.DataFrame, path: Path):
    with path.open('a') as f:
        table.to_csv(f, index=False, header=f.tell() == 0)
        f.flush()
        os.fsync(f.fileno())


def _append_parquet(table: pd.DataFrame, path: Path):
    "Rewrite the file with `table` at its end (a Parquet file cannot grow), and only then replace it."
    pa = _import_pyarrow()
    rows = pa.Table.from_pandas(table, preserve_index=False)
    if path.exists():
        rows = pa.concat_tables([pa.parquet.read_table(path), rows])
    part = path.with_suffix('.parquet.part')
    pa.parquet.write_table(rows, part)
    os.replace(part, path)


def log_scalars(
    cbs: Iterable[Callback],  # The callbacks of the Learner
    records: list[Record],  # What is new, on the host
    store: RecordStore  # Names the columns and the layers
):
    "Send records to the TensorBoard and Weights & Biases callbacks among `cbs` that are not switched off."
    for cb in cbs:
        if not cb.run: continue
        kinds = {c.__name__ for c in type(cb).__mro__}
        if 'TensorBoardCallback' in kinds:
            for record in records:
                for name, value in _scalars(record, store):
                    cb.writer.add_scalar(name, value, record.step)
        if 'WandbCallback' in kinds:
            import wandb
            # It takes no steps before its latest, so it gets the last record of each phase.
            latest = [r for p in PHASES for r in [r for r in records if r.phase == p][-1:]]
            wandb.log(dict(s for r in latest for s in _scalars(r, store)), step=cb._wandb_step)


def _scalars(record: Record, store: RecordStore) -> Iterator[tuple[str, float]]:
    "Name and value of each number of a record."
    for layer, numbers in zip(store.layers, record.values):
        for column, value in zip(store.columns, numbers):
            yield f'activations/{record.phase}/{layer.name}/{column}', float(value)


def write_new_records(
    store: RecordStore,
    file: StatsFile | None,  # `None`: no file
    folder: str | Path,  # Of the file
    cbs: Iterable[Callback]  # The callbacks of the Learner
):
    "Append records not yet written to the file, and send them to TensorBoard and Weights & Biases."
    records = store.unwritten()
    if not records: return
    if file is not None:
        file.append(store.frame(records), folder)
    log_scalars(cbs, records, store)
    for record in records:
        record.written = True
