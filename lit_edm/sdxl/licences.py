"""Licences of trained weights, which follow from the base's."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Licence:
    """What a model card says of the licence.

    Args:
        identifier: Of the Hub's list: https://huggingface.co/docs/hub/repositories-licenses; other if it is not there.
        name: Short name of a licence that is not on the list.
        link: Address of its text.
    """

    identifier: str
    name: str | None = None
    link: str | None = None


OF_BASES = {
    "stabilityai/stable-diffusion-xl-base-1.0": Licence(
        "openrail++", link="https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md"
    ),
    "playgroundai/playground-v2.5-1024px-aesthetic": Licence(
        "other",
        "playground-v2dot5-community",
        "https://huggingface.co/playgroundai/playground-v2.5-1024px-aesthetic/blob/main/LICENSE.md",
    ),
}
"""The licences of the bases that this package is about. They bind what is made of these bases, too."""


def licence_of(base: str, given: str | None = None) -> Licence | None:
    """Returns the licence that is given, or else the base's; None if neither is known.

    Args:
        base: Name of the base on the Hub.
        given: Identifier of the Hub's list.
    """
    return OF_BASES.get(base) if given is None else Licence(given)
