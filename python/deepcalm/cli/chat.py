"""The command ``chat``: a conversation at a terminal, or line by line through pipes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import Error, SessionError, one_line
from ..files.safetensors import parse_json
from ..text import decode_utf8
from .common import FILE, RUNTIME, SAMPLING, one_file, open_model, open_session, options, read_stdin, say
from .run import cached_text, check_room, how_to_sample, sampling_text, saved, start, stream

if TYPE_CHECKING:
    from ..generation import TextGeneration
    from ..session import Session, Stats

Messages = list[dict[str, str]]
ROLES = ("user", "assistant")
HELP = {
    "/help": "this list",
    "/reset": "forget the conversation",
    "/system TEXT": "another system message; without TEXT none",
    "/retry": "another answer, with another seed",
    "/save FILE": "write the conversation and its cache",
    "/load FILE": "go on with a saved conversation",
    "/quit": "leave, as Ctrl-D does",
}
KEYS = """\
Ctrl-C stops an answer and keeps its text; at an empty prompt it leaves.
A \\ at the end of a line goes on in the next; a paste is one turn."""


class Reader:
    """Turns from a terminal, with editing and a history, or lines from stdin where it or stdout is none."""

    def __init__(self, quiet: bool, history: bool) -> None:
        self._prompt = "" if quiet else "> "
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._ask = terminal_prompt(history_file() if history else None) if self.interactive else None

    def turn(self) -> str | None:
        """The next one; None at the end of input."""
        if self._ask is not None:
            try:
                return self._ask(self._prompt).rstrip("\r\n")
            except EOFError:
                return None
        while True:
            if sys.stdin.isatty():
                click.echo(self._prompt, err=True, nl=False)
            data = read_stdin(sys.stdin.buffer.readline)
            if not data:
                say("", not (sys.stdin.isatty() and self._prompt))
                return None
            try:
                return decode_utf8(data, "standard input").rstrip("\r\n")
            except Error as e:
                say(f"deepcalm: error: {e}")

    def agrees(self, question: str) -> bool:
        """Whether the user says yes; no where nobody can be asked."""
        if not self.interactive:
            return False
        try:
            return click.confirm(question, default=True, err=True)
        except click.Abort:
            return False


def expanded(path: str) -> Path:
    """With ~ as the shell has it, where it can be: Path.expanduser fails where it cannot."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def history_file() -> Path | None:
    """Where lines are kept between chats, readable by their author alone; None where that cannot be written."""
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = expanded(state if state.startswith("/") else "~/.local/state") / "deepcalm"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(folder / "chat_history", os.O_RDWR | os.O_CREAT, 0o600))
    except OSError:
        return None
    return folder / "chat_history"


