"""What every schedule was worth, by content: nothing is evaluated twice, whoever proposed it and whenever."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import sqlalchemy as sql

from samplers import SolverSchedule

from .objective import PENALTY

Record = dict[str, Any]
_T = TypeVar("_T")


def storage_url(storage: str) -> str:
    """A SQLAlchemy URL: as it is, ``postgresql://`` with the driver that we depend on, a file name as SQLite.

    Raises:
        ValueError: a scheme that is no database of many writers.
    """
    scheme, separator, rest = storage.partition("://")
    if not separator:
        return f"sqlite:///{storage}"
    if scheme in ("postgres", "postgresql"):
        return f"postgresql+psycopg://{rest}"
    if scheme.partition("+")[0] not in ("sqlite", "postgresql", "mysql"):
        raise ValueError(f"unknown storage {storage!r}; use sqlite:///FILE, postgresql://USER@HOST/DATABASE or a file name")
    return storage


def patiently(action: Callable[[], _T], attempts: int = 8) -> _T:
    """Do it, again after a while where another worker was creating the same tables or held the file's lock."""
    for attempt in range(attempts):
        try:
            return action()
        except (sql.exc.OperationalError, sql.exc.IntegrityError, sql.exc.ProgrammingError, sql.exc.InternalError):
            if attempt == attempts - 1:
                raise
            time.sleep(0.1 * 2**attempt)
    raise AssertionError("unreachable")


class Ledger:
    """Evaluations by the digests of objective and schedule; in memory, or a table beside the study's."""

    def __init__(self, url: str | None = None) -> None:
        """Open it; the table is made when it is missing."""
        self._memory: dict[str, Record] = {}
        self._engine = None if url is None else sql.create_engine(url, **engine_options(url))
        table = sql.Table(
            "fewstep_evaluations",
            sql.MetaData(),
            sql.Column("key", sql.String(64), primary_key=True),
            sql.Column("record", sql.Text, nullable=False),
        )
        self._table = table
        if self._engine is not None:
            engine = self._engine
            patiently(lambda: table.metadata.create_all(engine))

    @staticmethod
    def key(objective_digest: str, schedule: SolverSchedule) -> str:
        """The content's address."""
        return f"{objective_digest}:{schedule.digest}"

    def get(self, key: str) -> Record | None:
        """The record of this content, or None."""
        if key not in self._memory and self._engine is not None:
            query = sql.select(self._table.c.record).where(self._table.c.key == key)
            with self._engine.connect() as connection:
                found = connection.execute(query).scalar()
            if found is not None:
                self._memory[key] = json.loads(found)
        return self._memory.get(key)

    def put(self, key: str, record: Record) -> None:
        """Keep it; the first of two simultaneous writers wins."""
        self._memory[key] = record
        if self._engine is None:
            return
        engine = self._engine
        insert = sql.insert(self._table).values(key=key, record=json.dumps(record))

        def write() -> None:
            try:
                with engine.begin() as connection:
                    connection.execute(insert)
            except sql.exc.IntegrityError:
                pass  # another worker was quicker

        patiently(write)

    def close(self) -> None:
        """Give the connections back."""
        if self._engine is not None:
            self._engine.dispose()


def remembered(objective: Any, ledger: Ledger) -> Callable[[SolverSchedule], float]:
    """The objective's value, from the ledger where it is known, kept there where it is not."""

    def value(schedule: SolverSchedule) -> float:
        return float(evaluation(objective, schedule, ledger)["terms"]["value"])

    return value


def evaluation(objective: Any, schedule: SolverSchedule, ledger: Ledger) -> Record:
    """The terms of a schedule's value and the seconds that they took: known to the ledger, or made and kept now.

    Objectives without a digest are asked anew every time; values that are not finite become `PENALTY`.
    """
    digest = getattr(objective, "digest", None)
    key = None if digest is None else Ledger.key(digest, schedule)
    record = None if key is None else ledger.get(key)
    if record is not None:
        return {**record, "cached": True}
    start = time.perf_counter()
    whole = getattr(objective, "evaluate", None)
    terms = {"value": float(objective(schedule))} if whole is None else whole(schedule)
    terms = terms if math.isfinite(terms["value"]) else {"value": PENALTY}
    record = {"terms": terms, "seconds": time.perf_counter() - start}
    if key is not None:
        ledger.put(key, record)
    return {**record, "cached": False}


def engine_options(url: str) -> dict[str, Any]:
    """SQLAlchemy's options: SQLite waits for its lock, servers' connections are checked before use."""
    return {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
