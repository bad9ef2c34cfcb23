"""Walking folders: order, links, loops, names, and what is told about files passed over."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from moviola.media import media_kind, walk


def tree(top: Path, *names: str) -> None:
    for name in names:
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * len(name))


def found(*paths: str | Path) -> tuple[list[str], list[tuple[str, str]]]:
    skipped: list[tuple[str, str]] = []
    top = os.path.commonpath([str(p) for p in paths]) if len(paths) > 1 else str(paths[0])
    files = [
        os.path.relpath(f.path, top)
        for f in walk(paths, on_skip=lambda p, why: skipped.append((p.name, why)))
    ]
    return files, skipped


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.MP4", "video"),
        ("b.tar.mkv", "video"),
        ("c.JPeG", "picture"),
        ("d.gif", "picture"),
        ("e.txt", None),
        ("f", None),
        (".mp4", None),
        ("g.mp3", None),
    ],
)
def test_kind(name: str, kind: str | None) -> None:
    assert media_kind(name) == kind
    assert media_kind(Path("some.mp4") / name) == kind


def test_order_and_silence(tmp_path: Path) -> None:
    tree(
        tmp_path,
        "b.mp4",
        "a.jpg",
        "sub/z.png",
        "sub/deep/x.mov",
        "notes.txt",
        ".hidden/secret.mp4",
        "c.webm",
        ".d.mp4",
    )
    files, skipped = found(tmp_path)
    assert files == ["a.jpg", "b.mp4", "c.webm", "sub/deep/x.mov", "sub/z.png"]
    assert skipped == []
    assert [f.kind for f in walk(tmp_path)] == ["picture", "video", "video", "video", "picture"]
    first = next(walk(tmp_path))
    assert (first.size, first.mtime_ns) == (5, (tmp_path / "a.jpg").stat().st_mtime_ns)
    # A hidden folder that is named is entered; the same folder twice is walked once.
    assert found(tmp_path / ".hidden")[0] == ["secret.mp4"]
    assert len(list(walk([tmp_path, tmp_path / "sub", str(tmp_path / "b.mp4")]))) == 5


def test_links_and_loops(tmp_path: Path) -> None:
    tree(tmp_path, "one/a.mp4", "far/b.mp4")
    (tmp_path / "one" / "loop").symlink_to(tmp_path / "one")
    (tmp_path / "one" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "one" / "self.mp4").symlink_to(tmp_path / "one" / "self.mp4")
    (tmp_path / "one" / "lost.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "one" / "z.mp4").symlink_to(tmp_path / "one" / "a.mp4")
    (tmp_path / "one" / "far.mp4").symlink_to(tmp_path / "far" / "b.mp4")
    files, skipped = found(tmp_path / "one")
    assert files == ["a.mp4", "far.mp4"]
    assert sorted(name for name, _ in skipped) == ["lost.mp4", "self.mp4"]
    assert dict(skipped)["lost.mp4"] == "the link leads nowhere"


def test_named_paths_are_told(tmp_path: Path) -> None:
    tree(tmp_path, "a.mp4", "notes.txt")
    os.mkfifo(tmp_path / "pipe.mp4")
    files, skipped = found(
        tmp_path / "a.mp4", tmp_path / "notes.txt", tmp_path / "gone.mp4", tmp_path / "pipe.mp4"
    )
    assert files == ["a.mp4"]
    assert [name for name, _ in skipped] == ["notes.txt", "gone.mp4", "pipe.mp4"]
    assert "no such file" in skipped[1][1]


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "a.mp4", "locked/b.mp4", "c.mp4")
    if os.geteuid() == 0:
        # Root may read everything: say no in its place.
        listdir, access = os.listdir, os.access

        def no_list(path: Path) -> list[str]:
            if str(path).endswith("locked"):
                raise PermissionError(13, "Permission denied")
            return listdir(path)

        monkeypatch.setattr(os, "listdir", no_list)
        monkeypatch.setattr(
            os, "access", lambda path, mode: not str(path).endswith("a.mp4") and access(path, mode)
        )
    else:
        (tmp_path / "locked").chmod(0)
        (tmp_path / "a.mp4").chmod(0)
    files, skipped = found(tmp_path)
    (tmp_path / "locked").chmod(0o755)
    assert files == ["c.mp4"]
    assert sorted(name for name, _ in skipped) == ["a.mp4", "locked"]


def test_typescript_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "code.ts").write_text("Great code = 1;\nimport x from 'y'")
    (tmp_path / "film.ts").write_bytes(b"\x47" + b"\0" * 187)
    (tmp_path / "more.ts").write_text("export const a = 1")
    assert "film.ts" in found(tmp_path)[0]
    assert "more.ts" not in found(tmp_path)[0]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux")
def test_names(tmp_path: Path) -> None:
    top = os.fsencode(tmp_path)
    for name in (b"caf\xe9.mp4", b"two\nlines.mp4", b" space .mp4", "日本.jpg".encode(), b"-rf.png"):
        Path(os.fsdecode(top + b"/" + name)).write_bytes(b"x")
    names = [os.fsencode(f.path.name) for f in walk(tmp_path)]
    assert names == sorted(names)
    assert b"caf\xe9.mp4" in names
    assert len(names) == 5


def test_very_deep_folders(tmp_path: Path) -> None:
    old = Path.cwd()
    os.chdir(tmp_path)
    try:
        for _ in range(300):
            Path("d").mkdir()
            os.chdir("d")
        Path("a.mp4").write_bytes(b"x")
    finally:
        os.chdir(old)
    assert len(list(walk(tmp_path))) == 1
