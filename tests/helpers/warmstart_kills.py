"""Kills a warm start at its writes and renames; a process of its own, as it forks.

``FOLDER new STRIDE``: at every STRIDE-th point of a run, then the same call must end with the same adapter.
``FOLDER replace``: around the renames that put a new adapter in the place of an old one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from svdk import warm_start
from svdk.errors import InputError
from svdk.models.fingerprints import adapter_fingerprint
from svdk.warmstart import training
from svdk.warmstart.run_folder import put_back
from tests.helpers import tiny
from tests.helpers.artifact_torture import code_of, forked

OPTIONS = {"max_steps": 3, "learning_rate": 1e-2, "progress": False, "lora_dropout": 0.1}


def run(output: Path, **options: Any) -> Path:
    """A warm start of three steps with a checkpoint at each."""
    model = (tiny.tiny_model(), tiny.tiny_tokenizer())
    return warm_start(model, tiny.tiny_examples(20), output_dir=output, **(OPTIONS | options))


class Killer:
    """SIGKILL at the ``at``-th point; ``count`` says how many there were."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def around(self, call: Callable) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            result = call(*args, **kwargs)
            self.tick()
            return result

        return wrapped

    def tick(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def arm(self) -> None:
        for owner, name in (
            (os, "replace"), (os, "rename"), (torch, "save"), (safetensors.torch, "save_file"),
            (training, "save_file"), (os, "fsync"),
        ):  # fmt: skip
            setattr(owner, name, self.around(getattr(owner, name)))


def points(work: Callable[[], Any], report: Path) -> int:
    """How many points a run has."""

    def counted() -> None:
        killer = Killer(-1)
        killer.arm()
        work()
        with report.open("w") as file:
            file.write(str(killer.count))

    assert code_of(forked(counted)) == 0
    return int(report.read_text())


def killed_at(point: int, work: Callable[[], Any]) -> bool:
    """Whether the run got that far."""

    def dying() -> None:
        Killer(point).arm()
        work()

    code = code_of(forked(dying))
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def same(a: Path, b: Path) -> bool:
    names = sorted(os.listdir(a))
    files = ("warmstart.json", "calibration.jsonl")
    return (
        names == sorted(os.listdir(b))
        and adapter_fingerprint(a) == adapter_fingerprint(b)
        and all((a / name).read_text() == (b / name).read_text() for name in files)
    )


def new(folder: Path, stride: int) -> dict[str, Any]:
    """Every kill is followed by a run that ends as if nothing had happened."""
    run(folder / "whole")  # here: the children need not import again what it imports on the way
    total = points(lambda: run(folder / "counted"), folder / "count")
    killed = 0
    for point in range(2, total + 1, stride):  # 2: the first file is written, not yet in its place
        output = folder / f"cut{point}"
        killed += killed_at(point, lambda output=output: run(output))
        assert not output.exists() or same(output, folder / "whole"), f"point {point}: half an adapter"
        if not output.exists():
            assert code_of(forked(lambda output=output: run(output))) == 0, f"point {point}: no way on"
        assert same(output, folder / "whole"), f"point {point}: another adapter"
        assert not output.with_name(f"{output.name}.partial").exists() or point == total
    return {"points": total, "killed": killed}


def replace(folder: Path) -> dict[str, Any]:
    """Whenever it dies, the old adapter or the new one is there after the next look."""
    run(folder / "old", seed=1)
    run(folder / "whole")
    fingerprints = {adapter_fingerprint(folder / "old"): "old", adapter_fingerprint(folder / "whole"): "new"}
    states = []
    shutil.copytree(folder / "old", folder / "counted")
    total = points(lambda: run(folder / "counted", overwrite=True), folder / "count")
    for point in range(total - 4, total + 1):
        output = folder / f"cut{point}"
        shutil.copytree(folder / "old", output)
        assert killed_at(point, lambda output=output: run(output, overwrite=True))
        states.append(fingerprints[adapter_fingerprint(output)] if output.exists() else "absent")
        if states[-1] == "absent":
            try:
                run(output, resume=False)  # not overwrite: the adapter that was there must be found again
            except InputError as error:
                assert "holds an adapter" in str(error), error
            else:
                raise AssertionError(f"point {point}: the old adapter was lost")
        put_back(output.with_name(f"{output.name}.partial"), output)
        assert adapter_fingerprint(output) in fingerprints
        assert code_of(forked(lambda output=output: run(output, overwrite=True))) == 0
        assert fingerprints[adapter_fingerprint(output)] == "new"
    return {"points": total, "killed": len(states), "states": states}


if __name__ == "__main__":
    base = Path(sys.argv[1])
    print(json.dumps(new(base, int(sys.argv[3])) if sys.argv[2] == "new" else replace(base)))
