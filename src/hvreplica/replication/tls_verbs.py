"""The certificate verbs as functions: a first set of certificates, and who may write which VM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hvreplica.clock import SYSTEM
from hvreplica.files import OS_FILES
from hvreplica.transport import TRUST_FILE, allow
from hvreplica.transport.certificates import init_tls, issue_nbd

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    PathLike = str | os.PathLike[str]


def tls_init(folder: PathLike, *, names: Sequence[str] = ()) -> list[str]:
    """Make a CA, certificates for both sides and a trust list in `folder`;

    return the paths. Never overwrites.
    """
    return [str(path) for path in init_tls(OS_FILES, Path(folder), clock=SYSTEM, names=names)]


def tls_nbd(folder: PathLike, *, names: Sequence[str] = ()) -> list[str]:
    """Make certificates for `capture --nbd-tls` and its NBD clients in `folder`/nbd, of the CA in `folder`;

    return the paths. Never overwrites.
    """
    return [str(path) for path in issue_nbd(OS_FILES, Path(folder), clock=SYSTEM, names=names)]


def tls_trust(folder: PathLike, certificate: str, vm_patterns: Sequence[str]) -> None:
    """Let a certificate ("sha256:…" or a common name) write the VMs that match a pattern;

    takes effect at once.
    """
    allow(OS_FILES, Path(folder) / TRUST_FILE, certificate=certificate, vm=list(vm_patterns), clock=SYSTEM)
