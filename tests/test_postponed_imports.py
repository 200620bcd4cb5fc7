"""A process of bitmill's own imports torch's compiler only once something compiles."""

from __future__ import annotations

import subprocess
import sys

POSTPONED = """
import sys
from bitmill.postponed_imports import postpone_imports
postpone_imports()
import torch
from transformers import LlamaConfig, LlamaForCausalLM
assert "torch._dynamo.eval_frame" not in sys.modules and "torch.distributed.tensor" not in sys.modules
@torch.compiler.disable
def twice(x):
    return 2 * x
assert twice(3) == 6 and twice.__name__ == "twice"
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
model.generate(torch.tensor([[1, 2]]), max_new_tokens=2)
assert "torch._dynamo.eval_frame" not in sys.modules and "scipy" not in sys.modules
"""

COMPILED = """
add = torch.compile(lambda x: twice(x) + 1, backend="eager")
assert add(torch.ones(2)).tolist() == [3, 3]
assert "torch._dynamo.eval_frame" in sys.modules
from torch._dynamo import config, reset
reset()
assert torch._dynamo.disable(len) is not None and twice(3) == 6
assert not hasattr(torch._dynamo, "no_such_name")
"""


def _run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compiler_is_imported_when_something_compiles() -> None:
    _run(POSTPONED + COMPILED)


def test_submodules_of_the_compiler_execute_it_first() -> None:
    _run(POSTPONED + "import torch._dynamo.utils\nassert torch._dynamo.utils.counters is not None")
