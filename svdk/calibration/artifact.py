"""The calibrated steering artifact: ``steering.json`` with ``steering.safetensors`` beside the adapter.

``save`` survives a crash at any point. The tensors are staged as ``steering.safetensors.new``; replacing
``steering.json``, which names their SHA-256, commits; only then does the staged file take its final name.
Before the commit the old pair is untouched, after it ``load`` also accepts the staged file. Savers take
turns by a lock file; ``load`` takes no lock and reads again when files were replaced while it read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from svdk import __version__
from svdk.calibration.kept_statistics import below
from svdk.errors import ArtifactError, InputError
from svdk.ops.configs import ClassStrengths, SteeringConfig
from svdk.utils.checks import check_choice, is_number
from svdk.utils.files import read_object, unfinished, write_file

if TYPE_CHECKING:
    from svdk.calibration.report import Report

FORMAT = "svdk-steering"
FORMAT_VERSION = 2
_LATER: tuple[dict[str, Any], ...] = ({"classes": None}, {"options": [], "bias": []})
"""What earlier artifacts of format 2 did not have, the latest first, and what stood in its place."""
_ADDED: dict[str, Any] = {"lever": None, "positions": [], "scale": 1.0} | _LATER[0] | _LATER[1]
"""What format 1 did not have, which is still read, and what stood in its place."""
LEVERS = ("none", "bias", "scale", "vector", "constant", "classes", "positions")
JSON_NAME = "steering.json"
TENSORS_NAME = "steering.safetensors"
STAGED_NAME = TENSORS_NAME + ".new"
LOCK_NAME = ".steering.lock"
MAX_JSON_BYTES = 1 << 20
MAX_TENSORS_BYTES = 1 << 31
"""Far more than any calibration keeps; a file is read into memory before its checksum can be known."""
_TENSOR_FIELDS = ("vector", "statistics")
_STATISTICS = "statistics."


@dataclass(frozen=True, eq=False)
class Steering(SteeringConfig):
    """A :class:`svdk.SteeringConfig`, and what the calibration that chose it has seen.

    Fingerprints that are None are not checked by :meth:`load` (a hand-made ``Steering`` has none).
    Raises ``InputError`` when a value is out of range.
    """

    strength: float = 1.0
    alpha: float = 0.1
    lever: str | None = None
    """What steers: ``none``, ``bias`` (of :func:`svdk.choose` alone), ``scale`` (the adapter's own, no base
    row), ``vector`` (static, no base row), ``constant`` (one strength), ``classes`` or ``positions``;
    None: not calibrated, or by an older svdk."""
    options: tuple[str, ...] = ()
    """With lever ``bias``: the texts that it is about, as they are scored."""
    bias: tuple[float, ...] = ()
    """What is added to the log-probability of each of ``options``, in nats."""
    estimator: str | None = None
    objective: str | None = None
    gain: float | None = None
    """Expected gain over the warm start: nats a token (``nll``), nats a choice (``choice``) or fraction of
    tokens (``accuracy``)."""
    confidence_interval: tuple[float, float] | None = None
    """95 % bootstrap interval of ``gain`` over examples."""
    at_bound: bool = False
    """True when the objective still improved at ``strength``, the last value that was measured."""
    peft_type: str | None = None
    base_model_fingerprint: str | None = None
    adapter_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None
    vocab_size: int | None = None
    data_hash: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Calibration figures by name: numbers of examples and tokens, NLL and accuracy."""
    svdk_version: str = __version__
    format_version: int = FORMAT_VERSION
    vector: Tensor | None = None
    """(V,) float32 in logit units, for direction ``vector``."""
    statistics: Mapping[str, Tensor] | None = field(default=None, repr=False)
    """Per-token calibration statistics, as ``kept_statistics.Statistics.tensors`` gives them."""

    def __post_init__(self) -> None:
        """Check every field; ``InputError`` names the first bad one."""
        for name in ("strength", "alpha"):
            if isinstance(getattr(self, name), Tensor):
                raise InputError(f"{name} was a tensor; allowed in an artifact: a number")
        super().__post_init__()
        if isinstance(self.positions, Tensor):
            raise InputError("positions was a tensor; allowed in an artifact: a tuple of numbers")
        if self.lever is not None:
            check_choice("lever", self.lever, LEVERS)
        self._check_bias()
        if self.gain is not None and not is_number(self.gain):
            raise InputError(f"gain was {self.gain!r}; allowed: a number or None")
        interval = self.confidence_interval
        if interval is not None and not (
            isinstance(interval, tuple) and len(interval) == 2 and all(map(is_number, interval))
        ):
            raise InputError(f"confidence_interval was {interval!r}; allowed: (low, high) or None")
        if not isinstance(self.at_bound, bool):
            raise InputError(f"at_bound was {self.at_bound!r}; allowed: True or False")
        size = self.vocab_size
        if size is not None and not (is_number(size) and isinstance(size, int) and size > 0):
            raise InputError(f"vocab_size was {size!r}; allowed: a positive integer or None")
        for name in ("estimator", "objective", "peft_type", "data_hash", *_FINGERPRINTS):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise InputError(f"{name} was {value!r}; allowed: a string or None")
        if not isinstance(self.metrics, Mapping) or not all(
            isinstance(key, str) and is_number(value) for key, value in self.metrics.items()
        ):
            raise InputError(f"metrics was {self.metrics!r}; allowed: numbers by name")
        self._check_vector()

    def _check_bias(self) -> None:
        texts = isinstance(self.options, tuple) and all(isinstance(x, str) for x in self.options)
        if not texts or len(set(self.options)) < len(self.options):
            raise InputError(f"options was {self.options!r}; allowed: a tuple of different texts")
        numbers = isinstance(self.bias, tuple) and all(is_number(x) and math.isfinite(x) for x in self.bias)
        if not numbers or len(self.bias) != len(self.options) or bool(self.bias) != (self.lever == "bias"):
            raise InputError(
                f"bias was {self.bias!r} with {len(self.options)} options and lever {self.lever!r}; allowed: "
                "with lever 'bias' a tuple of one finite number an option, else none"
            )

    def _check_vector(self) -> None:
        if (self.vector is None) == (self.direction == "vector"):
            have = "absent" if self.vector is None else "given"
            raise InputError(f"vector was {have} with direction {self.direction!r}; needed for 'vector' only")
        if self.vector is None:
            return
        shape = tuple(self.vector.shape)
        if len(shape) != 1 or (self.vocab_size is not None and shape[0] != self.vocab_size):
            raise InputError(f"vector had shape {shape}; allowed: ({self.vocab_size or 'V'},)")
        if not self.vector.is_floating_point() or not torch.isfinite(self.vector).all():
            raise InputError(f"vector ({self.vector.dtype}) must hold finite floating-point numbers only")

    @property
    def helps(self) -> bool:
        """True when the whole confidence interval of the gain lies above zero."""
        return self.confidence_interval is not None and self.confidence_interval[0] > 0

    def verdict(self) -> str:
        """One sentence: what the calibration expects of this steering."""
        if self.gain is None or self.confidence_interval is None:
            return f"{self.setting()}; not calibrated"
        unit = "nats a choice" if self.objective == "choice" else "nats a token"
        scale, unit = (100.0, "points of token accuracy") if self.objective == "accuracy" else (1.0, unit)
        low, high = (scale * end for end in self.confidence_interval)
        expected = f"expected gain {scale * self.gain:.4g} {unit} (95 % interval {low:.4g} to {high:.4g})"
        if self.at_bound:
            expected += "; the objective still improves at this strength, the last one measured"
        if self.helps:
            return f"steering helps: {self.setting()}: {expected}"
        return f"steering does not help on this data: {self.setting()}: {expected}"

    def setting(self) -> str:
        """What steers and how strongly, in words."""
        if self.lever == "none":
            return "the adapter as it is"
        if self.lever == "scale":
            return f"the adapter's scale times {self.scale:g}"
        if self.lever == "bias":
            pairs = zip(self.options, self.bias, strict=True)
            return "a bias on the options: " + ", ".join(f"{text!r} {x:+.3g}" for text, x in pairs)
        text = f"{self.direction}, alpha {self.alpha:g}, strength {self.strength:.4g}"
        if self.positions:
            least, most = min(self.positions), max(self.positions)
            text += f" after {len(self.positions)} positions of their own ({least:.3g} to {most:.3g})"
        if self.classes is not None:
            text += f" for content, {self.classes.template:.3g} for template, {self.classes.stop:.3g} to stop"
        return text

    def report(self) -> Report:
        """Every estimator on the calibration data, from the statistics kept; made once.

        Raises ``ArtifactError`` for a steering that was not calibrated.
        """
        return self._report

    @cached_property
    def _report(self) -> Report:
        from svdk.calibration.report import CalibrationConfig, judged_statistics, make_report

        costs = {name: value for name, value in self.metrics.items() if name.startswith("ms_rows_")}
        return make_report(judged_statistics(self), CalibrationConfig.of(self), costs)

    def save(self, folder: str | Path) -> Path:
        """Write both files into ``folder`` (made if absent) and return the path of ``steering.json``.

        Raises ``OSError`` when the disk is full or not writable; what was there before stays usable.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # A copy: the statistics may hold the same tensor, and safetensors refuses shared memory.
        tensors = {} if self.vector is None else {"vector": self.vector.float().clone()}
        for name, tensor in (self.statistics or {}).items():
            tensors[_STATISTICS + name] = tensor
        payload = safetensors.torch.save({k: t.detach().cpu().contiguous() for k, t in tensors.items()})
        if len(payload) > MAX_TENSORS_BYTES:
            raise InputError(f"the tensors had {len(payload)} bytes; allowed: at most {MAX_TENSORS_BYTES}")
        text = json.dumps(self._record(payload), indent=2, allow_nan=False) + "\n"

        staged = folder / STAGED_NAME
        with _locked(folder / LOCK_NAME):
            _finish_interrupted_save(folder)
            write_file(staged, payload)
            try:
                write_file(folder / JSON_NAME, text)
            except BaseException:
                staged.unlink(missing_ok=True)
                raise
            os.replace(staged, folder / TENSORS_NAME)
        return folder / JSON_NAME

    def _record(self, payload: bytes) -> dict[str, Any]:
        record: dict[str, Any] = {"format": FORMAT}
        for entry in fields(self):
            if entry.name not in _TENSOR_FIELDS:
                record[entry.name] = _plain(getattr(self, entry.name))
        digest = hashlib.sha256(payload).hexdigest()
        record["tensors"] = {"file": TENSORS_NAME, "bytes": len(payload), "sha256": digest}
        record["checksum"] = _checksum(record)
        return record

    @classmethod
    def load(cls, folder: str | Path, *, model: Any = None, tokenizer: Any = None) -> Steering:
        """Read the artifact in ``folder`` and check that it fits what is beside it and what is given.

        The adapter in ``folder`` (when there is one) is always checked; ``model`` (base model, or a PEFT
        model on it) and ``tokenizer`` when given. Raises ``ArtifactError`` when the artifact is missing,
        damaged, of another format version, or was made for something else.
        """
        folder = Path(folder)
        record, tensors = _read(folder)
        statistics = below(tensors, _STATISTICS)
        unknown = sorted(set(tensors) - {"vector"} - {_STATISTICS + name for name in statistics})
        if unknown:
            raise ArtifactError(f"{folder / TENSORS_NAME} holds unknown tensors: {', '.join(unknown)}")
        try:
            steering = cls(**record, vector=tensors.get("vector"), statistics=statistics or None)
        except InputError as error:
            raise ArtifactError(f"{folder / JSON_NAME}: {error}") from error
        steering.check_fit(model=model, tokenizer=tokenizer, adapter=folder)
        return steering

    def check_fit(
        self, *, model: Any = None, tokenizer: Any = None, adapter: str | Path | None = None
    ) -> None:
        """Compare this steering with the model, tokenizer and adapter folder it is to be used with.

        What is None (here or there) is not compared. ``ArtifactError`` names both values of a mismatch.
        """
        # Here: PEFT and transformers are heavy.
        from svdk.models.fingerprints import adapter_fingerprint, model_fingerprint, tokenizer_fingerprint

        if model is not None:
            _compare("vocabulary size", self.vocab_size, vocab_size(model))
            _compare("PEFT type", self.peft_type, peft_type(model))
            if self.base_model_fingerprint is not None:
                _compare("base model", self.base_model_fingerprint, model_fingerprint(model))
        if tokenizer is not None and self.tokenizer_fingerprint is not None:
            _compare("tokenizer", self.tokenizer_fingerprint, tokenizer_fingerprint(tokenizer))
        if adapter is None or not Path(adapter, "adapter_config.json").exists():
            return
        if self.adapter_fingerprint is not None:
            _compare("adapter", self.adapter_fingerprint, adapter_fingerprint(adapter))


_FINGERPRINTS = ("base_model_fingerprint", "adapter_fingerprint", "tokenizer_fingerprint")
_KEYS = frozenset(entry.name for entry in fields(Steering)) - set(_TENSOR_FIELDS)


def vocab_size(model: Any) -> int:
    """The width of the model's logits as its configuration states it."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


