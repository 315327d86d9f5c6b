"""Small tasks with clean answers: a table of classics, and sentences built from a grammar."""

from collections.abc import Iterator
from importlib.resources import files
from itertools import product

_LISTS = ("in a list", "of a list", "in a list of numbers")
_CONDITIONS = (
    ("even", "n % 2 == 0"),
    ("odd", "n % 2 == 1"),
    ("positive", "n > 0"),
    ("negative", "n < 0"),
    ("nonzero", "n != 0"),
    ("large", "n > 100"),
    ("small", "n < 10"),
)
_DIVISORS = (("three", 3), ("four", 4), ("five", 5), ("seven", 7), ("ten", 10))
_MAPS = (
    ("squares", "n ** 2"),
    ("cubes", "n ** 3"),
    ("doubles", "n * 2"),
    ("halves", "n / 2"),
    ("square roots", "n ** 0.5"),
    ("absolute values", "abs(n)"),
)
_WORD_CONDITIONS = (
    ("that start with a vowel", "vowel", "word[0] in 'aeiou'"),
    ("that start with a capital letter", "capital", "word[0].isupper()"),
    ("that are longer than five letters", "long", "len(word) > 5"),
    ("that are shorter than four letters", "short", "len(word) < 4"),
    ("that contain a digit", "digit", "any(letter.isdigit() for letter in word)"),
    ("that are in upper case", "upper", "word.isupper()"),
    ("that end with a vowel", "vowel", "word[-1] in 'aeiou'"),
    ("that are palindromes", "palindrome", "word == word[::-1]"),
)


def exercises() -> list[tuple[str, str]]:
    """Return (task, answer) pairs; the task reads after "Write a function that"."""
    return [*_classics(), *_number_filters(), *_number_maps(), *_word_filters()]


def _classics() -> Iterator[tuple[str, str]]:
    text = (files("gllm_ray.demo") / "exercises.txt").read_text(encoding="utf-8")
    for block in text.split("\n\n"):
        tasks, _, answer = block.strip("\n").partition("\n")
        for task in tasks.split(" | "):
            yield task, answer


def _number_filters() -> Iterator[tuple[str, str]]:
    conditions = [(f"{word} numbers", word, test) for word, test in _CONDITIONS]
    conditions += [
        (f"numbers divisible by {word}", f"divisible_by_{word}", f"n % {n} == 0")
        for word, n in _DIVISORS
    ]
    for (noun, name, test), where in product(conditions, _LISTS):
        chosen = f"n for n in numbers if {test}"
        for tasks, function, body in (
            (("returns the sum of the", "adds the"), f"sum_{name}", f"return sum({chosen})"),
            (
                ("counts the", "returns the number of"),
                f"count_{name}",
                f"return sum(1 for n in numbers if {test})",
            ),
            (("returns the", "finds the"), f"{name}_numbers", f"return [{chosen}]"),
            (("returns the largest of the",), f"largest_{name}", f"return max({chosen})"),
            (("returns the smallest of the",), f"smallest_{name}", f"return min({chosen})"),
            (
                ("returns the average of the",),
                f"average_{name}",
                f"chosen = [{chosen}]\n    return sum(chosen) / len(chosen)",
            ),
            (
                ("prints the",),
                f"print_{name}",
                f"for n in numbers:\n        if {test}:\n            print(n)",
            ),
        ):
            for task in tasks:
                yield f"{task} {noun} {where}", f"def {function}(numbers):\n    {body}"


def _number_maps() -> Iterator[tuple[str, str]]:
    for (noun, expression), where in product(_MAPS, ("of a list", "of a list of numbers")):
        name = noun.replace(" ", "_")
        mapped = f"{expression} for n in numbers"
        yield f"returns the {noun} {where}", f"def {name}(numbers):\n    return [{mapped}]"
        yield f"computes the {noun} {where}", f"def {name}(numbers):\n    return [{mapped}]"
        yield (
            f"returns the sum of the {noun} {where}",
            f"def sum_{name}(numbers):\n    return sum({mapped})",
        )
        yield (
            f"prints the {noun} {where}",
            f"def print_{name}(numbers):\n    for n in numbers:\n        print({expression})",
        )


def _word_filters() -> Iterator[tuple[str, str]]:
    for (clause, name, test), where in product(_WORD_CONDITIONS, ("in a list", "of a text")):
        source, words = ("words", "words") if where == "in a list" else ("text", "text.split()")
        chosen = f"[word for word in {words} if {test}]"
        for task, function, body in (
            ("returns the words", f"{name}_words", f"return {chosen}"),
            ("finds the words", f"find_{name}_words", f"return {chosen}"),
            ("counts the words", f"count_{name}_words", f"return len({chosen})"),
            (
                "prints the words",
                f"print_{name}_words",
                f"for word in {words}:\n        if {test}:\n            print(word)",
            ),
            (
                "returns the longest of the words",
                f"longest_{name}_word",
                f"return max({chosen}, key=len)",
            ),
        ):
            yield f"{task} {where} {clause}", f"def {function}({source}):\n    {body}"
