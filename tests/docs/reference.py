"""docs/reference.md, read from the configuration classes and the command lines: `python -m tests.docs.reference`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf

from hstu_dist.__main__ import _parser as parser_of_the_package
from hstu_dist.cluster import ClusterConfig
from hstu_dist.commands.prepare import PrepareConfig
from hstu_dist.config import RunConfig, conf_dir
from hstu_dist.data.stream.config import FeedConfig
from hstu_dist.distributed.config import EmbeddingConfig
from hstu_dist.errors import ExitCode
from hstu_dist.files import write_atomically
from hstu_dist.inference.config import ExportConfig, RetrieveConfig, ScoreConfig, ServeConfig
from hstu_dist.losses.config import LossConfig
from hstu_dist.models.config import ModelConfig, TaskConfig
from hstu_dist.plan.config import HardwareConfig, PlanConfig
from hstu_dist.train.config import OptimizerConfig, TrainerConfig
from launch.__main__ import _parser as parser_of_the_launcher
from tests.docs.pages import anchor
from tests.docs.settings import Key, keys_of, summary_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference.md"

GROUPS: Mapping[str, Any] = {
    "task": TaskConfig,
    "data": FeedConfig,
    "model": ModelConfig,
    "loss": LossConfig,
    "embedding": EmbeddingConfig,
    "optimizer": OptimizerConfig,
    "trainer": TrainerConfig,
    "cluster": ClusterConfig,
    "plan": PlanConfig,
}
USES = {"score": ScoreConfig, "retrieve": RetrieveConfig, "export": ExportConfig, "serve": ServeConfig}
EXITS = {
    ExitCode.FINISHED: "finished, now or before, or handed to a scheduler",
    ExitCode.FAILED: "a rank failed",
    ExitCode.BAD_INPUT: "bad input; one line says what was got, what was expected and how to mend it",
    ExitCode.PEER_LOST: "of a rank: another one is gone, this one is not the cause",
    ExitCode.STOPPED: "asked to save and stop (`python -m launch cancel`)",
}

Shown = dict[type, str]
"""Where the settings of a class below a group have their table."""

_HEAD = """# Reference

