"""Tokenizer training and byte accounting."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from niblick.data import tokenizer as tokenizers
from niblick.data.errors import DataError

one_line = r"[^\n]*\Z"
WORDS = "the club is short and precise; a naïve Ångström of 42 niblicks, shots & strokes over grass or sand".split()


def prose(seed, words=4000):
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    tokenizers.train([prose(0)], 400, path)
    return path


@pytest.fixture(scope="module")
def processor(model):
    return tokenizers.load(model, 400)


def test_settings(processor):
    assert [processor.id_to_piece(i) for i in (1, 2)] == ["<s>", "</s>"]
    assert processor.is_control(0) and processor.is_unknown(3)
    assert [i for i in range(400) if processor.is_byte(i)] == list(range(4, 260))
    pieces = processor.encode("42 clubs\n\nthe  ", out_type=str)
    assert pieces[:2] == ["4", "2"] and processor.decode(processor.encode("  a \n b ")) == "a b"


def test_training_is_deterministic_and_silent(model, tmp_path, capfd):
    tokenizers.train([prose(0)], 400, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()
    assert capfd.readouterr() == ("", "")


def test_long_documents_are_not_skipped(tmp_path):
    document = prose(1, 20_000).replace(";", ";\n")
    assert len(document) > 20 * tokenizers.MAX_SENTENCE_BYTES
    tokenizers.train([document], 350, tmp_path / "t.model")
    pieces = tokenizers.load(tmp_path / "t.model").encode("precise", out_type=str)
    assert len(pieces) <= 2


@given(st.text(st.sampled_from("aé🙂 \n\u2028"), max_size=300))
@settings(max_examples=100, deadline=None)
def test_sentences_cut_and_keep_everything(text):
    original = tokenizers.MAX_SENTENCE_BYTES
    tokenizers.MAX_SENTENCE_BYTES = 16
    try:
        sentences = list(tokenizers.sentences(text))
    finally:
        tokenizers.MAX_SENTENCE_BYTES = original
    assert "".join(sentences) == text
    assert all(0 < len(sentence.encode()) <= 16 for sentence in sentences)


def test_sentences_end_at_line_ends():
    lines = ["x" * 1000 + "\n"] * 10
    assert [len(s) for s in tokenizers.sentences("".join(lines))] == [4004, 4004, 2002]


@pytest.mark.parametrize(
    ("documents", "size", "message"),
    [
        (["a few words only"], 1000, r"expected 1000 pieces, found text enough for only \d+"),
        ([prose(0)], 262, r"expected at least \d+ pieces for this text's characters, found 262"),
        ([], 400, "expected text to train on, found none"),
        (["\0 \n"], 400, "expected text to train on, found none"),
    ],
)
def test_untrainable_is_one_line_and_writes_nothing(tmp_path, documents, size, message):
    with pytest.raises(DataError, match="tokenizer: " + message + one_line):
        tokenizers.train(documents, size, tmp_path / "t.model")
    assert list(tmp_path.iterdir()) == []


def test_load_refuses(model, tmp_path):
    with pytest.raises(DataError, match=rf"{model}: expected a tokenizer of 8192 pieces, found 400{one_line}"):
        tokenizers.load(model, 8192)
    for data in (b"", b"not a model", model.read_bytes()[:1000]):
        (tmp_path / "bad.model").write_bytes(data)
        with pytest.raises(DataError, match=rf"bad.model: expected a SentencePiece model{one_line}"):
            tokenizers.load(tmp_path / "bad.model")
    with pytest.raises(DataError, match=rf"none.model: cannot read the tokenizer: No such file{one_line}"):
        tokenizers.load(tmp_path / "none.model")


def train_foreign(path, **changes):
    """A tokenizer that is not ours in one respect."""
    import sentencepiece

    ours = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "byte_fallback": True, "hard_vocab_limit": False}
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["abcabc"] * 9), model_writer=file, vocab_size=300, minloglevel=2, **(ours | changes)
        )


def test_load_refuses_other_special_ids_and_a_missing_space(tmp_path):
    path = tmp_path / "foreign.model"
    train_foreign(path, pad_id=-1, unk_id=0)
    with pytest.raises(DataError, match=r"expected pad, BOS, EOS, unknown ids \(0, 1, 2, 3\), found \(-1, 1, 2, 0\)"):
        tokenizers.load(path)
    train_foreign(path, add_dummy_prefix=False, model_type="bpe")
    with pytest.raises(DataError, match="expected the space '\u2581' as a piece of its own, found none"):
        tokenizers.load(path)


def test_encode_starts_with_bos_only(processor):
    ids = tokenizers.encode_document(processor, "\0 the <s> club </s>\n")
    assert ids.dtype == np.uint16 and ids[0] == 1
    assert not np.isin(ids[1:], [0, 1, 2, 3]).any()
    assert tokenizers.encode_document(processor, " \n").tolist() == [1]


def test_byte_table_by_hand(processor):
    table = tokenizers.ByteTable.of(processor)
    space, the = processor.piece_to_id("\u2581"), processor.piece_to_id("\u2581the")
    e_acute = processor.piece_to_id("ï")
    assert processor.id_to_piece(the) == "\u2581the" and e_acute != 3
    assert table.boundary[:4].all() and not table.boundary[4:].any()
    assert table.base[:4].tolist() == [0, 0, 0, 0] and (table.base[4:260] == 1).all()
    assert (table.base[the], table.lead[the]) == (3, True)
    assert (table.base[space], table.lead[space]) == (0, True)
    assert (table.base[e_acute], table.lead[e_acute]) == (2, False)
    previous, ids = np.array([the, 1, 4, the]), np.array([the, the, space, 1])
    assert table.bytes(previous, ids).tolist() == [4, 3, 1, 0]
    on_torch = table.to("cpu").bytes(torch.from_numpy(previous), torch.from_numpy(ids))
    assert on_torch.dtype == torch.int64 and on_torch.tolist() == [4, 3, 1, 0]


texts = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("the club \n\u2581\0a🙂é")))


@given(st.lists(texts, max_size=4))
@settings(max_examples=300, deadline=None)
def test_bytes_are_those_of_the_decoded_text(processor, documents):
    table = tokenizers.ByteTable.of(processor)
    stream = [tokenizers.encode_document(processor, text) for text in documents]
    tokens = np.concatenate([*stream, np.array([1], np.uint16)])
    decoded = tokenizers.decode_documents(processor, tokens)
    # The known exclusion: a space piece straight after BOS (only a literal U+2581 can put one there) is not counted.
    after_bos = int(table.lead[tokens[1:]][table.boundary[tokens[:-1]]].sum())
    assert int(table.bytes(tokens[:-1], tokens[1:]).sum()) == len(decoded) - after_bos


def test_plain_text_round_trips(processor):
    text = "a naïve 🙂 club of 42"
    tokens = np.concatenate([tokenizers.encode_document(processor, text)] * 2)
    assert tokenizers.decode_documents(processor, tokens) == 2 * text.encode()
