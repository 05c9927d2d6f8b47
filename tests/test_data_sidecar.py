"""Bytes per token under CaseOps: as defined on the pieces' surfaces, kept beside the shards, refused where wrong."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_data_caseops import AWKWARD, weights_by_definition

from niblick.data import byte_audit, caseops, corpus, prepare, shards, sidecar
from niblick.data import tokenizer as tokenizers
from niblick.data.command_line import guarded
from niblick.data.errors import DataError
from niblick.evaluation.run import ValidationSet
from niblick.model.config import DataConfig

one_line = r"[^\n]*\Z"
SIZE = 330
WORDS = "The club is SHORT and precise; a naïve Ångström of 42 Niblicks, shots & OpenGolf over grass or SAND".split()
TITLE_ID, ALLCAPS_ID, CAPNEXT_ID, ESCAPE_ID = range(4, 8)


def prose(seed, words=3000):
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    tokenizers.train([prose(0)], SIZE, folder / "case.model", True)
    tokenizers.train([prose(0)], SIZE, folder / "plain.model")
    tokenizers.train([prose(1)[:9000]], SIZE, folder / "other.model", True)
    return folder


@pytest.fixture(scope="module")
def processor(models):
    return tokenizers.load(models / "case.model", SIZE)


@pytest.fixture
def shard(models, processor, tmp_path):
    """A validation shard of three documents and its byte counts."""
    texts = ["The  Club\nOF 🙂", "a \ue001 NASA \ue004é", "shots"]
    ids, counts = zip(*(sidecar.count_bytes(processor, text) for text in texts), strict=True)
    path = tmp_path / "toy_val_000000.bin"
    shards.write_shard(path, np.concatenate(ids))
    sidecar.write(path, np.concatenate(counts), models / "case.model")
    return path


def test_a_case_tokenizer(processor, models):
    assert [processor.id_to_piece(i) for i in range(4, 8)] == list(caseops.OPERATORS)
    assert [i for i in range(SIZE) if processor.is_byte(i)] == list(range(8, 264))
    assert tokenizers.has_case_operators(processor)
    assert not tokenizers.has_case_operators(tokenizers.load(models / "plain.model"))
    ordinary = "".join(processor.id_to_piece(i) for i in range(264, SIZE))
    assert "the" in ordinary and not any("A" <= c <= "Z" for c in ordinary)
    with pytest.raises(DataError, match=r"expected at least 264 pieces \(.*4 operators\), found 263" + one_line):
        tokenizers.train([prose(0)], 263, models / "small.model", True)
    with pytest.raises(DataError, match="expected a tokenizer of plain text, found one with case operators" + one_line):
        tokenizers.ByteTable.of(processor)


def pieces_and_bytes(processor, text):
    ids, counts = sidecar.count_bytes(processor, text)
    return list(zip(processor.id_to_piece(ids[1:].tolist()), counts[1:].tolist(), strict=True))


def test_bytes_by_hand(processor):
    def last(text, n):
        return pieces_and_bytes(processor, text)[-n:]

    assert last("4 🙂", 5) == [("▁", 1), ("<0xF0>", 0), ("<0x9F>", 0), ("<0x99>", 0), ("<0x82>", 4)]
    assert last("4 \n\t 2", 2) == [("▁", 4), ("2", 1)]  # a run of white space is one piece
    assert sum(n for _, n in last("  1 2 \n", 3)) == 3  # and nobody's at the edges
    assert last("4½", 5)[1:] == [("<0xE2>", 0), ("<0x81>", 0), ("<0x84>", 0), ("2", 2)]  # NFKC: 1⁄2, to the last
    assert last("4Ａ", 2) == [("4", 1), ("<0x41>", 3)]  # a capital that comes after the transform
    assert last("4\ue003", 3) == [("4", 1), ("\ue004", 0), ("\ue003", 3)]
    assert last("4\ue004", 3) == [("4", 1), ("\ue004", 0), ("\ue004", 3)]
    the = pieces_and_bytes(processor, "The")
    assert the[0] == ("\ue001", 0) and sum(n for _, n in the) == 3
    ids, counts = sidecar.count_bytes(processor, " \n")
    assert ids.tolist() == [1] and counts.tolist() == [0]


texts = st.text(st.one_of(st.sampled_from(AWKWARD + "the club"), st.characters(exclude_categories=["Cs"])), max_size=40)


def surfaces_by_definition(processor, text):
    """Each piece's bytes by walking its surface, with the state of ESCAPE carried from piece to piece."""
    stream = caseops.encode(tokenizers.clean(text))
    weights = weights_by_definition(stream)
    return [0] + [sum(weights[a:b]) for a, b in processor.encode_as_offset_mapping(stream)["offsets"]], stream


