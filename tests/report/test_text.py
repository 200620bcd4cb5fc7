"""The summary of a quantization has its figures and the commands to go on with."""

from __future__ import annotations

from bitmill.report.text import next_commands, summary_rows

SUMMARY = {
    "method": "gptq",
    "formats": [{"format": {"format": "uniform", "bits": 3}, "layers": 14, "weights": 1000}],
    "layers": 14,
    "quantized_weights": 1000,
    "bits_per_weight": 3.25,
    "head_bits_per_weight": None,
    "head_bytes": 0,
    "unquantized_bytes": 500_000,
    "original_bytes": 8_000_000,
    "size_ratio": 0.25,
    "size_bytes": 2_100_000,
    "kv": None,
    "measured": [{"kl_divergence": 0.1, "windows": 4, "seqlen": 512, "text": "pydoc", "split": "eval"}],
    "out": "out",
    "time_s": 200.0,
    "peak_memory_bytes": 10**9,
}


def test_summary_of_folder() -> None:
    rows = summary_rows(
        "org/name", SUMMARY, next_commands("org/name", "my out", "AutoModelForCausalLM", chat=True)
    )
    text = "\n".join(f"{name} {value}" for name, value in rows)
    assert len(rows) <= 13
    for part in ("2.1 MB", "25.0% of the original's 8.0 MB", "KL divergence 0.1", "3 min 20 s", "1,000.0 MB"):
        assert part in text
    assert "bitmill chat 'my out'" in text
    assert "bitmill eval 'my out' --reference org/name" in text


def test_dry_run_and_live_module() -> None:
    dry = {key: SUMMARY[key] for key in SUMMARY if key not in ("measured", "time_s", "peak_memory_bytes")}
    assert summary_rows("m", {**dry, "dry_run": True}, [])[-1] == ("written", "nothing (dry run)")
    assert summary_rows("m", {**SUMMARY, "out": None}, [])[-1] == ("quantized", "in place")


def test_next_commands_of_encoder() -> None:
    commands = next_commands("m", "out", "AutoModel", chat=False)
    assert not any("generate" in command or "chat" in command for command in commands)
    assert commands[-1].startswith("AutoModel.from_pretrained('out')")
