"""Tokenizers that spell spaces as a mark and bytes as <0xNN> (SentencePiece): encoding, decoding, streaming, stops."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

import tiny
from deepcalm.errors import CheckpointError, UnsupportedError
from deepcalm.files.pack import pack
from deepcalm.model import Model
from deepcalm.text import AnswerText, Spelling, Vocabulary, load_tokenizer

MARK = "\u2581"
CONFIG = {"vocab_size": 400, "bos_token_id": 1, "eos_token_ids": [2]}
WORDS = ("the", "cat", "sat", "on", "a", "mat", "in")
CHARS = "abcdefghimnorstuvwxyz.,!?\n\u00e9\u65e5"


def bpe() -> models.BPE:
    """Specials 0..2, bytes 3..258, letters and the mark, then merges that build the words with and without the mark."""
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])}
    vocab |= {c: len(vocab) + i for i, c in enumerate(MARK + CHARS)}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for text in (MARK + word, word):
            for i in range(1, len(text)):
                pair = (text[:i], text[i])
                if pair[0] in vocab and "".join(pair) not in vocab:
                    vocab["".join(pair)] = len(vocab)
                    merges.append(pair)
    vocab[MARK * 2], merges = len(vocab), [*merges, (MARK, MARK)]
    return models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")


def sequence(strip: bool) -> Any:
    steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])


SPACES = normalizers.Replace(" ", MARK)
KINDS: dict[str, tuple[Any, Any, Any]] = {  # normalizer, pre-tokenizer, decoder
    "MiniCPM3": (normalizers.Sequence([normalizers.Prepend(MARK), SPACES]), None, sequence(True)),
    "Llama": (None, pre_tokenizers.Metaspace(MARK, prepend_scheme="first", split=False), sequence(True)),
    "Gemma": (SPACES, pre_tokenizers.Split(" ", "merged_with_previous"), sequence(False)),
    "T5": (None, pre_tokenizers.Metaspace(MARK), decoders.Metaspace(MARK)),
    "never": (None, pre_tokenizers.Metaspace(MARK, "never"), decoders.Metaspace(MARK, "never")),
}  # fmt: skip
TEXTS = [
    "the cat sat on a mat", " the cat", "  the  cat ", "the\ncat\n", "\u65e5\u672c\u8a9e and \U0001f642!", "", " ",
    "caf\u00e9", "<s>the cat</s> sat<think>a mat", "x" * 3, "\t\x00z",
]  # fmt: skip


def tokenizer(kind: str) -> Tokenizer:
    t = Tokenizer(bpe())
    normalizer, pre_tokenizer, decoder = KINDS[kind]
    if normalizer is not None:
        t.normalizer = normalizer
    if pre_tokenizer is not None:
        t.pre_tokenizer = pre_tokenizer
    t.decoder = decoder
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in ("<unk>", "<s>", "</s>")])
    t.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return t


def vocabulary(kind: str) -> Vocabulary:
    return Vocabulary(load_tokenizer(tokenizer(kind).to_str().encode()), {"bos_token": "<s>"}, CONFIG)


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_and_decoding_are_those_of_tokenizers(kind: str) -> None:
    v, t = vocabulary(kind), tokenizer(kind)
    for text in TEXTS:
        ids = t.encode(text, add_special_tokens=False).ids
        assert v.encode(text) == ids
        assert v.decode(ids) == t.decode(ids, skip_special_tokens=True)
        decoder = v.decoder(whole=True)
        pieces = [decoder.feed(i) for i in ids]
        assert "".join(pieces) + decoder.flush() == v.decode(ids)
        assert all(piece.isprintable() or piece in ("", "\n", "\t", "\x00") for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids_decode_as_tokenizers_does(kind: str) -> None:
    """Runs of bytes are whole characters or nothing of one: tokenizers then takes no valid character along. (Nor is a
    text's first token two marks: Metaspace takes them both away, and here one space goes.)"""
    v, t = vocabulary(kind), tokenizer(kind)
    rng, n = random.Random(0), t.get_vocab_size()
    seen = [i for i in range(259, n) if t.id_to_token(i) not in (None, MARK * 2)]
    for _ in range(300):
        ids: list[int] = []
        for _ in range(rng.randrange(8)):
            ids += rng.choices([0, 1, 2, *seen], k=rng.randrange(3)) + rng.choices(seen)
            run = rng.choice([b"\xe6\x97", b"\xff", b"\x80\x80", "\u8a9e".encode(), "\U0001f642".encode(), b""])
            ids += [3 + b for b in run]
        assert v.decode(ids) == t.decode(ids, skip_special_tokens=True), ids


@pytest.mark.reference
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_says_the_same(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `reference`)")
    tokenizer(kind).save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs, v = transformers.AutoTokenizer.from_pretrained(tmp_path), vocabulary(kind)
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert v.encode(text) == ids
        assert v.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_goes_on_from_its_prompt(kind: str) -> None:
    """Prompt and answer, wherever the text is cut, are together what all of it decodes to."""
    v = vocabulary(kind)
    ids = v.encode("the cat sat \u8a9e on a mat")
    for cut in range(len(ids) + 1):
        answer = AnswerText(v)
        text = "".join([answer.feed(i) for i in ids[cut:]]) + answer.flush()
        if cut > 0 and not 3 <= ids[cut - 1] < 259:
            assert v.decode(ids[:cut]) + text == v.decode(ids), cut


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_stop_strings_see_spaces_and_bytes(data: st.DataObject) -> None:
    v = vocabulary("MiniCPM3")
    text = "the cat sat on \u8a9e a mat"
    begin = data.draw(st.integers(3, len(text) - 1))
    stop = text[begin : data.draw(st.integers(begin + 1, len(text)))]
    ids = v.encode(text)
    assert v.decode(ids[:1]) == "the"
    answer, out = AnswerText(v, stop), ""
    for i in ids[1:]:
        out += answer.feed(i)
        if answer.stopped:
            break
    assert answer.stopped and out == text[3 : text.index(stop, 3)]


def test_text_inside_a_conversation_gets_no_mark_of_its_own() -> None:
    """What a user writes like a control token is encoded as text; nothing is put before it."""
    for kind in KINDS:
        v = vocabulary(kind)
        ids = v.encode("</s>", plain=True)
        assert ids == [3 + ord("<"), 3 + ord("/"), v._tokenizer.token_to_id("s"), 3 + ord(">")]
        assert v.encode("cat", plain=True) == [v._tokenizer.token_to_id("cat")]
        assert v.encode("cat") == tokenizer(kind).encode("cat").ids  # the tokenizer itself is as it was


def test_names_show_marks_as_spaces_and_bytes_as_bytes() -> None:
    v = vocabulary("Llama")
    assert [v.name(i) for i in (1, 3 + 0xE6, v.encode("the")[0])] == ["<s>", "\\xe6", " the"]


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Sequence([decoders.Replace(MARK, " "), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.Replace(MARK, "long"), decoders.Fuse()]),
        decoders.Sequence([decoders.Replace("", ""), decoders.Fuse()]),
        decoders.Sequence([decoders.Replace(Regex(MARK), " "), decoders.Fuse()]),
        decoders.Sequence([decoders.Sequence([decoders.ByteLevel()])]),
        decoders.Sequence([decoders.Replace(MARK, " "), decoders.Fuse(), decoders.Strip(" ", 1, 1)]),
        decoders.Sequence([decoders.Replace(MARK, " "), decoders.Fuse(), decoders.Strip("_", 1, 0)]),
    ],
)
def test_other_decoders_are_refused(decoder: Any) -> None:
    with pytest.raises(
        UnsupportedError, match=r"^tokenizer\.json: decoder .* is not supported, expected 'ByteLevel', 'Meta"
    ):
        Spelling.of(json.loads(decoder.__getstate__()))
    with pytest.raises(UnsupportedError, match="decoder None is not supported"):
        Spelling.of(None)


