"""What is the Triton backend's own: uniforms, slices, candidates, filters, tuning, tracing, compilation.

Its results are tested in ``test_ops.py`` with every other backend's.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from tests import ROOT
from tests.helpers import triton_interpreter

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (pip install triton)", allow_module_level=True)
triton_interpreter.enable()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

import svdk  # noqa: E402
from svdk.kernels import library, sample, tuning  # noqa: E402
from svdk.kernels import philox as draws  # noqa: E402
from svdk.ops import backends, philox, schema  # noqa: E402
from tests.helpers import cuda_sass  # noqa: E402
from tests.helpers import ops_cases as oc  # noqa: E402

DEVICE = oc.device_of("triton")
TINY = tuning.Config(block=64, cap=16, programs=16, stages=1)
"""Many tiles, slices and overflowing candidates even in a small vocabulary."""


@pytest.fixture
def tiny_config(monkeypatch):
    """Launch everything with TINY, as the interpreter's and the GPU's configuration."""
    monkeypatch.setattr(tuning, "config_for", lambda *_: TINY)


@triton.jit
def _uniform_kernel(out, seed: tl.int64, offset: tl.int64):
    temperature = 1.0
    tl.store(out, draws.row_uniform(draws.Draw(temperature, seed.to(tl.int64), offset.to(tl.int64))))


@pytest.mark.parametrize(
    ("seed", "offset"), [(0, 0), (1, 2), (-1, -2), (2**62 + 12345, 2**40 + 7), (-(2**63), 1)]
)
def test_uniforms_are_the_reference_ones(seed, offset):
    got = torch.empty(1, dtype=torch.float64, device=DEVICE)
    _uniform_kernel[(1,)](got, seed, offset)
    assert torch.equal(got.cpu(), philox.row_uniforms(torch.tensor([seed]), torch.tensor([offset])))


@triton.jit
def _one(draw):
    return tl.full([], 1.0, tl.float64)


@pytest.mark.skipif(DEVICE != "cpu", reason="only the interpreter looks names up at every call")
def test_a_uniform_of_one_draws_the_last_token_with_mass(tiny_config, monkeypatch):
    monkeypatch.setattr(sample, "row_uniform", _one)
    oc.assert_the_last_with_mass(monkeypatch, "triton")


def test_slices_tiles_and_configurations_change_no_token(tiny_config):
    warm, base = (x.to(DEVICE) for x in oc.logits(2, 999, seed=3))
    for case in oc.CASES:
        args, kwargs = oc.operands(case, warm, base)
        oc.assert_same_tokens(
            svdk.steered_sample(*args, **kwargs, seed=5, backend="triton"), args, kwargs | {"seed": 5}
        )
    for counters in library._counters.values():
        assert int(counters.abs().max()) == 0, "a launch must leave its counters at zero"


@pytest.mark.parametrize(
    "kwargs", [{}, {"temperature": 0.0}, {"top_p": 0.3}, {"top_k": 7}, {"strength_mode": "kl_budget"}]
)
def test_candidates_that_overflow_are_replaced_by_the_row(tiny_config, kwargs):
    warm, base = (x.to(DEVICE) for x in oc.logits(3, 700, scale=0.2, seed=4))
    kwargs = {"alpha": 0.05, "seed": 11, **kwargs}
    token, info = svdk.steered_sample(warm, base, **kwargs, backend="triton", return_info=True)
    oc.assert_same_tokens(token, (warm, base), kwargs)
    _, want = svdk.steered_sample(warm, base, **kwargs, backend="reference", return_info=True)
    assert int(info.candidates.min()) > 16 * 8, "the case must overflow"
    assert torch.equal(info.candidates.cpu(), want.candidates.cpu())
    strengths = torch.tensor([-1.0, 2.0], device=DEVICE)
    labels = torch.tensor([0, 5, 699], device=DEVICE)
    for penalty in (0.0, -1.0):
        got, want = (
            svdk.steered_logprob(
                warm, base, labels, strengths=strengths, alpha=0.05, penalty=penalty, backend=name
            )
            for name in ("triton", "reference")
        )
        oc.assert_close(got.logprob, want.logprob, "logprob")
        assert torch.equal(got.greedy.cpu(), want.greedy.cpu())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"alpha": 0.0, "direction": "log_ratio"},
        {"alpha": 0.0, "strength": 2.0},
        {"alpha": 0.01, "strength": 3.0},
        {"alpha": 0.2, "penalty": 0.5},
        {"alpha": 0.0, "direction": "log_ratio", "temperature": 0.0},
    ],
)
def test_extreme_logits_in_any_slice(tiny_config, kwargs):
    """What a slice flags, or cannot sum in float32, is for the program that finishes the row to mend."""
    lowest = torch.finfo(torch.float32).min
    warm, base = oc.logits(6, 700, seed=3)
    warm[0, 64:] = lowest  # whole slices without a token that counts
    base[1] = 1e25  # a log-ratio that rounds the warm logits away
    base[2, 650] = -lowest  # K beyond the range of float32 on its way
    warm[3, 650], base[3, 10] = lowest, lowest
    warm[4] += 1e7  # more than a float resolves
    base[5, 400] = -math.inf
    args = (warm.to(DEVICE), base.to(DEVICE))
    token, info = svdk.steered_sample(*args, **kwargs, seed=2, backend="triton", return_info=True)
    want_token, want = svdk.steered_sample(*args, **kwargs, seed=2, backend="reference", return_info=True)
    assert torch.equal(token.cpu(), want_token.cpu())
    assert info.status.tolist() == [0, 0, 0, 0, 0, 2]
    for name in ("kl", "logprob_warm", "logprob_steered"):
        oc.assert_close(getattr(info, name), getattr(want, name), name)
    assert torch.equal(svdk.steered_sample(*args, **kwargs, seed=2, backend="triton"), token)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kwargs", [{}, {"alpha": 0.01, "penalty": -1.0}, {"alpha": 0.0}])
def test_whole_tiles_of_odd_logits(tiny_config, kwargs, dtype):
    """What the tile loop does not look at shows in its sums, wherever in a slice it is."""
    lowest = torch.finfo(torch.bfloat16).min  # of float32 it would be -inf
    warm, base = oc.logits(10, 700, seed=8)
    warm[0, :400], base[0, :400] = -math.inf, -math.inf  # tiles before there is anything to be relative to
    warm[1, :400] = -math.inf
    base[1] += 95.0  # beyond exp() relative to 0
    base[2, :130], warm[2, :130] = -math.inf, -math.inf
    base[2] -= 300.0
    base[3, 200] = -math.inf  # the status alone tells of it
    warm[3, 200] = warm[3].min() - 200.0
    warm[4, 100], base[4, 100] = lowest, -math.inf
    warm[5] += 200.0 * torch.arange(700) / 700  # the maximum rises all the way
    base[6] += 200.0 * torch.arange(700).flip(0) / 700
    warm[7, 64:] = -math.inf
    base[8, 300] = math.nan
    warm[9, 500] = math.inf
    args = (warm.to(DEVICE, dtype), base.to(DEVICE, dtype))
    token, info = svdk.steered_sample(*args, **kwargs, seed=2, backend="triton", return_info=True)
    want_token, want = svdk.steered_sample(*args, **kwargs, seed=2, backend="reference", return_info=True)
    oc.assert_same_tokens(token, args, kwargs | {"seed": 2})
    assert torch.equal(info.status.cpu(), want.status.cpu())
    assert want.status.tolist() == [0, 0, 0, 2, 2, 0, 0, 0, 1, 1]
    assert torch.equal(info.candidates.cpu(), want.candidates.cpu())
    same = (token == want_token).cpu()
    oc.assert_close(info.kl, want.kl, "kl")
    oc.assert_close(info.logprob_steered.cpu()[same], want.logprob_steered.cpu()[same], "logprob_steered")


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize(
    "kwargs", [{"top_p": 0.5}, {"top_p": 0.0}, {"top_k": 3}, {"top_k": 3, "top_p": 0.4}, {"min_p": 1.0}]
)
def test_ties_in_the_filters(alpha, kwargs):
    # alpha picks the way: 0.5 ranks candidates, 0 searches the row for the threshold.
    warm = torch.zeros(12, 80, device=DEVICE)
    warm[6:, ::2] = 1.0
    base = warm.clone()
    kwargs = {"alpha": alpha, "seed": torch.arange(12, device=DEVICE), **kwargs}
    got = svdk.steered_sample(warm, base, **kwargs, backend="triton")
    assert torch.equal(got.cpu(), svdk.steered_sample(warm, base, **kwargs, backend="reference").cpu())


@pytest.mark.parametrize("name", ["default", "plain_top_p", "log_ratio_everywhere"])
def test_a_real_vocabulary(name):
    case = next(c for c in oc.CASES if c.name == name)
    warm, base = (x.to(DEVICE) for x in oc.logits(1, 32000, torch.bfloat16, seed=6))
    args, kwargs = oc.operands(case, warm, base)
    oc.assert_same_tokens(svdk.steered_sample(*args, **kwargs, backend="triton"), args, kwargs)


def _flat(op: schema.Op, warm, base, **more) -> tuple:
    """Flat arguments of an op, with the table's defaults."""
    operands = schema.Operands(warm, base, None, None, None, warm.shape[1], schema.KL_GRADIENT)
    given = {x.name: x.default if x.kind == "scalar" else schema.PerRow(x.default) for x in op.parameters}
    return tuple(op.flatten(operands, given | more))


