"""A packed model, opened: mapping, configuration, tokenizer, chat template, sessions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _core, limits
from .arguments import integer, token_ids
from .closing import Closing
from .drafters import Second, keeps_mtp
from .errors import Error, PackedFileError, ResourceError, SessionError, UnsupportedError, one_line, utf8
from .files import packed
from .files.text_files import FILES, LEGACY, TextFiles
from .generation import Options, TextGeneration, check_draft
from .names import DEVICES
from .session import Session, cache_type
from .text import Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from typing_extensions import Unpack

    from .batch import Batch
    from .markup import Markup
    from .template import ChatTemplate

DEFAULT_CTX = 4096
MAX_THREADS = 1024


class Config(Mapping[str, Any]):
    """The normalised configuration: field names as in config.json, as keys or attributes, read-only."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__["_values"] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("_values", {})
        if name not in values:
            raise AttributeError(f"no configuration key {name!r}")
        return values[name]

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("the configuration is read-only")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Config({self._values})"


class Model(Closing):
    """A packed file, mapped: on the CPU nothing is copied, on a GPU the whole file goes into device memory.

    Args:
        path: a ``.dcalm`` file, or one that is open already (``PackedFile``) and stays so.
        device: "cpu", "cuda" (one NVIDIA GPU), or "auto": the GPU if one can be used, else the CPU, said in ``notes``.
            ("sim" is the CUDA code on a simulated GPU, slow: the library that the tests build and DEEPCALM_SIM names.)
        threads: threads that every pass runs on; None: DEEPCALM_THREADS, else as many as pay, at most one per core.
        isa: instruction set by name; None: DEEPCALM_ISA, else the best one this processor has.

    Raises:
        PackedFileError: the file is missing, damaged or of an unknown version.
        UnsupportedError: device "cuda" without what it needs (the message says what is missing).
        ResourceError: an unknown instruction set, or a model that is larger than the device's memory.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | packed.PackedFile,
        device: str = "cpu",
        threads: int | None = None,
        isa: str | None = None,
    ) -> None:
        if device not in DEVICES:
            raise ValueError(f"device: {device!r}, expected one of {', '.join(DEVICES)}")
        #: What was turned off or replaced, one line each.
        self.notes: tuple[str, ...] = ()
        isa = utf8(isa or os.environ.get("DEEPCALM_ISA") or "") or None
        if threads is None:
            text = os.environ.get("DEEPCALM_THREADS", "")
            if text and not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MAX_THREADS):
                raise Error(f"DEEPCALM_THREADS: {one_line(text, 40)!r}, expected 1..{MAX_THREADS}")
            threads = int(text or 0)
        else:
            threads = integer("threads", threads, 1, MAX_THREADS)
        with nullcontext(path) if isinstance(path, packed.PackedFile) else packed.PackedFile(Path(path)) as file:
            self.path = file.path
            self.config = Config(file.config)
            self.header_sha256 = file.header_sha256
            self.entries = file.entries  # name -> Tensor, in file order
            files = {name: file.tokenizer_file(name) for name in (*FILES, *LEGACY)}
            #: Models that draft for this one.
            self.seconds: dict[str, Second] = {}
            self._text = TextFiles(files, f"{self.path}: ", PackedFileError)
            name = os.fsencode(file.path)  # which need not be UTF-8
            opened = (name, file.fileno(), file.config, file.tensor_table())
            self._core: _core.Model | None
            #: "cpu", "cuda" or "sim": where passes run.
            self.device = "cpu"
            if device != "cpu":
                try:
                    self._core = _core.Model.open_on(os.fsencode(_device_library(device)), *opened)
                    self.device = "sim" if device == "sim" else "cuda"
                except (UnsupportedError, ResourceError) as e:
                    if device != "auto":
                        raise type(e)(f"device {device!r}: {e}") from None
                    self.notes = (f"device auto: cpu, {e}",)
                else:
                    if threads or isa:
                        self.notes = (f"threads and isa have no effect on device {self.device}",)
            if self.device == "cpu":
                n = threads or limits.default_threads()
                self._core = _core.Model(*opened, isa, n, not threads)
                refusal = _core.amx_refusal() and f"this processor has AMX, but {_core.amx_refusal()}"
                if self.isa in (k["name"] for k in _core.isas() if k["emulated"]):
                    why = refusal or "this processor has no AMX"
                    self.notes += (f"isa {self.isa}: emulated, {why}: the same bits, slower",)
                elif refusal and not isa:
                    self.notes += (f"isa {self.isa}: {refusal}",)
                if n > (most := limits.processors()):
                    self.notes += (f"threads: {n}, of which {most} can run at a time here: more only slows them down",)

    def __repr__(self) -> str:
        return f"Model({str(self.path)!r}, device={self.device!r})"

    def close(self) -> None:
        """Unmaps the file when its last session is closed as well; what is asked of it afterwards is a SessionError."""
        self._core = None
        self.seconds.clear()

    @property
    def core(self) -> _core.Model:
        """The C++ model. Raises SessionError after ``close``."""
        if self._core is None:
            raise SessionError("the model is closed")
        return self._core

    @property
    def isa(self) -> str:
        """Name of the instruction set in use: one name, one set of bits."""
        return self.core.isa

    @property
    def threads(self) -> int:
        """Threads, at most, of a pass."""
        return self.core.n_threads

    @property
    def file_bytes(self) -> int:
        """Size of the packed file."""
        return self.core.file_bytes

    def lock(self) -> None:
        """Reads the whole file into memory and keeps it there while the model is open (mlock).

        Raises:
            ResourceError: the limit of locked memory (``ulimit -l``) or the memory is too small; the message has both.
        """
        self.core.lock(os.fsencode(self.path))

    def cold_share(self) -> float:
        """How much of the file is not in the page cache, 0..1, from 256 samples; 0 where the system does not tell."""
        cold, n = 0, min(256, -(-self.file_bytes // 4096))
        for i in range(n):
            try:
                os.preadv(self.core.fileno(), [bytearray(1)], self.file_bytes * i // n, os.RWF_NOWAIT)
            except BlockingIOError:
                cold += 1
            except OSError:  # a file system without it
                return 0.0
        return cold / n

    def active_bytes_per_token(self, pos: int, kv: str = "auto") -> int:
        """Bytes that decoding one token after ``pos`` others reads: weights in use and cache rows."""
        return self.core.active_bytes_per_token(integer("pos", pos, 0, 2**31 - 1), cache_type(kv, self.isa))

    def second(self, path: str) -> Second:
        """What drafts for this model with the one in ``path``, which is opened once.

        Raises:
            UnsupportedError: it has another vocabulary.
            Error: as ``Model`` does.
        """
        if path not in self.seconds:
            other = Model(path, self.device, self.threads if self.device == "cpu" else None, self.isa)
            for what in ("vocab_size", "tokenizer.json"):
                mine, theirs = (m.config.get(what, m._text.sha256(what)) for m in (self, other))
                if mine != theirs:
                    raise UnsupportedError(f"{path} cannot draft for {self.path}: {what} is {theirs}, expected {mine}")
            self.seconds[path] = Second(self, other, f"model:{path}")
        return self.seconds[path]

    # ---- text

    @property
    def tokenizer_config(self) -> Mapping[str, Any]:
        """The checkpoint's tokenizer_config.json, with the special_tokens_map.json of older ones; empty without."""
        return self._text.config

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """The checkpoint's generation_config.json; empty if it had none."""
        return self._text.generation

    @property
    def sampling_defaults(self) -> Mapping[str, float]:
        """What generation_config.json says of sampling: "temp" and those of "top_k", "top_p", "min_p" that it names.

        Empty without do_sample: greedy. The command line starts from it; ``Session.generate`` takes what it is given.

        Raises:
            PackedFileError: a value that is none.
        """
        return self._text.sampling

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer (``tokenizers.Tokenizer``). Raises PackedFileError if the file holds none."""
        return self._text.tokenizer

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Text in and out: bos rule, ids that end generation, incremental decoding."""
        return self._text.vocabulary(self.config)

    @property
    def n_valid(self) -> int:
        """One past the highest token id that may be sampled: the tokenizer's last, or ``vocab_size`` without one."""
        return self.vocabulary.n_valid if self.has_tokenizer else int(self.config["vocab_size"])

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end generation: of config and generation_config, and the tokenizer's turn ends."""
        return self.vocabulary.eos_ids if self.has_tokenizer else frozenset(self.config["eos_token_ids"])

    @property
    def has_tokenizer(self) -> bool:
        """Whether the packed file holds a tokenizer."""
        return self._text.has_tokenizer

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of ``text``; with ``bos``, exactly one bos in front where the tokenizer adds one (raw prompts).

        Special tokens written out in it count. For conversations use ``encode_chat``, whose templates write the bos.
        """
        return self.vocabulary.encode_prompt(text) if bos else self.vocabulary.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens left out; bytes that are not UTF-8 become U+FFFD.

        Raises:
            SessionError: an id outside the vocabulary.
            TypeError: not a flat sequence of integers.
        """
        return self.vocabulary.decode(token_ids(ids, int(self.config["vocab_size"])).tolist())

    @property
    def has_chat_template(self) -> bool:
        """Whether there is a chat template, which is not compiled for the answer."""
        return self._text.has_template

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The checkpoint's chat template, or None."""
        return self._text.template

    @cached_property
    def markup(self) -> Markup:
        """Tool calls and thoughts, as this model's family writes and reads them."""
        from .markup import Markup

        return Markup(self.chat_template, self.vocabulary)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The conversation as text, special tokens written out; see ``ChatTemplate.render`` for the options.

        Raises:
            UnsupportedError: the checkpoint has no chat template.
            Error: the template refuses the conversation or fails.
        """
        return self._template(messages).render(messages, **options)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The conversation as token ids, in which only the template writes control tokens (``ChatTemplate.encode``).

        Options and errors are those of ``apply_chat_template``.
        """
        return self._template(messages).encode(self.vocabulary, messages, **options)

    def _template(self, messages: Sequence[Mapping[str, Any]]) -> ChatTemplate:
        if self.chat_template is None:
            raise UnsupportedError(f"{self.path}: has no chat template; use a raw prompt")
        if isinstance(messages, (str, Mapping)) or not all(isinstance(m, Mapping) and "role" in m for m in messages):
            raise TypeError('messages: expected a sequence of {"role": ..., "content": ...}')
        return self.chat_template

    # ---- sessions

    def session(
        self, ctx: int | None = None, kv: str = "auto", max_rows: int | None = None, mtp: bool | None = None
    ) -> Session:
        """A new sequence with its own cache.

        Args:
            ctx: positions; None: the model's maximum, at most 4096.
            kv: cache type, "f16" | "bf16" | "f32" | "q8"; "auto": bf16 with the instruction set amx, else f16.
            max_rows: tokens per pass; None: 256, with the instruction set amx 512, or ctx where that is less. Each
                takes memory of the model's while it is needed, about 0.4 MB in V2-Lite.
            mtp: keep the MTP layer's state up to date, which drafting needs and costs an MTP row per token of a prompt;
                None: where the model has such a layer, so that ``generate`` drafts as the command line does.

        Raises:
            SessionError: ctx or max_rows out of range.
            UnsupportedError: mtp=True, and the model has no MTP layer.
            ResourceError: the cache does not fit into the available memory.
        """
        ctx = self._context(ctx)
        max_rows = min(self.core.pass_rows, ctx) if max_rows is None else max_rows
        max_rows = integer("max_rows", max_rows, 1, 4096, SessionError)
        if mtp not in (None, True, False):
            raise TypeError(f"mtp: {one_line(repr(mtp), 40)}, expected True, False or None")
        return Session(self, ctx, kv, max_rows, bool(self.config["num_nextn_predict_layers"]) if mtp is None else mtp)

    def batch(
        self,
        max_sequences: int = 8,
        ctx: int | None = None,
        kv: str = "auto",
        cache_bytes: int | None = None,
        draft: str | int = "auto",
        drafter: str = "auto",
    ) -> Batch:
        """Many sequences that share passes.

        Args:
            max_sequences: that run at a time, 1..64; more wait.
            ctx: positions of each; None: the model's maximum, at most 4096.
            kv: cache type, "f16" | "bf16" | "f32" | "q8"; "auto": bf16 with the instruction set amx, else f16.
            cache_bytes: for the rows of all caches together, of finished sequences too; None: as many as
                ``max_sequences`` of ``ctx`` take, or the available memory where that is less. Another model that drafts
                has rows of its own beside them, of running sequences.
            draft, drafter: drafts of a sequence and pass, and who makes them (``generation.Options``).

        Raises:
            SessionError: ctx out of range.
            UnsupportedError: drafter "mtp", and the model has no MTP layer, or a model of another vocabulary.
            TypeError, ValueError: another argument that is wrong.
        """
        from .batch import Batch

        return Batch(self, max_sequences, self._context(ctx), kv, cache_bytes, draft, drafter)

    def _context(self, ctx: int | None) -> int:
        limit = int(self.config["max_position_embeddings"])
        try:
            return min(DEFAULT_CTX, limit) if ctx is None else integer("ctx", ctx, 1, limit, SessionError)
        except SessionError as e:
            raise SessionError(f"{e} (max_position_embeddings)") from None