Made from the configuration classes and the command lines by `make docs`; a test compares them. Every key can be set
on the command line: `GROUP=OPTION` chooses an option of a group, `GROUP.KEY=VALUE` sets a key. In YAML the same keys
lie in [conf/](../conf), with their defaults. An unknown key, a wrong type or a value out of range is refused before any
process starts. A number, list or mapping with characters that a shell reads needs quotes: `'cluster.addresses=[a,b]'`.
"""


def render() -> str:
    """The page."""
    shown: Shown = {}
    parts = [_HEAD, *_contents(), "## Run", "The whole configuration of a run, `conf/train.yaml`."]
    parts += [_table(RunConfig, "", shown)]
    for group, annotation in GROUPS.items():
        parts += _group(group, annotation, shown)
    parts += ["## Preparation", f"{summary_of(PrepareConfig)} For `prepare`, beside `data`."]
    parts += [_table(PrepareConfig, "", shown)]
    for name, cls in USES.items():
        parts += [f"## Settings of {name}", summary_of(cls), _table(cls, "", shown)]
    parts += ["## Hardware of a plan", summary_of(HardwareConfig)]
    parts += [_chosen_by("cluster", "hardware", None), *_tables(HardwareConfig, "cluster", shown)]
    parts += ["## Commands", *_commands(), "## Exit codes", _exits()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _contents() -> list[str]:
    names = ["Run", *GROUPS, "Preparation", *(f"Settings of {name}" for name in USES)]
    names += ["Hardware of a plan", "Commands", "Exit codes"]
    return [" · ".join(f"[{name}](#{anchor(name)})" for name in names)]


def _group(group: str, annotation: Any, shown: Shown) -> Iterator[str]:
    yield f"## {group}"
    classes = _classes(annotation)
    for cls in classes:
        kinds = _kinds(cls) if len(classes) > 1 else None
        if kinds is not None:
            yield f"### {group}: {', '.join(kinds)}"
        yield from (summary_of(cls), _chosen_by(group, group, kinds), *_tables(cls, group, shown))


def _classes(annotation: Any) -> list[type]:
    """Alternatives of a group, in order."""
    if isinstance(annotation, type):
        return [annotation]
    return [
        cls for argument in get_args(annotation) for cls in _classes(argument) if hasattr(cls, "__pydantic_fields__")
    ]


def _kinds(cls: type) -> tuple[str, ...]:
    return get_args(cls.__pydantic_fields__["kind"].annotation)  # type: ignore[attr-defined]


def _chosen_by(key: str, folder: str, kinds: tuple[str, ...] | None) -> str:
    options = [
        file.stem
        for file in sorted((conf_dir() / folder).glob("*.yaml"))
        if kinds is None or OmegaConf.load(file).get("kind") in kinds
    ]
    return f"Options: {', '.join(f'`{key}={option}`' for option in options)}."


def _tables(cls: type, prefix: str, shown: Shown) -> Iterator[str]:
    """The table of a class, and of the settings below it, each class once."""
    new = [key for key in keys_of(cls) if key.parts is not None and key.parts not in shown]
    shown |= {key.parts: f"{prefix}.{key.path}" for key in new}
    yield _table(cls, prefix, shown)
    for key in new:
        path = f"{prefix}.{key.path}"
        yield from (f"#### `{path}`", summary_of(key.parts), *_tables(key.parts, path, shown))


def _table(cls: type, prefix: str, shown: Shown) -> str:
    # a group, and what chooses among its alternatives, have sections of their own
    hidden = GROUPS if prefix == "" else ("kind",) if prefix in GROUPS else ()
    rows = [_row(key, prefix, shown) for key in keys_of(cls) if key.name not in hidden]
    return _markdown(("key", "value", "default", "meaning"), rows) if rows else "No keys."


def _row(key: Key, prefix: str, shown: Shown) -> tuple[str, ...]:
    value = key.type
    if key.parts is not None:
        value = value.replace("settings", f"[settings](#{anchor(shown[key.parts])})")
    name = f"{prefix}.{key.name}" if prefix else key.name
    return f"`{name}`", value, key.default or "must be given", key.meaning


def _commands() -> Iterator[str]:
    whole = parser_of_the_package()
    subparsers = next(action for action in whole._actions if isinstance(action, argparse._SubParsersAction))
    for name, parser in subparsers.choices.items():
        yield f"### {name}"
        yield from _command(f"python -m hstu_dist {name}", parser)
    yield "### launch"
    yield from _command("python -m launch", parser_of_the_launcher())
    yield "### make"
    targets = [line for line in (ROOT / "Makefile").read_text().splitlines() if ":" in line and "  ## " in line]
    rows = [(f"`make {line.partition(':')[0]}`", line.partition("  ## ")[2]) for line in targets]
    yield _markdown(("target", "what it does"), rows)


def _command(line: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    words = [_shown(action) for action in actions if not action.option_strings]
    yield f"`{' '.join([line, *words, '[options]'])}`"
    yield (parser.description or "").replace("\n", " ").rstrip(".") + "."
    yield _markdown(("argument", "meaning"), [row for action in actions for row in _arguments(action)])


def _shown(action: argparse.Action) -> str:
    name = str(action.metavar or ("|".join(action.choices) if action.choices else action.dest))
    many = {"*": f"[{name} ...]", "+": f"{name} ...", "?": f"[{name}]"}
    return many.get(str(action.nargs), name)


def _arguments(action: argparse.Action) -> Iterator[tuple[str, str]]:
    name = ", ".join(action.option_strings) or _shown(action)
    if action.option_strings and action.nargs != 0:
        name += (
            f" {action.metavar or ('{' + ','.join(action.choices) + '}' if action.choices else action.dest.upper())}"
        )
    first, *lines = (action.help or "").split("\n")
    yield f"`{name}`", first
    for line in lines:
        # words and their meanings in columns
        word, _, meaning = line.partition("  ")
        yield f"`{word}`", meaning.strip()


def _exits() -> str:
    rows = [(str(int(code)), meaning) for code, meaning in EXITS.items()]
    return _markdown(("code", "meaning"), [*rows, ("128 + N", "stopped by signal N; a checkpoint was saved")])


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [[_escaped(cell) for cell in row] for row in (head, *rows)]
    lines.insert(1, ["---" for _ in head])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(cell: str) -> str:
    """Text that Markdown shows as it is, but for its code."""
    cell = cell.replace("|", "\\|")
    return "".join(
        part if part.startswith("`") else part.replace("<", "&lt;").replace("*", "\\*")
        for part in re.split(r"(`[^`]*`)", cell)
    )


if __name__ == "__main__":
    write_atomically(PAGE, render().encode())