def test_a_packed_model_talks_with_it(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "hf", "moonlight", dtype="f32", vocab_size=400, tokenizer="none")
    config = json.loads((folder / "config.json").read_text()) | {"bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    tokenizer("MiniCPM3").save(str(folder / "tokenizer.json"))
    template = "{{ bos_token }}{% for m in messages %}a {{ m['content'] }}</s>{% endfor %}"
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    pack(folder, tmp_path / "x")
    model = Model(tmp_path / "x")
    ids = model.encode("the cat")
    assert ids[0] == 1 and model.decode(ids) == "the cat"
    t = tokenizer("MiniCPM3")
    assert model.encode_chat([{"role": "user", "content": "the cat"}]) == t.encode("<s>a the cat</s>").ids
    ids = model.encode_chat([{"role": "user", "content": "the</s>cat"}])
    assert ids.count(2) == 1 and model.decode(ids) == "a the</s>cat"
    rest = t.encode("<s>a the</s>").ids[:-1] + model.vocabulary.encode("</s>cat", plain=True)
    assert ids == [*rest, 2]
    ids = model.encode("the cat")
    session = model.session(ctx=64)
    session.prefill(ids)
    new = list(session.generate(max_tokens=12))
    text = AnswerText(model.vocabulary)
    shown = "".join([text.feed(i) for i in new]) + text.flush()
    assert model.decode([*ids, *new]) == "the cat" + shown
    t.decoder = decoders.WordPiece()
    t.save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"decoder 'WordPiece' is not supported.* only token ids can be used"):
        pack(folder, tmp_path / "y")
