"A `Ledger` of finished runs: each is a row, appended to a CSV file, so that a study can be stopped and started again."
from __future__ import annotations

import csv
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd

from .data import InputError

__all__ = ['Ledger']


class Ledger:
    "Rows of finished runs, in memory and in a CSV file. `key in ledger` tells whether a run is there."
    def __init__(self,
        path: Path | None,  # The file; `None` keeps the rows in memory alone
        keys: list[str],  # Columns that tell runs apart
        columns: list[str]  # Those that follow
    ):
        self.path,self.keys,self.columns = path,keys,[*keys, *columns]
        self.rows: list[dict[str, str]] = []
        if path is not None and path.is_file(): self._read()
        self._done = {self._key(row) for row in self.rows}

    def _key(self, row: dict[str, Any]) -> tuple[str, ...]: return tuple(str(row[k]) for k in self.keys)
    def __contains__(self, row: dict[str, Any]) -> bool: return self._key(row) in self._done
    def __len__(self) -> int: return len(self.rows)

    def _read(self) -> None:
        "Read the file. A last line without its end is that of a run that was cut off, and is dropped."
        text = self.path.read_text()
        whole = text[:text.rfind('\n') + 1]
        if whole != text: self.path.write_text(whole)
        lines = csv.DictReader(whole.splitlines())
        if whole and list(lines.fieldnames or ()) != self.columns:
            raise InputError(f"{self.path}: its columns are {', '.join(lines.fieldnames or ())}; those of this command "
                             f"are {', '.join(self.columns)}. Move the file away, or name another folder with --out")
        self.rows = list(lines)

    def add(self, row: dict[str, Any]) -> None:
        "Add a finished run and write it to the file."
        row = {k: str(row[k]) for k in self.columns}
        self.rows.append(row)
        self._done.add(self._key(row))
        if self.path is None: return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, 'a', newline='') as f:
            to = csv.DictWriter(f, self.columns, lineterminator='\n')
            if not f.tell(): to.writeheader()
            to.writerow(row)

    def df(self) -> pd.DataFrame:
        "All rows, as pandas reads the file."
        text = StringIO()
        pd.DataFrame(self.rows, columns=self.columns).to_csv(text, index=False)
        text.seek(0)
        return pd.read_csv(text)
