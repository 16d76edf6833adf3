"""``svdk info``: what can run here, and which decoding path a model and an adapter will take."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Register ``info`` and its options."""
    parser = commands.add_parser(
        "info",
        help="show versions, backends and the decoding path",
        description="Versions and backends of this installation; with --model and --adapter, also whether "
        "both models of a decoding step share one forward pass, and why not if they do not; with a "
        "calibrated adapter, what steers it.",
    )
    parser.add_argument("--model", help="hub name, folder, .gguf file, or smollm2-135m")
    parser.add_argument("--adapter", help="adapter folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    import torch

    import svdk
    from svdk.calibration.artifact import JSON_NAME
    from svdk.errors import InputError
    from svdk.ops import backends
    from svdk.ops.philox import CONTRACT

    if args.model and not args.adapter:
        raise InputError("--adapter was absent; allowed: --model and --adapter, --adapter alone, or neither")
    if args.adapter and not args.model and not (Path(args.adapter) / JSON_NAME).exists():
        raise InputError(f"--adapter was {args.adapter} without --model; allowed: a calibrated adapter")
    cuda = torch.version.cuda or "none"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = {"svdk": svdk.__version__, "Python": platform.python_version()}
    versions |= {"torch": f"{torch.__version__} ({torch.get_num_threads()} threads)", "CUDA": cuda + gpu}
    versions |= {"draws": f"contract {CONTRACT} (docs/algorithm.md, random numbers)"}
    status = backends.status()
    if status["cpu"] == "available":
        from svdk import _C

        status["cpu"] += f" ({_C.cpu_arch()})"
    _table("versions", versions)
    _table("backends", status)
    if args.adapter and (Path(args.adapter) / JSON_NAME).exists():
        _table("steering", _steering(args.adapter))
    if args.model:
        _table("decoding", _decoding(args.model, args.adapter))
    return 0


def _steering(adapter: str) -> dict[str, str]:
    from svdk.calibration.artifact import Steering

    steering = Steering.load(adapter)
    rows = {"lever": steering.lever or "one strength"}
    if steering.positions:
        listed = " ".join(f"{x:.3g}" for x in steering.positions)
        rows["positions"] = f"{listed}, then {steering.strength:.3g}"
    if steering.classes is not None:
        one = steering.classes
        rows["classes"] = f"content {steering.strength:.3g}, template {one.template:.3g}, stop {one.stop:.3g}"
    return rows | {"verdict": steering.verdict()}


def _decoding(model_name: str, adapter: str) -> dict[str, str]:
    from svdk.models.loading import load_adapter, load_model
    from svdk.models.pair import ModelPair
    from svdk.models.paired_forward import why_not_paired

    model, _ = load_model(model_name)
    pair = ModelPair(load_adapter(model, adapter))
    reason = why_not_paired(pair)
    rows = {"model": f"{type(pair.module).__name__}, vocabulary {pair.vocab_size}", "adapter": pair.peft_type}
    if reason is None:
        return rows | {"path": "paired: one forward a step over both models' rows", "why": _why(pair)}
    return rows | {"path": "two_pass: two forwards a step, two caches", "why": reason}


def _why(pair) -> str:
    if pair.num_virtual_tokens:
        return f"the base rows mask the {pair.num_virtual_tokens} virtual tokens"
    return f"all {len(pair.layers)} adapter layers can serve warm and base rows together"


def _table(title: str, rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    print(title)
    for name, value in rows.items():
        print(f"  {name.ljust(width)}  {value}")
