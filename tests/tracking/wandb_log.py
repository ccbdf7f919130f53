"""A reader for the log file of an offline wandb run."""

import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

MAGIC, BLOCK, HEADER = b":W&B\xe1\xbe\x00", 32768, 7
FULL, FIRST, LAST = 1, 2, 4  # types of a record's chunk; 3 is a middle chunk


@dataclass
class WandbLog:
    """The content of an offline run's log."""

    run_id: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)  # only explicitly set values
    maxima: set[str] = field(default_factory=set)  # metrics whose maximum is in the summary
    artifacts: list[tuple[str, list[str]]] = field(default_factory=list)  # type and aliases
    exit_code: int | None = None


def read_wandb_log(folder: Path) -> WandbLog:
    """Read RUN/wandb/offline-run-*."""
    (path,) = folder.glob("run-*.wandb")
    log = WandbLog()
    for body in _records(path.read_bytes()):
        record = Record.FromString(body)
        _merge(log.config, record.run.config.update)
        _merge(log.config, record.config.update)
        _merge(log.summary, record.summary.update)
        if record.HasField("run"):
            log.run_id = record.run.run_id
        if record.HasField("history"):
            log.history.append(_merge({}, record.history.item))
        if record.HasField("metric") and record.metric.summary.max:
            log.maxima.add(record.metric.name)
        if record.HasField("artifact"):
            log.artifacts.append((record.artifact.type, list(record.artifact.aliases)))
        if record.HasField("exit"):
            log.exit_code = record.exit.exit_code
    return log


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a LevelDB log: blocks of chunks, each with checksum, length and type."""
    assert data[: len(MAGIC)] == MAGIC
    position, record = len(MAGIC), b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        checksum, size, kind = struct.unpack_from("<IHB", data, position)
        chunk = data[position + HEADER : position + HEADER + size]
        if zlib.crc32(data[position + HEADER - 1 : position + HEADER + size]) != checksum:
            return  # the chunk is still being written
        position += HEADER + size
        record = chunk if kind in (FULL, FIRST) else record + chunk
        if kind in (FULL, LAST):
            yield record


def _merge(into: dict[str, Any], items: Iterable[Any]) -> dict[str, Any]:
    for item in items:
        *parents, last = item.nested_key or [item.key]
        node = into
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = json.loads(item.value_json)
    return into
