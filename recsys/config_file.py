"""Configuration files as a tree that remembers where each value came from: extends, overlays, --set, environment variables.

YAML is read by the 1.2 core rules: `no`, `on` and `2022-05-04` are strings (a country code stays a country code) and
`1e-3` is a number. The trap in merging: a mapping whose `type` changes is replaced whole, because the old type's keys
would be faults of the new one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from recsys.config_faults import Fault, Origin, explain, nearest, shown_setting

Schema = TypeVar("Schema", bound=BaseModel)
BASE = Path(__file__).parent.parent / "configs" / "base.yaml"
"""The base file that comes with the code: `extends: base.yaml` finds it, and its neighbours, from anywhere."""
ENVIRONMENT = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
"""`${NAME}` or `${NAME:-default}` inside a string: for secrets, which do not belong into a file under version control."""


@dataclass(frozen=True)
class Node:
    """A value and where it stands. `value` is a dict of nodes, a list of nodes, or a scalar."""

    value: Any
    origin: Origin

    def plain(self) -> Any:
        """The tree as dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def at(self, path: Sequence[str | int]) -> Origin:
        """Where the value of this path was written; for a key that nobody wrote, the nearest section above it."""
        node = self
        for part in path:
            if isinstance(node.value, dict) and str(part) in node.value:
                node = node.value[str(part)]
            elif isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
            else:
                break
        return node.origin

    def leaves(self, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Origin]]:
        """Every dotted path with a scalar or list, and where it was written."""
        if isinstance(self.value, dict) and self.value:
            for key, child in self.value.items():
                yield from child.leaves((*path, key))
        else:
            yield ".".join(path), self.origin


