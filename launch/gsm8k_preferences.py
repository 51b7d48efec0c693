"""Preference data from GSM8K's example solutions: `python launch/gsm8k_preferences.py example_model_solutions.jsonl [data/gsm8k]`.

The file (github.com/openai/grade-school-math) has four models' solutions of each test question, marked right or wrong. Writes pairs.jsonl,
the first right and the first wrong solution of each question that has both, and labelled.jsonl, every solution with its label. The last
tenth of the questions goes to pairs_eval.jsonl and labelled_eval.jsonl. These are test questions: report no GSM8K score after this.
"""

import json
import sys
from pathlib import Path

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        lines = Path(sys.argv[1]).read_text().splitlines()
    except OSError as e:
        sys.exit(f"gsm8k_preferences.py: {sys.argv[1]}: {e.strerror}; expected GSM8K's example_model_solutions.jsonl")
    folder = Path(sys.argv[2] if len(sys.argv) == 3 else "data/gsm8k")
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for i, line in enumerate(lines):
        row = json.loads(line)
        part = "_eval" if i >= len(lines) * 9 // 10 else ""
        solutions = [row[model] for model in MODELS]
        right, wrong = ([s["solution"] for s in solutions if s["is_correct"] == truth] for truth in (True, False))
        if right and wrong:
            files.setdefault(f"pairs{part}", []).append({"prompt": row["question"], "chosen": right[0], "rejected": wrong[0]})
        labelled = [{"prompt": row["question"], "completion": s["solution"], "label": s["is_correct"]} for s in solutions]
        files.setdefault(f"labelled{part}", []).extend(labelled)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"wrote {folder}/{name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