def _device_library(device: str) -> Path:
    if device != "sim":
        return Path(_core.__file__).with_name("libdeepcalm_cuda.so")
    if not (library := os.environ.get("DEEPCALM_SIM")):
        raise UnsupportedError("DEEPCALM_SIM is not set, expected the library that tests/sim/build.py builds and names")
    return Path(library)


def demo_path() -> Path:
    """The packed file of the embedded demo model.

    Raises:
        ResourceError: this installation has none.
    """
    path = Path(__file__).parent / "demo" / "demo.dcalm"
    if not path.is_file():
        raise ResourceError(f"no demo model in this installation ({path}); name a packed file")
    return path


def stream(
    prompt: str,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    stop: str | Sequence[str] = (),
    ctx: int | None = None,
    kv: str = "auto",
    **options: Unpack[Options],
) -> TextGeneration:
    """The text that a model writes after a raw prompt (without the prompt), as an iterator over its pieces.

    Args:
        model: a ``Model`` or the path of a packed file; None: the embedded demo model.
        stop: a string, or several, that end the text; they are not part of it.
        ctx, kv: see ``Model.session``.
        options: see ``generation.Options``; ``max_tokens`` is 256 by default.

    Raises:
        SessionError: the prompt is empty without a bos token to start from, or longer than the context.
        TypeError, ValueError: another argument that is wrong.
    """
    if not isinstance(model, Model):
        model = Model(demo_path() if model is None else model)
    draft = options.get("draft", "auto")
    check_draft(draft)
    session = model.session(ctx, kv, mtp=keeps_mtp(draft, options.get("drafter", "auto")))
    options.setdefault("max_tokens", 256)
    return session.generate(model.encode(prompt), **options).text(stop)


def generate(
    prompt: str,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    stop: str | Sequence[str] = (),
    ctx: int | None = None,
    kv: str = "auto",
    **options: Unpack[Options],
) -> str:
    """The whole text of ``stream``, which has the same arguments and errors."""
    return "".join(stream(prompt, model, stop=stop, ctx=ctx, kv=kv, **options))
