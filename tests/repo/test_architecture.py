"""What each layer must not know. import-linter sees packages; these see names within torch and os.

Every rule is a function of source text, so that each is also tried on a line that breaks it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.repo.test_layout import PACKAGES, ROOT, python_files

Rule = Callable[[ast.Module], Iterator[str]]
LAUNCHER_VARIABLE = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|MASTER_ADDR|MASTER_PORT"
    r"|(SLURM|TORCHELASTIC|OMPI|PMI)_\w+"
)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes, or ""."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a module imports or reads through attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.lineno, dotted(node)


def mentions(*forbidden: str) -> Rule:
    """No import of, and no attribute below, any of these dotted names."""

    def rule(tree: ast.Module) -> Iterator[str]:
        for line, name in names(tree):
            if any(name == bad or name.startswith(f"{bad}.") for bad in forbidden):
                yield f"{line}: {name}"

    return rule


def identifiers(*forbidden: str) -> Rule:
    """None of these words as a variable, argument, attribute or function."""

    def rule(tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            for field in ("id", "attr", "arg", "name"):
                word = getattr(node, field, None)
                if word in forbidden:
                    yield f"{getattr(node, 'lineno', 0)}: {word}"

    return rule


def float_calls(tree: ast.Module) -> Iterator[str]:
    """`.float()`: "in fp32" means at least fp32, or float64 proofs stop being float64."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "float"
        ):
            yield f"{node.lineno}: .float()"


def launcher_variables(tree: ast.Module) -> Iterator[str]:
    """The names of variables that torchrun and srun set."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and LAUNCHER_VARIABLE.fullmatch(node.value)
        ):
            yield f"{node.lineno}: {node.value}"


def unsafe_calls(tree: ast.Module) -> Iterator[str]:
    """Ways in which data could become code."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        if called in {"eval", "exec", "os.system", "pickle.load", "pickle.loads", "yaml.load"}:
            yield f"{node.lineno}: {called}"
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if (keyword.arg, value) in {
                ("weights_only", False),
                ("trust_remote_code", True),
                ("allow_pickle", True),
                ("shell", True),
            }:
                yield f"{node.lineno}: {keyword.arg}={value!r}"


def unfinished(tree: ast.Module) -> Iterator[str]:
    """Functions whose only statement is `raise NotImplementedError`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if dotted(raised) == "NotImplementedError":
                yield f"{node.lineno}: NotImplementedError"


EVERYWHERE = PACKAGES
RULES: list[tuple[str, tuple[str, ...], frozenset[str], Rule, str]] = [
    # name, where it holds, files it does not hold for, rule, a line that breaks it
    (
        "models know no ranks",
        ("models",),
        frozenset(),
        mentions("torch.distributed"),
        "from torch import distributed",
    ),
    (
        "models name no ranks",
        ("models",),
        frozenset(),
        identifiers("DeviceMesh", "get_rank", "world_size", "process_group"),
        "def f(world_size): ...",
    ),
    (
        "models read no environment",
        ("models",),
        frozenset(),
        mentions("os.environ", "os.getenv", "os.environb"),
        "x = os.environ['HOME']",
    ),
    ("models keep float64", ("models",), frozenset(), float_calls, "y = x.float()"),
    (
        "one importer of torch.distributed.checkpoint",
        EVERYWHERE,
        frozenset({"trainer/checkpoint/shards.py"}),
        mentions("torch.distributed.checkpoint"),
        "import torch.distributed.checkpoint as dcp",
    ),
    (
        "one reader of launchers' variables",
        EVERYWHERE,
        # DeepSpeed reads one itself, and has to find it.
        frozenset({"launch/topology.py", "trainer/engine/deepspeed/library.py"}),
        launcher_variables,
        "rank = int(env['SLURM_PROCID'])",
    ),
    (
        "randomness has names",
        EVERYWHERE,
        # Foreign decoders draw from the process's generator: seeded for them within fork_rng.
        frozenset({"models/random.py", "models/encoders/video_vae.py"}),
        mentions("torch.manual_seed", "numpy.random.seed", "np.random.seed", "random.seed"),
        "torch.manual_seed(0)",
    ),
    (
        "data is never code",
        EVERYWHERE,
        frozenset(),
        unsafe_calls,
        "torch.load(path, weights_only=False)",
    ),
    ("nothing is a stub", EVERYWHERE, frozenset(), unfinished, "raise NotImplementedError('x')"),
]


@pytest.fixture(scope="module")
def parsed() -> Callable[[Path], ast.Module]:
    """A file's tree, which all rules walk."""
    return cache(lambda path: ast.parse(path.read_text()))


@pytest.mark.parametrize(
    ("folders", "exempt", "rule"), [row[1:4] for row in RULES], ids=[row[0] for row in RULES]
)
def test_rule(
    folders: tuple[str, ...],
    exempt: frozenset[str],
    rule: Rule,
    parsed: Callable[[Path], ast.Module],
) -> None:
    broken = [
        f"{name}:{finding}"
        for path in python_files(*folders)
        if (name := path.relative_to(ROOT).as_posix()) not in exempt
        for finding in rule(parsed(path))
    ]
    assert not broken


@pytest.mark.parametrize(
    ("rule", "breach"), [row[3:] for row in RULES], ids=[row[0] for row in RULES]
)
def test_rule_sees_a_breach(rule: Rule, breach: str) -> None:
    assert list(rule(ast.parse(breach)))
    assert not list(rule(ast.parse("import torch\nx = torch.zeros(3).to(torch.float32)")))


def test_no_notes_to_self() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    noted = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in python_files(*PACKAGES, "tests", "benchmarks")
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if marks.search(line)
    ]
    assert not noted
