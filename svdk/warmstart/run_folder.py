"""The folder of a running warm start: settings, checkpoints, and the rename into place at the end."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from svdk.errors import InputError, first_line
from svdk.utils.files import read_object, sync, unfinished, write_json

RUN_FILE = "run.json"
REPLACED = "replaced"
"""The adapter that a new one takes the place of, in the run's folder for the time of two renames."""
STATE_FILE = "trainer_state.json"


def open_run(partial: Path, record: dict[str, Any], resume: bool | str, main: bool) -> Path | None:
    """Make ``partial`` ready; the checkpoint to go on from, or None. Only the ``main`` process writes."""
    path = partial / RUN_FILE
    if main:
        left = unfinished(path)  # of a run that was killed while it wrote its first file
        if partial.exists() and not path.exists() and set(partial.iterdir()) - set(left):
            raise InputError(f"{partial} is in the way and not an interrupted warm start; move it away")
        if path.exists() and resume is False:
            shutil.rmtree(partial)
        elif path.exists():
            _check_same_run(path, record)
        elif resume is True:
            raise InputError(
                f"resume was True, and {partial} holds no interrupted run; allowed: 'auto', False"
            )
        partial.mkdir(parents=True, exist_ok=True)
        for file in left:
            file.unlink(missing_ok=True)
        try:
            write_json(path, record, allow_nan=True)  # the losses of a run that diverged
        except OSError:
            drop_broken_checkpoints(partial)
            raise
    found = complete_checkpoints(partial)
    return found[-1] if found else None


def _check_same_run(path: Path, record: dict[str, Any]) -> None:
    try:
        old = read_object(path)
        flat = [{**r, **r["settings"]} for r in (old, record)]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged; resume=False discards that run: {first_line(error)}") from error
    keys = [k for k in flat[0] | flat[1] if k != "settings" and flat[0].get(k) != flat[1].get(k)]
    if keys:
        changes = ", ".join(f"{k} was {flat[0].get(k)!r}, is {flat[1].get(k)!r}" for k in sorted(keys)[:3])
        raise InputError(
            f"{path.parent} holds an interrupted run with other settings ({changes}); "
            "give the same ones to go on with it, or resume=False to discard it"
        )


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were written to their end, oldest first; the Trainer writes its state last."""
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            read_object(path / STATE_FILE)
        except (OSError, ValueError):
            continue
        found.append(path)
    return sorted(found, key=lambda p: int(p.name.rsplit("-", 1)[1]))


def drop_broken_checkpoints(folder: Path) -> None:
    """Remove half-written checkpoints, and the folder itself when no complete one is left."""
    complete = complete_checkpoints(folder)
    for path in folder.glob("checkpoint-*"):
        if path not in complete:
            shutil.rmtree(path, ignore_errors=True)
    if not complete:
        shutil.rmtree(folder, ignore_errors=True)


def publish(partial: Path, output: Path) -> None:
    """Rename the finished adapter into place; one that it replaces is put back if that fails."""
    sync(partial / "adapter")  # on the disk before the rename is
    try:
        if output.exists():
            shutil.rmtree(partial / REPLACED, ignore_errors=True)  # of a run killed after its second rename
            os.replace(output, partial / REPLACED)
        os.replace(partial / "adapter", output)
    except BaseException:
        put_back(partial, output)
        raise
    shutil.rmtree(partial, ignore_errors=True)


def put_back(partial: Path, output: Path) -> None:
    """Undo the first of the two renames of a :func:`publish` that did not come to the second."""
    if not output.exists():
        with suppress(FileNotFoundError):  # the usual case; also where another process was faster
            os.replace(partial / REPLACED, output)