@given(texts)
@example("\ue004\ue004\ue001 Ａ\ufeff")
@example("\ufeff a \u2581")
@settings(max_examples=400, deadline=None)
def test_counts_are_those_of_the_surfaces_and_of_the_text(processor, text):
    ids, counts = sidecar.count_bytes(processor, text)
    assert ids.tolist() == tokenizers.encode_document(processor, text).tolist()
    by_definition, stream = surfaces_by_definition(processor, text)
    assert counts.tolist() == by_definition
    offsets = processor.encode_as_offset_mapping(stream)["offsets"]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(offsets)), "no character between two pieces"
    if offsets:  # what is outside belongs to the edges, which normalisation drops
        edges = stream[: offsets[0][0]], stream[offsets[-1][1] :]
        assert [processor.normalize(edge).strip("▁") for edge in edges] == ["", ""]
        assert counts.sum() == len(text.replace("\0", " ").strip().encode()) - sum(len(e.encode()) for e in edges)
    sidecar.check(ids, counts, processor, "x.bin")


def test_decoded_text_has_its_case_again(processor):
    text = "The club is SHORT, OpenGolf \ue001 and 🙂"
    tokens = np.concatenate([tokenizers.encode_document(processor, text)] * 2)
    assert tokenizers.decode_documents(processor, tokens) == 2 * text.encode()


def test_what_is_beside_a_shard(shard, models):
    path = sidecar.path_beside(shard)
    assert path.name == "toy_val_bytes_000000.bin" and shards.find_shards(shard.parent, "val") == [shard]
    counts = sidecar.read(shard, models / "case.model")
    assert counts.dtype == np.uint16 and counts.sum() == len("The  Club\nOF 🙂a \ue001 NASA \ue004éshots".encode())
    assert np.frombuffer(path.read_bytes()[:12], "<i4").tolist() == [20240520, 1, len(counts)]
    with pytest.raises(DataError, match=rf"expected byte counts for the shard's \d+ tokens, found 3{one_line}"):
        sidecar.write(shard, np.array([0, 1, 1]), models / "case.model")


def test_a_long_run_of_spaces_fits(processor, models, tmp_path):
    ids, counts = sidecar.count_bytes(processor, "a" + " " * 70_000 + "b")
    shards.write_shard(tmp_path / "x_val_0.bin", ids)
    sidecar.write(tmp_path / "x_val_0.bin", counts, models / "case.model")
    assert sidecar.read(tmp_path / "x_val_0.bin", models / "case.model").max() >= 70_000


def rewrite(shard, change, keep_note=True):
    """The side-car with changed counts, with or without the identity in its header."""
    path = sidecar.path_beside(shard)
    counts = np.array(shards.read_shard(path))
    note = shards.read_note(path, 64) if keep_note else b""
    shards.write_shard(path, change(counts, shards.read_shard(shard)), note)


def raised(value, where):
    def change(counts, tokens):
        counts[np.flatnonzero(where(tokens))[0]] = value
        return counts

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda counts, tokens: counts[:-1], r"expected byte counts for the shard's \d+ tokens, found \d+"),
        (lambda counts, tokens: np.roll(counts, 1), r"not the byte counts of these tokens: expected 0 for token"),
        (raised(1, lambda t: t == 1), r"expected 0 for token 0 \('<s>'\), found 1 \(1 such tokens\)"),
        (raised(3, lambda t: t == TITLE_ID), r"expected 0 for token 1 \('\\ue001'\), found 3"),
        (raised(6, lambda t: t == 8 + 0xF0), r"expected 0 for token \d+ \('<0xF0>'\), found 6"),
        (raised(0, lambda t: np.roll(t, 1) == ESCAPE_ID), r"expected 3 for token \d+ \('\\ue001'\), found 0"),
    ],
)
@pytest.mark.parametrize("keep_note", [True, False])
def test_counts_that_do_not_fit_their_tokens_are_refused(shard, models, change, message, keep_note):
    rewrite(shard, lambda counts, tokens: counts, keep_note)
    sidecar.read(shard, models / "case.model")
    rewrite(shard, change, keep_note)
    with pytest.raises(DataError, match=rf"toy_val_bytes_000000.bin: .*{message}{one_line}"):
        sidecar.read(shard, models / "case.model")


