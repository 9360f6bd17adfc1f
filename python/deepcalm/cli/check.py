"""The commands ``verify`` and ``perplexity``: is it right?"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import Error, one_line
from ..tables import columns
from ..text import decode_utf8
from .common import FILE, RUNTIME, model_file, one_file, open_model, options, progress, read_text, write, write_json

if TYPE_CHECKING:
    from ..check.perplexity import Perplexity
    from ..check.verify import Report


def _layers(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[int] | None:
    """ "0-2,5" -> [0, 1, 2, 5]"""
    out: set[int] = set()
    for part in (value or "").split(",") if value is not None else ():
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part, re.ASCII)
        if match is None or int(match[1]) > int(match[2] or match[1]):
            raise click.BadParameter(f"{part!r}, expected numbers and ranges as in 0-2,5")
        out |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return None if value is None else sorted(out)


@click.command(
    short_help="Compare a packed file with its checkpoint.",
    epilog="""\b
Examples:
  deepcalm verify v2-lite.dcalm --against ~/models/DeepSeek-V2-Lite
  deepcalm verify v3.dcalm --against ~/models/DeepSeek-V3 --layers 0-4,61
  deepcalm verify v2-lite.dcalm --against ~/models/DeepSeek-V2-Lite --json | jq .first_divergence
Exit code 0: everything that was compared agrees; 1: something does not, and the first place is named.""",
)
@click.argument("file", type=FILE, required=False)
@click.option("--against", type=FILE, required=True, metavar="DIR", help="The checkpoint that FILE was packed from.")
@click.option(
    "--layers", metavar="A-B,...", callback=_layers, help="Only these layers; the MTP layer is the last plus one."
)
@click.option("--prompt", metavar="TEXT", help="The text to run (default: a built-in one).")
@click.option("--tokens", type=click.IntRange(8, 4096), default=32, show_default=True, metavar="N",
              help="Tokens of it, at least 8.")  # fmt: skip
@options("--model", "--threads", "--isa", "--kv", "--json", "--quiet")
def verify(
    path: Path | None, file: Path | None, against: Path, layers: list[int] | None, prompt: str | None, tokens: int,
    threads: int | None, isa: str | None, kv: str, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Tell whether the packed FILE computes what its checkpoint says.

    Compares the configuration, tokenizer and chat template, every weight, and every stage of every layer with a second
    implementation in numpy; then the logits with themselves over threads, passes and drafts, to the bit, and with the
    checkpoint's: what packing costs must be what the file's weights explain, and less than ignoring the text would
    cost. At the end stand what was not compared, and the verdict.
    """
    from ..check.verify import verify as compare

    if (file := one_file(path, file)) is None:
        raise click.UsageError("Missing argument 'FILE'.")
    file = model_file(file)
    try:
        with progress(f"verifying {file.name}", quiet) as update:
            report = compare(file, against, layers=layers, prompt=prompt, tokens=tokens, isa=isa, kv=kv,
                             progress=update, threads=threads)  # fmt: skip
    except ValueError as e:  # layers or tokens that this model does not have
        raise Error(str(e)) from None
    write_json(report.as_dict()) if as_json else write(verify_text(report))
    if (first := report.first_divergence) is not None:
        more = len(report.divergences) - 1
        raise Error(one_line(str(first), 400) + (f"; and {more} more" if more else ""))


def verify_text(r: Report) -> str:
    """One line per comparison, then the effect, what was not looked at, and the verdict."""
    rows = [("", "compared", "", "worst", "allowed", "")]
    for c in r.checks:
        unit = {"weights": " half steps", "arithmetic": " rel. RMS"}.get(c.leg, " differ")
        items = {"texts": "files", "weights": "tensors", "arithmetic": "taps", "exactness": "runs"}.get(c.leg, "")
        items = items[:-1] if c.items == 1 else items
        worst = f"{c.error:.2f}" if c.leg == "weights" else f"{c.error:.2g}"
        where = f" ({c.at})" if c.at and c.error else ""
        rows.append((c.leg, c.what, f"{c.items} {items}", worst + unit + where, f"{c.allowed:g}",
                     "ok" if c.ok else "DIFFERS"))  # fmt: skip
    lines = [f"{key:<32}{value:.6g}" for key, value in r.effect.items()]
    effect = f"\neffect of packing, {r.tokens} tokens, {r.kv} cache, against the checkpoint in f64\n" if lines else ""
    lines += ["", *(f"note: {one_line(note, 200)}" for note in r.notes)]
    if r.not_compared:
        lines.append(f"not compared: {', '.join(r.not_compared)}")
    lines += ["", f"verdict: {r.verdict}"]
    return columns(rows) + effect + "".join(line + "\n" for line in lines)


@click.command(
    short_help="Score a text with a model.",
    epilog="""\b
Examples:
  deepcalm perplexity v2-lite.dcalm book.txt --ctx 2048
  deepcalm perplexity v2-lite-q4.dcalm book.txt --kl-against v2-lite-bf16.dcalm --json""",
)
@click.argument("file", type=FILE, required=False)
@click.argument("text", required=False)
@click.option(
    "--kl-against", type=FILE, metavar="FILE", help="Also the divergence from another packed file of the same model."
)
@options("--model", *RUNTIME, "--json", "--quiet")
def perplexity(
    path: Path | None, file: Path | None, text: str | None, kl_against: Path | None, device: str,
    threads: int | None, isa: str | None, ctx: int | None, kv: str, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Score the text file TEXT ("-": stdin) with the packed model FILE.

    The text is cut into windows of --ctx positions; every token with a position before it in its window is scored.
    """
    from ..check.perplexity import perplexity as score

    if path is not None and text is None and file is not None:  # the one argument is TEXT
        file, text = None, str(file)
    if (file := one_file(path, file)) is None or text is None:
        raise click.UsageError(f"Missing argument '{'FILE' if file is None else 'TEXT'}'.")
    content = decode_utf8(read_text(text), "standard input" if text == "-" else text)
    model = open_model(file, device, threads, isa, quiet)
    other = open_model(kl_against, device, threads, isa, quiet) if kl_against is not None else None
    with progress("scoring", quiet) as update:
        result = score(model, content, ctx, kv, other, update)
    if as_json:
        values = dataclasses.asdict(result)
        write_json(values | {"perplexity": result.perplexity, "standard_error": result.standard_error})
    else:
        write(perplexity_text(result))


def perplexity_text(r: Perplexity) -> str:
    """The result as lines."""
    start = "each starting with bos" if r.bos else "without bos"
    lines = [
        f"perplexity {r.perplexity:.4f} +- {r.standard_error:.4f}",
        f"nll {r.nll_mean:.5f} +- {r.nll_standard_error:.5f} nats per token",
        f"{r.n_scored} of {r.n_tokens} tokens scored, {r.n_windows} windows of {r.ctx} positions, {start}",
    ]
    if (d := r.divergence) is not None:
        lines.append(f"KL({d.against} || this) {d.kl_mean:.6f} +- {d.kl_standard_error:.6f} nats per token, "
                     f"same best token at {100 * d.argmax_agreement:.2f} % of positions")  # fmt: skip
    return "\n".join(lines) + "\n"


COMMANDS = (verify, perplexity)