def peft_type(model: Any) -> str | None:
    """The PEFT type of the active adapter ("LORA", "IA3", ...), None for a model without one."""
    config = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
    return None if config is None else str(getattr(config.peft_type, "value", config.peft_type))


def _compare(what: str, expected: object, found: object) -> None:
    if expected is not None and found is not None and expected != found:
        raise ArtifactError(
            f"{what} does not match: the artifact was made for {expected}, this one is {found}"
        )


def _plain(value: Any) -> Any:
    """``value`` in strict JSON: infinities as strings, NaN as null."""
    if isinstance(value, ClassStrengths):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def _number(value: Any) -> Any:
    """The inverse of :func:`_plain` where a number is expected; anything else is left to be refused."""
    return {"inf": math.inf, "-inf": -math.inf}.get(value, value) if isinstance(value, str) else value


def _checksum(record: Mapping[str, Any]) -> str:
    body = {key: value for key, value in record.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``, which is gone again afterwards; a killed holder's lock lapses with it."""
    import fcntl  # POSIX alone; all else here runs anywhere

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            # The one before us may have removed the file that we waited for: then it locks nothing.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _finish_interrupted_save(folder: Path) -> None:
    """Give a staged file its final name if ``steering.json`` already refers to it; drop unfinished ones."""
    for name in (JSON_NAME, STAGED_NAME):
        for left in unfinished(folder / name):
            left.unlink(missing_ok=True)
    staged = folder / STAGED_NAME
    if not (staged.exists() and (folder / JSON_NAME).exists()):
        return
    try:
        wanted = _read_json(folder / JSON_NAME)["tensors"]["sha256"]
    except ArtifactError:  # a damaged steering.json is about to be replaced: nothing of it to keep
        return
    if hashlib.sha256(staged.read_bytes()).hexdigest() == wanted:
        os.replace(staged, folder / TENSORS_NAME)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the tensors it refers to, both of the same save."""
    while True:
        before = _state(folder)
        try:
            record = _read_json(folder / JSON_NAME)
            return record, _read_tensors(folder, record.pop("tensors"))
        except (ArtifactError, FileNotFoundError):
            if _state(folder) == before:  # nobody saved meanwhile: it is as bad as it looks
                raise


def _state(folder: Path) -> list[tuple[int, int, int] | None]:
    """What changes when a save replaces one of the files."""
    state: list[tuple[int, int, int] | None] = []
    for name in (JSON_NAME, TENSORS_NAME, STAGED_NAME):
        try:
            found = (folder / name).stat()
        except FileNotFoundError:
            state.append(None)
        else:
            state.append((found.st_ino, found.st_size, found.st_mtime_ns))
    return state


def _read_json(path: Path) -> dict[str, Any]:
    """The checked record: constructor arguments of ``Steering`` and ``tensors``."""
    try:
        record = read_object(path, ArtifactError, limit=MAX_JSON_BYTES, strict=True)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist: run `svdk calibrate` on this adapter first") from error
    if record.get("format") != FORMAT:
        raise ArtifactError(f"{path} is not a steering artifact (its format must be {FORMAT!r})")
    version = record.get("format_version")
    if version not in (1, FORMAT_VERSION) or isinstance(version, bool):
        raise ArtifactError(f"{path}: format_version was {version!r}; this svdk reads 1 and {FORMAT_VERSION}")
    if record.get("checksum") != _checksum(record):
        raise ArtifactError(f"{path} was changed after it was written: its checksum does not match")
    del record["checksum"], record["format"]
    keys = _KEYS | {"tensors"}
    if version == 1:
        keys -= set(_ADDED)
    else:
        for added in _LATER:
            if set(added) & set(record):
                break
            record |= added
    if set(record) != keys:
        raise ArtifactError(f"{path}: missing or unknown entries: {', '.join(sorted(set(record) ^ keys))}")
    if version == 1:
        record |= _ADDED | {"format_version": FORMAT_VERSION}
    if not isinstance(record["svdk_version"], str):
        raise ArtifactError(f"{path}: svdk_version was {record['svdk_version']!r}; allowed: a string")
    for name in ("strength", "penalty"):
        record[name] = _number(record[name])
    for name in ("positions", "options", "bias"):
        if isinstance(record[name], list):
            record[name] = tuple(record[name])
    record["classes"] = _classes(path, record["classes"])
    if isinstance(record["confidence_interval"], list):
        record["confidence_interval"] = tuple(map(_number, record["confidence_interval"]))
    if isinstance(record["metrics"], dict):
        values = ((key, _number(value)) for key, value in record["metrics"].items())
        record["metrics"] = {key: math.nan if value is None else value for key, value in values}
    return record


def _classes(path: Path, entry: Any) -> ClassStrengths | None:
    """The strengths by class of a record; None where it has none."""
    if entry is None:
        return None
    names = {one.name for one in fields(ClassStrengths)}
    if not isinstance(entry, dict) or set(entry) != names:
        raise ArtifactError(f"{path}: classes was {entry!r}; needed: {', '.join(sorted(names))}, or null")
    try:
        values: dict[str, Any] = {k: tuple(x) if isinstance(x, list) else x for k, x in entry.items()}
        return ClassStrengths(**values)
    except InputError as error:
        raise ArtifactError(f"{path}: {error}") from error


def _read_tensors(folder: Path, entry: Any) -> dict[str, Tensor]:
    """The tensors that ``steering.json`` refers to, from the final or (interrupted save) staged file."""
    if not (
        isinstance(entry, dict)
        and set(entry) == {"file", "bytes", "sha256"}
        and entry["file"] == TENSORS_NAME
        and isinstance(entry["bytes"], int)
        and isinstance(entry["sha256"], str)
    ):
        raise ArtifactError(f"{folder / JSON_NAME}: tensors was {entry!r}; needed: file, bytes and sha256")
    problem = f"{folder / TENSORS_NAME} does not exist"
    for name in (TENSORS_NAME, STAGED_NAME):
        path = folder / name
        if not path.exists():
            continue
        size = path.stat().st_size
        if size > MAX_TENSORS_BYTES:
            reason = f"{path} has {size} bytes; allowed: at most {MAX_TENSORS_BYTES}"
        elif size != entry["bytes"]:
            reason = f"{path} has {size} bytes, {entry['bytes']} were written: it is truncated or replaced"
        elif (header := _header_bytes(path)) > size - 8:
            reason = f"{path} claims a header of {header} bytes in a file of {size}"
        else:
            payload = path.read_bytes()
            digest = hashlib.sha256(payload).hexdigest()
            if digest == entry["sha256"]:
                try:
                    return safetensors.torch.load(payload)
                except (SafetensorError, ValueError, KeyError) as error:
                    raise ArtifactError(f"{path} is damaged: {error}") from error
            reason = f"{path} was changed: its SHA-256 is {digest}, {entry['sha256']} was written"
        if name == TENSORS_NAME:
            problem = reason
    raise ArtifactError(problem)


def _header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")