def test_counts_of_another_shard_or_tokenizer_are_refused(shard, models):
    with pytest.raises(DataError, match=rf"byte counts of another tokenizer than .*other.model: expected{one_line}"):
        sidecar.read(shard, models / "other.model")
    tokens = np.array(shards.read_shard(shard))
    tokens[-1] ^= 1
    shards.write_shard(shard, tokens)
    with pytest.raises(DataError, match=rf"byte counts of another shard than .*val_000000.bin: expected{one_line}"):
        sidecar.read(shard, models / "case.model")
    sidecar.path_beside(shard).unlink()
    message = rf"val_bytes_000000.bin: expected the byte counts of toy_val_000000.bin, found no such file{one_line}"
    with pytest.raises(DataError, match=message):
        sidecar.read(shard, models / "case.model")


def test_a_shard_may_begin_after_an_escape(processor):
    ids, counts = sidecar.count_bytes(processor, "1\ue004\ue004 2")
    assert ids.tolist().count(ESCAPE_ID) == 4
    for cut in range(1, len(ids)):
        sidecar.check(ids[cut:], counts[cut:], processor, "x.bin")


# ------------------------------------------------------------------------------------ from text to shards to a score


TEXTS = [f"{prose(seed, 30)}  {i} \n\n {chr(0xE001 + seed % 4)}½🙂" for i, seed in enumerate(range(60))]
SMALL = {"vocab_size": SIZE, "held_out": 0.2, "shard_tokens": 300, "caseops": True}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_text(text)
    return folder


def held_out(source):
    return [text for name, text in corpus.documents(source) if corpus.is_held_out(name, 0.2)]


def test_from_text_to_bits_per_byte(source, tmp_path, capsys):
    out = tmp_path / "out"
    prepared = prepare.prepare(source, out, **SMALL)
    assert prepare.prepare(source, out, **SMALL) == prepared and len(prepared.val) > 2
    assert not any("_bytes_" in path.name for path in (*prepared.train, *prepared.val))
    assert len(list(out.glob("*_bytes_*"))) == len(prepared.val)
    data = ValidationSet.load(prepared.val, prepared.tokenizer, vocab_size=SIZE)
    assert data.byte_counts.sum(dtype=int) == sum(len(text.encode()) for text in held_out(source))
    cut = ValidationSet.load(prepared.val, prepared.tokenizer, vocab_size=SIZE, max_tokens=400)
    assert cut.byte_counts.tolist() == data.byte_counts[:400].tolist()
    words = ["--data", str(out), "--source", str(source)]
    assert guarded("byte_audit", byte_audit.main, words) == 0
    said = capsys.readouterr().out
    assert f"documents recounted: {len(held_out(source))}\n" in said and f"bytes: {data.byte_counts.sum():,d}\n" in said


def test_counts_must_lie_beside_every_shard(source, tmp_path):
    prepared = prepare.prepare(source, tmp_path / "out", **SMALL)
    sidecar.path_beside(prepared.val[1]).unlink()
    for use in (lambda: prepare.ready(tmp_path / "out"), lambda: byte_audit.audit(prepared.val, prepared.tokenizer),
                lambda: ValidationSet.load(prepared.val, prepared.tokenizer, vocab_size=SIZE)):  # fmt: skip
        with pytest.raises(DataError, match=rf"expected the byte counts of niblick_val_000001.bin{one_line}"):
            use()
    assert prepare.prepare(source, tmp_path / "out", **SMALL) == prepared  # prepared anew
    prepare.ready(tmp_path / "out")


def test_the_tokenizer_decides(source, models, tmp_path):
    given_case = prepare.prepare(
        source, tmp_path / "a", tokenizer=models / "case.model", **(SMALL | {"caseops": False})
    )
    assert sidecar.path_beside(given_case.val[0]).exists()
    plain = models / "plain.model"
    with pytest.raises(DataError, match=rf"plain.model: expected a tokenizer with case operators{one_line}"):
        prepare.prepare(source, tmp_path / "b", tokenizer=plain, **SMALL)
    given_plain = prepare.prepare(source, tmp_path / "b", tokenizer=plain, **(SMALL | {"caseops": False}))
    assert not list((tmp_path / "b").glob("*_bytes_*"))
    with pytest.raises(DataError, match="expected a tokenizer with case operators"):
        prepare.ready(tmp_path / "b", caseops=True)
    # A tokenizer of the other kind beside shards with counts: neither the counts nor a table is used for them.
    with pytest.raises(DataError, match="byte counts of another tokenizer"):
        ValidationSet.load(given_case.val, plain, vocab_size=SIZE)
    result = byte_audit.audit(list(given_plain.val), plain)
    assert result.documents_that_differ == 0 and result.bytes == result.decoded_bytes > 0


