"""A Linux guest of a few seconds: Debian's kernel, shell and agent, a disk, and a line to tell it what to do.

The guest has the disk as /dev/vda, /run in memory, and three functions beside the shell's own (see _INIT). It
answers each line on a virtio port with what the command printed and its exit code. The agent has a port of
its own, which QEMU offers as a Unix socket. No network, no graphics, no KVM: the same everywhere.
"""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

import pytest

from tests.support import guest_packages
from tests.support.guest_packages import AGENT, KERNEL, SHELL
from tests.support.initramfs import Initramfs, modules_in_order
from tests.support.tools import missing, require_tool

BOOT_TIMEOUT_S = 180
COMMAND_TIMEOUT_S = 120
_MODULES = ["virtio_pci", "virtio_blk", "virtio_console", "crc32c_generic", "ext4"]

# fsynced SIZE_KIB NAME: write a new file of random bytes, fsync it (in ext4 its name with it), tell name and
# sum. writing PREFIX: fsynced files without end, told in /run/fsynced, beside unsynced overwrites of one file
# and trims; for start().
_INIT = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/sbin
mkdir -p /proc /sys /dev /run /tmp /mnt
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /run
for module in /modules/*; do insmod "$module" || echo "no module $module"; done

port() {
    while :; do
        for each in /sys/class/virtio-ports/*; do
            [ "$(cat "$each/name" 2>/dev/null)" = "$1" ] && echo "/dev/${each##*/}" && return
        done
        usleep 20000
    done
}

fsynced() {
    new=/run/new-$1-${2##*/}
    case $2 in */*) mkdir -p "/mnt/${2%/*}" ;; esac
    dd if=/dev/urandom of="$new" bs=1k count="$1" 2>/dev/null &&
        sum=$(sha256sum <"$new") &&
        dd if="$new" of="/mnt/$2" bs=64k conv=fsync 2>/dev/null &&
        rm "$new" &&
        echo "$2 ${sum%% *}"
}

writing() {
    number=0
    while [ ! -e /run/stop ]; do
        number=$((number + 1))
        dd if=/dev/urandom of=/mnt/unsynced bs=4k seek=$((number * 37 % 1024)) count=8 conv=notrunc 2>/dev/null
        fsynced $((number * 29 % 96 + 1)) "$1-$number" >>/run/fsynced || break
        [ $((number % 8)) -ne 0 ] || fstrim /mnt || break
    done
    echo ended >>/run/ended
}

agent() {
    qemu-ga -m virtio-serial -p "$(port org.qemu.guest_agent.0)" -t /run -f /run/qemu-ga.pid
}

line=$(port hvreplica.control)
exec 3<>"$line"
echo "= 0" >&3
while read -r command <&3; do
    case $command in
    "& "*)
        eval "${command#??}" </dev/null >>/run/background.log 2>&1 &
        told='' code=0
        ;;
    *)
        told=$(eval "$command" 2>&1 </dev/null)
        code=$?
        ;;
    esac
    [ -z "$told" ] || printf '%s\n' "$told" | sed 's/^/| /' >&3
    echo "= $code" >&3
done
echo "the line to the host ended"
"""


class GuestImage:
    """What all guests of a test run boot: a kernel and its first file system, in a folder."""

    def __init__(self, folder: Path) -> None:
        """Make both. Skips or fails the running test where a part is not to be had."""
        self.program = require_tool("qemu-system-x86_64")
        formatter = require_tool("mkfs.ext4")
        try:
            parts = guest_packages.fetch()
            (self.kernel,) = parts[KERNEL].glob("vmlinuz-*")
            archive = Initramfs()
            archive.add("init", _INIT.encode())
            archive.add("bin/busybox", (parts[SHELL] / "busybox").read_bytes())
            archive.add_program("bin/qemu-ga", parts[AGENT] / "qemu-ga")
            archive.add_program("bin/mkfs.ext4", Path(formatter))
            for number, (name, content) in enumerate(modules_in_order(parts[KERNEL], _MODULES)):
                archive.add(f"modules/{number:02}-{name}.ko", content)
        except (guest_packages.PackagesMissing, FileNotFoundError, ValueError) as error:
            missing(f"no guest can be made: {error}")
        self.initramfs = folder / "initramfs"
        self.initramfs.write_bytes(archive.pack())


class LinuxGuest:
    """A running guest; a context manager that ends it. `sockets`: a folder whose name is short."""

    def __init__(self, image: GuestImage, sockets: Path, *, drive: str, memory_mib: int = 192) -> None:
        """Boot, with `drive` as the options of QEMU's -drive, and wait until the guest listens."""
        self.agent_path = sockets / "agent.sock"
        self._console, self._errors = sockets / "console.log", sockets / "qemu.log"
        control_path = sockets / "control.sock"
        self._received = b""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.bind(str(control_path))
            listening.listen()
            listening.settimeout(BOOT_TIMEOUT_S)
            with self._errors.open("wb") as errors:
                self._process = subprocess.Popen(
                    self._command(image, control_path, drive, memory_mib),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                )
            try:
                self._line, _ = listening.accept()
                self._answer(BOOT_TIMEOUT_S, "boot")
            except BaseException:
                self.kill()
                raise

    def _command(self, image: GuestImage, control_path: Path, drive: str, memory_mib: int) -> list[str]:
        return [
            image.program, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            "-machine", "pc,accel=tcg", "-cpu", "max", "-m", str(memory_mib),
            "-kernel", str(image.kernel), "-initrd", str(image.initramfs),
            "-append", "console=ttyS0 quiet panic=-1 rdinit=/init",
            "-serial", f"file:{self._console}",
            "-device", "virtio-serial",
            "-chardev", f"socket,id=control,path={control_path}",
            "-device", "virtserialport,chardev=control,name=hvreplica.control",
            "-chardev", f"socket,id=agent,path={self.agent_path},server=on,wait=off",
            "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
            "-drive", f"{drive},if=none,id=disk", "-device", "virtio-blk,drive=disk",
        ]  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End the guest as a power cut does. May be called twice."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(AttributeError):
            self._line.close()

    def run(self, command: str, *, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Return what one line of shell printed in the guest; fails the test unless it ended with 0."""
        self.begin(command)
        return self._answer(timeout_s, command)

    def start(self, command: str) -> None:
        """Run one line of shell in the guest's background; /run/background.log has what it prints."""
        self.run(f"& {command}")

    def begin(self, command: str) -> None:
        """Send a command whose answer end() waits for."""
        assert "\n" not in command
        self._line.sendall(command.encode() + b"\n")

    def end(self, *, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Return what the command of begin() printed; fails the test unless it ended with 0."""
        return self._answer(timeout_s, "the command begun")

    def fsynced(self, text: str | None = None) -> dict[str, str]:
        """Return names and SHA-256 of files in lines "name sum"; by default of all that `writing` wrote so far."""
        text = self.run("cat /run/fsynced") if text is None else text
        return dict(re.findall(r"^(\S+) ([0-9a-f]{64})$", text, re.MULTILINE))

    def _answer(self, timeout_s: float, command: str) -> str:
        deadline_s = time.monotonic() + timeout_s
        told: list[str] = []
        while True:
            line = self._receive_line(deadline_s, command)
            if line.startswith("= "):
                text = "\n".join(told)
                if line != "= 0":
                    pytest.fail(
                        f"in the guest: {command} -> {line[2:]}\n{text}\n{self._logs()}", pytrace=False
                    )
                return text
            told.append(line.removeprefix("| "))

    def _receive_line(self, deadline_s: float, command: str) -> str:
        while b"\n" not in self._received:
            self._line.settimeout(max(deadline_s - time.monotonic(), 0.001))
            try:
                piece = self._line.recv(65536)
            except TimeoutError:
                pytest.fail(f"the guest did not answer: {command}\n{self._logs()}", pytrace=False)
            if not piece:
                pytest.fail(f"the guest ended: {command}\n{self._logs()}", pytrace=False)
            self._received += piece
        line, self._received = self._received.split(b"\n", 1)
        return line.decode(errors="replace")

    def _logs(self) -> str:
        texts = [path.read_text(errors="replace") for path in (self._console, self._errors) if path.exists()]
        return "\n".join(texts)[-4000:]
