"""Figures of tasks as tables."""

from __future__ import annotations

from bitmill.report.tasks import task_table, tasks_of_models

ARC = {"documents": 8, "acc": 0.5, "acc_stderr": 0.189, "acc_norm": 0.25, "acc_norm_stderr": None}
GSM8K = {"documents": 8, "exact_match": 0.0, "exact_match_stderr": 0.0, "exact_match_interval": [0.0, 0.3694]}


def test_one_model():
    header, *rows = task_table({"arc_easy": {**ARC, "reference_acc": 1.0}, "gsm8k": GSM8K})
    assert header == ["task", "documents", "acc", "float acc", "acc_norm", "exact_match"]
    assert rows[0] == ["arc_easy", "8", "0.500 ± 0.189", "1.000", "0.250", "-"]
    assert rows[1] == ["gsm8k", "8", "-", "-", "-", "0.000 ± 0.000 (0.000 to 0.369)"]


def test_several_models():
    titles, rows = tasks_of_models([{"arc_easy": ARC}, {"gsm8k": GSM8K}])
    assert titles == ["arc_easy acc", "arc_easy acc_norm", "gsm8k exact_match"]
    assert rows == [["0.500 ± 0.189", "0.250", "-"], ["-", "-", "0.000 ± 0.000 (0.000 to 0.369)"]]
    assert tasks_of_models([]) == ([], [])
