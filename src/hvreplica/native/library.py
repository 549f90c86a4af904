"""Load the compiled kernels and choose their variant.

HVREPLICA_KERNELS in the environment names a variant; it is a demand, not a preference: where this machine
cannot run it, the import fails and says why. Without it the fastest variant that runs here is taken.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

try:
    from hvreplica.native._hvr import ffi, lib
except ImportError as error:
    error.add_note("build the kernels with `python native/build.py`, or install hvreplica with pip")
    raise

if TYPE_CHECKING:
    from hvreplica.native.tables import Array, Octets

__all__ = [
    "CHOSEN_VARIANT",
    "VARIANTS",
    "available_variants",
    "choose_variant",
    "ffi",
    "kernel_variant",
    "lib",
    "octets",
    "u32s",
    "u64s",
    "writable_i64s",
    "writable_octets",
    "writable_u64s",
]

VARIANTS = {"scalar": lib.HVR_SCALAR, "neon": lib.HVR_NEON, "avx2": lib.HVR_AVX2, "avx512": lib.HVR_AVX512}
_REASONS = {0: "this processor lacks its instructions", -1: "this library was built for another architecture"}

_U8 = ffi.typeof("uint8_t[]")
_U32 = ffi.typeof("uint32_t[]")
_U64 = ffi.typeof("uint64_t[]")
_I64 = ffi.typeof("int64_t[]")


def available_variants() -> tuple[str, ...]:
    """Return the names of the kernels that this machine can run, slowest first."""
    return tuple(name for name, number in VARIANTS.items() if lib.hvr_variant_available(number) == 1)


def choose_variant(demand: str | None) -> str:
    """Return the variant to use. Raises: ImportError if `demand` names one that cannot run here."""
    if not demand:
        return available_variants()[-1]
    if demand not in VARIANTS:
        message = f"HVREPLICA_KERNELS={demand}: no such kernels; there are {', '.join(VARIANTS)}"
        raise ImportError(message)
    availability = lib.hvr_variant_available(VARIANTS[demand])
    if availability != 1:
        names = ", ".join(available_variants())
        message = f"HVREPLICA_KERNELS={demand}: {_REASONS[availability]}; here run {names}"
        raise ImportError(message)
    return demand


CHOSEN_VARIANT = choose_variant(os.environ.get("HVREPLICA_KERNELS"))


def kernel_variant() -> str:
    """Return the name of the kernels in use."""
    return CHOSEN_VARIANT


def octets(buffer: Octets) -> Any:
    """Return a C pointer with a length over the bytes of a C-contiguous buffer; it keeps the buffer alive."""
    return ffi.from_buffer(_U8, buffer)


def writable_octets(buffer: Octets) -> Any:
    """Return as octets(), for a buffer that the kernel writes. Raises: BufferError if it is read-only."""
    return ffi.from_buffer(_U8, buffer, require_writable=True)


def u32s(array: Array) -> Any:
    """Return the elements of a uint32 array for a kernel that writes them."""
    return ffi.from_buffer(_U32, array, require_writable=True)


def u64s(array: Array) -> Any:
    """Return the elements of a uint64 array for a kernel that reads them."""
    return ffi.from_buffer(_U64, array)


def writable_u64s(array: Array) -> Any:
    """Return the elements of a uint64 array for a kernel that writes them."""
    return ffi.from_buffer(_U64, array, require_writable=True)


def writable_i64s(array: Array) -> Any:
    """Return the elements of an int64 array for a kernel that writes them."""
    return ffi.from_buffer(_I64, array, require_writable=True)