def test_the_op_in_a_compiled_graph():
    warm, base = (x.to(DEVICE) for x in oc.logits(2, 64))
    labels = torch.tensor([1, 2], device=DEVICE)

    def step(warm, base, seed):
        token = svdk.steered_sample(warm, base, seed=seed, backend="triton")
        return token, svdk.steered_logprob(warm, base, labels, backend="triton").logprob * 2

    seed = torch.tensor([3, 4], device=DEVICE)
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    for got, want in zip(compiled(warm, base, seed), step(warm, base, seed), strict=True):
        assert torch.equal(got, want)
    tests = ("test_schema", "test_faketensor")
    for name, more in (
        (
            "steered_sample",
            {
                "logit_bias": None,
                "bitmask": None,
                "labels": None,
                "strength_mode": schema.CONSTANT,
                "info": True,
            },
        ),
        ("steered_logprob", {"labels": labels, "penalty": 0.0, "strengths": None}),
        ("steered_logits", {"strength_mode": schema.CONSTANT, "skip": None, "out": torch.empty_like(warm)}),
        ("extract", {}),
    ):
        op = getattr(torch.ops.svdk_triton, name)
        torch.library.opcheck(op, _flat(schema.OPS[name], warm, base, **more), test_utils=tests)


def test_auto_never_interprets(monkeypatch):
    if not library.INTERPRETED:
        pytest.skip("the kernels are compiled here")
    assert backends._choose("triton", "cpu") is library.BACKEND
    assert backends._choose("auto", "cpu") is not library.BACKEND
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "no GPU is visible" in backends._why_not_triton()
    monkeypatch.setattr(backends.importlib.metadata, "version", lambda _: "3.5.1")
    assert "3.5.1 is too old" in backends._why_not_triton()


