"""tiktoken.model -> tokenizer.json: the same ids as tiktoken on varied text, and refusals."""

from __future__ import annotations

import base64
import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import tiktoken
from tokenizers import Tokenizer

import tiny
from deepcalm.errors import CheckpointError
from deepcalm.files import packed
from deepcalm.files.pack import pack
from deepcalm.files.tiktoken import PATTERN, convert

TEXT = (
    "Once upon a time there was a robot who didn't like rain. It's raining, said the robot, and they'll laugh.\n"
    "Zwölf Boxkämpfer jagen Viktor über den großen Sylter Deich.  Été, naïve, Ünïcödé, ǅ ʰ İstanbul, ΑΒΓ αβγ, Привет.\n"
    "你好世界，今天很好。漢字とかな交じり文、한국어 텍스트. mixed混合text中文abc 12345 67 8 ３ ٣ 1000000 x2y\r\n\r\n"
    "def f(x):\n\treturn {'a': x**2, \"b\": [1, 2.5e-3]}  # comment ... !!! ???\n\n\n   indented    spaces \t tabs \n"
    "🎉🎉 emoji 👩‍👩‍👧 👍🏽 ①②③ ½ ™ © I'LL YOU'RE Don'T 'tis 's e\u0301 a\u0300b \u200b \u00a0 \u3000 end"
)
SPECIALS = {"<|im_end|>": 0, "[BOS]": 2}  # offsets after the last rank; 1 is reserved


def substrings(n: int, seed: int) -> dict[bytes, int]:
    """A rank table of the bytes and n random substrings of TEXT, shorter ones first."""
    rng, data = random.Random(seed), TEXT.encode()
    tokens: set[bytes] = set()
    while len(tokens) < n:
        i = rng.randrange(len(data) - 8)
        tokens.add(data[i : i + rng.randint(2, 7)])
    ordered = [bytes([b]) for b in rng.sample(range(256), 256)]
    ordered += sorted(tokens, key=lambda t: (len(t), rng.random()))
    return {t: i for i, t in enumerate(ordered)}


def trained(n: int) -> dict[bytes, int]:
    """A rank table of true byte pairs: n merges, most frequent first, inside space-separated words."""
    words = [[bytes([b]) for b in w.encode()] for w in TEXT.replace(" ", "\0 ").split("\0")]
    ranks = {bytes([b]): b for b in range(256)}
    for _ in range(n):
        pairs = Counter(p for w in words for p in pairwise(w))
        a, b = min(pairs, key=lambda p: (-pairs[p], p))
        if pairs[a, b] < 2 or a + b in ranks:
            break
        ranks[a + b] = len(ranks)
        for w in words:
            i = 0
            while i < len(w) - 1:
                if (w[i], w[i + 1]) == (a, b):
                    w[i : i + 2] = [a + b]
                i += 1
    return ranks


def lines(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(t) + f" {r}\n".encode() for t, r in ranks.items())


def config(ranks: dict[bytes, int]) -> bytes:
    tokens = {str(len(ranks) + i): {"content": t, "special": True} for t, i in SPECIALS.items()}
    return json.dumps({"added_tokens_decoder": tokens, "tokenizer_class": "TikTokenTokenizer"}).encode()


def samples(seed: int) -> list[str]:
    rng = random.Random(seed)
    alphabet = sorted(set(TEXT))
    out = [TEXT, *TEXT.split("\n"), "", " ", "\n", "a"]
    out += ["".join(rng.choice(alphabet) for _ in range(rng.randint(1, 50))) for _ in range(800)]
    out += [TEXT[i : i + rng.randint(1, 120)] for i in rng.sample(range(len(TEXT)), 200)]
    return out + [rng.choice("a '\n1中\t") * rng.randint(1, 40) for _ in range(100)]


