"""Build the kernels: `python native/build.py`, or through setup.py as any wheel is built.

One text, hvr.h, is the C header and cffi's declaration. The result is src/hvreplica/native/_hvr.abi3.so, for
CPython 3.11 and newer. Environment:

CC                    the compiler; cc by default
HVREPLICA_WERROR=1    first compile every source with all warnings as errors
SAN=1                 build with AddressSanitizer and UndefinedBehaviorSanitizer into build/sanitized, beside
                      a copy of the Python sources, and print how to run it
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "avx2",
    "avx512",
    "bat",
    "bitmap",
    "coalesce",
    "dispatch",
    "hrl",
    "nbd",
    "neon",
    "payload",
    "runs",
    "scalar",
    "track",
    "under",
    "xxh3",
)
FLAGS = ("-std=c11", "-O3", "-fvisibility=hidden", "-fno-strict-aliasing")
WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wstrict-prototypes", "-Wundef", "-Werror")
SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-g",
    "-O1",
)
MODULE = "hvreplica.native._hvr"


def declarations() -> str:
    """Return hvr.h without its preprocessor lines, as cffi reads it."""
    lines = (ROOT / "native" / "hvr.h").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


def builder(folder: Path, *, sanitized: bool = False) -> FFI:
    """Return the FFI whose extension is MODULE, from the sources in `folder`."""
    extra = list(SANITIZERS) if sanitized else []
    ffi = FFI()
    ffi.cdef(declarations())
    ffi.set_source(
        MODULE,
        '#include "hvr.h"',
        sources=[str(folder / f"{name}.c") for name in SOURCES],
        depends=[str(folder / "hvr.h"), str(folder / "kernels.h")],
        include_dirs=[str(folder)],
        extra_compile_args=[*FLAGS, *extra],
        extra_link_args=extra,
        py_limited_api=True,
        define_macros=[("Py_LIMITED_API", "0x030B0000")],
    )
    return ffi


# What setup.py gives to cffi; setuptools wants paths relative to the project.
ffibuilder = builder(Path("native"))


def check_warnings() -> None:
    """Compile each source for nothing but its warnings, as errors."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    for name in SOURCES:
        source = ROOT / "native" / f"{name}.c"
        subprocess.run([*compiler, *FLAGS, *WARNINGS, "-c", "-o", os.devnull, str(source)], check=True)


def build(*, sanitized: bool = False) -> Path:
    """Build the extension beside its package and return its path; the old one stays in place until the new
    one is whole.
    """
    os.chdir(ROOT)
    work = Path("build") / ("native-sanitized" if sanitized else "native")
    package = Path("src") / "hvreplica"
    if sanitized:
        package = Path("build") / "sanitized" / "hvreplica"
        shutil.rmtree(package, ignore_errors=True)
        shutil.copytree(
            Path("src") / "hvreplica", package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    built = Path(builder(ROOT / "native", sanitized=sanitized).compile(tmpdir=str(work)))
    target = package / "native" / "_hvr.abi3.so"
    temporary = target.with_suffix(".new")
    shutil.copy2(built, temporary)
    temporary.replace(target)
    return target


def main() -> None:
    """Build as the environment says."""
    sanitized = os.environ.get("SAN") == "1"
    if os.environ.get("HVREPLICA_WERROR") == "1":
        check_warnings()
    target = build(sanitized=sanitized)
    sys.stderr.write(f"built {target}\n")
    if sanitized:
        compiler = shlex.split(os.environ.get("CC", "cc"))
        library = subprocess.run(
            [*compiler, "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
        ).stdout.strip()
        folder = Path("build") / "sanitized"
        sys.stderr.write(
            f"run it with ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD={library} "
            f"{sys.executable} -m pytest -o pythonpath='. {folder}' tests/native\n"
        )


if __name__ == "__main__":
    main()
