"""Every public function of models/ that takes or gives tensors says what shape they have."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.repo.test_layout import ROOT, python_files

SHAPE = re.compile(
    r"\[[^\[\]]*[A-Za-z0-9_*.]+[^\[\]]*\]"  # [N, C]
    r"|\bscalar\b|\b0-d\b|\bshape[sd]?\b|[Ee]lement-?wise"
)
SUFFIXED = re.compile(r"_[A-Z]{1,6}$")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def tensor_arguments(function: Function) -> Iterator[str]:
    """Names of the arguments that are tensors, and "return"."""
    arguments = function.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        if argument.annotation is not None and "Tensor" in ast.unparse(argument.annotation):
            yield argument.arg
    if function.returns is not None and "Tensor" in ast.unparse(function.returns):
        yield "return"


def without_shapes(tree: ast.Module) -> Iterator[str]:
    """Public functions and methods whose tensors have neither described nor suffixed shapes."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    parents: list[ast.Module | ast.ClassDef] = [tree, *classes]
    for parent in parents:
        if isinstance(parent, ast.ClassDef) and parent.name.startswith("_"):
            continue
        class_text = (ast.get_docstring(parent) or "") if isinstance(parent, ast.ClassDef) else ""
        for node in parent.body:
            if not isinstance(node, Function) or node.name.startswith("_"):
                continue
            tensors = list(tensor_arguments(node))
            if not tensors or all(SUFFIXED.search(name) for name in tensors):
                continue
            text = f"{ast.get_docstring(node) or ''} {class_text}"
            if not SHAPE.search(text):
                yield f"{node.lineno}: {node.name}({', '.join(tensors)})"


def test_shapes_are_stated() -> None:
    bare = [
        f"{path.relative_to(ROOT)}:{finding}"
        for path in python_files("models")
        if path.parent.name != "importers"  # state dicts: names, and whatever shape they have
        for finding in without_shapes(ast.parse(path.read_text()))
    ]
    assert not bare


def test_a_function_without_shapes_is_seen() -> None:
    source = 'def f(x: Tensor) -> Tensor:\n    """Twice x."""\n'
    assert list(without_shapes(ast.parse(source))) == ["1: f(x, return)"]
    assert not list(without_shapes(ast.parse(source.replace("Twice x.", "x: [N, C]; twice x."))))
    method = f"class A:\n    {source.replace(chr(10), chr(10) + '    ')}"
    assert list(without_shapes(ast.parse(method)))
