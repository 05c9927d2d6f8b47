"""SentencePiece tokenizers with the challenge's settings, and the bytes that each token stands for.

BPE, character coverage 0.999, byte fallback, digits split singly, `nmt_nfkc` normalisation, no dummy prefix; ids:
pad 0, BOS 1, EOS 2, unknown 3. Normalisation collapses white space (a newline becomes a space) and drops it at the
edges, so bits per byte count the bytes of the *decoded* text, which `decode_documents` gives back.

A tokenizer whose ids 4 to 7 are the operators of CaseOps reads text through that transform, everywhere in this room.
Its tokens' bytes are those of the original text, all white space within it included (niblick.data.sidecar).
"""

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from niblick.data import caseops
from niblick.data.errors import DataError
from niblick.data.files import write_atomically

PAD, BOS, EOS, UNK = 0, 1, 2, 3
FIRST_OPERATOR = 4  # of a CaseOps tokenizer: four ids, in the order of caseops.OPERATORS
SMALLEST = 4 + 256  # the special pieces, and one for every byte
SPACE = "\u2581"  # how SentencePiece spells a space
MAX_SENTENCE_BYTES = 4192  # the trainer's default limit: it skips longer sentences without a word


def clean(text: str) -> str:
    """The text as the tokenizer takes it: NUL replaced by a space, edges stripped."""
    return text.replace("\0", " ").strip()


def sentences(text: str) -> Iterator[str]:
    """Cuts a document at line ends into sentences of at most MAX_SENTENCE_BYTES UTF-8 bytes.

    Fed whole, every longer document would be skipped by the trainer, which for source files is most of the corpus. A
    single longer line is cut at a space, or where there is none between two characters.
    """
    sentence, size = [], 0
    for line in _short_lines(text):
        length = len(line.encode())
        if size + length > MAX_SENTENCE_BYTES:
            yield "".join(sentence)
            sentence, size = [], 0
        sentence.append(line)
        size += length
    if sentence:
        yield "".join(sentence)


def _short_lines(text: str) -> Iterator[str]:
    for line in text.splitlines(keepends=True):
        rest = line.encode()
        while len(rest) > MAX_SENTENCE_BYTES:
            # The cut may split a character; "ignore" drops its beginning here, and the rest starts with it again.
            head = rest[:MAX_SENTENCE_BYTES].decode(errors="ignore")
            head = head[: head.rfind(" ") + 1] or head
            yield head
            rest = rest[len(head.encode()) :]
        yield rest.decode()


def train(documents: Iterable[str], vocab_size: int, path: str | Path, case_operators: bool = False) -> None:
    """Trains a tokenizer of exactly `vocab_size` pieces on the documents and writes it to `path`.

    case_operators: a CaseOps tokenizer, trained on the transformed text. Deterministic: the same documents in the same
    order give the same file. DataError where the text supports fewer pieces, needs more, or is empty.
    """
    operators = list(caseops.OPERATORS) if case_operators else []
    smallest = SMALLEST + len(operators)
    if vocab_size < smallest:
        kinds = "4 special, 256 bytes" + (", 4 operators" if operators else "")
        raise DataError(f"tokenizer: expected at least {smallest} pieces ({kinds}), found {vocab_size}")
    failures, model = [], io.BytesIO()

    def texts() -> Iterator[str]:
        try:
            for document in documents:
                yield from sentences(caseops.encode(clean(document)) if operators else clean(document))
        except Exception as error:  # the trainer would wrap it, with its stack, into a RuntimeError of its own
            failures.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.999,
            byte_fallback=True,
            user_defined_symbols=operators,
            split_digits=True,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            hard_vocab_limit=False,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            num_threads=1,  # the thread count is written into the model, and may not decide a tie
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise DataError(_training_failure(str(error), vocab_size)) from error
    found = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if found != vocab_size:
        raise DataError(f"tokenizer: expected {vocab_size} pieces, found text enough for only {found}")
    write_atomically(path, lambda file: file.write(model.getvalue()))


def _training_failure(message: str, vocab_size: int) -> str:
    if "sentences_.empty" in message:
        return "tokenizer: expected text to train on, found none"
    needed = re.search(r"required_chars\. \d+ vs (\d+)", message)
    if needed:
        return f"tokenizer: expected at least {needed[1]} pieces for this text's characters, found {vocab_size}"
    most = re.search(r"value <= (\d+)", message)
    if most:
        return f"tokenizer: expected {vocab_size} pieces, found text enough for only {most[1]}"
    return f"tokenizer: training failed: {' '.join(message.split())}"


def find(data: str | Path) -> Path:
    """The one SentencePiece model in a folder of shards, or in the folder of a pattern that matches them."""
    folder = Path(data) if Path(data).is_dir() else Path(data).parent
    models = sorted(folder.glob("*.model"))
    if len(models) != 1:
        raise DataError(f"{folder}: expected exactly one tokenizer *.model (or its path), found {len(models)}")
    return models[0]


