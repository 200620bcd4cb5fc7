"""The groups and examples that --help shows."""

from __future__ import annotations

import copy
import typing
from typing import Annotated, Any

from typer.models import OptionInfo

QUANTIZE, MEASURE, RUN, LOOK_UP = "Quantize", "Measure", "Run", "Look up"

COMMANDS = {
    QUANTIZE: ("quantize", "train", "compare", "sweep", "plan"),
    MEASURE: ("eval", "rescore", "verify", "inspect", "bench"),
    RUN: ("generate", "chat", "serve", "import", "export", "lint", "exec"),
    LOOK_UP: ("methods", "recipes", "models", "texts", "doctor"),
}

PANELS = {  # by parameter; others are in typer's own panel
    "Method": (
        "method", "methods", "bits", "group_size", "type", "settings", "format", "solver", "transform", "tuner",
        "sparse", "inputs", "attention", "rules", "simulate", "recipes", "propagate", "max_minutes", "head_bits",
        "budget", "budgets", "sensitivity", "allocator", "corrections", "save_recipe",
    ),
    "Export": ("to", "dtype", "engine"),
    "Recognizer": (
        "lm", "lm_weight", "insertion_penalty", "references", "costs", "paths", "dev_share",
        "score_end", "batch_size",
    ),
    "Training": ("teacher", "loss", "learn", "epochs", "rate", "held_apart"),
    "Text and measurement": (
        "calib", "text", "split", "samples", "seqlen", "seed", "measure", "windows", "reference", "record",
        "search", "prompts", "quality", "tasks", "limit", "run_code",
        "draws",
    ),
    "Keys and values": ("kv", "kv_bits", "kv_set", "kv_samples", "kv_seqlen"),
    "Generation": ("prompt", "system", "max_new_tokens", "temperature", "raw", "dense"),
    "Server": ("host", "port"),
    "Machine": ("device", "activations", "memory", "gpus", "ray", "trust_remote_code"),
    "Output": (
        "out", "overwrite", "resume", "dry_run", "estimate", "keep_models", "as_json", "verbose", "quiet",
    ),
}  # fmt: skip
_PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names}
_PANEL_OF_COMMAND = {
    "generate": {"seed": "Generation"},
    "chat": {"seed": "Generation"},
    "train": {"tokens": "Training", "max_minutes": "Training"},
}

EXAMPLES = {
    "quantize": (
        "bitmill quantize smollm2-135m --bits 3",
        "bitmill quantize org/name --method gptq --bits 4 --group-size 128 -o DIR",
        "bitmill quantize smollm2-135m --method gptqt --bits 3 --kv kvquant --kv-bits 3",
        "bitmill quantize smollm2-135m --bits 3 --dry-run --json",
        "bitmill quantize smollm2-135m --budget 3.0bpw --dry-run --save-recipe plan.yaml",
    ),
    "train": (
        "bitmill train DIR -o TRAINED",
        "bitmill train DIR --teacher org/name --epochs 2 --max-minutes 60 -o TRAINED",
        "bitmill train smollm2-135m --method efficientqat --bits 2 --loss next-token --learn scales -o TRAINED",
    ),
    "compare": ("bitmill compare smollm2-135m --methods rtn,gptq,gptqt --bits 4,3",),
    "sweep": (
        "bitmill sweep smollm2-135m",
        "bitmill sweep smollm2-135m --text pydoc --windows 4",
        "bitmill sweep smollm2-135m --activations --calib pydoc",
    ),
    "plan": (
        "bitmill plan llama-7b --memory 24GB --context 32k",
        "bitmill plan org/name --bits 4 --kv kvquant --kv-bits 3 --memory 16GiB",
    ),
    "eval": (
        "bitmill eval DIR --reference smollm2-135m",
        "bitmill eval smollm2-135m --text FILE.txt --json",
        "bitmill eval DIR --tasks arc_easy,hellaswag,piqa,lambada --limit 200 --record",
        "bitmill eval DIR --tasks gsm8k,humaneval,mbpp --run-code --limit 100",
    ),
    "rescore": (
        "bitmill rescore nbest.jsonl --lm DIR -o best.jsonl",
        "bitmill rescore words_text --costs ac_cost --references text --lm DIR --score-end -o best.jsonl",
        "bitmill rescore lattices --paths 100 --references text --lm DIR -o best.jsonl",
    ),
    "verify": ("bitmill verify DIR", "bitmill verify DIR --no-quality"),
    "inspect": ("bitmill inspect DIR",),
    "generate": (
        'bitmill generate DIR --prompt "What is the capital of France?"',
        'bitmill generate DIR --raw --prompt "Once upon a time" --max-new-tokens 100 --temperature 0.8',
    ),
    "serve": ("bitmill serve DIR", "bitmill serve DIR --port 8080 -- --enable-cors"),
    "exec": (
        "bitmill exec -- lm_eval --model hf --model_args pretrained=DIR --tasks piqa",
        "bitmill exec -- python program.py",
    ),
    "import": (
        "bitmill import GPTQ_FOLDER -o DIR",
        "bitmill import MODEL.Q4_K_M.gguf -o DIR",
    ),
    "lint": (
        "bitmill lint DIR --engine vllm",
        "bitmill lint org/name --method gptq --set bits=4 --set symmetric=true --engine sglang",
    ),
    "export": (
        "bitmill export DIR --to compressed-tensors",
        "bitmill export DIR --to gguf -o MODEL.gguf",
        "bitmill export DIR --to gptq -o OUT",
        "bitmill export DIR --to dense --dtype bfloat16",
    ),
    "chat": ("bitmill chat DIR", 'bitmill chat DIR --system "Answer in one sentence."'),
    "methods": ("bitmill methods", "bitmill methods gptqt"),
    "recipes": ("bitmill recipes", "bitmill recipes gptq --set bits=3"),
    "models": ("bitmill models", "bitmill models smollm2-135m"),
    "texts": ("bitmill texts",),
    "doctor": ("bitmill doctor", "bitmill doctor --json"),
    "bench kernels": ("bitmill bench kernels --shape 4096x11008 --format uniform --bits 4",),
    "bench formats": ("bitmill bench formats --bits 2", "bitmill bench formats --model smollm2-135m"),
    "bench decode": ("bitmill bench decode DIR --tokens 64",),
    "bench prefill": ("bitmill bench prefill DIR --tokens 512",),
}


def panel_of_command(name: str) -> str | None:
    """Return the group of a command in the list of commands."""
    return next((panel for panel, names in COMMANDS.items() if name in names), None)


def epilog(command: str) -> str | None:
    """Return the examples at the end of a command's help; None without any."""
    examples = EXAMPLES.get(command)
    return "\n\n".join(["Examples:", *(f"  {line}" for line in examples)]) if examples else None


def in_panel(annotation: Any, name: str, command: str) -> Any:
    """Return the annotation of a parameter with the group of its option in the help.

    Args:
        annotation: Annotated[type, OptionInfo], or another annotation, which is returned as it is.
        name: name of the parameter.
        command: name of the command.
    """
    panel = {**_PANEL_OF, **_PANEL_OF_COMMAND.get(command, {})}.get(name)
    parts = typing.get_args(annotation)
    if panel is None or len(parts) != 2 or not isinstance(parts[1], OptionInfo):
        return annotation
    option = copy.copy(parts[1])
    option.rich_help_panel = panel
    return Annotated[parts[0], option]
