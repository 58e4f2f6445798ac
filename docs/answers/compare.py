"""The written answers of ``written.jsonl``, labelled by hand, as four graders read them.

    python docs/answers/compare.py

writes ``results.json``: of every answer, what relexkit's ``reward: math``, math-verify, and
lm-evaluation-harness's gsm8k (``flexible-extract``) and hendrycks_math say. Needs math-verify and
lm-eval; the last two are called as the harness calls them.
"""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any

from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters.extraction import RegexFilter
from lm_eval.tasks.hendrycks_math.utils import is_equiv, last_boxed_only_string, remove_boxed
from math_verify import parse, verify

from relexkit.trainer.tasks.answers import gives_answer

HERE = Path(__file__).parent
FLEXIBLE = RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)  # of its gsm8k.yaml
IGNORED = [",", "\\$", "(?s).*#### ", "\\.$"]
HUGE = 60  # seconds after which a grader that fills the memory with one number is ended


def relexkit(row: dict[str, Any]) -> bool:
    return gives_answer(row["completion"], row["reference"], row.get("question", ""))


def math_verify(row: dict[str, Any]) -> bool:
    """As its documentation calls it: the reference as LaTeX, the completion as it is."""
    reference = row["reference"]
    gold = parse(reference if "$" in reference or "\\boxed" in reference else f"${reference}$")
    return bool(verify(gold or parse(reference), parse(row["completion"])))


def harness_gsm8k(row: dict[str, Any]) -> bool:
    (found,) = FLEXIBLE.apply([[row["completion"]]], [{}])
    options = {"regexes_to_ignore": IGNORED, "ignore_case": True}
    return bool(exact_match_hf_evaluate(found, [row["reference"]], **options)["exact_match"])


def harness_math(row: dict[str, Any]) -> bool:
    """``process_results`` of hendrycks_math: what stands between dollar signs, or all of it."""
    text = row["completion"]
    places = [place for place, sign in enumerate(text) if sign == "$"]
    answer = text[places[0] + 1 : places[-1]] if len(places) > 1 else text
    boxed = last_boxed_only_string(f"\\boxed{{{row['reference']}}}")
    return bool(is_equiv(answer, remove_boxed(boxed)))


GRADERS = {
    "relexkit": relexkit,
    "math-verify": math_verify,
    "gsm8k flexible-extract": harness_gsm8k,
    "hendrycks_math": harness_math,
}


def graded(grader: str, row: dict[str, Any]) -> bool | str:
    try:
        return GRADERS[grader](row)
    except Exception as error:
        return type(error).__name__


def main() -> None:
    rows = [json.loads(line) for line in (HERE / "written.jsonl").read_text().splitlines()]
    pools = {name: multiprocessing.Pool(1) for name in GRADERS}
    for row in rows:
        row["graders"] = {}
        for name in GRADERS:
            try:
                answer = pools[name].apply_async(graded, (name, row))
                row["graders"][name] = answer.get(HUGE)
            except multiprocessing.TimeoutError:
                row["graders"][name] = "no end"
                pools[name].terminate()
                pools[name] = multiprocessing.Pool(1)
    for pool in pools.values():
        pool.terminate()
    (HERE / "results.json").write_text(
        "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"
    )
    count = Counter(row["right"] for row in rows)
    print(f"{count[True]} right and {count[False]} wrong answers")
    for name in GRADERS:
        missed = sum(row["right"] and row["graders"][name] is not True for row in rows)
        passed = sum(not row["right"] and row["graders"][name] is True for row in rows)
        print(f"{name}: {missed} right ones refused, {passed} wrong ones rewarded")


if __name__ == "__main__":
    main()
