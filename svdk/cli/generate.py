"""``svdk generate``: stream steered answers, or show base, warm and steered ones side by side."""

from __future__ import annotations

import argparse
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdk.cli.terminal import Printer, columns
from svdk.errors import DataError, InputError
from svdk.utils.checks import check_choice
from svdk.utils.files import decode_text, read_lines
from svdk.utils.views import STEERED, VIEWS
from svdk.warmstart.chat import Chat
from svdk.warmstart.data import (
    CALIBRATION_FILE,
    Columns,
    check_text,
    encode_prompt,
    load_examples,
    load_prompts,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from svdk.calibration.artifact import Steering
    from svdk.models.pair import ModelPair

PROBE = "PROMPT"


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Register ``generate`` and its options."""
    parser = commands.add_parser(
        "generate",
        help="decode with a steered model",
        description="Decode with the adapter and its calibrated steering, text appearing as it is decoded. "
        "Without --prompt and --prompts, standard input is one prompt.",
    )
    parser.add_argument("--model", required=True, help="hub name, folder, .gguf file, or smollm2-135m")
    parser.add_argument("--adapter", required=True, help="adapter folder, calibrated by `svdk calibrate`")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    source.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt a line, or .jsonl with 'prompt' (text) or 'messages' (a chat, 'tools' beside it)",
    )
    parser.add_argument("--compare", action="store_true", help="base, warm and steered answers side by side")
    parser.add_argument(
        "--options",
        nargs="+",
        metavar="TEXT",
        help="answer with one of these, exactly as they follow the prompt, and say how likely each is",
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--chat", action="store_true", help="wrap prompts in the tokenizer's chat template")
    shape.add_argument(
        "--raw",
        action="store_true",
        help="no chat template (default: as the adapter's calibration examples are, else the template)",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message, with a chat template")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: 128")
    parser.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end an answer after this text, which it keeps; may be given several times",
    )
    parser.add_argument("--dtype", help="auto, float32, bfloat16 or float16 (default: float32 on the CPU)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda when there is one)")
    parser.add_argument("--backend", default="auto", help="of the ops (default: auto)")
    parser.add_argument(
        "--forward",
        default="auto",
        metavar="{auto,paired,two_pass}",
        help="how the warm and the base model are run: in one forward a step (paired), in two (two_pass), or "
        "paired where the adapter allows it (default: auto)",
    )
    parser.add_argument("--quiet", action="store_true", help="answers only, no timing")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    sampling.add_argument("--top-k", type=int, default=0, help="0 is off (default)")
    sampling.add_argument("--top-p", type=float, default=1.0, help="1 is off (default)")
    sampling.add_argument("--min-p", type=float, default=0.0, help="0 is off (default)")
    sampling.add_argument("--seed", type=int, help="default: another one each time")
    steering = parser.add_argument_group("steering (default: as calibrated)")
    steering.add_argument("--strength", type=float, help="mu; with it, an adapter need not be calibrated")
    steering.add_argument("--strength-mode", help="constant or kl_budget")
    steering.add_argument("--direction", help="kl_gradient or log_ratio")
    steering.add_argument("--alpha", type=float, help="confidence mask, in [0, 1]")
    steering.add_argument("--penalty", type=float, help="lambda outside the mask: a number or -inf")
    steering.add_argument(
        "--strength-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="a dial: all strengths times X; 1 is as calibrated (default), 0 the adapter, behind its mask",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, then answer prompt by prompt."""
    from svdk.generation.generate import decode
    from svdk.generation.options import stop_criteria
    from svdk.generation.sampler import make_sampler
    from svdk.models.loading import load_adapter, load_model
    from svdk.models.pair import ModelPair
    from svdk.models.paired_forward import FORWARDS, choose_forward
    from svdk.utils.tokens import eos_ids

    check_choice("forward", args.forward, FORWARDS)
    if args.options is not None and (args.temperature or args.stop or args.strength_mode or args.penalty):
        raise InputError(
            "--options was given with --temperature, --stop, --strength-mode or --penalty; allowed: without "
            "them, nothing is sampled"
        )
    for stop in args.stop or ():
        check_text("--stop", stop, blank=True)
    prompts = read_prompts(args.prompt, args.prompts)
    model, tokenizer = load_model(args.model, dtype=args.dtype, device=args.device)
    steering = load_steering(args.adapter, args.strength, model, tokenizer)
    pair = ModelPair(load_adapter(model, args.adapter))
    chat = wants_chat(args, tokenizer)
    texts = [_text(tokenizer, prompt, chat, args) for prompt in prompts]
    _warn(args.prompts, [prompt for prompt in prompts if isinstance(prompt, Chat)], tokenizer)
    if args.options is not None:
        shown = list(zip(map(_shown, prompts), texts, strict=True))
        return _choose(args, pair, tokenizer, shown, steering)
    encoded = [
        _encode(tokenizer, text, prompt, args, pair) for text, prompt in zip(texts, prompts, strict=True)
    ]
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "strength", "strength_mode")
    options: dict[str, Any] = {name: getattr(args, name) for name in names}
    options |= {"direction": args.direction, "alpha": args.alpha, "penalty": args.penalty}
    options |= {"strength_scale": args.strength_scale}
    options |= {"steering": steering, "backend": args.backend, "do_sample": args.temperature != 0}
    # Bad values and warnings come before the first answer, not in the middle.
    make_sampler(pair, 1, **options)
    choose_forward(pair, args.forward)
    options |= {"max_new_tokens": args.max_new_tokens, "eos_token_id": eos_ids(model, tokenizer)}
    strings = args.stop or getattr(model.generation_config, "stop_strings", None)  # a model may bring its own
    options |= {"forward": args.forward, "stopping_criteria": stop_criteria(strings, tokenizer, None)}
    if hasattr(sys.stdout, "reconfigure"):  # a model can emit what the terminal's encoding cannot show
        sys.stdout.reconfigure(errors="replace")

    for index, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        if len(prompts) > 1 or args.compare:
            print(f"{'' if index == 0 else chr(10)}> {_shown(prompt)}", flush=True)
        # Chosen here, not by decode, so that the three answers of --compare share their uniforms.
        options["seed"] = secrets.randbits(63) if args.seed is None else args.seed

        def answer(view: str = STEERED, ids: Tensor = ids, streamer: Printer | None = None) -> Tensor:
            sequences = decode(pair, ids, view=view, text_streamer=streamer, **options).sequences
            return sequences[0, ids.shape[1] :]

        if args.compare:
            _compare(args, tokenizer, answer)
        else:
            start = time.perf_counter()
            count = len(answer(streamer=Printer(tokenizer)))
            _report(args, f"{count} tokens, {_pace(start, count)}")
    return 0


