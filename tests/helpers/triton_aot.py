"""Compile every Triton kernel variant for GPUs that are not here; one JSON line a kernel and target.

Run as a program: ``python tests/helpers/triton_aot.py [target ...]``, without TRITON_INTERPRET
(``test_triton.py`` does). Spills and registers come from the cubin's resource table or the AMD assembly's
metadata.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from svdk.kernels import steering
from svdk.kernels.extract import extract_count_kernel, extract_fill_kernel
from svdk.kernels.logits import measure_rows_kernel, write_rows_kernel
from svdk.kernels.logprob import steered_logprob_kernel
from svdk.kernels.sample import steered_sample_kernel
from svdk.kernels.tuning import DEFAULT, block_of
from svdk.ops import schema

COMPACT, DIRECT, FILTERS, INFO, OUTSIDE = (
    getattr(steering, name).value for name in ("COMPACT", "DIRECT", "FILTERS", "INFO", "OUTSIDE")
)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ROWS = {
    f"{x.name}_rows": {"float": "*fp32", "int": "*i64"}[x.kind]
    for x in schema.PARAMETERS
    if x.kind != "scalar"
}
ROWS |= {"warm_rows": "*i64", "base_rows": "*i64", "labels": "*i64", "strengths": "*fp32", "skip": "*i1"}
ROWS |= {"logit_bias": "*fp32", "bitmask": "*i32"}
"""What a call may be without."""
OTHERS = {
    "*fp32": "warm other sums ranking kept kept_out floats_out curves_out rows_out p_out delta_out "
    "steered steered_out mus mu_out logits_out",
    "*i32": "counts candidates counters ints_out status_out found found_out",
    "*i64": "row_ptr token_out greedy_out sizes_out ids_out",
    "i32": "batch vocab slice_size number width",
    "i64": "warm_stride other_stride bias_stride bitmask_stride out_stride",
    "fp32": "largest",
}
"""What is not in the table of parameters."""
TYPES = {name: kind for kind, names in OTHERS.items() for name in names.split()}
TYPES |= ROWS | {x.name: {"float": "fp32", "scalar": "fp32", "int": "i64"}[x.kind] for x in schema.PARAMETERS}
ALIGNED = ("warm_stride", "other_stride", "vocab", "slice_size")
"""Multiples of 16 for every usual model; a launch finds that out by itself."""
SHAPE = {"BLOCK": None, "STAGES": DEFAULT.stages}
KL = schema.KL_GRADIENT
COMPACTED = KL | COMPACT
SAMPLE = {"KIND": COMPACTED, "MODE": schema.CONSTANT, "SPLITS": 4, "CAP": DEFAULT.cap, **SHAPE}
LOGPROB = {"KIND": COMPACTED | OUTSIDE, "SPLITS": 1, "CAP": DEFAULT.cap, **SHAPE}
SAMPLES = (
    ("sample", {}, "fp32", ()),
    ("sample.bf16.rows", {"SPLITS": 64}, "bf16", ("seed_rows", "offset_rows")),
    ("sample.alone", {"SPLITS": 1}, "bf16", ("warm_rows", "base_rows")),
    ("sample.filters.info", {"KIND": COMPACTED | FILTERS | INFO}, "bf16", tuple(ROWS)),
    ("sample.label", {"MODE": schema.LABEL}, "fp16", ("labels",)),
    ("sample.kl_budget", {"MODE": schema.KL_BUDGET}, "fp32", ()),
    ("sample.wide", {"KIND": KL | OUTSIDE}, "fp32", ()),
    ("sample.wide.filters", {"KIND": KL | FILTERS}, "fp32", ()),
    ("sample.log_ratio", {"KIND": schema.LOG_RATIO | DIRECT}, "bf16", ()),
    ("sample.vector", {"KIND": schema.VECTOR | COMPACT}, "bf16", ()),
    ("sample.vector.wide", {"KIND": schema.VECTOR | DIRECT | INFO}, "bf16", ()),
    ("sample.vector.budget", {"KIND": schema.VECTOR | COMPACT, "MODE": schema.KL_BUDGET}, "bf16", ()),
    ("sample.adjusted", {}, "bf16", ("logit_bias", "bitmask")),
    ("sample.masked.wide.filters", {"KIND": KL | FILTERS}, "fp32", ("bitmask",)),
    ("sample.masked.plain", {"KIND": schema.PLAIN | DIRECT}, "bf16", ("bitmask",)),
    ("sample.plain", {"KIND": schema.PLAIN | DIRECT}, "fp32", ()),
    ("sample.plain.filters", {"KIND": schema.PLAIN | FILTERS}, "fp32", ()),
)
VARIANTS = (
    *((label, steered_sample_kernel, SAMPLE | changed, *rest) for label, changed, *rest in SAMPLES),
    ("logprob", steered_logprob_kernel, LOGPROB, "fp32", ("labels", "strengths")),
    ("logprob.wide", steered_logprob_kernel, LOGPROB | {"KIND": KL}, "bf16", ("labels", "strength_rows")),
    ("logits.measure", measure_rows_kernel, SAMPLE | {"MODE": schema.KL_BUDGET}, "bf16", ("skip",)),
    ("logits.write", write_rows_kernel, SAMPLE | {"KIND": COMPACTED | OUTSIDE}, "bf16", ("skip",)),
    ("extract.count", extract_count_kernel, {"KIND": KL, "SPLITS": 4, **SHAPE}, "fp32", ()),
    ("extract.fill", extract_fill_kernel, {"KIND": KL, "BLOCK": None}, "bf16", ()),
)
EVERYWHERE = (
    "logits.measure",
    "logits.write",
    "sample",
    "sample.filters.info",
    "sample.wide.filters",
    "logprob",
    "extract.count",
    "extract.fill",
)


def compile_variant(kernel, constants: dict, dtype: str, given: tuple[str, ...], target: GPUTarget):
    """The compiled kernel: row tensors not in ``given`` are absent, as when a caller passes scalars."""
    signature, constexprs = {}, {}
    constants = constants | {"BLOCK": block_of(DEFAULT, 4 if dtype == "fp32" else 2)}
    if "logit_bias" in given or "bitmask" in given:
        constants["STAGES"] = 1  # as library.py
    for name in kernel.arg_names:
        if name in constants:
            signature[name], constexprs[name] = "constexpr", constants[name]
        elif name in ROWS and name not in given:
            signature[name], constexprs[name] = "constexpr", None
        elif name in ("warm", "other"):
            vector = constants["KIND"] & 3 == schema.VECTOR and name == "other"
            signature[name] = "*fp32" if vector else f"*{dtype}"
        else:
            signature[name] = TYPES[name]
    aligned = [n for n in kernel.arg_names if signature[n][0] == "*" or n in ALIGNED]
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options={"num_warps": DEFAULT.num_warps})


def resources(compiled) -> dict[str, int]:
    """Registers and bytes or registers spilled, from what the compiler left."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        # Scalar registers spill into vector registers there, which costs no memory traffic.
        spills, scratch, registers = (
            int(re.findall(rf"\.{name}:\s*(\d+)", text)[0])
            for name in ("vgpr_spill_count", "private_segment_fixed_size", "vgpr_count")
        )
        return {"registers": registers, "spills": spills + scratch}
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text).groups()
    return {"registers": int(registers), "spills": int(stack) + int(local)}


def main(names: list[str]) -> None:
    """``names``: targets, with "+" for all variants, else some; or "unspecialised", for arguments."""
    if names == ["unspecialised"]:
        for kernel in dict.fromkeys(variant[1] for variant in VARIANTS):
            listed = [x.name for x in kernel.params if x.do_not_specialize]
            print(json.dumps({"kernel": kernel.__name__, "unspecialised": listed}), flush=True)
        return
    for name in names or [f"{target}+" for target in TARGETS]:
        target = name.rstrip("+")
        for label, kernel, constants, dtype, given in VARIANTS:
            if name == target and label not in EVERYWHERE:
                continue
            compiled = compile_variant(kernel, constants, dtype, given, TARGETS[target])
            line = {
                "target": target,
                "kernel": label,
                "shared": compiled.metadata.shared,
                **resources(compiled),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
