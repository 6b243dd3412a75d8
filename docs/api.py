# ruff: noqa: T201
"""Write docs/api.md: every public name with its signature and docstring.

    python docs/api.py

A test holds the page to what this would write.
"""

import argparse
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning_clamp
from lightning_clamp import clamping, export, losses, metrics, sharpness

PAGE = Path(__file__).with_name("api.md")
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Reference", "Example")


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(page())
    print(f"written: {PAGE}")


def page() -> str:
    """The whole page as Markdown."""
    parts = [
        "# API\n\nWritten by `python docs/api.py` from the docstrings. Shapes: N items, C classes; logits are "
        "unnormalised. [metrics.md](metrics.md) and [losses.md](losses.md) say more about those two.",
        *_section(lightning_clamp, "lightning_clamp", skip=("losses", "metrics", "sharpness")),
        *_section(clamping, "lightning_clamp.clamping", only=("Candidate",)),
        *_section(export, "lightning_clamp.export", only=("to_exported_program", "to_onnx", "fold", "Folded")),
        *_section(metrics, "lightning_clamp.metrics"),
        *_section(losses, "lightning_clamp.losses"),
        *_section(sharpness, "lightning_clamp.sharpness"),
    ]
    return "\n\n".join(parts) + "\n"


def _section(module: ModuleType, name: str, *, only: tuple[str, ...] = (), skip: tuple[str, ...] = ()) -> Iterator[str]:
    yield f"## {name}"
    for public in only or module.__all__:
        if public not in skip and callable(getattr(module, public)):
            yield from _entry(f"{name}.{public}", getattr(module, public))


def _entry(name: str, thing: Any) -> Iterator[str]:
    yield f"### {name.split('.')[-1]}"
    yield f"```text\n{name}{_signature(thing)}\n```"
    yield _markdown(inspect.getdoc(thing) or "")
    if inspect.isclass(thing):
        yield from filter(None, (_method(attribute, thing) for attribute in vars(thing) if attribute[0] != "_"))


def _method(name: str, owner: type) -> str:
    """One public method or property, its own alone and not the hooks of Lightning and torchmetrics."""
    member = inspect.getattr_static(owner, name)
    doc = inspect.getdoc(getattr(member, "__func__", member))
    bases = [base for base in owner.__mro__[1:] if not base.__module__.startswith("lightning_clamp")]
    if doc is None or any(hasattr(base, name) for base in bases) or not isinstance(member, _METHODS):
        return ""
    called = "" if isinstance(member, property) else _signature(getattr(member, "__func__", member))
    return f"- **`.{name}{called}`** {_markdown(doc.split(chr(10) * 2)[0])}"


_METHODS = (property, classmethod, staticmethod, type(main))


def _signature(thing: Any) -> str:
    """Parameters and their defaults; the types are in the text."""
    try:
        signature = inspect.signature(thing)
    except ValueError:
        return ""
    kept = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name not in ("self", "cls")]
    return str(signature.replace(parameters=kept, return_annotation=signature.empty))


def _markdown(doc: str) -> str:
    """Google sections as lists, and reStructuredText's roles as code."""
    lines: list[str] = []
    section = ""
    for line in doc.splitlines():
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            section = line.rstrip(":")
            lines += ["", f"**{section}**", ""]
        elif section in ("Args", "Attributes", "Raises") and re.match(r"    \S", line):
            lines.append(re.sub(r"^    ([^:]+):", r"- `\1`:", line))
        else:
            lines.append(line[4:] if section == "Example" else line.strip() if section else line)
    text = "\n".join(lines)
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = re.sub(r":\w+:`[~.]*([^`]*)`", lambda found: f"`{found[1].split('.')[-1]}`", text)
    text = re.sub(r"``([^`]*)``", r"`\1`", text)
    return re.sub(r"((?:^>>> .*\n?(?:^(?!>>>|$).*\n?)*)+)", r"```python\n\1\n```", text, flags=re.MULTILINE)


if __name__ == "__main__":
    main()