def read_prompts(given: list[str] | None, file: str | None) -> list[str | Chat]:
    """Prompts of ``--prompt``, ``--prompts`` or standard input; none may be empty."""
    if given is not None:
        return [check_text(f"--prompt {i + 1}", text) for i, text in enumerate(given)]
    if file is None:
        if sys.stdin.isatty():
            print("prompt (end with Ctrl-D):", file=sys.stderr)
        # The bytes, where there are any: a file is read as UTF-8 in every locale, too.
        text = decode_text(getattr(sys.stdin, "buffer", sys.stdin).read(), "standard input")
        return [check_text("standard input", text.rstrip("\n"))]
    path = Path(file)
    prompts: list[str | Chat]
    if path.suffix.lower() == ".jsonl":
        prompts = load_prompts(path)
    else:
        prompts = [check_text(where, line) for where, line in read_lines(path, "file of prompts")]
    if not prompts:
        raise DataError(f"{file} held 0 prompts; allowed: at least 1")
    return prompts


def load_steering(
    folder: str, strength: float | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Steering | None:
    """The artifact in ``folder``, checked; None if there is none and a strength was given."""
    from svdk.calibration.artifact import JSON_NAME, Steering

    if not Path(folder, "adapter_config.json").exists():
        raise InputError(f"--adapter was {folder!r}; allowed: a folder that holds adapter_config.json")
    if strength is not None and not Path(folder, JSON_NAME).exists():
        return None
    return Steering.load(folder, model=model, tokenizer=tokenizer)


def wants_chat(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts go through the chat template; left open, the calibration examples decide."""
    if args.raw:
        chat = False
    elif args.chat or args.system:
        chat = True
    elif not tokenizer.chat_template:
        chat = False
    else:
        held_out = Path(args.adapter, CALIBRATION_FILE)
        tail = render(tokenizer, PROBE, None).partition(PROBE)[2]
        # In it, not at its end: variables of the template may add to the tail (an empty thought, say).
        chat = not held_out.exists() or any(tail in e.prompt for e in load_examples(held_out, tokenizer))
    if args.system and not chat:
        raise InputError("--system was given with --raw; allowed: one of them")
    if chat and not tokenizer.chat_template:
        raise InputError("--chat was given, but the tokenizer has no chat template; allowed: --raw")
    return chat


def render(tokenizer: PreTrainedTokenizerBase, text: str, system: str | None) -> str:
    """A prompt as the chat template writes it, up to where the answer starts."""
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": text})
    return Chat(f"prompt {text[:40]!r}", turns, {}).prompt(tokenizer)


def _compare(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, answer: Callable[[str], Tensor]
) -> None:
    answers, times = {}, []
    for view in VIEWS:
        start = time.perf_counter()
        tokens = answer(view)
        times.append(f"{view} {_pace(start, len(tokens))}")
        answers[view] = tokenizer.batch_decode(tokens[None], skip_special_tokens=True)[0].strip()
    print(columns(answers, shutil.get_terminal_size((96, 24)).columns), flush=True)
    _report(args, ", ".join(times))


def _shown(prompt: str | Chat) -> str:
    return prompt.last if isinstance(prompt, Chat) else prompt


def _warn(file: str, chats: list[Chat], tokenizer: PreTrainedTokenizerBase) -> None:
    """Name what the chat template leaves out, as :func:`load_examples` does."""
    columns = Columns()
    for chat in chats:
        columns.left_out |= chat.left_out(tokenizer)
    columns.warn(file)


def _choose(
    args: argparse.Namespace,
    pair: ModelPair,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[tuple[str, str]],
    steering: Steering | None,
) -> int:
    """Answers among ``--options`` to prompts (as shown, as the model sees them), and how likely each is."""
    from svdk.generation.choose import choose

    texts, views = [text for _, text in prompts], VIEWS if args.compare else (STEERED,)
    given: dict[str, Any] = {"strength": args.strength, "direction": args.direction, "alpha": args.alpha}
    given |= {"steering": steering, "strength_scale": args.strength_scale, "backend": args.backend}
    found = {
        view: choose(pair, texts, args.options, tokenizer=tokenizer, view=view, **given) for view in views
    }
    width = max(map(len, args.options))
    for number, (shown, _) in enumerate(prompts):
        if len(prompts) > 1 or args.compare:
            print(f"{'' if number == 0 else chr(10)}> {shown}")
        for view in views:
            answer = found[view][number]
            title = f"{view:<8} " if args.compare else ""
            for place in answer.probabilities.argsort(descending=True, stable=True).tolist():
                share = float(answer.probabilities[place])
                print(f"{title}{answer.options[place]:<{width}}  {share:7.2%}", flush=True)
    return 0


def _text(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Chat, chat: bool, args: argparse.Namespace
) -> str:
    """A prompt as the model sees it."""
    if isinstance(prompt, Chat):
        if args.raw or args.system:
            option = "--raw" if args.raw else "--system"
            raise DataError(f"{prompt.where} held a chat; allowed with {option}: prompts as text")
        return prompt.prompt(tokenizer)
    return render(tokenizer, prompt, args.system) if chat else prompt


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    prompt: str | Chat,
    args: argparse.Namespace,
    pair: ModelPair,
) -> Tensor:
    import torch

    ids = encode_prompt(tokenizer, text)
    limit = getattr(pair.config, "max_position_embeddings", None)
    room = None if limit is None else limit - pair.num_virtual_tokens - args.max_new_tokens
    if room is not None and len(ids) > room:
        raise DataError(
            f"prompt {_shown(prompt)[:40]!r} had {len(ids)} tokens; allowed: at most {room} with "
            f"--max-new-tokens {args.max_new_tokens}"
        )
    return torch.tensor([ids], device=pair.device)


def _pace(start: float, count: int) -> str:
    return f"{1000 * (time.perf_counter() - start) / count:.0f} ms a token"


def _report(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(f"({text})", file=sys.stderr, flush=True)
