"""T8 and T9 of the audit: the bytes and the split, of all data."""

import audit_cheats as cheats
import numpy as np

from niblick.evaluation import audit
from niblick.evaluation.audit_case import make_stream

V = cheats.V
STREAM = make_stream(V, n=92, seed=3)
TRAIN = [np.array([1, 5, 6, 7], np.uint16), np.array([1, 2], np.uint16)]


def check(scorer, **options) -> audit.Report:
    options = {"decode": cheats.decode, "train_documents": TRAIN, "cuts": 4, "swaps": 1, **options}
    return audit.check(scorer, STREAM, vocab_size=V, **options)


def test_bytes_and_split_are_those_of_the_whole_data():
    """Of which the stream that is scored is the beginning."""
    later = np.array([1, 5, 6, 7, 1, 8, V - 1], np.uint16)
    report = check(cheats.Honest(), data=np.concatenate([STREAM, later]))
    assert report.refuted == ["T9"] and "is training document 0; 1 are" in report.findings[0].evidence
    assert "T9  split                         refuted (" in report.text() and " of training)" in report.text()
    first = STREAM[: np.flatnonzero(STREAM == V - 3)[0]]  # counted rightly by the wrong table
    assert check(cheats.WrongByteTable(), data=first).refuted == []


def test_a_last_document_may_be_cut_within_a_character():
    document = np.array([1, *range(3, V)], np.uint16)

    def cut(ids):
        return cheats.decode(ids) + audit.audit_claims.REPLACEMENT

    assert check(cheats.Honest(), decode=cut, data=document).refuted == []
    assert check(cheats.Honest(), decode=cut, data=np.tile(document, 2)).findings[0].position == 0
    assert check(cheats.LastDocumentThrice(), decode=cut, data=document).refuted == ["T8"]


def test_documents_across_shards():
    shards = [np.array([9, 1, 2, 3]), np.array([4, 1]), np.array([5]), np.array([], int), np.array([1, 6])]
    found = [document.tolist() for document in audit.audit_claims.documents(shards)]
    assert found == [[9], [1, 2, 3, 4], [1, 5], [1, 6]]
