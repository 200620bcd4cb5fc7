"""A workspace to run commands in: a tiny model with a tokenizer, a text, and quantized folders."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 125
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def save_model(folder: Path, *, blocks: int = 2, seed: int = 0, chat: bool = True) -> Path:
    """A Llama of a few thousand weights and a tokenizer of whole words, as a Hugging Face folder."""
    import torch

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=WORDS + 3,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    model.save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i + 3 for i in range(WORDS)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    if chat:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def write_text(path: Path, words: int = 2000) -> Path:
    choose = random.Random(0)
    path.write_text(" ".join(f"w{choose.randrange(WORDS)}" for _ in range(words)))
    return path


def arguments(source: Path, text: Path | str, out: Path, *more: str, method: str = "gptq") -> list[str]:
    """A quantize command that takes a fraction of a second."""
    short = ["--samples", "4", "--seqlen", "32", "--measure", "2", "--group-size", "16"]
    command = ["quantize", str(source), "--calib", str(text), "-o", str(out), *short]
    return [*command, *(["--method", method] if method else []), *more]


def interrupted_after(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the next run stop as if by Ctrl-C after some blocks."""
    from bitmill.checkpoint.writer import FolderSink

    write = FolderSink.write

    def stop(self, result, streamed):
        if result.index == blocks:
            raise KeyboardInterrupt
        write(self, result, streamed)

    monkeypatch.setattr(FolderSink, "write", stop)


class Workspace:
    """source, text: to quantize.  done: a finished folder.  half: an unfinished run of the folder `half`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source, self.text = root / "source", root / "text.txt"
        self.done, self.half, self.out = root / "done", root / "half", root / "out"

    @property
    def partial(self) -> Path:
        return self.root / "half.partial"

    def quantize(self, *more: str, method: str = "gptq", out: Path | None = None) -> list[str]:
        # the text by its relative name: the report holds what the user typed, and copies must agree
        return arguments(self.source, self.text.name, out or self.out, *more, method=method)

    def copy(self, root: Path) -> Workspace:
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        return Workspace(root)


def build_workspace(root: Path) -> Workspace:
    from bitmill.cli.main import main

    workspace = Workspace(root)
    save_model(workspace.source)
    write_text(workspace.text)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root)
        assert main(workspace.quantize(out=workspace.done)) == 0
        interrupted_after(1, monkeypatch)
        assert main(workspace.quantize(out=workspace.half)) == 130
    return workspace


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