def terminal_prompt(history: Path | None) -> Callable[[str], str]:
    """Reads a turn with prompt_toolkit: Enter ends it, but not behind a backslash nor inside a paste."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output.vt100 import Vt100_Output

    class Lines(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # a full disk is no reason to lose the turn
                super().store_string(string.encode("utf-8", "replace").decode())

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    output = Vt100_Output.from_pty(sys.stdout, term=os.environ.get("TERM"))
    output.enable_cpr = False  # where the cursor is: a terminal that is slow to answer would answer into the next line
    lines: History = InMemoryHistory() if history is None else Lines(str(history))
    session: PromptSession[str] = PromptSession(
        history=lines, key_bindings=keys, multiline=True, enable_suspend=True, output=output
    )
    return lambda prompt: session.prompt(prompt, prompt_continuation="  ")


class Chat:
    """A conversation and the session that holds it; one method for each command.

    system: the system message; messages: the rest; asked: as they were before the last answer, for /retry.
    """

    def __init__(self, session: Session, system: str | None, template: Mapping[str, Any], reader: Reader) -> None:
        self.session = session
        self.system = system
        self.messages: Messages = []
        self.asked: Messages = []
        self._template = template
        self._reader = reader
        self.templated = session.model.chat_template is not None
        if self.templated or system is not None:
            self._encode([{"role": "user", "content": "x"}])  # fails before the first turn

    def _encode(self, messages: Messages) -> list[int]:
        model, opening = self.session.model, [] if self.system is None else [{"role": "system", "content": self.system}]
        if not self.templated and not opening:
            return model.encode(running_text(messages))
        return model.encode_chat([*opening, *messages], **self._template)

    def ids(self) -> list[int]:
        """The conversation as tokens that leave room for an answer.

        Raises:
            Error: they do not, and the user has not agreed to forget the oldest turns.
        """
        ids, ctx = self._encode(self.messages), self.session.ctx
        if len(ids) < ctx:
            return ids
        room = ctx - min(256, ctx // 4)
        for n in range(2, len(self.messages), 2):  # a turn and its answer
            shorter = self._encode(self.messages[n:])
            if len(shorter) <= room:
                turns = f"the oldest {n // 2} turns" if n > 2 else "the oldest turn"
                if self._reader.agrees(f"{len(ids)} tokens, the context has {ctx} positions: forget {turns}?"):
                    del self.messages[:n]
                    return shorter
                break
        check_room(len(ids), self.session)
        return ids

    def turn(self, text: str | None, max_tokens: int | None, sampling: Mapping[str, Any], quiet: bool) -> None:
        """Shows the answer to ``text``, or another one to what was last asked."""
        before, self.messages = self.messages, [*self.messages] if text is not None else [*self.asked]
        if text is not None:
            self.messages.append({"role": "user", "content": text})
        try:
            ids = self.ids()
        except Error as e:
            say(f"deepcalm: error: {e}; /reset starts over")
            self.messages = before
            return
        self.asked = [*self.messages]
        kept, stats = self.session.reuse(ids), self.session.stats
        cached = self.session.core.pos
        answer, seed = start(self.session, ids[kept:], max_tokens, **sampling)
        stream(answer, quiet)
        if answer.reason == "eos" and not self.templated:
            self.messages = []
        elif answer.text:
            self.messages.append({"role": "assistant", "content": answer.text})
        else:
            self.messages.pop()
        say(brief(answer, self.session.stats - stats, seed) + cached_text(cached, ids), quiet)

    def set_system(self, text: str) -> None:
        """/system"""
        before, self.system = self.system, text or None
        try:
            self._encode([{"role": "user", "content": "x"}])
        except Error:
            self.system = before
            raise

    def save(self, path: Path) -> None:
        """/save: a saved session with the conversation beside it; nothing else is overwritten."""
        if os.path.lexists(path):
            saved(self.session, path, "name another file")
        value = {"system": self.system, "messages": self.messages}
        self.session.save(path, conversation=json.dumps(value))
        say(f"{path}: {len(self.messages)} messages, {self.session.pos} positions")

    def load(self, path: Path) -> None:
        """/load: all of it, or an Error that leaves the conversation as it is."""
        state, notes = saved(self.session, path, "and so is the conversation")
        value = parse_json(notes.get("conversation", "null").encode(), f"{path}: conversation", SessionError)
        if not is_conversation(value) or (value["system"] is not None and not self.templated):
            raise SessionError(f"{path}: no conversation that chat has saved")
        self.session.load_state(state)
        self.system, self.messages = value["system"], value["messages"]
        self.asked = self.messages[:-1]
        say(f"{path}: {len(self.messages)} messages, {self.session.pos} positions")


def is_conversation(value: Any) -> bool:
    """Whether ``Chat.save`` may have written this."""
    if not isinstance(value, dict) or value.keys() != {"system", "messages"}:
        return False
    system, messages = value["system"], value["messages"]
    return isinstance(system, str | None) and isinstance(messages, list) and len(messages) % 2 == 0 and all(
        isinstance(m, dict) and m.keys() == {"role", "content"} and m["role"] == ROLES[i % 2]
        and isinstance(m["content"], str) for i, m in enumerate(messages)
    )  # fmt: skip


def brief(answer: TextGeneration, stats: Stats, seed: int | None) -> str:
    """The line after an answer: what it was, how fast, how full the context is."""
    session, line = answer.generation.session, f"{len(answer.generation.tokens)} tokens, ended by {answer.reason}"
    if stats.decode_tokens:
        line += f"; {stats.decode_rate:.1f} tok/s, {stats.decode_bandwidth:.2f} GB/s"
    return line + f"; {session.pos} of {session.ctx} positions" + ("" if seed is None else f"; seed {seed}")


def running_text(messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation without a template, as the terminal shows it: each answer follows its line, and ends one."""
    return "".join(m["content"] + ("\n" if m["role"] == "assistant" else "") for m in messages)


