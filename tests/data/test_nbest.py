"""N-best lists are read, or refused with the number of the line."""

from __future__ import annotations

import json

import pytest

from bitmill.data.nbest import Hypothesis, read_nbest
from bitmill.errors import UsageError

GOOD = {
    "id": "u1",
    "hypotheses": [{"text": "he was not", "score": -8}, {"text": "", "score": 1.5}],
    "reference": "he",
}


def written(tmp_path, *lines, name="nbest.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_json_lines(tmp_path):
    path = written(tmp_path, GOOD, "", {**GOOD, "id": "u2", "reference": None})
    one, two = read_nbest(path)
    assert one.hypotheses == (Hypothesis("he was not", -8.0), Hypothesis("", 1.5))
    assert (one.id, one.reference, two.id, two.reference) == ("u1", "he", "u2", None)
    said = read_nbest(path, references=written(tmp_path, "u1 he was", "u2  not  at all", name="text"))
    assert [utterance.reference for utterance in said] == ["he was", "not at all"]


def test_kaldi(tmp_path):
    texts = written(tmp_path, "a-b-1 he was", "a-b-2", "c-1 not", name="words_text")
    costs = written(tmp_path, "a-b-1 12.5", "a-b-2 13", "c-1 -1", name="ac_cost")
    one, two = read_nbest(texts, costs)
    assert (one.id, one.hypotheses) == ("a-b", (Hypothesis("he was", -12.5), Hypothesis("", -13.0)))
    assert (two.id, two.hypotheses) == ("c", (Hypothesis("not", 1.0),))


WRONG = {
    "is no JSON": "{",
    "has no 'id'": {"hypotheses": []},
    "has no 'hypotheses'": {"id": "u"},
    "has no hypotheses": {"id": "u", "hypotheses": []},
    "hypothesis 1, has no 'text'": {"id": "u", "hypotheses": [{"score": 1}]},
    "hypothesis 2, has the score": {"id": "u", "hypotheses": [{"text": "a", "score": 1}, {"text": "b"}]},
    "has the score 'x'": {"id": "u", "hypotheses": [{"text": "a", "score": "x"}]},
    "has the score nan": '{"id": "u", "hypotheses": [{"text": "a", "score": NaN}]}',
    "gives the reference 3": {**GOOD, "id": "u", "reference": 3},
    "repeats the id 'u1'": GOOD,
}


@pytest.mark.parametrize("reason", WRONG)
def test_wrong_lines_refused(reason, tmp_path):
    path = written(tmp_path, GOOD, WRONG[reason])
    with pytest.raises(UsageError, match=f"^Line 2 of .*{reason}") as caught:
        read_nbest(path)
    assert str(caught.value).endswith(".")


def test_wrong_files_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no utterance"):
        read_nbest(written(tmp_path, ""))
    (tmp_path / "latin").write_bytes(json.dumps(GOOD).encode() + b"\xe9")
    with pytest.raises(UsageError, match="is not UTF-8"):
        read_nbest(tmp_path / "latin")
    nbest = written(tmp_path, GOOD)
    with pytest.raises(UsageError, match="no reference for the utterance 'u1'"):
        read_nbest(nbest, references=written(tmp_path, "u2 a", name="text"))
    texts = written(tmp_path, "u-1 a", "u-2 b", name="words_text")
    with pytest.raises(UsageError, match=r"Line 2 of .* has no cost of 'u-2'"):
        read_nbest(texts, written(tmp_path, "u-1 3", name="ac_cost"))
    with pytest.raises(UsageError, match=r"Line 1 of .* has the cost 'x'"):
        read_nbest(texts, written(tmp_path, "u-1 x", name="ac_cost"))
    with pytest.raises(UsageError, match=r"Line 1 of .* begins with 'u'"):
        read_nbest(written(tmp_path, "u a", name="plain"), written(tmp_path, "u 3", name="ac_cost"))
    with pytest.raises(UsageError, match=r"Line 2 of .* repeats 'u-1'"):
        read_nbest(written(tmp_path, "u-1 a", "u-1 b", name="twice"), written(tmp_path, "u-1 3", name="ac_cost"))