@pytest.mark.parametrize("table", ["trained", 0, 1])
def test_ids_are_tiktoken_s(table: str | int) -> None:
    ranks = trained(400) if table == "trained" else substrings(1200, int(table))
    specials = {t: len(ranks) + i for t, i in SPECIALS.items()}
    want = tiktoken.Encoding("x", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    got = Tokenizer.from_str(convert(lines(ranks), config(ranks), "tiktoken.model").decode())
    for text in samples(len(ranks)):
        ids = want.encode(text, disallowed_special=())
        assert got.encode(text, add_special_tokens=False).ids == ids, text
        assert got.decode(ids) == text
    text = "a<|im_end|>b [BOS]\n"
    assert got.encode(text, add_special_tokens=False).ids == want.encode(text, allowed_special="all")
    assert got.get_vocab_size(with_added_tokens=True) == len(ranks) + 3
    assert got.token_to_id(f"<|reserved_token_{len(ranks) + 1}|>") == len(ranks) + 1


def test_packing_converts_tiktoken_model(tmp_path: Path) -> None:
    src = tiny.write(tmp_path / "hf", "kimi_k2", tokenizer="tiktoken")
    assert not (src / "tokenizer.json").exists()
    pack(src, tmp_path / "x")
    with packed.PackedFile(tmp_path / "x") as f:
        data = f.tokenizer_file("tokenizer.json")
    assert data is not None
    got = Tokenizer.from_str(data.decode())
    tiny.write_tokenizer(tmp_path / "hf.json")
    want = Tokenizer.from_file(str(tmp_path / "hf.json"))
    assert got.get_vocab() == want.get_vocab()
    text = "the other hour<|im_end|><|user|>an inner one"
    assert got.decode(got.encode(text).ids, skip_special_tokens=False) == text
    assert got.encode("the thin").ids[0] == want.encode("the").ids[0]


GOOD = {bytes([b]): b for b in range(256)} | {b"ab": 256}


@pytest.mark.parametrize(
    ("ranks", "tokenizer_config", "message"),
    [
        (b"", b"{}", "byte 0 is not a token"),
        (lines(GOOD).replace(b"AA== 0\n", b"AAA= 0\n"), b"{}", "byte 0 is not a token"),
        (lines(GOOD) + b"YWI= 257\n", b"{}", "line 258 is b'YWI= 257', expected a new token with rank 257"),
        (lines(GOOD) + b"YWJj 258\n", b"{}", "line 258 is .*, expected a new token with rank 257"),
        (lines(GOOD) + b"?? 257\n", b"{}", "line 258 is .*, expected base64 and a rank"),
        (lines(GOOD) + b"YWJj\n", b"{}", "line 258 is .*, expected base64 and a rank"),
        (lines(GOOD) + b"YWJj x\n", b"{}", "line 258 is .*, expected base64 and a rank"),
        (lines(GOOD) + b"YWJj 257 1\n", b"{}", "line 258 is .*, expected a new token"),
        (lines(GOOD) + base64.b64encode(b"x" * 1025) + b" 257\n", b"{}", "line 258 is .*, expected a new token"),
        (lines(GOOD), b"[]", "tokenizer_class"),
        (lines(GOOD), b'{"tokenizer_class": "QwenTokenizer"}', "expected TikTokenTokenizer"),
        (lines(GOOD), b'{"added_tokens_decoder": []}', "expected ids from 257 on, each with a content"),
        (lines(GOOD), b'{"added_tokens_decoder": {"5": {"content": "x"}}}', "added_tokens_decoder '5' is"),
        (lines(GOOD), b'{"added_tokens_decoder": {"99999999": {"content": "x"}}}', "added_tokens_decoder '99999999'"),
        (lines(GOOD), b'{"added_tokens_decoder": {"300": {"content": 1}}}', "added_tokens_decoder '300'"),
        (lines(GOOD), b'{"added_tokens_decoder": {"x": {"content": "x"}}}', "added_tokens_decoder 'x'"),
        (lines(GOOD), b"{", "not valid JSON"),
    ],
)
def test_refusals(ranks: bytes, tokenizer_config: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as e:
        convert(ranks, tokenizer_config, "tiktoken.model")
    assert "\n" not in str(e.value)
