"""Requests become prompts for models with and without a chat template, and answers are judged."""

from __future__ import annotations

import gzip
import json

from bitmill.data.benchmark_tasks import BENCHMARKS, TASKS

SOLVED = "Question: Two and two?\nAnswer: So the answer is 4."
ADD = 'def add(a, b):\n    """Add."""\n'
TEST = "def check(candidate):\n    assert candidate(1, 2) == 3\n"


def question(task, document, context):
    line = {"doc_id": 0, "doc": document, "request": {"context": context}}
    content = gzip.compress(json.dumps(line).encode())
    (record,) = BENCHMARKS.extracts[f"task-{task}"].select(lambda name: content)
    return TASKS[task].item(json.loads(json.dumps(record)))


def runs(program: str) -> bool:
    try:
        exec(program, {})
    except (AssertionError, NameError, SyntaxError):
        return False
    return True


def test_numbers():
    context = f"{SOLVED}\n\nQuestion: A thousand\n\nand two?\nAnswer:"
    asked = question("gsm8k", {"short_answer": "1,002"}, context)
    assert asked.prompt.text == context
    assert asked.prompt.turns == (
        ("user", "Two and two?"),
        ("assistant", "So the answer is 4."),
        ("user", "A thousand\n\nand two?"),
    )
    assert asked.is_right(" 1000 + 2 = 1002. So the answer is $1,002.00.", None)
    assert not asked.is_right(" So the answer is 1003.", None)


def test_functions():
    asked = question("humaneval", {"prompt": ADD, "test": TEST, "entry_point": "add"}, "")
    assert asked.prompt.text == ADD.rstrip()
    assert asked.prompt.reply.endswith(f"```python\n{ADD.rstrip()}")
    assert asked.is_right("\n    return a + b", runs)
    assert not asked.is_right("\n    return a - b", runs)


def test_scripts():
    task, reply = "Solve this:\n```\nAdd.\n```", "Below is a Python script that solves it:\n```python\n"
    document = {
        "test_setup_code": "two = 2",
        "test_list": ["assert add(1, two) == 3", "assert add(0, 0) == 0\r\n"],
    }
    asked = question("mbpp", document, f"{task}\n\n{reply}")
    assert asked.prompt.turns == (("user", task),)
    assert asked.prompt.reply == reply
    assert asked.is_right("def add(a, b):\n    return a + b", runs)
    assert not asked.is_right("def add(a, b):\n    return 3", runs)