def help_text() -> str:
    """The commands."""
    width = max(map(len, HELP))
    return "".join(f"{name:<{width}}  {what}\n" for name, what in HELP.items()) + KEYS


def command(chat: Chat, line: str) -> None:
    """What a line that begins with "/" asks for, but /quit and /retry. Raises Error if it cannot be done."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/help":
        say(help_text())
    elif name == "/reset":
        chat.messages, chat.asked = [], []
        chat.session.truncate(0)
    elif name == "/system":
        chat.set_system(rest)
    elif name in ("/save", "/load"):
        if not rest or "\0" in rest:
            raise SessionError(f"{name} FILE: which file?")
        (chat.save if name == "/save" else chat.load)(expanded(rest))
    else:
        raise SessionError(f"no command {one_line(name, 40)!r}: {', '.join(n.split()[0] for n in HELP)} are "
                           "(a space before the / makes it text)")  # fmt: skip


@click.command(
    name="chat",
    epilog="""\b
Examples:
  deepcalm chat -m v2-lite-chat.dcalm
  deepcalm chat -m v2-lite-chat.dcalm --system "Answer in French." --temp 0.7
Commands: /reset forgets the conversation, /quit or Ctrl-D leaves, /help lists the others; Ctrl-C stops an answer and
keeps its text.""",
)
@click.argument("file", type=FILE, required=False)
@options("--model", "--max-tokens", *SAMPLING, "--system", "--chat-template-kwargs")
@click.option("--history/--no-history", default=True, show_default=True,
              help="Keep lines typed at a terminal, in $XDG_STATE_HOME/deepcalm/chat_history.")  # fmt: skip
@options(*RUNTIME, "--lock", "--quiet")
def chat_command(
    path: Path | None, file: Path | None, max_tokens: int | None, system: str | None, template_options: dict[str, Any],
    history: bool, device: str, threads: int | None, isa: str | None, ctx: int | None, kv: str, lock: bool,
    quiet: bool, **sampling: Any,
) -> int:  # fmt: skip
    """Talk with a model, FILE or the demo model.

    At a terminal with line editing and a history, through pipes line by line. Each turn renders the whole conversation
    with the checkpoint's template and computes only what follows the longest prefix that is still in the cache. A model
    without a template continues the text so far, your line included, until it ends it; the next line begins a new one.
    The demo model answers with stories, begun by you or by itself.
    """
    model = open_model(one_file(path, file), device, threads, isa, quiet, lock)
    if path is None and file is None:
        say("the demo model tells stories: begin one, as in Once upon a time", quiet)
    elif model.chat_template is None and system is None:
        say("this model has no chat template: it continues the text, yours and its own; /reset begins a new one", quiet)
    reader = Reader(quiet, history)
    chat = Chat(open_session(model, ctx, kv, sampling, quiet), system, template_options, reader)
    sampling |= how_to_sample(model, quiet, **sampling)
    say(f"{model.path.name}, context {chat.session.ctx}, {sampling_text(sampling, model)}", quiet)
    say("/help lists commands, Ctrl-D leaves", quiet or not reader.interactive)
    while (line := reader.turn()) is not None and line.strip() != "/quit":
        try:
            if line.strip() == "/retry":
                if not chat.asked:
                    raise SessionError("nothing to answer again")
                if sampling["seed"] is not None:
                    sampling["seed"] = (sampling["seed"] + 1) % 2**64
                say("note: at temperature 0 the answer is the same, give --temp", quiet or sampling["temp"] != 0)
                chat.turn(None, max_tokens, sampling, quiet)
            elif line.startswith("/"):
                command(chat, line)
            elif line.strip():
                chat.turn(line, max_tokens, sampling, quiet)
        except (Error, OSError) as e:
            if isinstance(e, OSError) and e.filename is None:
                raise
            say(f"deepcalm: error: {e}")
    return 0


COMMANDS = (chat_command,)
