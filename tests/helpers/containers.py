"""The Containerfile as steps, and a fresh Debian root in which they run: no container engine is needed."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.commands import ROOT

_PASSED = ("PIP_", "SSL_", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")  # how pip reaches its index
_LOCALS = ("/etc/pip.conf", "/etc/xdg/pip", "/etc/ssl/certs/ca-certificates.crt", "/etc/resolv.conf")


def steps(text: str) -> list[tuple[str, str]]:
    """Instruction and arguments of each line of a Containerfile."""
    lines = text.replace("\\\n", " ").splitlines()
    pairs = (line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#"))
    return [(name, " ".join(arguments.split())) for name, arguments in pairs]


class Root:
    """A fresh Debian root. As a container engine would, `run` follows the steps of a Containerfile.

    Parameters
    ----------
    folder : Path
        Where debootstrap makes it.
    suite : str
        Release of Debian, such as `bookworm`.
    """

    def __init__(self, folder: Path, suite: str):
        self.folder = folder
        self._where, self._path = "/", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        subprocess.run(["debootstrap", "--variant=minbase", "--include=ca-certificates", suite, folder], check=True)
        for local in filter(os.path.exists, _LOCALS):
            target = folder / local.removeprefix("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if os.path.isdir(local):
                shutil.copytree(local, target, dirs_exist_ok=True)
            else:
                shutil.copyfile(local, target)

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """/proc, and the folders from which pip takes packages on this machine."""
        index = subprocess.run(["pip", "config", "list"], capture_output=True, text=True).stdout
        words = {word.strip("'").removeprefix("file://") for word in index.replace("=", " ").split()}
        sources = sorted(word for word in words if os.path.isabs(word) and os.path.isdir(word))
        done: list[Path] = []
        try:
            for source in ("/proc", *sources):
                target = self.folder / source.removeprefix("/")
                target.mkdir(parents=True, exist_ok=True)
                subprocess.run(["mount", "--bind", source, target], check=True)
                done.append(target)
            yield
        finally:
            for target in reversed(done):
                subprocess.run(["umount", target], check=True)

    def follow(self, name: str, arguments: str) -> None:
        """One step of a Containerfile.

        Raises
        ------
        ValueError
            If its instruction is not known here.
        """
        if name == "RUN":
            self.run(arguments)
        elif name == "COPY":
            target = self.folder / arguments.split()[1].removeprefix("/")
            listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
            for file in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True).stdout.split("\0"):
                if file and os.path.lexists(ROOT / file):
                    (target / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(ROOT / file, target / file, follow_symlinks=False)
        elif name == "WORKDIR":
            self._where = arguments
        elif name == "ENV":
            self._path = arguments.removeprefix("PATH=").replace("$PATH", self._path)
        elif name not in ("FROM", "ENTRYPOINT"):
            raise ValueError(name)

    def run(self, command: str) -> str:
        """The output of a command in this root."""
        environment = {name: value for name, value in os.environ.items() if name.startswith(_PASSED)}
        environment |= {"PATH": self._path, "HOME": "/root", "LANG": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
        line = f"cd {shlex.quote(self._where)} && {command}"
        words = ["chroot", self.folder, "/bin/sh", "-c", line]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout
