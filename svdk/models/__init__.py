"""Models and adapters: loading them, and both views of a pair in one forward.

Reading order: ``loading``, ``gguf``, ``adapter_files``, ``adapter_rules``, ``fingerprints``, ``checkpoint``;
``rows`` (padding and virtual tokens), ``traits`` and ``rotary`` (what families need), ``stream`` (a forward
as the model's own ``generate`` would call it), ``pair`` (the warm and the base view of one model);
``paired_forward`` and ``paired_adapters`` (both views in one forward), ``two_pass``, ``cpu_linear``.
"""

from svdk.models.loading import load_adapter, load_model

__all__ = ["load_adapter", "load_model"]
