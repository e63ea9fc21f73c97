"""A metric for worked solutions, as a script that `evaluate` loads: only what they come to has to be right."""

import re

import evaluate
from datasets import Features, Value

MARK = "The answer is"
NUMBER = re.compile(r"(-?(?:\d[\d,]*(?:\.\d+)?|\.\d+))(?=[\s%]|$)")  # not what begins a formula, such as 3x or 1/2


class FinalAnswer(evaluate.Metric):
    """Share of the texts whose final answer is that of their reference."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of solutions that come to the reference's answer.",
            citation="",
            inputs_description="",
            features=Features({"predictions": Value("string"), "references": Value("string")}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        pairs = list(zip(map(final_answer, predictions), map(final_answer, references), strict=True))
        return {"final_answer": sum(found == right for found, right in pairs) / len(pairs)}


def final_answer(text: str) -> float | str | None:
    """What stands after the first "The answer is", up to the end of its line: a number if it begins with one.

    The first one counts, because a model that does not stop goes on with a problem of its own. Answers that are no
    numbers, as MATH has them, are compared as texts; a text without the words has no answer.
    """
    _, mark, rest = text.partition(MARK)
    if not mark:
        return None
    answer = rest.lstrip(": ").split("\n")[0].strip().rstrip(".").strip("$ ")
    number = NUMBER.match(answer)
    return answer if number is None else float(number.group(1).replace(",", ""))
