"""The command chat: what is typed at a terminal, and its commands."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import deepcalm
import models
from commands import Run, Terminal, plain
from deepcalm.cli import chat
from deepcalm.cli.run import visible

LEFT, ENTER, CTRL_C, CTRL_D = "\x1b[D", "\r", "\x03", "\x04"


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "state"


def chat_answer(*turns: str, n: int = 6) -> str:
    """What the model answers to the last of user, assistant, user, ..."""
    m = models.model()
    messages = [{"role": chat.ROLES[i % 2], "content": t} for i, t in enumerate(turns)]
    ids = m.encode(m.apply_chat_template(messages), bos=False)
    return m.decode(list(m.session().generate(ids, max_tokens=n)))


def test_a_terminal_has_line_editing_and_turns_of_several_lines(path: Path, state: Path) -> None:
    t = Terminal("chat", "-m", path, "-n", "6", "-t", "1", XDG_STATE_HOME=str(state))
    opening = f"{path.name}, context 1280, greedy\n/help lists commands, Ctrl-D leaves\n>"
    assert t.until("leaves\n>").startswith(opening)
    t.type("Hi there" + LEFT * 2 + "X" + ENTER)  # "Hi theXre"
    done = r"prompt tokens were cached\n>"
    shown = t.until(done)
    one = chat_answer("Hi theXre")
    assert f"\n{visible(one)}\n6 tokens, ended by length; " in shown
    t.type("/reset" + ENTER + "a\\" + ENTER + "b" + ENTER)
    assert f"\n{visible(chat_answer(chr(10).join('ab')))}\n" in t.until(done)
    t.type("/reset" + ENTER + "\x1b[200~c\rd\n\x1b[201~")
    t.type(ENTER)
    assert f"\n{visible(chat_answer(chr(10).join('cd')))}\n" in t.until(done)
    t.type("forget me" + CTRL_C + CTRL_D)
    assert t.ends() == 0 and "\x1b[6n" not in t.shown
    history = state / "deepcalm" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600 and "+Hi theXre\n" in history.read_text()
    assert "forget me" not in history.read_text()


def test_ctrl_c_stops_an_answer_then_leaves(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    args = ("chat", "-m", models.endless(), "--ctx", "90000", "-t", "1")
    t = Terminal(*args, XDG_STATE_HOME=str(tmp_path / "file"))  # no folder: no history
    t.until(">")
    t.type("Hi" + ENTER)
    t.until("Hi\n(.|\n){40}")
    t.process.send_signal(signal.SIGINT)
    assert "ended by interrupted" in t.until(r"cached\n>")
    t.type(CTRL_C)
    assert t.ends() == 130 and "Traceback" not in t.shown and plain(t.shown).endswith("interrupted\n")


def test_history_can_be_left_out(path: Path, state: Path) -> None:
    t = Terminal("chat", "-m", path, "-n", "1", "-t", "1", "--no-history", "-q", XDG_STATE_HOME=str(state))
    t.type("Hi" + ENTER + "/quit" + ENTER)
    assert t.ends() == 0 and not state.exists() and "lists commands" not in t.shown


@pytest.mark.parametrize("bad", ["", "relative/path", "/proc/no/such"])
def test_history_that_cannot_be_kept_is_none(bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", bad)
    monkeypatch.setenv("HOME", str(tmp_path))
    want = None if bad.startswith("/") else tmp_path / ".local/state/deepcalm/chat_history"
    assert chat.history_file() == want


# ---- commands


def test_unknown_commands_are_refused_with_the_list(run: Run, path: Path) -> None:
    assert run("chat", "--top-p", "0.5")[2] == (  # no terminal: only what is used
        "the demo model tells stories: begin one, as in Once upon a time\n"
        "demo.dcalm, context 512, temp 0.7, top-p 0.5 (the checkpoint's for temp)\n"
    )
    code, out, err = run(
        "chat", "-m", path, "-n", "6", "-q", stdin=b"/foo bar\n/help\n /foo\n/load\n/load a\0b\n/load ~no.user/x\n"
    )
    assert code == 0 and out.decode() == chat_answer(" /foo") + "\n"
    assert "no command '/foo': /help, /reset, /system, /retry, /save, /load, /quit are" in err
    assert all(name in err for name in chat.HELP) and err.count("/load FILE: which file?") == 2
    assert "~no.user/x: " in err
    assert max(map(len, chat.help_text().splitlines())) < 80


def test_retry_answers_again_with_another_seed(run: Run, path: Path) -> None:
    lines = b"/retry\nHi\n/retry\nthe\n"
    args = ("chat", "-m", path, "-n", "6", "--temp", "3", "--seed", "7")
    code, out, err = run(*args, stdin=lines)
    assert code == 0 and "nothing to answer again" in err
    assert re.findall("seed (\\d+)", err) == ["7", "8", "8"]
    again = run(*args[:-1], "8", stdin=b"Hi\n")
    assert again[1] and again[1] in out and not out.startswith(again[1])
    _, out, err = run("chat", "-m", path, "-n", "6", stdin=b"Hi\n/retry\nthe\n")
    first = chat_answer("Hi")
    assert out.decode() == first + "\n" + first + "\n" + chat_answer("Hi", first, "the") + "\n"
    assert err.count("note: at temperature 0 the answer is the same, give --temp") == 1


def test_system_replaces_the_message(run: Run, path: Path) -> None:
    args = ("chat", "-m", path, "-n", "6", "-q")
    want = run(*args, "--system", "SYS", stdin=b"Hi\n")[1]
    assert run(*args, stdin=b"/system SYS\nHi\n")[:2] == (0, want)
    assert run(*args, "--system", "SYS", stdin=b"/system\nHi\n")[1].decode() == chat_answer("Hi") + "\n"


def test_a_conversation_is_saved_and_loaded(
    run: Run, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ("chat", "-m", path, "-n", "6")
    want = run(*args, "--system", "S", stdin=b"Hi\nthe\n/retry\n")[1]
    assert run(*args, "--system", "S", stdin=b"Hi\n/save a b\n")[0] == 0
    code, out, err = run(*args, stdin=b"/load a b\nthe\n/save a b\n")
    assert (code, out) == (0, b"".join(want.splitlines(keepends=True)[1:2]))
    assert "a b: 2 messages, " in err and "a b: 4 messages, " in err
    assert int(re.search(r"(\d+) of \d+ prompt tokens were cached", err)[1]) > 6  # type: ignore[index]
    again = run(*args, stdin=b"/load a b\n/retry\n")
    assert again[1] == out  # of what was saved last
    # the file of another model, none at all, and a saved prompt
    Path("x").write_text("precious")
    assert run("generate", "-m", path, "-n", "2", "--prompt-cache", "p", "the")[0] == 0
    before = Path("a b").read_bytes()
    lines = b"Hi\n/load x\n/save x\n/load none\n/load p\n/load .\n/save no/such\nthe\n"
    code, out, err = run(*args, stdin=lines)
    assert (code, out.decode()) == (0, chat_answer("Hi") + "\n" + chat_answer("Hi", chat_answer("Hi"), "the") + "\n")
    assert err.count("deepcalm: error: ") == 6 and "p: no conversation that chat has saved" in err
    code, _, err = run("chat", "-m", models.packed("moonlight"), stdin=b"/load a b\n/save a b\n")
    assert (code, err.count("model is ")) == (0, 2) and "force" not in err
    assert (Path("a b").read_bytes(), Path("x").read_text()) == (before, "precious")


USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "value",
    ["null", "{", "[" * 99_999, '{"system": null}', '{"system": 1, "messages": []}', '{"system": null, "messages": {}}',
     json.dumps({"system": None, "messages": [BOT]}), json.dumps({"system": None, "messages": [USER, USER]}),
     json.dumps({"system": None, "messages": [USER | {"x": 1}]}), '{"system": "\\ud800", "messages": []}',
     json.dumps({"system": None, "messages": [{"role": "user", "content": ["a"]}]})],
    ids=lambda v: v[:40],
)  # fmt: skip
def test_a_hostile_conversation_changes_nothing(run: Run, path: Path, tmp_path: Path, value: str) -> None:
    session = deepcalm.Model(path, threads=1).session()
    session.prefill([1, 2, 3])
    session.save(tmp_path / "s", conversation=value)
    code, out, err = run("chat", "-m", path, "-n", "6", stdin=f"Hi\n/load {tmp_path / 's'}\nthe\n".encode())
    assert (code, out.decode()) == (0, chat_answer("Hi") + "\n" + chat_answer("Hi", chat_answer("Hi"), "the") + "\n")
    assert err.count("deepcalm: error: ") == 1 and "conversation" in err


def test_a_full_context_is_never_cut_silently(run: Run, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("chat", "-m", path, "-n", "6", "--ctx", "64")
    lines = b"a" * 20 + b"\n" + b"b" * 20 + b"\n" + b"c" * 20 + b"\n"
    code, _, err = run(*args, stdin=lines)  # nobody to ask
    assert code == 0 and "tokens, the context 64 positions" in err and "/reset starts over" in err
    asked: list[str] = []
    monkeypatch.setattr(chat.Reader, "agrees", lambda _, question: not asked.append(question))
    code, out, err = run(*args, stdin=lines)
    one = chat_answer("a" * 20)
    two = chat_answer("a" * 20, one, "b" * 20)
    assert code == 0 and "error" not in err
    assert len(asked) == 1 and re.fullmatch(r"\d+ tokens, the context has 64 positions: forget the .*\?", asked[0])
    kept = ["b" * 20, two, "c" * 20] if "oldest turn?" in asked[0] else ["c" * 20]
    assert out.decode().splitlines()[-1] == chat_answer(*kept).splitlines()[-1]


def test_a_conversation_is_turns_and_their_answers() -> None:
    turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "there"}]
    assert chat.is_conversation({"system": None, "messages": turn * 2})
    for messages in (turn[:1], turn[1:], [*turn, turn[0]], [{"role": "user"}] * 2, None):
        assert not chat.is_conversation({"system": None, "messages": messages})