def load(path: str | Path, vocab_size: int | None = None) -> sentencepiece.SentencePieceProcessor:
    """Loads a tokenizer and checks it: its size (where given), the four special ids, and that the space is a piece.

    Without a piece of its own for the space, a lone space would fall back to bytes and the byte counts would be wrong.
    """
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot read the tokenizer: {error.strerror}") from error
    except RuntimeError as error:
        raise DataError(f"{path}: expected a SentencePiece model, found something else") from error
    found = processor.vocab_size()
    if found == 0:
        raise DataError(f"{path}: expected a SentencePiece model, found no pieces")
    if vocab_size is not None and found != vocab_size:
        raise DataError(f"{path}: expected a tokenizer of {vocab_size} pieces, found {found}")
    special = (processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id())
    if special != (PAD, BOS, EOS, UNK):
        raise DataError(f"{path}: expected pad, BOS, EOS, unknown ids {(PAD, BOS, EOS, UNK)}, found {special}")
    if processor.piece_to_id(SPACE) == UNK:
        raise DataError(f"{path}: expected the space {SPACE!r} as a piece of its own, found none")
    return processor


def has_case_operators(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether this is a CaseOps tokenizer: its ids from FIRST_OPERATOR on are the four operators."""
    if processor.vocab_size() < SMALLEST + len(caseops.OPERATORS):
        return False
    return all(processor.id_to_piece(FIRST_OPERATOR + i) == piece for i, piece in enumerate(caseops.OPERATORS))


def as_read(processor: sentencepiece.SentencePieceProcessor, text: str) -> str:
    """The text as this tokenizer takes it: clean, and with case operators where it has them."""
    return caseops.encode(clean(text)) if has_case_operators(processor) else clean(text)


def id_dtype(processor: sentencepiece.SentencePieceProcessor) -> type[np.unsignedinteger]:
    """uint16, or beyond 65,536 pieces uint32."""
    return np.uint16 if processor.vocab_size() <= 2**16 else np.uint32


def encode_document(processor: sentencepiece.SentencePieceProcessor, text: str) -> np.ndarray:
    """BOS and the document's ids, of `id_dtype`; no EOS. An empty document gives only BOS."""
    return np.array([BOS, *processor.encode(as_read(processor, text))], id_dtype(processor))


def decode_documents(processor: sentencepiece.SentencePieceProcessor, tokens: np.ndarray) -> bytes:
    """The UTF-8 text of a token stream (n,), its documents (cut at BOS) end to end, in its original case."""
    documents = np.split(tokens, np.flatnonzero(tokens == BOS))
    texts = (processor.decode(document.tolist()) for document in documents)
    return b"".join((caseops.decode(text) if has_case_operators(processor) else text).encode() for text in texts)


@dataclass(frozen=True)
class ByteTable:
    """How many bytes of text a token stands for, given the token before it.

    Three arrays over the ids, numpy or (after `to`) torch: base int64, the bytes without a leading space; lead bool,
    whether the piece begins with a space; boundary bool, whether the id is pad, BOS, EOS, unknown or unused.
    """

    base: np.ndarray | torch.Tensor  # (V,)
    lead: np.ndarray | torch.Tensor  # (V,)
    boundary: np.ndarray | torch.Tensor  # (V,)

    @classmethod
    def of(cls, processor: sentencepiece.SentencePieceProcessor) -> "ByteTable":
        """The table of a SentencePiece tokenizer. DataError for CaseOps: its operators stand for no text of their own,
        and a table would count three bytes for each."""
        if has_case_operators(processor):
            raise DataError("bytes per token: expected a tokenizer of plain text, found one with case operators")
        ids = range(processor.vocab_size())
        boundary = [processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i) for i in ids]
        base, lead = np.zeros(len(ids), np.int64), np.zeros(len(ids), bool)
        for i in ids:
            if boundary[i]:
                continue
            if processor.is_byte(i):  # spelled "<0xE2>", but one byte
                base[i] = 1
                continue
            piece = processor.id_to_piece(i)
            lead[i] = piece.startswith(SPACE)
            base[i] = len(piece.removeprefix(SPACE).encode())
        return cls(base, lead, np.array(boundary))

    def to(self, device: str | torch.device) -> "ByteTable":
        """The same table as torch tensors on `device`."""
        return ByteTable(*(torch.as_tensor(x, device=device) for x in (self.base, self.lead, self.boundary)))

    def bytes(self, previous: np.ndarray | torch.Tensor, ids: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
        """Bytes of each target in `ids` after the token in `previous` (same shape): int64.

        base + [lead and not boundary(previous)]: a space straight after BOS is not decoded, so it is not counted.
        """
        return self.base[ids] + (self.lead[ids] & ~self.boundary[previous])
