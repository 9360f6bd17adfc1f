"""The embedded demo model: intact, as good as it was when it was packed, and what the README's command shows."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

import deepcalm
from deepcalm.check.perplexity import perplexity
from deepcalm.files.packed import PackedFile

DATA = Path(__file__).parents[1] / "data"
CARD = (deepcalm.demo_path().parent / "MODEL_CARD.md").read_text(encoding="utf-8")
# Perplexity of held-out text (windows of 512), as measured when the file was made; with f32 weights 1.426 and 32.741.
PERPLEXITY = {"stories": 1.4254, "books": 32.748}


@pytest.fixture(scope="module")
def model() -> deepcalm.Model:
    return deepcalm.Model(deepcalm.demo_path(), threads=1)


def test_demo_file_is_intact_and_documented(model: deepcalm.Model) -> None:
    with PackedFile(deepcalm.demo_path()) as packed:
        assert packed.check() == []
        n_params = 0
        for entry in packed.entries.values():
            if entry.kind in ("tiled", "plain") and entry.role != "draft_head":
                rows = sum(entry.parts) if entry.parts else entry.shape[-2] if len(entry.shape) > 1 else entry.shape[0]
                n_params += entry.n_slices * rows * (entry.shape[-1] if len(entry.shape) > 1 else 1)
    assert f"{n_params:,} parameters" in CARD
    named = dict(re.findall(r"\| (\w+) \| ([\w.-]+) ", CARD))
    numbers = {k: v for k, v in named.items() if k in model.config}
    assert len(numbers) > 12 and all(model.config[k] == float(v) for k, v in numbers.items())
    with (deepcalm.demo_path().parent / "training_log.csv").open() as f:
        log = list(csv.DictReader(f))
    assert int(log[-1]["step"]) > 5500 and float(log[-1]["main_loss"]) < float(log[0]["main_loss"]) / 4


@pytest.mark.by_turns("text", 1)
@pytest.mark.parametrize("text", list(PERPLEXITY))
def test_demo_perplexity_is_what_it_was(model: deepcalm.Model, text: str) -> None:
    result = perplexity(model, (DATA / f"{text}.txt").read_text(encoding="utf-8"), ctx=512)
    assert result.n_scored > 9900 and result.bos
    # Instruction sets differ by 1e-4 here; a wrong scale, eps or routing weight is off by far more than 0.3 %.
    assert result.perplexity == pytest.approx(PERPLEXITY[text], rel=3e-3)


def test_demo_tells_a_story_and_ends_it(model: deepcalm.Model) -> None:
    session = model.session()
    generation = session.generate(model.encode("Once upon a time"), max_tokens=500)
    text = model.decode(list(generation))
    assert generation.reason == "eos" and 150 < len(generation.tokens) < 400
    words = re.findall(r"[a-z]+", text.lower())
    held_out = (DATA / "stories.txt").read_text() + (DATA / "books.txt").read_text()
    known = set(re.findall(r"[a-z]+", held_out.lower()))
    assert sum(w in known for w in words) > 0.9 * len(words)  # English words, in sentences
    assert len(set(words)) > 60 and text.count(". ") + text.count(".\n") > 8


def test_demo_drafts_are_accepted_as_often_as_the_card_says(model: deepcalm.Model) -> None:
    drafted = accepted = 0
    for story in (DATA / "stories.txt").read_text(encoding="utf-8").split("<|endoftext|><|begin_of_text|>")[:4]:
        ids = model.encode(story)[:40]
        generation = model.session(mtp=True).generate(ids, max_tokens=60, draft=1)
        plain = list(model.session().generate(ids, max_tokens=60))
        assert list(generation) == plain
        drafted += generation.drafts.stats.drafted
        accepted += generation.drafts.stats.accepted
    assert drafted > 90 and accepted / drafted > 0.85  # own stories: 94.9 % in the model card


def test_demo_template_is_that_of_the_recipe() -> None:
    recipe = (Path(__file__).parents[2] / "tools" / "train_demo.py").read_text(encoding="utf-8")
    (template,) = re.findall(r'^TEMPLATE = """\\\n(.*?)"""$', recipe, re.M | re.S)
    with PackedFile(deepcalm.demo_path()) as packed:
        assert packed.tokenizer_file("chat_template.jinja") == template.encode()


USER, BOT, SYSTEM = "user", "assistant", "system"
BOS, EOS = "<|begin_of_text|>", "<|endoftext|>"


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([(USER, "Once upon a time ")], "Once upon a time"),
        ([(USER, "Long ago"), (BOT, ", there was a cat")], "Long ago, there was a cat"),
        ([(USER, "Long ago"), (BOT, ", there"), (USER, "was a cat")], "Long ago, there was a cat"),
        ([(USER, "Long ago"), (BOT, ", there"), (USER, ", far away")], "Long ago, there, far away"),
        ([(USER, "Long ago"), (BOT, " it was.\n"), (USER, "In a house")], "In a house"),
        ([(USER, "Long ago"), (BOT, " and" * 300), (USER, "In a house")], "In a house"),
        ([(USER, " Hello!")], f"Hello!{EOS}{BOS}"),
        ([(USER, "Hello!"), (BOT, "Once there"), (USER, "was")], f"Hello!{EOS}{BOS}Once there was"),
        ([(USER, "Hello!"), (BOT, "It was so."), (USER, "More")], f"More{EOS}{BOS}"),
        ([(SYSTEM, "Mia sat. "), (USER, "One day")], "Mia sat. One day"),
        ([(SYSTEM, "Mia sat. "), (USER, "Hello!")], f"Hello!{EOS}{BOS}Mia sat."),
        ([(SYSTEM, "Mia sat.")], "Mia sat."),
    ],
)  # fmt: skip
def test_demo_template_makes_turns_of_stories(
    model: deepcalm.Model, messages: list[tuple[str, str]], text: str
) -> None:
    assert model.apply_chat_template([{"role": r, "content": c} for r, c in messages]) == BOS + text


def test_demo_answers_in_a_chat(model: deepcalm.Model) -> None:
    """A line that opens a story is continued as without the template, any other is answered with a whole story."""
    once = [{"role": USER, "content": "Once upon a time"}]
    assert model.encode_chat(once) == model.encode("Once upon a time")
    generation = model.session().generate(model.encode_chat([{"role": USER, "content": "Tell me about a dog!"}]))
    story = model.decode(list(generation))
    assert generation.reason == "eos" and 150 < len(generation.tokens) < 400
    assert re.match(r"(Once|Long ago|There|In a) ", story) and story.endswith(".")


def test_demo_readme_command_prints_a_story() -> None:
    command = [sys.executable, "-m", "deepcalm", "generate", "Once upon a time", "-n", "60", "--seed", "1"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.split()) > 30 and run.stdout.isprintable() is False and "\ufffd" not in run.stdout
    assert "tok/s" in run.stderr and "GB/s" in run.stderr
