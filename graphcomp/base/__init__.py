"""Files, caches, processes, progress: what knows no network."""

from graphcomp.base import cache, distributed
from graphcomp.base.digests import Buffer, json_sha256, sha256, tensor_parts
from graphcomp.base.files import (
    LOCK,
    atomic_directory,
    atomic_entries,
    atomic_file,
    is_dir,
    is_file,
    locked,
    read_record,
    remove,
    settled,
    sweep,
    unfinished,
    write_record,
    write_text,
    write_texts,
)
from graphcomp.base.muting import muted
from graphcomp.base.nesting import nests_at_most
from graphcomp.base.progress import Progress, part, quiet
from graphcomp.base.shelf import Shelf
from graphcomp.base.stopping import Stop, load_state, save_state, stoppable
from graphcomp.base.user_code import call_in_file
from graphcomp.base.workers import Engine, Failure, Tell, Told, run_in_processes, run_tasks

__all__ = [
    "Buffer",
    "Engine",
    "Failure",
    "LOCK",
    "Progress",
    "Shelf",
    "Stop",
    "Tell",
    "Told",
    "atomic_directory",
    "atomic_entries",
    "atomic_file",
    "cache",
    "call_in_file",
    "distributed",
    "is_dir",
    "is_file",
    "json_sha256",
    "load_state",
    "locked",
    "muted",
    "nests_at_most",
    "part",
    "quiet",
    "read_record",
    "remove",
    "run_in_processes",
    "run_tasks",
    "save_state",
    "settled",
    "sha256",
    "stoppable",
    "sweep",
    "tensor_parts",
    "unfinished",
    "write_record",
    "write_text",
    "write_texts",
]
