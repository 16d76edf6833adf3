"""Programs that kill and crowd the writers of an artifact; each in a process of its own, as they fork.

``kills FOLDER``: die at every step of a save. ``crowd FOLDER``: several savers and readers at once.
``bounds FOLDER``: load what the folder's subfolders hold in little memory.
"""

from __future__ import annotations

import fcntl
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from svdk.calibration.artifact import JSON_NAME, TENSORS_NAME, Steering

KILLED = 9
SAVERS, SAVES = 4, 12


def example(strength: float) -> Steering:
    """A steering whose tensors tell which strength they belong to; their size differs too."""
    return Steering(strength, statistics={"p": torch.full((10 + int(strength),), strength)})


def checked(folder: Path) -> float:
    """The strength in ``folder``, after a look that the tensors are of the same save."""
    steering = Steering.load(folder)
    p = steering.statistics["p"]
    assert len(p) == 10 + int(steering.strength), "tensors of another save"
    assert bool((p == steering.strength).all()), "tensors of another save"
    return steering.strength


def forked(work: Callable[[], Any]) -> int:
    """The pid of a child that does ``work``; its exit code is 0, or 1 after an exception."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def code_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Killer:
    """Ends the process before, after or in the middle of the ``at``-th call that touches a file."""

    def __init__(self, at: int) -> None:
        self.left = at

    def tick(self) -> None:
        self.left -= 1
        if self.left == 0:
            os._exit(KILLED)

    def around(self, call: Callable) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            result = call(*args, **kwargs)
            self.tick()
            return result

        return wrapped

    def arm(self) -> None:
        for owner, names in (
            (os, ("open", "replace", "fsync", "unlink")),
            (fcntl, ("flock",)),
        ):
            for name in names:
                setattr(owner, name, self.around(getattr(owner, name)))
        opened = self.around(Path.open)

        def torn(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = opened(path, mode, *args, **kwargs)
            return file if mode.startswith("r") else _Torn(file, self.tick)

        Path.open = torn


class _Torn:
    """A file whose every write has a moment when half of it is on the disk."""

    def __init__(self, file: Any, tick: Callable[[], None]) -> None:
        self.file, self.tick = file, tick

    def __enter__(self) -> _Torn:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> None:
        half = len(data) // 2
        self.file.write(data[:half])
        self.file.flush()
        self.tick()
        self.file.write(data[half:])


def kills(folder: Path) -> None:
    """After a death at any step the old or the new artifact loads, and the next save works."""
    example(1).save(folder)
    committed = False
    for step in range(1, 1000):

        def dying(step: int = step) -> None:
            Killer(step).arm()
            example(2).save(folder)

        code = code_of(forked(dying))
        assert code in (0, KILLED), code
        strength = checked(folder)
        assert strength in (1, 2)
        committed |= strength == 2
        assert not committed or strength == 2, f"step {step}: later than the commit, yet the old one"
        again = code_of(forked(lambda: example(3).save(folder)))
        assert again == 0, f"step {step}: the next save failed"
        assert checked(folder) == 3
        left = sorted(os.listdir(folder))
        assert left == [JSON_NAME, TENSORS_NAME], f"step {step}: {left}"
        example(1).save(folder)
        if code == 0:
            print(f"{step} steps")
            return
    raise AssertionError("the save never came to its end")


def crowd(folder: Path) -> None:
    """Savers and readers at once: every load finds one save's record with the same save's tensors."""
    example(0).save(folder)

    def saver(first: int) -> None:
        for i in range(SAVES):
            example(first + i).save(folder)

    def reader() -> None:
        seen, saving = set(), True
        while saving:
            saving = not (folder / "done").exists()
            seen.add(checked(folder))
        assert len(seen) > 2, f"the readers saw only {seen}"

    readers = [forked(reader) for _ in range(2)]
    savers = [forked(lambda n=n: saver(100 * n)) for n in range(1, SAVERS + 1)]
    codes = [code_of(pid) for pid in savers]
    (folder / "done").touch()
    codes += [code_of(pid) for pid in readers]
    assert set(codes) == {0}, codes
    assert checked(folder) % 100 == SAVES - 1, "the last save of one of the savers"
    assert sorted(os.listdir(folder)) == ["done", JSON_NAME, TENSORS_NAME]
    print("consistent")


def bounds(folder: Path) -> None:
    """Every subfolder is refused with an ArtifactError within 256 MiB above what the imports take."""
    from svdk.errors import ArtifactError
    from svdk.models.loading import load_adapter
    from tests.helpers import tiny

    load_adapter(tiny.tiny_model(), folder / "good")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
    for sub in sorted(folder.iterdir()):
        if sub.name == "good":
            continue
        try:
            if sub.name.startswith("steering"):
                Steering.load(sub)
            else:
                load_adapter(tiny.tiny_model(), sub)
        except ArtifactError as error:
            print(f"{sub.name}: {error}")
        else:
            raise AssertionError(f"{sub.name} was accepted")


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
