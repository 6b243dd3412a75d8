"""The house: which room may ask which, and that each thing is said in one place."""

import ast
import importlib
import subprocess
import sys
from dataclasses import fields
from graphlib import TopologicalSorter
from pathlib import Path
from typing import get_type_hints

import pytest

import lightning_clamp
from lightning_clamp import losses
from lightning_clamp.clamping.options import ClampKeywords, ClampOptions, PublishedOptions
from lightning_clamp.spec import Spec, SpecKeywords

PACKAGE = Path(lightning_clamp.__file__).parent
FILES = {
    ".".join(("lightning_clamp", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
# From the ground floor up: a room may ask those before it, and those beside it in the same wing.
FLOORS = (
    ("_checks", "_lazy", "_misfits"),
    ("_rows", "_batch"),
    ("_views",),
    ("spec",),
    ("metrics", "losses"),
    ("clamping",),
    ("_digest", "_files"),
    ("checkpoint", "report"),
    ("_trainer", "restore"),
    ("sharpness",),
    ("export", "group_report"),
    ("module",),
    ("callback", "monitor", "priors", "standalone"),
    ("cli",),
    ("__main__",),
)
# Losses measure margins as the metrics do.
BESIDE = {("losses", "metrics")}
# The front door names all rooms, and its opening says that lazily; two names are looked up there.
FRONT = "lightning_clamp"


def asked(path: Path) -> set[str]:
    """The package's modules that a file imports, anywhere in it and also for type checkers alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in inner}
    return {name for name in found if name in FILES and name != FRONT}


def wing(module: str) -> str:
    return module.split(".")[1]


GRAPH = {name: asked(path) for name, path in FILES.items() if name != FRONT}


def test_no_room_is_asked_in_a_circle():
    # A package's __init__ gathers its rooms, which may not ask it back; the sorter raises on a circle.
    assert len(list(TopologicalSorter(GRAPH).static_order())) == len(GRAPH)


def test_questions_go_downstairs_only():
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    assert {wing(name) for name in GRAPH} == set(floor)
    upstairs = [
        (name, other)
        for name, others in GRAPH.items()
        for other in others
        if wing(name) != wing(other)
        and floor[wing(other)] >= floor[wing(name)]
        and (wing(name), wing(other)) not in BESIDE
    ]
    assert not upstairs


@pytest.mark.slow
def test_what_is_plain_torch_needs_no_lightning():
    modules = ", ".join(f"lightning_clamp.{name}" for name in ("clamping", "metrics", "losses", "sharpness", "spec"))
    functions = [name for name in losses.__all__ if name.endswith(("_loss", "Loss"))] + ["LabelPerturbationRule"]
    code = (
        f"import sys, {modules}\n"
        f"from lightning_clamp.losses import {', '.join(functions)}\n"
        "from lightning_clamp.sharpness import gauss_newton_sharpness\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('lightning', 'pytorch_lightning')])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_published_method_knows_nothing_of_its_rival():
    assert not {name for name in GRAPH["lightning_clamp.clamping.published"] if name.endswith(("selection", "scoring"))}


def test_keywords_are_the_fields_of_what_they_make():
    settings = {field.name for field in fields(Spec)}
    assert set(get_type_hints(SpecKeywords)) == settings
    options = {field.name: field.type for kind in (ClampOptions, PublishedOptions) for field in fields(kind)}
    assert set(get_type_hints(ClampKeywords)) == {*settings, *options}
    for made, keywords in ((Spec, SpecKeywords), (ClampOptions, ClampKeywords), (PublishedOptions, ClampKeywords)):
        hints = get_type_hints(keywords)
        assert {name: hints[name] for name in get_type_hints(made)} == get_type_hints(made)


def test_the_four_settings_stand_together_in_one_file_alone():
    together = [
        name for name, path in FILES.items() if all(f"{field.name}:" in path.read_text() for field in fields(Spec))
    ]
    assert together == ["lightning_clamp.spec"]


@pytest.mark.parametrize("path", sorted(FILES.values()), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_public_name_shadows_a_module(path):
    """Python sets a module as an attribute of its package, and a function of that name would take its place."""
    if path.name == "__main__.py":
        return
    package, name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).rsplit(".", 1)
    module = importlib.import_module(package if name == "__init__" else f"{package}.{name}")
    assert name == "__init__" or getattr(importlib.import_module(package), name) is module
