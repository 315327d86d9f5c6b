"""What the demo model reads: the standard library, and questions made from its docstrings."""

import ast
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gllm_ray.demo.exercises import exercises

HELD_OUT_EVERY = 50
# Each time an exercise is asked, it is phrased anew.
EXERCISE_REPEATS = 4
MAX_ANSWER_CHARS = 900
_MAX_TASK_CHARS = 120
# Tests, tables, bundled copies and generated text teach no Python worth completing.
_EXCLUDED = {
    "__pycache__", "config", "encodings", "ensurepip", "idlelib", "lib-dynload", "lib2to3",
    "pydoc_data", "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
_ASKING = (
    "Write a function that {}.",
    "Write a Python function that {}.",
    "Write a function which {}.",
    "Please write a function that {}.",
    "Can you write a function that {}?",
    "I need a function that {}.",
    "write a function that {}",
    "Write a function called {name} that {}.",
    "Write a function named {name} that {}.",
)
_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a Python programmer.",
    "You write short Python functions.",
    "Answer with Python code.",
)
_GREETING = "Hello! Ask me to write a small Python function."
_INTRODUCTION = (
    "I am a very small language model. I learned Python from its standard library. "
    "Ask me to write a small function."
)
_SMALL_TALK = [
    *((question, _GREETING) for question in ("Hello", "Hello!", "Hi", "hi", "Hey", "hello there")),
    *((question, _INTRODUCTION) for question in ("Who are you?", "Hello, who are you?")),
    *((question, _INTRODUCTION) for question in ("What can you do?", "What are you?", "Help")),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
]
_IMPERATIVES = {
    "add", "append", "build", "calculate", "call", "change", "check", "close", "compare",
    "compile", "compute", "convert", "copy", "create", "decode", "delete", "determine", "encode",
    "ensure", "execute", "extract", "find", "format", "generate", "get", "give", "insert", "join",
    "list", "load", "look", "make", "merge", "move", "open", "parse", "print", "process", "produce",
    "put", "quote", "raise", "read", "remove", "rename", "replace", "return", "round", "run",
    "search", "send", "set", "sort", "split", "start", "stop", "strip", "test", "transform",
    "translate", "try", "turn", "update", "validate", "wait", "walk", "wrap", "write", "yield",
}  # fmt: skip

Pair = tuple[str, str]
Conversation = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts to learn from: whole modules, and conversations for the chat template."""

    modules: list[str]
    conversations: list[Conversation]


def build_corpora(seed: int) -> tuple[Corpus, Corpus]:
    """Return the training and the held-out corpus of the running interpreter.

    Every `HELD_OUT_EVERY`-th module, with all questions made from it, and every
    `HELD_OUT_EVERY`-th exercise are held out. `seed` decides order and phrasing.
    """
    modules, tasks = standard_library(), exercises()
    held_out = _build(modules[::HELD_OUT_EVERY], tasks[::HELD_OUT_EVERY], seed)
    del modules[::HELD_OUT_EVERY], tasks[::HELD_OUT_EVERY]
    return _build(modules, tasks * EXERCISE_REPEATS, seed), held_out


def _build(modules: list[str], tasks: list[Pair], seed: int) -> Corpus:
    rng = random.Random(seed)
    tasks = [pair for text in modules for pair in docstring_tasks(text)] + tasks
    names = [_function_name(answer) for _, answer in tasks]
    exchanges = [_exchange(task, answer, names, rng) for task, answer in tasks]
    exchanges += _SMALL_TALK * EXERCISE_REPEATS
    rng.shuffle(exchanges)
    return Corpus(modules, list(_conversations(exchanges, rng)))


def standard_library() -> list[str]:
    """Return the sources of the standard library's modules, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part.split("-")[0] in _EXCLUDED or part in _EXCLUDED for part in parts):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text:
            texts.append(text)
    return texts


def docstring_tasks(source: str) -> Iterator[Pair]:
    """Yield (task, answer) for each short function of `source` whose docstring states a task.

    The task reads after "Write a function that"; the answer is the function without docstring.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("__"):
            continue
        task = _task(ast.get_docstring(node) or "")
        if task is None or len(node.body) < 2:
            continue
        node.body = node.body[1:]
        answer = ast.unparse(node)
        if len(answer) <= MAX_ANSWER_CHARS:
            yield task, answer


def _task(docstring: str) -> str | None:
    """Turn a docstring's imperative first sentence into the third person, or return None."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = paragraph.split(". ")[0].rstrip(".:")
    verb, _, rest = sentence.partition(" ")
    verb = verb.lower()
    if verb.endswith("s") and verb[:-1] in _IMPERATIVES:
        verb = verb[:-1]
    if verb not in _IMPERATIVES or not rest or len(sentence) > _MAX_TASK_CHARS:
        return None
    if verb.endswith(("ss", "sh", "ch", "x")):
        return f"{verb}es {rest}"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return f"{verb[:-1]}ies {rest}"
    return f"{verb}s {rest}"


def _exchange(task: str, answer: str, names: list[str], rng: random.Random) -> Pair:
    """Phrase `task` as a question; where that names the function, give it one of `names`."""
    # Many questions are asked in the plainest way.
    asking = _ASKING[0] if rng.random() < 0.4 else rng.choice(_ASKING)
    name = rng.choice(names)
    if "{name}" in asking:
        answer = re.sub(rf"\b{_function_name(answer)}\b", name, answer)
    return asking.format(task, name=name), answer


def _function_name(source: str) -> str:
    return re.search(r"def (\w+)", source)[1]


def _conversations(exchanges: list[Pair], rng: random.Random) -> Iterator[Conversation]:
    """Join `exchanges`: some with a system prompt, some of several turns."""
    remaining = iter(exchanges)
    for exchange in remaining:
        turns: Conversation = []
        if rng.random() < 0.15:
            turns.append({"role": "system", "content": rng.choice(_SYSTEM_PROMPTS)})
        turns += _turns(exchange)
        while rng.random() < 0.15 and (more := next(remaining, None)):
            turns += _turns(more)
        yield turns


def _turns(exchange: Pair) -> Conversation:
    question, answer = exchange
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
