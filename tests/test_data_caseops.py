"""The case transform against its definition, written out character by character, and lossless on any text."""

import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from niblick.data import caseops

T, A, C, E = caseops.OPERATORS
# Letters of every kind that case mapping treats oddly (ß, İ, ı, ŉ, ǅ, K the Kelvin sign), capitals beyond ASCII, full
# width, the operators and their neighbours, white space, NUL, a byte order mark, combining marks, planes beyond 16 bit.
AWKWARD = (
    "abzAZIÉßİıŉǅKſＡΣς\ue000\ue001\ue002\ue003\ue004\ue005 \n\t\r\0\u2028\u3000\u2581\ufeff\u0301½ﷺ🙂👩\u200d𝐀1_'"
)
texts = st.text(st.one_of(st.sampled_from(AWKWARD), st.characters(exclude_categories=["Cs"])), max_size=60)


def is_letter(c: str) -> bool:
    return "a" <= c <= "z" or "A" <= c <= "Z"


def encode_by_definition(text: str) -> str:
    out, i = "", 0
    while i < len(text):
        if text[i] in caseops.OPERATORS:
            out, i = out + E + text[i], i + 1
        elif is_letter(text[i]):
            j = i
            while j < len(text) and is_letter(text[j]):
                j += 1
            word, i = text[i:j], j
            if word == word.lower():
                out += word
            elif len(word) >= 2 and word == word.upper():
                out += A + word.lower()
            else:
                out += (T if word[0].isupper() else "") + word[0].lower()
                out += "".join((C if c.isupper() else "") + c.lower() for c in word[1:])
        else:
            out, i = out + text[i], i + 1
    return out


def decode_by_definition(stream: str) -> str:
    out, all_caps, one_cap, literal = "", False, False, False
    for c in stream:
        if literal:
            out, literal, all_caps = out + c, False, False
        elif c in caseops.OPERATORS:
            literal, all_caps, one_cap = c == E, c == A, c in (T, C)
        else:
            all_caps = all_caps and is_letter(c)
            out += c.upper() if is_letter(c) and (all_caps or one_cap) else c
            one_cap = False
    return out


def weights_by_definition(stream: str) -> list[int]:
    weights, literal = [], False
    for c in stream:
        acts = c in caseops.OPERATORS and not literal
        weights.append(0 if acts else len(c.encode()))
        literal = acts and c == E
    return weights


@pytest.mark.parametrize(
    ("text", "stream"),
    [
        ("", ""),
        ("the", "the"),
        ("The", T + "the"),
        ("A", T + "a"),
        ("NASA", A + "nasa"),
        ("OK, I", A + "ok, " + T + "i"),
        ("iPhone", "i" + C + "phone"),
        ("OpenAI", T + "open" + C + "a" + C + "i"),
        ("aB", "a" + C + "b"),
        ("X1Y", T + "x1" + T + "y"),
        ("ABc", T + "a" + C + "bc"),
        ("ÉTUDE", "É" + A + "tude"),
        ("\ue000", "\ue000"),
        (T + E, E + T + E + E),
        ("a" + C + "B", "a" + E + C + T + "b"),
    ],
)
def test_by_hand(text, stream):
    assert caseops.encode(text) == stream and caseops.decode(stream) == text


@given(texts)
@example(E)
@example("AB" + E + "AB")
@settings(max_examples=600, deadline=None)
def test_lossless_and_as_defined(text):
    stream = caseops.encode(text)
    assert stream == encode_by_definition(text)
    assert not any("A" <= c <= "Z" for c in stream)
    assert caseops.decode(stream) == text == decode_by_definition(stream)


@given(texts)
@settings(max_examples=600, deadline=None)
def test_weights_are_the_bytes_of_the_original(text):
    stream = caseops.encode(text)
    weights = caseops.byte_weights(stream)
    assert weights.dtype == np.int64 and weights.tolist() == weights_by_definition(stream)
    assert weights.sum() == len(text.encode())


@given(st.text("aB1 " + caseops.OPERATORS, max_size=12))
@settings(max_examples=600, deadline=None)
def test_streams_that_no_text_has_are_decoded_too(stream):
    assert caseops.decode(stream) == decode_by_definition(stream)
    assert caseops.byte_weights(stream).tolist() == weights_by_definition(stream)


def test_long_words_take_linear_time():
    """A pattern that seeks a capital from every letter takes minutes for this."""
    began = time.process_time()
    for text in ("a" * 300_000, "A" * 300_000, "aA" * 150_000, caseops.ESCAPE * 300_000):
        assert caseops.decode(caseops.encode(text)) == text
    assert time.process_time() - began < 10
