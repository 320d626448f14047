"""What users import is importable, complete and documented."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator

import pytest

from tests.support.source_tree import package_modules

PUBLIC_MODULES = ("tokenmill", "tokenmill.executor", "tokenmill.llmapi")

EXPECTED = {
    "tokenmill": {"LLM", "SamplingParams", "RequestOutput", "CompletionOutput", "__version__"},
    "tokenmill.executor": {
        "BatchingType",
        "CapacitySchedulerPolicy",
        "Executor",
        "ExecutorConfig",
        "FinishReason",
        "IterationStats",
        "KvCacheConfig",
        "ModelType",
        "OutputConfig",
        "Request",
        "RequestStats",
        "RequestStatsPerIteration",
        "Response",
        "Result",
        "SamplingConfig",
        "SchedulerConfig",
    },
    "tokenmill.llmapi": {
        "LLM",
        "BuildConfig",
        "CapacitySchedulerPolicy",
        "CompletionOutput",
        "KvCacheConfig",
        "RequestOutput",
        "SamplingParams",
        "SchedulerConfig",
    },
}


def exported(module_name: str) -> list[str]:
    """`__all__` of a module."""
    names = importlib.import_module(module_name).__all__
    assert isinstance(names, list)
    return names


def isort_key(name: str) -> tuple[int, str]:
    """Order of `__all__` as the linter keeps it: constants, classes, the rest; each by name."""
    kind = 0 if name.isupper() else 1 if name.lstrip("_")[:1].isupper() else 2
    return kind, name


@pytest.mark.spec("A1")
@pytest.mark.parametrize("module_name", PUBLIC_MODULES)
def test_all_is_sorted_and_holds_the_api(module_name: str) -> None:
    names = exported(module_name)
    assert names == sorted(set(names), key=isort_key)
    assert set(names) >= EXPECTED[module_name]


@pytest.mark.parametrize("module_name", PUBLIC_MODULES)
def test_every_exported_name_is_importable_and_documented(module_name: str) -> None:
    module = importlib.import_module(module_name)
    assert inspect.getdoc(module)
    for name in exported(module_name):
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{module_name}.{name} has no docstring"
            for member, attribute in vars(value).items():
                if inspect.isfunction(attribute) and not member.startswith("_"):
                    assert inspect.getdoc(attribute), f"{module_name}.{name}.{member} has no docstring"


@pytest.mark.parametrize("module_name", PUBLIC_MODULES)
def test_dir_lists_the_exported_names(module_name: str) -> None:
    module = importlib.import_module(module_name)
    assert set(exported(module_name)) <= set(dir(module))


@pytest.mark.parametrize("module_name", PUBLIC_MODULES)
def test_an_unknown_name_is_an_attribute_error(module_name: str) -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = importlib.import_module(module_name).no_such_name


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Public classes and functions at the top of a module that have no docstring."""
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None and not is_overload(node):
            yield node.name


def is_overload(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """Whether it is a typing overload, whose docstring belongs to the implementation."""
    return any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list)


def test_every_module_class_and_function_is_documented() -> None:
    missing = []
    for module in package_modules().values():
        if ast.get_docstring(module.tree) is None:
            missing.append(module.name)
        missing.extend(f"{module.name}.{name}" for name in undocumented(module.tree))
    assert not missing, "\n".join(["", *missing])


def test_a_missing_docstring_is_found() -> None:
    tree = ast.parse('class A: ...\ndef f(): ...\ndef _g(): ...\nasync def h():\n    "Doc."\n')
    assert list(undocumented(tree)) == ["A", "f"]
