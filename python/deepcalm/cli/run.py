"""The command ``generate``, and what it shares with ``chat``: how to sample, streaming, statistics."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import SessionError, one_line
from ..files.safetensors import check_output
from ..tables import columns
from ..text import decode_utf8
from .common import (
    FILE,
    INTERRUPTED,
    RUNTIME,
    SAMPLING,
    deferred_interrupt,
    open_model,
    open_session,
    options,
    progress,
    read_text,
    say,
    write,
    write_json,
)

if TYPE_CHECKING:
    from ..generation import TextGeneration
    from ..model import Model
    from ..session import Session, Stats


NO_SAMPLING: dict[str, float] = {"temp": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
# keys of generation_config that change the text, and their values that do not
NOT_SUPPORTED = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "typical_p": 1.0, "num_beams": 1}


@click.command(
    epilog="""\b
Examples:
  deepcalm generate "Once upon a time"
  deepcalm generate -m v2-lite.dcalm --temp 0.7 --top-p 0.9 -n 300 "The three laws are"
  deepcalm generate -m chat.dcalm --chat --system "Be brief." "What is MLA?"
  deepcalm generate -m v3.dcalm --draft 2 "MTP on or off, the text is the same:"
  deepcalm generate -m v2.dcalm --drafter ngram,model:v2-lite.dcalm "Once"
  deepcalm generate -m v2-lite.dcalm --prompt-cache book.session --file book.txt --logprobs 3
  deepcalm generate -m v2-lite.dcalm --file question.txt --stop END --json"""
)
@click.argument("prompt", required=False)
@options("--model")
@click.option("-p", "--prompt", "given", metavar="TEXT", help="PROMPT, as an option.")
@click.option("-f", "--file", type=click.Path(), metavar="FILE", help="Read the prompt from a file, byte for byte.")
@options("--max-tokens", *SAMPLING)
@click.option(
    "--chat/--raw", "as_chat", default=None,
    help="Apply the checkpoint's chat template, or take the prompt as it is (default).",
)  # fmt: skip
@click.option(
    "--logprobs",
    type=click.IntRange(0, 100),
    metavar="N",
    help="Every token's log probability and its N best alternatives, before filters; a table on stderr.",
)
@click.option(
    "--prompt-cache",
    "cache",
    type=FILE,
    metavar="FILE",
    help="Go on from this saved session as far as the prompt agrees, and save the new one there.",
)
@options("--system", "--chat-template-kwargs", *RUNTIME, "--lock", "--json", "--quiet")
def generate(
    prompt: str | None, path: Path | None, given: str | None, file: str | None, max_tokens: int | None,
    as_chat: bool | None, logprobs: int | None, cache: Path | None, system: str | None,
    template_options: dict[str, Any], device: str, threads: int | None, isa: str | None, ctx: int | None, kv: str,
    lock: bool, as_json: bool, quiet: bool, **sampling: Any,
) -> int:  # fmt: skip
    """Continue PROMPT ("-": read it from stdin).

    The new text goes to stdout as it is made, with a newline at its end if it has none; one line with tokens, speed
    and the reason for stopping goes to stderr. Without --chat the prompt is continued as it is, after one bos token
    where the model's tokenizer adds one.
    """
    if sum(x is not None for x in (prompt, given, file)) != 1:
        raise click.UsageError("give either a PROMPT ('-' for stdin) or --file")
    prompt = given if prompt is None else prompt
    if prompt is not None and prompt.endswith(".dcalm") and os.path.exists(prompt):  # noqa: PTH110  # a NUL is text
        raise click.UsageError(f"{prompt} is a packed file: -m names the model")
    if (system is not None or template_options) and not as_chat:
        raise click.UsageError(f"--{'chat-template-kwargs' if system is None else 'system'} needs --chat")
    if file is not None or prompt == "-":
        text = decode_utf8(read_text(file or "-"), file or "standard input")
    else:
        text = decode_utf8(os.fsencode(prompt or ""), "the prompt")  # argv bytes that are no UTF-8 come as surrogates
    model = open_model(path, device, threads, isa, quiet, lock)
    if as_chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": text})
        ids = model.encode_chat(messages, **template_options)
    else:
        ids = model.encode(text)
    session = open_session(model, ctx, kv, sampling, quiet, saved=cache is not None)
    check_room(len(ids), session)
    kept = 0 if cache is None else restore(session, cache, ids)
    sampling |= how_to_sample(model, quiet, **sampling)
    answer, seed = start(session, ids[kept:], max_tokens or 256, logprobs=logprobs, **sampling)
    terminal = sys.stderr.isatty() and sys.stdout.isatty()
    echo = text if prompt not in (None, "-") and terminal and not (as_chat or as_json or quiet) else ""
    stream(answer, quiet, show=not as_json, echo=echo)
    if cache is not None:
        session.save(cache)
    read = bandwidth_now(model, session.stats) if as_json or not quiet else None
    if as_json:
        write_json(report(answer, session.stats, seed) | {
            "prompt_tokens": len(ids), "model": str(model.path), "isa": model.isa, "threads": model.threads,
            "ctx": session.ctx, "kv": session.kv, "read_bandwidth": read, "cached_tokens": kept,
        })  # fmt: skip
    elif logprobs is not None:
        say(scores_table(answer), quiet)
    say(summary(answer, session.stats, seed, read) + cached_text(kept, ids, cache is not None), quiet)
    if as_chat is None and model.has_chat_template and path is not None:  # the demo model is for both
        say("hint: this model has a chat template, and the prompt was continued as it is; --chat applies the template, "
            "--raw leaves this hint out", quiet)  # fmt: skip
    return INTERRUPTED if answer.reason == "interrupted" else 0


def check_room(n_tokens: int, session: Session) -> None:
    """Raises SessionError unless a prompt of ``n_tokens`` leaves room for an answer."""
    if n_tokens >= session.ctx:
        limit = session.model.config["max_position_embeddings"]
        hint = f"--ctx goes up to {limit}" if session.ctx < limit else "that is the model's maximum"
        raise SessionError(f"the prompt has {n_tokens} tokens, the context {session.ctx} positions ({hint})")


def restore(session: Session, path: Path, ids: Sequence[int]) -> int:
    """The saved session in ``path``, if there is one, as far as it agrees with ``ids``: how many tokens that are.

    Raises:
        Error: another model's, or no saved session at all, which will not be overwritten; or it could not be.
    """
    check_output(path)
    if not os.path.lexists(path):
        return 0
    session.load_state(saved(session, path, "name another file for --prompt-cache")[0])
    return session.reuse(ids)


def saved(session: Session, path: Path, advice: str) -> tuple[dict[str, Any], dict[str, str]]:
    """``session.saved(path)``; a refusal ends with ``advice``."""
    try:
        return session.saved(path)
    except SessionError as e:
        reason = str(e).partition("; force=True")[0]
        raise SessionError(f"{reason}; it is left as it is, {advice}") from None


def cached_text(kept: int, ids: Sequence[int], said: bool = True) -> str:
    """The end of the line of statistics."""
    return f"; {kept} of {len(ids)} prompt tokens were cached" if said else ""


def how_to_sample(model: Model, quiet: bool, *, seed: int | None, **options: Any) -> dict[str, float]:
    """temp, top_k, top_p and min_p: those asked for, else the checkpoint's, else greedy; says what has no effect."""
    given = {k: options[k] for k in NO_SAMPLING if options[k] is not None}
    values: dict[str, float] = {**NO_SAMPLING, **model.sampling_defaults, **given}
    if values["temp"]:
        config = model.generation_config
        more = [f"{k} {config[k]}" for k, off in NOT_SUPPORTED.items() if config.get(k) not in (None, off)]
        if more and model.sampling_defaults:
            text = one_line(", ".join(more), 200)
            say(f"note: the checkpoint's generation_config asks for {text}, which is not supported", quiet)
        return values
    idle = [f"--{k.replace('_', '-')}" for k in given if k != "temp"] + ["--seed"] * (seed is not None)
    if idle:
        verb = "have" if len(idle) > 1 else "has"
        say(f"note: {' and '.join(idle)} {verb} no effect at temperature 0, give --temp", quiet)
    return dict(NO_SAMPLING)


def start(
    session: Session,
    ids: Sequence[int],
    max_tokens: int | None,
    *,
    stop: Sequence[str],
    seed: int | None,
    **options: Any,
) -> tuple[TextGeneration, int | None]:
    """The generation that the options describe, and its seed (None: greedy)."""
    if options["temp"] == 0:
        seed = None
    elif seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    try:
        return session.generate(ids, max_tokens=max_tokens, seed=seed or 0, **options).text(stop), seed
    except ValueError as e:
        raise click.UsageError(str(e)) from None


def stream(answer: TextGeneration, quiet: bool, show: bool = True, echo: str = "") -> None:
    """Writes the text as it comes; Ctrl-C ends it and keeps what there is, every character once.

    Before it a bar, if the prompt takes more than a second, then the prompt's text ``echo``, dim.
    """
    shown = 0

    def write_new() -> None:
        nonlocal shown
        with deferred_interrupt():
            write((visible if sys.stdout.isatty() else str)(answer.text[shown:]) if show else "")
            shown = len(answer.text)

    try:
        with progress("reading prompt tokens", quiet, delay=1) as answer.generation.progress:
            next(answer, None)
        if echo:
            click.secho(echo, err=True, nl=False, dim=True, color=False if os.environ.get("NO_COLOR") else None)
        write_new()
        for _ in answer:
            write_new()
    except KeyboardInterrupt:
        answer.interrupt()
    write_new()
    if show and answer.text and not answer.text.endswith("\n"):
        write("\n")


def visible(text: str) -> str:
    """A model's text for a terminal, which it must not control: escapes and their like as \\x1b."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda m: f"\\x{ord(m[0]):02x}", text)


def bandwidth_now(model: Model, stats: Stats) -> float | None:
    """GB/s of a plain read by as many threads, just after decoding; None after less than half a second of it.

    A bandwidth from another day would be another machine's: virtual machines differ by a factor from hour to hour. The
    probe takes about 0.3 s, which is worth it for a run that was long enough to be a measurement.
    """
    from .. import _core

    return _core.read_bandwidth(model.threads, 512, 2) if stats.decode_seconds >= 0.5 else None


def summary(answer: TextGeneration, stats: Stats, seed: int | None, read: float | None = None) -> str:
    """One line: tokens, why it ended, rates, bandwidth and what share of the plain read ``read`` it is, seed."""
    line = f"{len(answer.generation.tokens)} tokens, ended by {answer.reason}"
    if stats.prefill_tokens:
        line += f"; prefill {stats.prefill_tokens} tokens, {stats.prefill_rate:.1f} tok/s"
    if stats.decode_tokens:
        line += f"; decode {stats.decode_rate:.1f} tok/s, {stats.decode_bandwidth:.2f} GB/s"
        line += f", {100 * stats.decode_bandwidth / read:.0f} % of a plain read" if read else ""
    drafts = answer.generation.drafts
    if drafts.stats.drafted:
        who = ", ".join(f"{name} {taken} of {made}" for name, (made, taken) in drafts.stats.drafters.items())
        line += f"; {drafts.stats.accepted} of {drafts.stats.drafted} drafts accepted ({who})"
        line += f", {drafts.stats.tokens_per_pass:.2f} tokens and {drafts.stats.experts_per_pass:.1f} experts a pass"
    if drafts.switches and not drafts.drafting:
        line += "; drafting turned off, it did not pay"
    how = answer.generation.sampling
    session = answer.generation.session
    line += f"; {session.model.isa}, cache {session.kv}"
    line += f"; {sampling_text({k: getattr(how, k) for k in NO_SAMPLING}, session.model)}"
    return line if seed is None else f"{line}; seed {seed}"


def scores_table(answer: TextGeneration) -> str:
    """A line a token: its log probability, its text, and the most probable ones at its place."""
    name = answer.generation.session.model.vocabulary.name
    return columns((f"{s.logprob:9.4f}", repr(name(s.token)), "  ".join(f"{x:.4f} {name(i)!r}" for i, x in s.top))
                   for s in answer.generation.scores)[:-1]  # fmt: skip


def sampling_text(how: Mapping[str, float], model: Model) -> str:
    """How tokens are chosen (keys of NO_SAMPLING), and which of it the checkpoint said."""
    values = {k: how[k] for k, off in NO_SAMPLING.items() if how[k] != off}
    if not values:
        return "greedy"
    own = [k for k, v in values.items() if model.sampling_defaults.get(k) == v]
    text = ", ".join(f"{k.replace('_', '-')} {v:g}" for k, v in values.items())
    whose = "" if own == list(values) else " for " + " and ".join(k.replace("_", "-") for k in own)
    return text + (f" (the checkpoint's{whose})" if own else "")


def report(answer: TextGeneration, stats: Stats, seed: int | None) -> dict[str, Any]:
    """The same for --json."""
    name = answer.generation.session.model.vocabulary.name

    def scored(token: int, logprob: float) -> dict[str, Any]:
        return {"id": token, "text": name(token), "logprob": logprob}

    scores = [scored(s.token, s.logprob) | {"top": [scored(*x) for x in s.top]} for s in answer.generation.scores]
    return ({"logprobs": scores} if answer.generation.logprobs is not None else {}) | {
        "text": answer.text,
        "reason": answer.reason,
        "tokens": answer.generation.tokens,
        "temp": answer.generation.sampling.temp,
        "sampling": {k: getattr(answer.generation.sampling, k) for k in NO_SAMPLING},
        "seed": seed,
        "prefill": {"tokens": stats.prefill_tokens, "seconds": stats.prefill_seconds, "bytes": stats.prefill_bytes},
        "decode": {"tokens": stats.decode_tokens, "seconds": stats.decode_seconds, "bytes": stats.decode_bytes},
        "drafts": {
            "offered": answer.generation.drafts.stats.drafted,
            "accepted": answer.generation.drafts.stats.accepted,
            "acceptance": answer.generation.drafts.stats.acceptance,
            "drafters": {
                name: {"offered": made, "accepted": taken}
                for name, (made, taken) in answer.generation.drafts.stats.drafters.items()
            },
            "tokens_per_pass": answer.generation.drafts.stats.tokens_per_pass,
            "experts_per_pass": answer.generation.drafts.stats.experts_per_pass,
        },
    }


COMMANDS = (generate,)