def test_tuning_results_survive_and_bad_files_do_not_matter(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_device", lambda index: ("a GPU", 100))
    like = torch.empty(1, device="meta")
    tuning._remembered.cache_clear()
    try:
        assert tuning.config_for("sample", like, 3, 1000) == tuning.DEFAULT
        tuning._remember(tuning.key_of("sample", like, 3, 1000), TINY)
        tuning._remembered.cache_clear()  # as a new process would start
        assert tuning.config_for("sample", like, 4, 1024) == TINY
        assert tuning.config_for("sample", like, 5, 1000) == tuning.DEFAULT
        assert [p.name for p in tuning.cache_path().parent.iterdir()] == ["triton.json"]
        for content in ("", "{", '{"format": 0}', '{"format": 1, "configs": {"x": {"warp": 1}}}', "[]"):
            tuning.cache_path().write_text(content)
            tuning._remembered.cache_clear()
            assert tuning.config_for("sample", like, 4, 1024) == tuning.DEFAULT
    finally:
        tuning._remembered.cache_clear()


@pytest.mark.parametrize("batch", [1, 3, 64, 1000])
def test_slices_cover_the_row(monkeypatch, batch):
    monkeypatch.setattr(tuning, "_device", lambda index: ("a GPU", 132))
    like = torch.empty(1, device="meta")
    for vocab in (1, 63, 1000, 32000, 151_936):
        for config in tuning.CANDIDATES:
            block, splits, size = tuning.shape(config, like, batch, vocab)
            assert splits in tuning.SPLITS
            assert size % block == 0
            assert block & (block - 1) == 0
            assert splits * size >= vocab


class _Recorder:
    """In the place of a kernel: notes the variants that would be compiled, and launches nothing."""

    def __init__(self, variants: set):
        self.variants = variants

    def __call__(self, kernel):
        self.kernel = kernel
        return self

    def __getitem__(self, _grid):
        def launch(*given, **options):
            named = zip(self.kernel.arg_names, given, strict=True)
            free = ("batch", "top_k", "seed", "offset", "number")  # of the batch: not specialised
            kinds = [
                (name, value if name.isupper() or value is None else self.kind(value))
                for name, value in named
                if name not in free
            ]
            self.variants.add((self.kernel.__name__, tuple(kinds), tuple(options.items())))

        return launch

    @staticmethod
    def kind(value):
        """As Triton specialises: numbers that are 1 or a multiple of 16, pointers by their alignment."""
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        return type(value), value == 1, isinstance(value, int) and value % 16 == 0


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("most", [1, 5, 300])
def test_after_a_warm_up_no_batch_needs_another_variant(monkeypatch, most, paired):
    shape, like = tuning.shape, torch.empty(1, dtype=torch.float32, device="meta")
    monkeypatch.setattr(tuning, "_device", lambda index: ("a GPU", 132))
    monkeypatch.setattr(tuning, "config_for", lambda *_: tuning.DEFAULT)
    monkeypatch.setattr(tuning, "shape", lambda config, _, *rest: shape(config, like, *rest))
    variants: set = set()
    monkeypatch.setattr(library, "wrap_triton", _Recorder(variants))
    vocab = 32000
    warm = torch.zeros(1, vocab).expand(2 * most, vocab) if paired else torch.zeros(most, vocab)
    base = None if paired else warm

    def options(rows: int) -> dict:
        found = {"seed": torch.arange(rows), "temperature": torch.ones(rows), "strength": 0.5}
        index = torch.arange(rows)
        return found | ({"warm_rows": index, "base_rows": index + rows} if paired else {})

    batches = svdk.warm_up(svdk.steered_sample, warm, base, backend="triton", **options(most))
    assert batches[0] == most
    assert batches[-1] == 1
    ready = set(variants)
    assert len(ready) <= len(tuning.SPLITS)
    for rows in range(1, most + 1):
        some = (warm, None) if paired else (warm[:rows], base[:rows])
        svdk.steered_sample(*some, backend="triton", **options(rows))
    assert variants == ready
    svdk.steered_sample(warm[:1], backend="triton")
    assert variants > ready, "another kind of step must show"


@pytest.mark.parametrize("kernel", ["steered_sample_kernel", "steered_logprob_kernel"])
def test_kernels_are_not_specialised_for_the_batch(kernel):
    """The interpreter's kernels do not say; without it, a kernel lists what it does not specialise."""
    (line,) = [x for x in _program("triton_aot.py", "unspecialised") if x["kernel"] == kernel]
    assert "batch" in line["unspecialised"]


def test_warm_up_says_what_it_takes():
    with pytest.raises(svdk.InputError, match=r"op was 'sample'; allowed: svdk\.steered_sample, "):
        svdk.warm_up("sample", torch.zeros(1, 8))


def _program(name: str, *arguments: str) -> list[dict]:
    """The JSON lines of a program of this folder, run without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "helpers" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("target", ["sm_80", "sm_90+", "gfx942"])
def test_kernels_compile_for_gpus_that_are_not_here(target, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    lines = _program("triton_aot.py", target)
    assert len(lines) >= 6
    for line in lines:
        # A few bytes outside the loops are no loss; a spilled accumulator would be hundreds.
        assert line["spills"] <= 32, line
        assert line["shared"] <= 32 * 1024, line


@pytest.mark.skipif(cuda_sass._tool("nvdisasm") is None, reason="no nvdisasm here")
def test_the_hot_loops_are_short(tmp_path, monkeypatch):
    """Counted: 24.6 instructions a pair of logits and 9.4 a token. An H100 has time for 35 and 18."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    steered, plain = _program("triton_sass.py")
    assert (steered["loop"], plain["loop"]) == ("steered", "plain")
    assert steered["instructions"] <= 26
    assert plain["instructions"] <= 10.5
    for line in (steered, plain):
        assert line["double"] == line["spills"] == 0, line
        assert line["registers"] <= 128, "four programs of 128 threads must fit a multiprocessor"


def test_tracing_writes_no_input():
    for line in _program("triton_trace.py"):
        assert line["launches"] == line["expected"], line
        # The second kernel of steered_logits reads the candidates of the first.
        ours = [name.endswith("_out") or name == "candidates" for name in line["kept"]]
        assert all(ours), f"an input would be copied: {line}"
