"""A repository on the Hugging Face Hub that files are sent to."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from lit_edm.errors import InputError

CHECKPOINTS = "step_*/*"
"""The folders of checkpoints within a folder of files, which stay at home."""


@dataclass(frozen=True)
class HubRepository:
    """A model repository of the Hub. Its client finds the token where `hf auth login` or HF_TOKEN has put it.

    Args:
        name: Such as someone/my_style; without an owner it is the user's own.
        private: Whether nobody else sees it, should it have to be made.
        key: What messages call the setting that names it.

    Raises:
        InputError: The Hub takes no such name.
    """

    name: str
    private: bool = True
    key: str = "SaveAdapter.push_to_hub"

    def __post_init__(self) -> None:
        if not is_repository(self.name):
            raise InputError(
                f"{self.key} is '{self.name}', which no repository can be called; write owner/name, with letters, "
                "digits, hyphens, underscores and dots"
            )

    def full_name(self) -> str:
        """Asks the Hub who the user is; returns the name with its owner.

        Raises:
            InputError: The Hub cannot be asked or knows no user by the token, or the owner is someone else.
        """
        from huggingface_hub import HfApi

        try:
            user = HfApi().whoami()
        except Exception as error:  # of a dozen classes: no token, a wrong one, no network, offline on purpose
            raise InputError(
                f"{self.key} is {self.name}, but the Hub does not know you ({first_sentence(error)}): "
                "run `hf auth login`, set HF_TOKEN, or leave it out and upload the files later"
            ) from error
        owner, _, name = self.name.rpartition("/")
        owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", ()))]
        if owner and owner not in owners:
            raise InputError(f"{self.key} is {self.name}, but you are {user['name']}; write {user['name']}/{name}")
        return f"{owner or user['name']}/{name}"

    def upload(self, folder: Path) -> str:
        """Sends the files of a folder, without those of checkpoints; returns the repository's address."""
        from huggingface_hub import HfApi

        api = HfApi()
        url = api.create_repo(self.name, private=self.private, exist_ok=True)
        api.upload_folder(
            repo_id=self.name,
            folder_path=folder,
            ignore_patterns=[CHECKPOINTS],
            commit_message="Upload what lit_edm trained",
        )
        return str(url)

    def upload_command(self, folder: Path) -> str:
        """Returns the command line that does the same by hand."""
        private = ["--private"] if self.private else []
        return shlex.join(["hf", "upload", self.name, str(folder), ".", "--exclude", CHECKPOINTS, *private])


def first_sentence(error: Exception) -> str:
    """Returns what an error says first, or else its name."""
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".") or type(error).__name__


def is_repository(name: str) -> bool:
    """Tells whether a repository on the Hub can have a name, with or without its owner."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_hub_name(name: str) -> bool:
    """Tells whether a base's name is one on the Hub, and not a folder's."""
    return name.count("/") == 1 and is_repository(name) and not Path(name).exists()
