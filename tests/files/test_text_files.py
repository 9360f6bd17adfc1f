"""A checkpoint's tokenizer and template files: tokens as transformers reads them, and files that nobody can use."""

# ruff: noqa: E501  (tables: one case, one line)
from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import tiny
from deepcalm.errors import CheckpointError, Error
from deepcalm.files.pack import pack, plan
from deepcalm.files.packed import PackedFile
from deepcalm.files.text_files import FILES, LEGACY, TextFiles
from deepcalm.model import Model
from deepcalm.sampling import Sampling
from deepcalm.text import token_content

TEXT = "the <tool> a<bos>b<eos>\n<bos> <pic>é<end>"
CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}
N = tiny.FIRST_SPECIAL


def tokenizer_json(*added: dict[str, Any], drop: Collection[int] = ()) -> str:
    """The tiny byte-level tokenizer with no special tokens but ``added``, and without the ids ``drop``."""
    pieces = [*tiny.byte_alphabet(), *(a + b for a, b in tiny.MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(pieces)}, merges=list(tiny.MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    value = json.loads(tokenizer.to_str())
    value["model"]["vocab"] = {t: i for t, i in value["model"]["vocab"].items() if i not in drop}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    value["added_tokens"] = [flags | t for t in added]
    return json.dumps(value)


def token(text: str, **flags: Any) -> dict[str, Any]:
    return {"content": text, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False, **flags}


BOS_EOS = {"bos_token": "<bos>", "eos_token": "<eos>"}
LIST = {"additional_special_tokens": ["<pic>", "<end>"]}
DECODER = {str(N): token("<bos>", special=True), str(N + 1): token("<tool>", special=False), str(N + 2): token("<eos>")}
IN_FILE = {"id": N, "content": "<tool>"}, {"id": N + 1, "content": "<bos>"}, {"id": N + 2, "content": "<eos>"}
Seen = tuple[list[int], int, list[int], "int | None", int]
CASES: dict[str, tuple[dict[str, str], Seen]] = {}  # files, and what transformers 5.24 makes of TEXT with them


def case(name: str, want: Seen, *added: dict[str, Any], **files: dict[str, Any]) -> None:
    CASES[name] = (
        {"tokenizer.json": tokenizer_json(*added)} | {f"{k}.json": json.dumps(v) for k, v in files.items()},
        want,
    )


# fmt: off
case("nothing", ([], 39, [], None, 265), tokenizer_config=CLASS)
case("named only", ([265, 266, 265, 268, 267], 19, [265, 266, 267, 268], 266, 269), tokenizer_config=CLASS | BOS_EOS | {"image_token": "<pic>", "x_token": token("<end>", __type="AddedToken")})
case("named and known", ([265, 266, 267, 266], 22, [266, 267], 267, 268), *IN_FILE, tokenizer_config=CLASS | BOS_EOS)
case("objects", ([265, 266, 265], 27, [265, 266], 266, 267), tokenizer_config=CLASS | {k: token(v, __type="AddedToken", normalized=True) for k, v in BOS_EOS.items()})
case("decoder", ([266, 265, 267, 265], 22, [265, 267], 267, 268), tokenizer_config=CLASS | BOS_EOS | {"added_tokens_decoder": DECODER})
case("decoder with other ids", ([266, 265, 267, 265], 22, [265, 267], 267, 268), tokenizer_config=CLASS | BOS_EOS | {"added_tokens_decoder": {str(int(k) + 7): v for k, v in DECODER.items()}})
case("flags in the decoder", ([265, 266, 266], 24, [265, 266, 267], 267, 268), *IN_FILE, tokenizer_config=CLASS | BOS_EOS | {"added_tokens_decoder": {str(N): token("<tool>", lstrip=True, special=True), str(N + 1): token("<bos>", rstrip=True), str(N + 2): token("<eos>", single_word=True)}})
case("list", ([265, 266], 31, [265, 266], None, 267), tokenizer_config=CLASS | LIST)
case("list beside a decoder", ([266, 265, 267, 265, 269, 268], 14, [265, 267, 269], 267, 270), tokenizer_config=CLASS | BOS_EOS | LIST | {"added_tokens_decoder": DECODER | {str(N + 3): token("<end>", special=False)}})
case("extra list", ([265], 34, [265], None, 266), tokenizer_config=CLASS | LIST | {"extra_special_tokens": ["<tool>"]})
case("extra object", ([265, 266], 31, [265, 266], None, 267), tokenizer_config=CLASS | {"extra_special_tokens": {"pic_token": "<pic>", "end_token": "<end>"}})
case("added_tokens.json", ([266, 265, 267, 265], 22, [265, 267], 267, 268), tokenizer_config=CLASS | BOS_EOS, added_tokens={"<bos>": N, "<tool>": N + 1, "<eos>": N + 2})
case("added_tokens.json over known", ([265, 266, 267, 266, 269, 268], 14, [268, 269], None, 270), *IN_FILE, tokenizer_config=CLASS | LIST, added_tokens={"<end>": N + 9, "<pic>": N + 1})
case("special_tokens_map.json", ([265, 266, 267, 266, 268, 269], 14, [266, 267, 268, 269], 267, 270), *IN_FILE, tokenizer_config=CLASS, special_tokens_map={"bos_token": token("<bos>"), "eos_token": "<eos>"} | LIST)
case("map and added", ([269, 265, 266, 265, 267, 268], 14, [265, 266], 266, 270), special_tokens_map=BOS_EOS | LIST, added_tokens={"<bos>": N, "<eos>": N + 1, "<pic>": N + 2, "<end>": N + 3, "<tool>": N + 4}, tokenizer_config=CLASS)
case("map over the config", ([267, 266, 265], 26, [265, 266, 267], 265, 268), tokenizer_config=CLASS | {"eos_token": "<bos>", "extra_special_tokens": ["<pic>"]}, special_tokens_map={"eos_token": "<end>", "extra_special_tokens": ["<tool>", "<pic>"]})
case("a decoder hides the older files", ([266, 265, 267, 265], 22, [265], None, 268), tokenizer_config=CLASS | {"added_tokens_decoder": DECODER}, special_tokens_map=BOS_EOS, added_tokens={"<end>": N})
# fmt: on


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    """A checkpoint with these files, and no others of their kind."""
    tiny.write(folder, "v2_lite", vocab_size=300)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    config = json.loads((folder / "config.json").read_text()) | {"bos_token_id": None, "eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def seen(tokenizer: Tokenizer, eos: str | None) -> Seen:
    """What TEXT becomes: its ids from N on, how many ids in all; the special ids, eos, one past the last id."""
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    special = [i for i, t in sorted(tokenizer.get_added_tokens_decoder().items()) if t.special]
    n = max(tokenizer.get_vocab().values()) + 1
    return [i for i in ids if i >= N], len(ids), special, None if eos is None else tokenizer.token_to_id(eos), n


def opened(folder: Path, files: Mapping[str, str | bytes]) -> tuple[Model, list[str]]:
    """The packed model, and the packer's notes."""
    notes = pack(write(folder / "hf", files), folder / "x.dcalm").notes
    return Model(folder / "x.dcalm"), notes


@pytest.mark.parametrize("name", CASES)
def test_declared_tokens_have_the_ids_and_flags_of_transformers(name: str) -> None:
    files, want = CASES[name]
    text = TextFiles({name: data.encode() for name, data in files.items()}, "", Error)
    assert seen(text.tokenizer, token_content(text.config.get("eos_token"))) == want


@pytest.mark.reference
@pytest.mark.parametrize("name", CASES)
def test_stored_expectations_are_those_of_live_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `reference`)")
    files, want = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoTokenizer.from_pretrained(write(tmp_path, files))
    assert seen(theirs.backend_tokenizer, theirs.eos_token) == want
    assert (
        theirs.encode(TEXT, add_special_tokens=False)
        == theirs.backend_tokenizer.encode(TEXT, add_special_tokens=False).ids
    )


@pytest.mark.parametrize("name", ["decoder", "special_tokens_map.json", "map and added"])
def test_a_packed_model_reads_them_all(name: str, tmp_path: Path) -> None:
    files, (high, length, special, eos, n) = CASES[name]
    model, notes = opened(tmp_path, files)
    assert notes == []
    ids = model.encode(TEXT)
    assert [i for i in ids if i >= N] == high and len(ids) == length
    assert model.n_valid == n and model.eos_ids == {eos}
    assert not any(model.decode([i]) for i in special) and all(model.decode([i]) for i in set(high) - set(special))


def test_older_files_are_not_stored_where_they_are_not_read(tmp_path: Path) -> None:
    older, decoder = (
        opened(tmp_path / str(i), CASES[n][0])[0]
        for i, n in enumerate(["map and added", "a decoder hides the older files"])
    )
    stored = [
        [n for n in (*FILES, *LEGACY) if f.tokenizer_file(n) is not None]
        for f in map(PackedFile, (older.path, decoder.path))
    ]
    assert stored == [["tokenizer.json", "tokenizer_config.json", *LEGACY], ["tokenizer.json", "tokenizer_config.json"]]


def test_every_id_with_a_token_can_be_sampled(tmp_path: Path) -> None:
    """Ids with holes between them: their number is not the highest."""
    model, _ = opened(tmp_path, {"tokenizer.json": tokenizer_json(drop=range(128, 160))})
    assert model.n_valid == N
    logits = np.zeros(300, np.float32)
    logits[[N - 1, N, 299]] = 1, 2, 3  # the last token, and rows of the embedding that no token has
    assert Sampling().choose(logits, 0, model.n_valid) == N - 1
    assert model.decode([N - 1, 130]) == model.decode([N - 1])


def test_tokens_beyond_the_model_s_rows_are_noted(tmp_path: Path) -> None:
    files = {"tokenizer.json": tokenizer_json({"id": N, "content": "<a>"}), "added_tokens.json": "{}"}
    config = {"extra_special_tokens": [f"<{i}>" for i in range(40)]}
    _, notes = opened(tmp_path, files | {"tokenizer_config.json": json.dumps(config)})
    assert notes == ["the tokenizer has ids up to 305, the model rows for 300: text with those tokens cannot be used"]


GOOD = {"tokenizer.json": tokenizer_json(*IN_FILE), "tokenizer_config.json": json.dumps(CLASS | BOS_EOS)}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 7\n"


def wordpiece() -> str:
    tokenizer = Tokenizer(models.BPE(vocab={"\u2581": 0, "x": 1}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.WordPiece()
    return tokenizer.to_str()


def config(**keys: Any) -> str:
    return json.dumps(CLASS | BOS_EOS | keys)


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("tokenizer.json", POINTER, "a git-LFS pointer, not the file itself; fetch it with: git lfs pull"),
        ("tokenizer_config.json", POINTER, "a git-LFS pointer"),
        ("chat_template.jinja", POINTER, "a git-LFS pointer"),
        ("added_tokens.json", POINTER, "a git-LFS pointer"),
        ("generation_config.json", POINTER, "a git-LFS pointer"),
        ("tokenizer.json", GOOD["tokenizer.json"][:2000], "not valid JSON"),
        ("tokenizer.json", b"", "not valid JSON"),
        ("tokenizer.json", b"{}", "Model missing"),
        ("tokenizer.json", GOOD["tokenizer.json"].replace('"a": 97', '"a": 97, "a": 97'), "key 'a' appears twice"),
        ("tokenizer.json", wordpiece(), r"decoder 'WordPiece' is not supported, expected .*; without this file only token ids"),
        ("tokenizer_config.json", config()[:-1] + ', "bos_token": "<bos>"}', "key 'bos_token' appears twice"),
        ("tokenizer_config.json", config()[:-1] + ', "note": "\\ud83d"}', "surrogates not allowed"),
        ("tokenizer_config.json", b"", "not valid JSON"),
        ("tokenizer_config.json", b"[]", "expected a JSON object"),
        ("tokenizer_config.json", config() + " // end", "Extra data"),
        ("tokenizer_config.json", config(chat_template="{% if %}"), "chat template: TemplateSyntaxError"),
        ("tokenizer_config.json", config(chat_template="{{ bos_token | nosuch }}"), "No filter named 'nosuch'"),
        ("tokenizer_config.json", config(chat_template=7), "chat_template is neither"),
        ("tokenizer_config.json", config(added_tokens_decoder=[]), r"added_tokens_decoder is .*, expected texts of tokens or objects"),
        ("tokenizer_config.json", config(added_tokens_decoder={"1" * 5000: token("<a>")}), "added_tokens_decoder is"),
        ("tokenizer_config.json", config(added_tokens_decoder={"5": "<a>"}), "added_tokens_decoder is {'5': '<a>'}"),
        ("tokenizer_config.json", config(extra_special_tokens=3), "extra_special_tokens is 3"),
        ("tokenizer_config.json", config(eos_token=["<eos>"]), r"eos_token is \['<eos>'\]"),
        ("tokenizer_config.json", config(eos_token=token("<eos>", lstrip=1)), "eos_token is {'content': '<eos>', 'lstrip': 1"),
        ("special_tokens_map.json", b"[]", "expected a JSON object"),
        ("added_tokens.json", b'{"<a>": "5"}', "'<a>' is '5', expected an id"),
        ("chat_template.jinja", b"{{ \xff }}", r"not valid UTF-8 at byte 3 \(0xff\)"),
        ("chat_template.jinja", b"{% for %}", "chat template: TemplateSyntaxError"),
        ("generation_config.json", b'{"eos_token_id": 1, "eos_token_id": 2}', "key 'eos_token_id' appears twice"),
        ("generation_config.json", b"[]", "expected a JSON object"),
        ("tiktoken.model", POINTER, "a git-LFS pointer"),
    ],
)  # fmt: skip
def test_what_generate_cannot_use_is_refused_by_file(
    file: str, data: str | bytes, message: str, tmp_path: Path
) -> None:
    files = {name: text for name, text in GOOD.items() if file != "tiktoken.model" or name != "tokenizer.json"}
    folder = write(tmp_path, files | {file: data})
    with pytest.raises(CheckpointError, match=rf"^{folder}/{file}: .*{message}") as e:
        plan(folder)
    assert "\n" not in str(e.value)


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("tokenizer.json", BOM + GOOD["tokenizer.json"].encode()),
        ("tokenizer_config.json", BOM + GOOD["tokenizer_config.json"].encode()),
        ("tokenizer_config.json", config(model_max_length=float("inf"), x=float("nan"), y=10**30)),
        ("generation_config.json", b'{"temperature": Infinity, "top_p": NaN, "penalty": 1e999}'),
        ("generation_config.json", BOM + b"{}"),
        ("chat_template.jinja", b""),
        ("chat_template.jinja", "{{ messages[0].content }}<eos>"),
        ("special_tokens_map.json", BOM + b"{}"),
    ],
)
def test_what_transformers_reads_is_read(file: str, data: str | bytes, tmp_path: Path) -> None:
    model, notes = opened(tmp_path, GOOD | {file: data})
    assert notes == [] and model.encode(TEXT) == [257, 32, 265, 262, 266, 98, 267, 10, 266, 32, *b"<pic>\xc3\xa9<end>"]
    assert model.eos_ids == {N + 2}
    if file == "chat_template.jinja" and data:
        assert model.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi<eos>"
    assert len(list(model.session(32).generate(model.encode("a"), max_tokens=2))) >= 1


def test_a_template_that_fails_on_a_plain_message_is_noted(tmp_path: Path) -> None:
    template = "{{ raise_exception('tools only') }}"
    _, notes = opened(tmp_path, GOOD | {"chat_template.jinja": template})
    assert notes == ["the chat template fails on a plain message: chat template: tools only"]
