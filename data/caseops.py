"""CaseOps (PR #1729): text without ASCII capitals, whose case four operators in front of letters keep.

TITLE and CAPNEXT make the next letter a capital, ALLCAPS the letters up to the next character that is none, and ESCAPE
says that the operator after it is meant as a character. Only A-Z change. `decode(encode(text)) == text` for every text;
the tokenizer after it still normalises, so a document is not given back byte by byte, and neither its decoded text nor
the pieces' spelling tells how many bytes it had: `byte_weights` does.
"""

import re

import numpy as np

TITLE, ALLCAPS, CAPNEXT, ESCAPE = "\ue001", "\ue002", "\ue003", "\ue004"
OPERATORS = TITLE + ALLCAPS + CAPNEXT + ESCAPE

# From the first capital of a run of letters to the run's end. Whole runs would do, but most have no capital; a pattern
# that asks for letters and then a capital takes quadratic time on a long run without one.
_OPERATOR_OR_CAPITAL = re.compile(f"[{OPERATORS}]|[A-Z][A-Za-z]*")
_CAPITAL = re.compile("[A-Z]")
_OPERATED = re.compile(f"{ESCAPE}(.?)|{ALLCAPS}([A-Za-z]*)|[{TITLE}{CAPNEXT}]([A-Za-z]?)", re.DOTALL)
_ESCAPED = re.compile(f"{ESCAPE}(.)", re.DOTALL)


def encode(text: str) -> str:
    """The text as the tokenizer sees it."""
    return _OPERATOR_OR_CAPITAL.sub(_encoded, text)


def _encoded(match: re.Match) -> str:
    word, start = match[0], match.start()
    if word in OPERATORS:
        return ESCAPE + word
    if start and "a" <= match.string[start - 1] <= "z":  # the run began with lower-case letters
        return _CAPITAL.sub(_capital, word)
    if len(word) > 1 and word.isupper():
        return ALLCAPS + word.lower()
    return TITLE + word[0].lower() + _CAPITAL.sub(_capital, word[1:])


def _capital(match: re.Match) -> str:
    return CAPNEXT + match[0].lower()


def decode(stream: str) -> str:
    """The text that `encode` made `stream` of. In a stream of other making, as a model may write one, an operator that
    has nothing to act on is left out."""
    return _OPERATED.sub(lambda match: match[1] or (match[2] or match[3] or "").upper(), stream)


def byte_weights(stream: str) -> np.ndarray:
    """The UTF-8 bytes of the original text that each character of an encoded text stands for: int64 (len(stream),).

    0 for an operator that acts as one, 3 for an escaped one, for all others the length of their UTF-8.
    """
    codes = np.frombuffer(stream.encode("utf-32-le"), "<u4")
    weights = 1 + (codes >= 0x80) + (codes >= 0x800).astype(np.int64) + (codes >= 0x10000)
    lengths = weights.copy()
    weights[(codes >= ord(TITLE)) & (codes <= ord(ESCAPE))] = 0
    escaped = [match.start(1) for match in _ESCAPED.finditer(stream)]
    weights[escaped] = lengths[escaped]
    return weights
