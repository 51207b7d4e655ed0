"""Where an activation recorder writes its records as training goes.

`write_new_records` appends them to a CSV or a Parquet file, so that an interrupted run keeps every finished epoch. It
also sends them to TensorBoard and Weights & Biases, where fastai's own callbacks for them are attached."""
from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Iterable

import pandas as pd
from fastai.callback.core import Callback

from .records import PHASES, Record, RecordStore

__all__ = ['StatsFile', 'write_new_records']


class StatsFile:
    "A file that tables are appended to: `.parquet`, or else CSV. Its name is relative to the folder of a call."
    def __init__(self, fname: str | Path):
        self.fname = Path(fname)
        self.is_parquet = self.fname.suffix == '.parquet'
        if self.is_parquet: _import_pyarrow()

    def prepare(self, folder: str | Path, append: bool):
        "Make the folder, and remove the file of an earlier fit unless `append`."
        path = Path(folder)/self.fname
        path.parent.mkdir(parents=True, exist_ok=True)
        if not append: path.unlink(missing_ok=True)

    def append(self, table: pd.DataFrame, folder: str | Path):
        "Append a table, and make sure that it is on disk."
        path = Path(folder)/self.fname
        if self.is_parquet: return _append_parquet(table, path)
        with path.open('a') as f:
            table.to_csv(f, index=False, header=f.tell() == 0)
            f.flush()
            os.fsync(f.fileno())


def _import_pyarrow() -> ModuleType:
    try: import pyarrow.parquet
    except ImportError as e: raise ImportError("fname: a .parquet file needs pyarrow (`pip install pyarrow`); "
                                               "name a .csv file to do without") from e
    return pyarrow


def _append_parquet(table: pd.DataFrame, path: Path):
    "Rewrite the file with `table` at its end (a Parquet file cannot grow), and only then replace it."
    pa = _import_pyarrow()
    rows = pa.Table.from_pandas(table, preserve_index=False)
    if path.exists(): rows = pa.concat_tables([pa.parquet.read_table(path), rows])
    part = path.with_suffix('.parquet.part')
    pa.parquet.write_table(rows, part)
    os.replace(part, path)


def write_new_records(store: RecordStore, file: StatsFile | None, folder: str | Path, cbs: Iterable[Callback]):
    "Append records not yet written to the file, if there is one, and send them to TensorBoard and Weights & Biases."
    records = [r for p in PHASES for r in store.rows[p] if not r.written]
    if not records: return
    if file is not None: file.append(store.frame(records), folder)
    for cb in cbs:
        kinds = {c.__name__ for c in type(cb).__mro__} if cb.run else set()
        if 'TensorBoardCallback' in kinds:
            for r in records:
                for name, value in _scalars(r, store).items(): cb.writer.add_scalar(name, value, r.step)
        if 'WandbCallback' in kinds:
            import wandb
            # It takes no steps before its latest, so it gets the last record of each phase.
            latest = {r.phase: _scalars(r, store) for r in records}
            wandb.log({name: v for scalars in latest.values() for name, v in scalars.items()}, step=cb._wandb_step)
    for r in records: r.written = True


def _scalars(record: Record, store: RecordStore) -> dict[str, float]:
    return {f'activations/{record.phase}/{layer.name}/{column}': float(value)
            for layer, numbers in zip(store.layers, record.values) for column, value in zip(store.columns, numbers)}
