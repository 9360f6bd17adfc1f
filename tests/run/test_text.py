"""Prompt encoding, incremental decoding and stop strings (deepcalm.text), on the tiny byte-level tokenizer."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

import tiny
from deepcalm.errors import Error, PackedFileError, SessionError, UnsupportedError, one_line
from deepcalm.text import AnswerText, Decoder, StopMatcher, Vocabulary, decode_utf8, load_tokenizer

BOS, EOS, IM_END, USER, OBSERVATION = range(tiny.FIRST_SPECIAL, tiny.FIRST_SPECIAL + 5)
CONFIG = {"vocab_size": 300, "bos_token_id": BOS, "eos_token_ids": [EOS]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tiny.write_tokenizer(path)
    return load_tokenizer(path.read_bytes())


def test_vocabulary_valid_ids_and_eos(tokenizer: Tokenizer) -> None:
    v = Vocabulary(tokenizer, {"eos_token": {"content": "<|im_end|>"}}, CONFIG)
    assert v.n_valid == tiny.N_TOKENS  # 27 padding rows up to vocab_size are never sampled
    assert Vocabulary(tokenizer, {}, CONFIG | {"vocab_size": 270}).n_valid == 270
    # config, tokenizer_config and the turn ends that exist as special tokens
    assert v.eos_ids == {EOS, IM_END, USER, OBSERVATION}


@pytest.mark.parametrize(
    ("adds", "text", "want"),
    [
        (True, "the", [BOS, 257]),
        (True, "", [BOS]),
        (True, "<bos>the", [BOS, 257]),  # exactly one
        (False, "the", [257]),
        (False, "", [BOS]),  # nothing else to start from
        (False, "<bos>", [BOS]),
    ],
)
def test_raw_prompt_bos_rule(tokenizer: Tokenizer, adds: bool, text: str, want: list[int]) -> None:
    v = Vocabulary(tokenizer, {"bos_token": "<bos>", "add_bos_token": adds}, CONFIG)
    assert v.encode_prompt(text) == want


def test_raw_prompt_bos_of_post_processor(tokenizer: Tokenizer) -> None:
    t = Tokenizer.from_str(tokenizer.to_str())
    t.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    v = Vocabulary(t, {"add_bos_token": False}, CONFIG)
    assert v.encode_prompt("the") == [BOS, 257]
    assert v.encode("the") == [257]


def test_special_tokens_that_are_asked_for_show(tokenizer: Tokenizer) -> None:
    v = Vocabulary(tokenizer, {}, CONFIG)
    assert v.special_ids(["<|im_end|>", "<|user|>", "the"]) == {IM_END, USER}
    answer = AnswerText(v, "r|>", shown={IM_END, USER})
    assert [answer.feed(t) for t in (257, EOS, IM_END, OBSERVATION)] == ["the", "", "<|im_end|>", ""]
    assert answer.feed(USER) == "<|use" and answer.stopped
    assert v.decode([257, IM_END]) == "the"


def test_empty_prompt_without_bos_is_refused(tokenizer: Tokenizer) -> None:
    v = Vocabulary(tokenizer, {}, CONFIG | {"bos_token_id": None})
    with pytest.raises(SessionError, match="prompt is empty"):
        v.encode_prompt("")
    assert v.encode_prompt("a") == [ord("a")]


def test_encode_refuses_what_the_model_has_no_row_for(tokenizer: Tokenizer) -> None:
    with pytest.raises(SessionError, match="id 257, but the model has vocab_size 257"):
        Vocabulary(tokenizer, {}, CONFIG | {"vocab_size": 257}).encode("the")
    with pytest.raises(SessionError, match="not valid Unicode"):
        Vocabulary(tokenizer, {}, CONFIG).encode("\ud800")


def test_load_tokenizer_refuses_damage() -> None:
    for bad in (b"", b"{", b"\xff", b"[]", b'{"version":"1.0"}', b'{"model":{"type":"BPE","vocab":[],"merges":{}}}'):
        with pytest.raises(PackedFileError, match=r"^tokenizer\.json: "):
            load_tokenizer(bad)


def test_load_tokenizer_turns_truncation_and_padding_off(tokenizer: Tokenizer) -> None:
    t = Tokenizer.from_str(tokenizer.to_str())
    t.enable_truncation(2)
    t.enable_padding(length=9)
    assert load_tokenizer(t.to_str().encode()).encode("abc").ids == [97, 98, 99]


def test_a_decoder_that_is_not_known_is_refused() -> None:
    t = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    t.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedError, match="'WordPiece'"):
        Vocabulary(t, {}, CONFIG).decoder()


def test_decode_equals_tokenizers(tokenizer: Tokenizer) -> None:
    v = Vocabulary(tokenizer, {}, CONFIG)
    text = "the other – naïve 深 🙂<eos>\n\tin<think>x"
    ids = v.encode(text)
    assert EOS in ids
    assert (
        v.decode(ids)
        == tokenizer.decode(ids, skip_special_tokens=True)
        == text.replace("<eos>", "").replace("<think>", "")
    )
    assert v.decode([*range(0, 256), 280]) == bytes(range(256)).decode("utf-8", "replace")  # 280: no such token


def test_added_tokens_that_are_not_special_are_text(tokenizer: Tokenizer) -> None:
    t = Tokenizer.from_str(tokenizer.to_str())
    t.add_tokens([AddedToken("<é ü>", special=False)])
    v = Vocabulary(t, {}, CONFIG)
    assert v.n_valid == tiny.N_TOKENS + 1
    assert v.decode([97, tiny.N_TOKENS, 98]) == "a<é ü>b"


def test_tokens_outside_the_byte_level_alphabet_are_text_as_they_are() -> None:
    t = Tokenizer(models.BPE(vocab={"a": 0, "\u65e5\u672c": 1, "\u0120b": 2}, merges=[]))
    t.decoder = decoders.ByteLevel()
    assert Vocabulary(t, {}, CONFIG).decode([0, 1, 2]) == t.decode([0, 1, 2]) == "a\u65e5\u672c b"


def test_decoder_emits_complete_characters_only() -> None:
    d = Decoder(lambda token: bytes([token]))
    assert [d.feed(b) for b in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert d.flush() == ""
    assert [d.feed(b) for b in (0xF0, 0x9F, 0x41)] == ["", "", "�A"]  # a broken sequence does not swallow text
    assert [d.feed(0xE6), d.flush()] == ["", "�"]


@given(st.text(max_size=40), st.data())
@settings(max_examples=100, deadline=None)
def test_decoder_pieces_join_to_the_text(text: str, data: st.DataObject) -> None:
    raw = text.encode("utf-8", "surrogatepass")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    pieces = [raw[a:b] for a, b in itertools.pairwise([0, *cuts, len(raw)])]
    d = Decoder(pieces.__getitem__)
    assert "".join([d.feed(i) for i in range(len(pieces))]) + d.flush() == raw.decode("utf-8", "replace")


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    m, out = StopMatcher(stops), ""
    for piece in pieces:
        out += m.feed(piece)
        if m.stopped:
            return out, True
    return out + m.flush(), False


@pytest.mark.parametrize(
    ("stops", "text", "want"),
    [
        ([], "abc", ("abc", False)),
        (["END"], "one END two", ("one ", True)),
        (["END"], "one EN", ("one EN", False)),
        (["END"], "ENEND", ("EN", True)),
        (["aab"], "aaab", ("a", True)),
        (["\n\n", "\nQ:"], "x\nQ:y", ("x", True)),
        (["abcd", "bc"], "abcd", ("a", True)),  # the one that ends first
        (["bc", "abc"], "abc", ("", True)),  # of those the longest
        (["é🙂"], "caé🙂", ("ca", True)),
        (["x"], "x", ("", True)),
    ],
)
def test_stop_strings_do_not_depend_on_token_borders(stops: list[str], text: str, want: tuple[str, bool]) -> None:
    for k in range(len(text) + 1):
        for j in range(k, len(text) + 1):
            assert run(stops, [text[:k], text[k:j], text[j:]]) == want
    assert run(stops, list(text)) == want


def test_stop_matcher_holds_back_no_more_than_it_must() -> None:
    m = StopMatcher(["stop"])
    assert [m.feed(c) for c in "a st stx"] == ["a", " ", "", "", "st ", "", "", "stx"]
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
@settings(max_examples=200, deadline=None)
def test_stop_matcher_any_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    ends = [(i + len(s), i) for s in stops for i in range(len(text)) if text.startswith(s, i)]
    want = (text[: min(ends)[1]], True) if ends else (text, False)
    assert run(stops, pieces) == want


def test_decode_utf8_names_the_byte() -> None:
    assert decode_utf8("naïve".encode(), "f") == "naïve"
    with pytest.raises(Error, match=r"prompt.txt: not valid UTF-8 at byte 2 \(0xff\)"):
        decode_utf8(b"ab\xffc", "prompt.txt")


def test_one_line() -> None:
    assert one_line("a\n  b\x1b[31m\tc") == "a b [31m c"
    assert len(one_line("x" * 999)) == 300


def test_byte_alphabet_matches_tokenizers() -> None:
    assert set(pre_tokenizers.ByteLevel.alphabet()) == set(tiny.byte_alphabet())
