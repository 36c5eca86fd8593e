"""What jsonargparse says of mistakes, and what becomes of it."""

from typing import Any, Literal

import pytest
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable

from lit_edm.edm import DiffusionLoss
from lit_edm.sdxl import Adapter
from lit_edm.wording import one_line


def said(kind: Any, *arguments: str) -> str:
    """What becomes of the error that arguments of this kind of value meet."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--x", type=kind)
    with pytest.raises(ArgumentError) as error:
        parser.parse_args(arguments)
    return one_line(str(error.value))


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (int, "four", "x: expected int, got four"),
        (int | None, "1.5", "x: expected int, got 1.5"),
        (int | float | None, "fast", "x: expected int or float, got fast"),
        (int | bool, "maybe", "x: expected int or bool, got maybe"),
        (list[float] | None, "[1, two]", "x: expected float, got two"),
        (dict[str, int] | None, "TOK", "x: expected dict, got TOK"),
        (Literal["stop", "skip"], "no", "x: expected one of stop, skip, got no"),
        (Literal[16, 32] | Literal["bf16", "fp16"] | None, "fp8", "x: expected one of 16, 32, bf16, fp16, got fp8"),
    ],
)
def test_values(kind: Any, value: str, message: str) -> None:
    assert said(kind, f"--x={value}") == message


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (Adapter | None, "Lora", "x: no Adapter is called Lora; did you mean LoRA?"),
        (Adapter | None, "lokr", "x: no Adapter is called lokr; did you mean LoKr?"),
        (Adapter | None, "EDMLoss", "x: no Adapter is called EDMLoss; write its full import path, such as"),
        (list[Callback] | Callback | None, "FreezeEmb", "x: no Callback is called FreezeEmb; did you mean FreezeEmbed"),
        (OptimizerCallable | None, "Adamw_", "x: no Optimizer is called Adamw_; did you mean AdamW?"),
    ],
)
def test_classes(kind: Any, name: str, message: str) -> None:
    assert said(kind, f"--x={name}").startswith(message)


def test_class_of_an_argument_that_has_to_be_given() -> None:
    """Of which jsonargparse does not say what is wanted."""
    message = "x.init_args.noise: no NoiseDistribution is called Lognorm; did you mean LogNormal?"
    assert said(DiffusionLoss | None, "--x=EDMLoss", "--x.noise=Lognorm") == message


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Adapter, ["--x=LoRA", "--x.rnk=4"], "x: Option 'rnk' is not accepted; did you mean rank?"),
        (Adapter | None, ["--x=LoRA", "--x.nonsense=4"], "x: Option 'nonsense' is not accepted"),
        (OptimizerCallable | None, ["--x=AdamW", "--x.lrr=1"], "x: Option 'lrr' is not accepted; did you mean lr?"),
        (OptimizerCallable | None, ["--x=AdamW", "--x.lr=1e-4x"], "x.init_args.lr: expected float, got 1e-4x"),
    ],
)
def test_arguments_of_classes(kind: Any, arguments: list[str], message: str) -> None:
    assert said(kind, *arguments) == message


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        ("Subcommand 'fit' does not accept option 'trainer.max_step'", "; did you mean trainer.max_steps?"),
        ("Subcommand 'fit' does not accept option 'modle.class_path'", "; did you mean model?"),
        ("unrecognized arguments: --mdel=3", "; did you mean model?"),
        ("unrecognized arguments: --optimizer.lr=3", ""),
        ("unrecognized arguments: --trainer.nonsense.a=1", ""),
        ("argument subcommand: invalid choice: 'fitt'", ""),
        ("Option 'x' is not accepted", ""),
    ],
)
def test_messages_without_structure(message: str, hint: str) -> None:
    assert one_line(message) == message + hint


def test_what_is_not_understood_stays() -> None:
    assert one_line("") == ""
    assert one_line('Parser key "x":\n  Something new') == "x: Something new"
    assert one_line("Parser key \"x\" element 2:\n  Expected a <class 'int'>. Got value: y") == (
        "x (element 2): expected int, got y"
    )
