"""Replica logs: write, read, check, recover and apply them. Spec: [MS-HRL]."""

from hvreplica.hrl.apply import apply_log
from hvreplica.hrl.data import HoleFinder
from hvreplica.hrl.dump import dump_entries, log_info
from hvreplica.hrl.reader import LogReader
from hvreplica.hrl.recover import recover_log
from hvreplica.hrl.report import ApplyReport, LogEnd, LogEntry, LogInfo, LogReport, LogSummary
from hvreplica.hrl.times import read_times_file, times_path
from hvreplica.hrl.verify import verify_log
from hvreplica.hrl.writer import GrownLog, LogWriter

__all__ = [
    "ApplyReport",
    "GrownLog",
    "HoleFinder",
    "LogEnd",
    "LogEntry",
    "LogInfo",
    "LogReader",
    "LogReport",
    "LogSummary",
    "LogWriter",
    "apply_log",
    "dump_entries",
    "log_info",
    "read_times_file",
    "recover_log",
    "times_path",
    "verify_log",
]
