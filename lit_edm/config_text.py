"""Whether a config file can be read, before jsonargparse reads it without saying which one it was, and where."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from lit_edm.errors import InputError


def check_config(path: Path) -> None:
    """Checks that a file is YAML, a mapping without a key that is there twice, of which all but the last were lost.

    Raises:
        InputError: It is something else; names the file and the line.
    """
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        for mapping in mappings_of(root):
            check_keys(mapping, path)
        if not isinstance(root, yaml.MappingNode):
            raise InputError(f"{path}: holds no keys; write some, such as model, data and trainer")
        loader.construct_document(root)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: save it as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f", line {mark.line + 1}"
        raise InputError(f"{path}{line}: not YAML ({error.problem}): correct it") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({getattr(error, 'reason', error)}): correct it") from error


def mappings_of(root: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    """Yields all mappings of a file, once each, though an alias may have them in several places."""
    seen, todo = set[int](), [root]
    while todo:
        node = todo.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield node
            todo += [value for _, value in node.value]
        else:
            todo += node.value


def check_keys(mapping: yaml.MappingNode, path: Path) -> None:
    """Raises InputError if a key is there twice."""
    lines: dict[str, int] = {}
    for key, _ in mapping.value:
        line = key.start_mark.line + 1
        if str(key.value) in lines:
            raise InputError(f"{path}, line {line}: {key.value} is in line {lines[key.value]} too: keep one of them")
        lines[str(key.value)] = line
