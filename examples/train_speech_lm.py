"""Train a small LSTM language model on sentences, to rescore the hypotheses of a speech recognizer.

    python examples/train_speech_lm.py speech-lm --minutes 25

Sentences come from the Brown corpus and from novels (`bitmill texts`), in lower case and without punctuation, as
recognizers write them. The folder is an ordinary model: `bitmill quantize speech-lm --method gptq --bits 2` reads
it. The folder speech-lm-text holds the sentences, heldout.txt those of documents that were not trained on. The
order of the data is seeded; how far a machine gets in the time is not, so give --steps for equal results.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.decoders import Metaspace
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import bitmill  # noqa: F401  registers the model with transformers
from bitmill.data.text import load_documents
from bitmill.recurrent.config import LstmConfig
from bitmill.recurrent.model import LstmForCausalLM

START = "<s>"  # begins every sentence, and so ends the one before
TEXTS = ("brown", "prose")
LENGTH = 64  # tokens of a row; rows begin with a sentence


def sentences(text: str) -> list[str]:
    """Return the sentences of a text in lower case, without punctuation."""
    parts = re.split(r"(?<=[.!?;])[\"')\]]*\s+|\n\s*\n", text)
    plain = (re.sub(r"[^a-z' ]+", " ", part.lower().replace("’", "'")) for part in parts)
    clean = (re.sub(r"(?<![a-z])'+|'+(?![a-z])", " ", part).split() for part in plain)
    return [" ".join(words) for words in clean if len(words) > 2]


def train_tokenizer(lines: list[str], size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of byte pairs that reads any text as lower case without punctuation."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z']+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always", split=False)]
    )
    tokenizer.decoder = Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[START], show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    start = tokenizer.token_to_id(START)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A {START} $B", special_tokens=[(START, start)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=START)


def rows(tokens: list[list[int]], count: int, seed: int) -> Iterator[Tensor]:
    """Yield batches (count, LENGTH + 1) of sentences one after another, in an order drawn anew every epoch."""
    generator = random.Random(seed)
    order = list(range(len(tokens)))
    batch: list[list[int]] = []
    while True:
        generator.shuffle(order)
        row: list[int] = []
        for index in order:
            row += tokens[index]
            if len(row) > LENGTH:
                batch.append(row[: LENGTH + 1])
                row = []
            if len(batch) == count:
                yield torch.tensor(batch)
                batch = []


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean loss of the next token."""
    logits = model(batch[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def train(model: nn.Module, batches: Iterator[Tensor], steps: int, minutes: float, rate: float) -> int:
    """Train until `steps` or `minutes` are over, with a rate that falls to zero; return the steps taken."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    started, done = time.monotonic(), 0
    model.train()
    while done < steps and (passed := (time.monotonic() - started) / 60) < minutes:
        share = max(done / steps, passed / minutes)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (done + 1) / 50) * (1 - share)
        loss = loss_of(model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done += 1
        if done % 100 == 0:
            print(f"step {done}, {passed:.1f} min, loss {float(loss):.3f}", flush=True)
    model.eval()
    return done


def main() -> None:
    """Train, and write the folder."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("out", type=Path)
    options.add_argument("--minutes", type=float, default=float("inf"), help="end after this time")
    options.add_argument("--steps", type=int, default=20_000)
    options.add_argument("--text", action="append", help=f"names or files of texts; {', '.join(TEXTS)} without")
    options.add_argument("--vocab", type=int, default=3000)
    options.add_argument("--hidden", type=int, default=512)
    options.add_argument("--embedding", type=int, default=256)
    options.add_argument("--layers", type=int, default=1)
    options.add_argument("--dropout", type=float, default=0.1)
    options.add_argument("--rate", type=float, default=4e-3)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()

    torch.manual_seed(given.seed)
    texts = given.text or TEXTS
    train_lines = [line for text in texts for doc in load_documents(text, "calib") for line in sentences(doc)]
    heldout = [line for text in texts for doc in load_documents(text, "eval") for line in sentences(doc)]
    tokenizer = train_tokenizer(train_lines, given.vocab)
    tokens = [ids for ids in tokenizer(train_lines)["input_ids"] if len(ids) > 2]
    print(f"{len(train_lines)} sentences, {sum(map(len, tokens))} tokens", flush=True)
    config = LstmConfig(
        vocab_size=len(tokenizer),
        embedding_size=given.embedding,
        hidden_size=given.hidden,
        projection_size=given.embedding if given.hidden > given.embedding else 0,
        num_hidden_layers=given.layers,
        dropout=given.dropout,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LstmForCausalLM(config)
    steps = train(model, rows(tokens, given.batch, given.seed), given.steps, given.minutes, given.rate)
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    texts_folder = given.out.with_name(f"{given.out.name}-text")
    texts_folder.mkdir(exist_ok=True)
    for name, lines in (("train.txt", train_lines), ("heldout.txt", heldout)):
        text = "".join(f"{START} {line}\n" for line in lines)
        (texts_folder / name).write_text(text, encoding="utf-8")
    about = {"steps": steps, "tokens": steps * given.batch * LENGTH, "parameters": model.num_parameters()}
    (texts_folder / "training.json").write_text(
        json.dumps({**vars(given), "out": str(given.out), **about}, default=str)
    )
    print(json.dumps(about))


if __name__ == "__main__":
    main()