def test_audit_finds_counts_that_are_possible_but_wrong(source, tmp_path):
    """White space that is not the text's passes what the tokens alone can tell, and not a recount."""
    prepared = prepare.prepare(source, tmp_path / "out", **(SMALL | {"max_val_tokens": 700}))
    paths = list(prepared.val)
    n_documents = byte_audit.audit(paths, prepared.tokenizer, source=source).documents_recounted
    assert n_documents == (np.concatenate([shards.read_shard(path) for path in paths]) == 1).sum()
    processor = tokenizers.load(prepared.tokenizer)
    space = processor.piece_to_id("▁")
    rewrite(paths[0], raised(9, lambda tokens: tokens == space))
    assert byte_audit.audit(paths, prepared.tokenizer).documents_recounted == 0
    with pytest.raises(DataError, match=rf"the bytes of document \d+ are not those of its text{one_line}"):
        byte_audit.audit(paths, prepared.tokenizer, source=source)
    only = tmp_path / "only"
    only.mkdir()
    (only / "x.txt").write_text("Another text")
    with pytest.raises(DataError, match=rf"expected the text of document 0 \(\d+ tokens\), found none{one_line}"):
        byte_audit.audit(paths, prepared.tokenizer, source=only)


def test_audit_counts_the_targets_of_whole_windows(source, models, tmp_path, monkeypatch):
    """As the challenge does: the bytes of tokens 1 to T, of a plain tokenizer too."""
    settings = SMALL | {"caseops": False}
    prepared = prepare.prepare(source, tmp_path / "out", tokenizer=models / "plain.model", **settings)
    data = ValidationSet.load(prepared.val, prepared.tokenizer, vocab_size=SIZE)
    others = np.flatnonzero(data.byte_counts != data.byte_counts[1])  # so that a shift by one is seen
    kept = int(others[others > len(data.tokens) * 2 // 3][0]) - 1
    total = int(data.byte_counts[1 : kept + 1].sum(dtype=int))
    monkeypatch.setattr(byte_audit, "PUBLISHED_WINDOW", kept)
    monkeypatch.setattr(byte_audit, "PUBLISHED", {kept: total})
    found = byte_audit.audit(list(prepared.val), prepared.tokenizer).published
    assert found == f"{total} for {kept} targets, {total} found" and kept < len(data.tokens) - 1


def test_audit_knows_the_published_totals(source, tmp_path, monkeypatch, capsys):
    prepared = prepare.prepare(source, tmp_path / "out", **SMALL)
    result = byte_audit.audit(list(prepared.val), prepared.tokenizer)
    assert result.published == "no total for so many targets"
    for total, status in ((result.bytes, 0), (result.bytes * 164_590_000 // 151_080_645, 2)):
        monkeypatch.setattr(byte_audit, "PUBLISHED", {result.targets: total})
        assert guarded("byte_audit", byte_audit.main, ["--data", str(tmp_path / "out")]) == status
        said = capsys.readouterr()
        if status:
            assert said.err.count("\n") == 1 and f"expected the published {total} bytes" in said.err


def test_every_setting_of_the_data_reaches_its_folder(tmp_path, monkeypatch):
    """Training and the bench share the folder, so each setting must decide it or be handed on."""
    calls = []
    monkeypatch.setattr(prepare, "prepare", lambda source, out, **settings: calls.append((out, settings)))
    data = DataConfig(cache=str(tmp_path))
    prepare.prepare_cached(data, 512)
    for change in ({"caseops": True}, {"held_out": 0.3}, {"shard_tokens": 77}, {"max_val_tokens": 9}):
        prepare.prepare_cached(replace(data, **change), 512)
        assert {name: calls[-1][1][name] for name in change} == change
    prepare.prepare_cached(data, 513)
    assert len({out for out, _ in calls}) == len(calls) and calls[0][0].parent == tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-tokens", "-1"], "--max-tokens: expected 0 (all) or at least 2"),
        (["--max-tokens", "1"], "--max-tokens: expected 0 (all) or at least 2"),
        (["--source", "stdlib"], "--source: expected a tokenizer with case operators"),
        (["--data", "/none/here"], "/none/here: no val shards"),
    ],
)
def test_audit_refuses_what_it_cannot_count(words, message, models, tmp_path, capsys):
    shards.write_shard(tmp_path / "toy_val_000000.bin", np.array([1, 5, 6, 7], np.uint16))
    words = ["--data", str(tmp_path), "--tokenizer", str(models / "plain.model"), *words]
    assert guarded("byte_audit", byte_audit.main, words) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err
