"""What is wrong with a config in one line, in a user's terms, in place of jsonargparse's account of all it tried."""

import difflib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, get_type_hints

from lightning.pytorch import Trainer

KEYS = (
    *("config", "seed_everything", "model", "data", "trainer", "ckpt_path", "weights_only"),
    *(f"trainer.{name}" for name in inspect.signature(Trainer).parameters),
)
"""Of the config, above those of its classes."""
BOILERPLATE = re.compile(
    "Does not validate|Errors:|Given value type|Problem with given|Expected a <class 'NoneType'>|Expected a path"
)
NAMESPACE = re.compile(r"\. Got value: Namespace.*")


@dataclass
class Account:
    """What jsonargparse's nested account of all it tried says of the innermost thing that is wrong.

    Args:
        keys: Keys of the config on the way to it.
        owner: Import path of the class that the last key is an argument of.
        types: What may be there, as Python writes it.
        causes: What is wrong by each of these types.
        value: What is there.
    """

    keys: list[str]
    owner: str = ""
    types: str = ""
    causes: tuple[str, ...] = ()
    value: str = ""


def one_line(message: str) -> str:
    """Reduces an error of jsonargparse to the innermost cause, the key it stands under, and the nearest right name."""
    account = read_account(message)
    if not account.causes:
        return message
    where, what = ".init_args.".join(account.keys), cause_of(account)
    return f"{where}: {what}" if where else what


def read_account(message: str) -> Account:
    """Reads an account up to the end of its innermost part."""
    account = Account([])
    for line in (line.strip().removeprefix("- ") for line in message.splitlines()):
        if line.startswith("Given value:"):
            account.value = NAMESPACE.sub("", line.removeprefix("Given value:")).strip()
        if account.causes and re.match("Given value:|Problem with|Not a valid", line):
            break
        if match := re.search(r'Parser key "([^"]+)"( element \d+)?:\s*(.*)', line):
            account.keys.append(match[1] + (f" ({match[2].strip()})" if match[2] else ""))
            account.types, line = "", match[3]
        if match := re.search(r"(?:Problem with given class_path |class_path=)'([\w.]+)'", line):
            account.owner = match[1]
        if line.startswith("Subtypes:"):
            account.types = line
        elif line and not BOILERPLATE.match(line):
            account.causes = (*account.causes, line)
    return account


def cause_of(account: Account) -> str:
    """Returns what is wrong."""
    cause = re.sub(r"^Type typing\.Callable.* callable class: ", "", NAMESPACE.sub("", account.causes[0]))
    if match := re.search(r"(?:unrecognized arguments: --|does not accept option ')([\w.]+)", cause):
        return f"{cause}{hint(match[1], KEYS, 0.8) or hint(match[1].partition('.')[0], KEYS, 0.8)}"
    if match := re.search(r"Option '([^']+)' is not accepted$", cause):
        return f"{cause}{hint(match[1], arguments(account.owner))}"
    choices = choices_of(account.types or cause)
    names = (re.match(r"Expected a dot import path string: (.+)", text) for text in account.causes)
    if (name := next(filter(None, names), None)) and not choices:
        return no_class(name[1], account)
    if match := re.match(r"Expected a (?:<class '(\w+)'>|typing\.Literal.*?)(?:\. Got value: (.*))?$", cause):
        return f"expected {choices or match[1]}, got {match[2] or account.value}"
    if match := re.match(r"Not a valid subclass of (\w+)", cause):
        return f"expected a class of {match[1]}'s, its name as class_path and its settings as init_args"
    return cause


def choices_of(types: str) -> str:
    """Returns what a value may be where that is numbers, or some words; nothing if classes are what is wanted."""
    words = [word.strip("' ") for found in re.findall(r"Literal\[([^\]]*)\]", types) for word in found.split(",")]
    numbers = re.findall(r"<class '(int|float)'>", types)
    if not numbers and not words:
        return ""
    plain = dict.fromkeys([*numbers, *re.findall("<class '(bool)'>", types), *words])
    return f"{'one of ' if words else ''}{', '.join(plain) if words else ' or '.join(plain)}"


def no_class(name: str, account: Account) -> str:
    """Says that no class has a name, and which one may have been meant."""
    bases = bases_of(account.types or hints_of(account.owner).get(account.keys[-1], ""))
    known = {kind.__name__ for base in bases for kind in kinds_of(base)}
    near = hint(name, known) or "; write its full import path, such as my_package.MyClass"
    return f"no {bases[0].__name__ if bases else 'class'} is called {name}{near}"


def bases_of(types: str) -> list[type]:
    """Returns the classes that types name, but for Python's own."""
    named = (found(path) for path in re.findall(r"[\w.]+\.\w+", types))
    return [kind for kind in named if isinstance(kind, type) and root(kind) not in sys.stdlib_module_names]


def kinds_of(base: type) -> Iterator[type]:
    """Yields the classes that can stand where a base is wanted: of this package, and of the one that the base is of."""
    if not inspect.isabstract(base) and not base.__name__.startswith("_"):
        yield base
    for kind in base.__subclasses__():
        if root(kind) in ("lit_edm", root(base)):
            yield from kinds_of(kind)


def found(path: str) -> Any:
    """Returns what has an import path, or None."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None)
    except (ImportError, ValueError):
        return None


def root(kind: type) -> str:
    """Returns the name of the package that a class is of."""
    return kind.__module__.partition(".")[0]


def arguments(owner: str) -> Iterable[str]:
    """Returns the arguments of a class, given its import path."""
    kind = found(owner)
    return inspect.signature(kind).parameters if callable(kind) else ()


def hints_of(owner: str) -> dict[str, str]:
    """Returns the types of a class's arguments, as Python writes them, given its import path."""
    kind = found(owner)
    return {} if kind is None else {name: str(hint) for name, hint in get_type_hints(kind.__init__).items()}


def hint(name: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """Returns a question for the name that may have been meant, with a semicolon before it; nothing if none is near."""
    by_letters = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), by_letters, n=1, cutoff=likeness)
    return f"; did you mean {by_letters[near[0]]}?" if near and by_letters[near[0]] != name else ""