def merge(base: Node, top: Node) -> Node:
    """`top` over `base`: mappings merge by key, anything else replaces; so does a mapping of another `type`."""
    if not (isinstance(base.value, dict) and isinstance(top.value, dict)):
        return top
    old, new = base.value.get("type"), top.value.get("type")
    if old is not None and new is not None and old.value != new.value:
        return top
    merged = dict(base.value)
    for key, child in top.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Node(merged, base.origin if top.origin.line is None else top.origin)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the name and place PyYAML looks for


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    # No leading zeros: 007 is an id.
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf|\.Inf)$|^\.(?:nan|NaN)$",
        "-+0123456789.",
    ),
    ("merge", r"^<<$", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


@dataclass
class Reader:
    """Reads files into one tree; collects faults instead of stopping at the first. `readable`: every file could be parsed."""

    faults: list[Fault] = field(default_factory=list)
    readable: bool = True

    def read(self, files: Sequence[Path], settings: Sequence[str] = (), defaults: str = "") -> Node:
        """Merge the files in order, each after what it extends, then `path=value` settings. A file counts once: its first place.

        `defaults` is the text of the shipped base file; it lies under all others, whether they extend it or not.
        """
        layers: dict[Path, Node] = {}
        if defaults:
            layers[BASE.resolve()] = self.parse_text(defaults, BASE.name) or Node({}, Origin(BASE.name))
        for file in files:
            self._layers(Path(file), layers, chain=(), origin=None)
        tree = Node({}, Origin("defaults"))
        for layer in layers.values():
            tree = merge(tree, layer)
        for setting in settings:
            overlay = self._setting(setting, tree)
            tree = merge(tree, overlay) if overlay is not None else tree
        return tree

    def expanded(self, node: Node, path: tuple[str, ...] = ()) -> Node:
        """The tree with `${NAME}` and `${NAME:-default}` filled in from the environment; an unset name is a fault."""
        if isinstance(node.value, dict):
            return Node({key: self.expanded(child, (*path, key)) for key, child in node.value.items()}, node.origin)
        if isinstance(node.value, list):
            return Node([self.expanded(child, (*path, str(i))) for i, child in enumerate(node.value)], node.origin)
        if not isinstance(node.value, str):
            return node

        def value_of(match: re.Match[str]) -> str:
            name, default = match.groups()
            found: str | None = os.environ[name] if name in os.environ else default  # noqa: SIM401 - get() hides None from mypy
            if found is None:
                self.faults.append(Fault(node.origin, ".".join(path), f"needs the environment variable {name}, which is not set"))
            return found or ""

        return Node(ENVIRONMENT.sub(value_of, node.value), node.origin)

    def _layers(self, file: Path, layers: dict[Path, Node], chain: tuple[Path, ...], origin: Origin | None) -> None:
        key = file.resolve()
        if key in chain:
            circle = " -> ".join(p.name for p in (*chain[chain.index(key) :], key))
            self._fatal(Fault(origin or Origin(str(file)), "extends", f"goes in a circle: {circle}. Remove one of these lines."))
            return
        if key in layers:
            return
        node = self._parse(file, origin)
        if node is None:
            return
        parent = node.value.pop("extends", None)
        if parent is not None and not isinstance(parent.value, str):
            self.faults.append(Fault(parent.origin, "extends", "must be the path of one file, relative to this one", value=parent.plain()))
        elif parent is not None:
            beside, shipped = file.parent / parent.value, BASE.parent / Path(parent.value).name
            known = shipped.exists() or shipped.resolve() in layers
            self._layers(beside if beside.exists() or not known else shipped, layers, (*chain, key), parent.origin)
        layers[key] = node

    def _parse(self, file: Path, origin: Origin | None) -> Node | None:
        try:
            text = file.read_text("utf-8")
        except FileNotFoundError:
            near = nearest(file.name, [p.name for p in file.parent.glob("*.yaml")]) if file.parent.is_dir() else None
            hint = f" Did you mean '{file.parent / near}'?" if near else ""
            self._fatal(Fault(origin or Origin(str(file)), "", f"there is no file '{file}'.{hint}"))
            return None
        except (OSError, UnicodeDecodeError) as error:
            self._fatal(Fault(Origin(str(file)), "", f"cannot be read as UTF-8 text: {error}"))
            return None
        return self.parse_text(text, str(file))

    def parse_text(self, text: str, file: str) -> Node | None:
        """One document of YAML; None (and a fault with its line) where it is not one mapping."""
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            node = Node({}, Origin(file, 1)) if root is None else self._node(root, loader, file, set())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self._fatal(Fault(Origin(file, mark.line + 1 if mark else None), "", f"is not valid YAML: {error.problem or error.context}"))
            return None
        except yaml.YAMLError as error:
            self._fatal(Fault(Origin(file), "", f"is not valid YAML: {error}"))
            return None
        finally:
            loader.dispose()
        if not isinstance(node.value, dict):
            self._fatal(Fault(node.origin, "", "must hold keys and values, such as `name: mine`", value=node.plain()))
            return None
        return node

    def _node(self, node: yaml.Node, loader: _Loader, file: str, above: set[int], key_line: int | None = None) -> Node:
        origin = Origin(file, (node.start_mark.line if key_line is None else key_line) + 1)
        if id(node) in above:
            raise yaml.MarkedYAMLError(problem="an alias that contains itself", problem_mark=node.start_mark)
        above = above | {id(node)}
        if not isinstance(node, yaml.ScalarNode) and node.tag not in {"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}:
            raise yaml.MarkedYAMLError(problem=f"the tag '{node.tag}' is not allowed here", problem_mark=node.start_mark)
        if isinstance(node, yaml.MappingNode):
            self._find_duplicates(node, file)
            loader.flatten_mapping(node)  # `<<: *anchor`
            pairs: dict[str, Node] = {}
            for key, value in node.value:
                pairs[_key(key, loader)] = self._node(value, loader, file, above, key.start_mark.line)
            return Node(pairs, origin)
        if isinstance(node, yaml.SequenceNode):
            return Node([self._node(child, loader, file, above) for child in node.value], origin)
        return Node(loader.construct_object(node), origin)

    def _find_duplicates(self, node: yaml.MappingNode, file: str) -> None:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if key.id != yaml.ScalarNode.id:  # `[a, b]: c`
                raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=key.start_mark)
            line = key.start_mark.line + 1
            if key.value in seen and key.value != "<<":
                first = seen[key.value]
                self.faults.append(Fault(Origin(file, line), key.value, f"is set twice in one section, first on line {first}. Remove one."))
            seen.setdefault(key.value, line)

    def _setting(self, setting: str, tree: Node) -> Node | None:
        """`a.b.c=value` as a tree; a number steps into a list, whose other entries stay."""
        origin = Origin(f"--set {shown_setting(setting)}")
        path, equals, text = setting.partition("=")
        parts = path.strip().split(".")
        if not equals or not all(parts):
            self._fatal(Fault(origin, "", "must read path=value, for example --set fine_rank.training.epochs=3"))
            return None
        parsed = self.parse_text(f"value: {text}" if text.strip() else "value:", origin.file)
        if parsed is None:
            return None
        value = Node(_relabel(parsed.value["value"], origin).value, origin)
        return self._nest(parts, value, tree, origin)

    def _nest(self, parts: list[str], value: Node, tree: Node | None, origin: Origin) -> Node:
        if not parts:
            return value
        head, rest = parts[0], parts[1:]
        held = tree.value if tree is not None else None
        if isinstance(held, list) and head.isdigit() and int(head) < len(held):
            items = list(held)
            items[int(head)] = merge(items[int(head)], self._nest(rest, value, items[int(head)], origin))
            return Node(items, origin)
        child = held.get(head) if isinstance(held, dict) else None
        return Node({head: self._nest(rest, value, child, origin)}, origin)

    def _fatal(self, fault: Fault) -> None:
        self.faults.append(fault)
        self.readable = False


@dataclass(frozen=True)
class Loaded(Generic[Schema]):
    """What a set of files says: a configuration, or what is wrong with it. `tree` knows where each value was written."""

    config: Schema | None
    faults: tuple[Fault, ...]
    tree: Node


def read_as(
    schema: type[Schema],
    files: Sequence[Path],
    settings: Sequence[str] = (),
    *,
    places: Mapping[str, str] | None = None,
    as_written: Sequence[str] = (),
    defaults: str = "",
) -> Loaded[Schema]:
    """Read files and settings as one configuration of this class; every fault of the files and of the values at once.

    `places`: a short name of a section -> the dotted path it stands for. `as_written`: sections whose owner fills in
    environment variables itself. `defaults`: the base file's text, under all files.
    """
    reader = Reader()
    tree = reader.read(files, settings, defaults)
    for short, path in (places or {}).items():
        tree = _placed(tree, short, path.split("."))
    if schema.model_config.get("extra") == "ignore":  # what it does not read cannot be at fault
        tree = Node({name: child for name, child in tree.value.items() if name in schema.model_fields}, tree.origin)
    kept = {name: tree.value[name] for name in as_written if name in tree.value}
    rest = Node({name: child for name, child in tree.value.items() if name not in kept}, tree.origin)
    tree = Node(reader.expanded(rest).value | kept, tree.origin)
    if not reader.readable:
        return Loaded(None, tuple(reader.faults), tree)
    data = tree.plain()
    try:
        config = schema.model_validate(data)
    except ValidationError as error:
        return Loaded(None, (*reader.faults, *explain(error, schema, data, tree.at)), tree)
    return Loaded(config if not reader.faults else None, tuple(reader.faults), tree)


def _placed(tree: Node, short: str, path: list[str]) -> Node:
    """Move the section written under its short name to its place, over what stands there."""
    if short not in tree.value:
        return tree
    moved = tree.value[short]
    for part in reversed(path):
        moved = Node({part: moved}, moved.origin)
    return merge(Node({key: child for key, child in tree.value.items() if key != short}, tree.origin), moved)


def _key(node: yaml.ScalarNode, loader: _Loader) -> str:
    """Keys are strings: `5: half` and `"5": half` are one key."""
    loader.construct_object(node)  # refuses a tag that is not plain YAML
    return str(node.value)


def _relabel(node: Node, origin: Origin) -> Node:
    if isinstance(node.value, dict):
        return Node({key: _relabel(child, origin) for key, child in node.value.items()}, origin)
    if isinstance(node.value, list):
        return Node([_relabel(child, origin) for child in node.value], origin)
    return Node(node.value, origin)
