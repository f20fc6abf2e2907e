"""Upload a model folder to the Hub: only the files missing there, then read them back.

    upload = HubUpload("org/name")
    upload.check_access()                     # fails for a wrong token, another's namespace, no network
    upload.check_weights(list_files(folder))  # no others may lie there
    upload.create(private=True, gated=None)
    commit = upload.send(upload.missing(list_files(folder)), "Add the model")
    upload.read_back(list_files(folder), commit)
    upload.tag("v1", commit)

The checks before an upload are in `publishing_checks`; the command is `hub_upload.py`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "model.onnx")
"""Files of a repository that a model may be loaded from."""


class PublishError(RuntimeError):
    """A problem that the publisher must solve; the message says how."""


@dataclass(frozen=True)
class PublishedFile:
    """One file to publish: its path, its name in the repository, its size [bytes] and its hashes."""

    path: Path
    name: str
    size: int
    sha256: str
    git_sha1: str

    @classmethod
    def read(cls, path: Path, name: str) -> PublishedFile:
        """Hash a file, as the Hub's large file storage and git do."""
        data = path.read_bytes()
        git_sha1 = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return cls(path, name, len(data), hashlib.sha256(data).hexdigest(), git_sha1)


def list_files(folder: Path) -> list[PublishedFile]:
    """Return all files of a folder, by name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [PublishedFile.read(path, path.relative_to(folder).as_posix()) for path in paths]


class HubUpload:
    """A repository on the Hub to upload a folder to.

    Args:
        repo: "org/name".
        token: Access token; by default that of `hf auth login` or HF_TOKEN.

    Raises:
        PublishError: By every method, with a remedy: no network, a refused token, a server error.
    """

    def __init__(self, repo: str, token: str | None = None):
        try:
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII):
                raise HFValidationError("it has no owner.")
            validate_repo_id(repo)
        except HFValidationError as error:
            raise PublishError(f"{repo!r} is not a name of a repository; give --repo org/name.") from error
        self.repo = repo
        self.token = token
        self.api = HfApi(token=token)

    def check_access(self) -> str:
        """Check that the token's owner may write to the repository's namespace, and return their name."""
        with self._explained():
            user = self.api.whoami()
        owner = self.repo.partition("/")[0]
        spaces = [user["name"], *(org["name"] for org in user.get("orgs", []))]
        if owner not in spaces:
            raise PublishError(
                f"{self.repo} belongs to {owner}, but the token is {user['name']}'s, who may write to "
                f"{', '.join(spaces)}; choose another --repo or token."
            )
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise PublishError("The token may only read; make one with write access on the Hub.")
        return user["name"]

    def missing(self, files: Sequence[PublishedFile]) -> list[PublishedFile]:
        """Return the files that the repository lacks or has with other content."""
        remote = self._remote_files()
        return [file for file in files if not _is_same(file, remote.get(file.name))]

    def check_weights(self, files: Sequence[PublishedFile]) -> None:
        """Refuse a repository that keeps weights that the files lack: they might be loaded instead."""
        others = self._remote_files().keys() - {file.name for file in files}
        if left := [name for pattern in WEIGHTS for name in sorted(fnmatch.filter(others, pattern))]:
            raise PublishError(
                f"{self.repo} has {', '.join(left)}, of another version; delete that there, or add a new one "
                "to the folder."
            )

    def check_tag(self, tag: str, is_complete: bool) -> None:
        """Refuse a tag that names another version already."""
        with self._explained():
            try:
                refs = self.api.list_repo_refs(self.repo)
                head = self.api.model_info(self.repo).sha
            except RepositoryNotFoundError:
                return
        commits = {ref.name: ref.target_commit for ref in refs.tags}
        if tag in commits and not (is_complete and commits[tag] == head):
            raise PublishError(
                f"{self.repo} has a tag {tag} already, of another version; choose another --tag."
            )

    def create(self, private: bool, gated: str | None) -> None:
        """Create the repository if there is none, and set who may access its files.

        Args:
            private: Whether only its members see it; an existing one must have this visibility already.
            gated: "auto" or "manual" to require users to agree to the terms; None to change nothing.
        """
        with self._explained():
            self.api.create_repo(self.repo, private=private, exist_ok=True)
            is_private = bool(self.api.model_info(self.repo).private)
            if is_private != private:
                state = "private" if is_private else "public"
                raise PublishError(
                    f"{self.repo} exists and is {state}; change that on the Hub, or the option."
                )
            if gated is not None:
                self.api.update_repo_settings(self.repo, gated=gated)  # type: ignore[arg-type]

    def send(self, files: Sequence[PublishedFile], message: str) -> str:
        """Upload files in one commit, and return the head commit of the repository."""
        with self._explained():
            head = self.api.model_info(self.repo).sha or "main"
            if not files:
                return head
            operations = [CommitOperationAdd(file.name, file.path) for file in files]
            return self.api.create_commit(
                self.repo, operations, commit_message=message, parent_commit=head
            ).oid

    def read_back(self, files: Sequence[PublishedFile], commit: str) -> None:
        """Download the files of a commit and compare their hashes."""
        with tempfile.TemporaryDirectory() as fresh, self._explained():
            snapshot_download(self.repo, revision=commit, local_dir=fresh, token=self.token)
            got = {
                file.name: PublishedFile.read(Path(fresh, file.name), file.name).sha256
                for file in files
                if Path(fresh, file.name).is_file()
            }
        if wrong := [file.name for file in files if got.get(file.name) != file.sha256]:
            raise PublishError(f"{self.repo} gives back other content for {wrong}; run the command again.")

    def tag(self, tag: str, commit: str) -> None:
        """Tag a commit."""
        with self._explained():
            self.api.create_tag(self.repo, tag=tag, revision=commit, exist_ok=True)

    def _remote_files(self) -> dict[str, Any]:
        """Return the entries of the repository's tree, by path; {} if there is no repository."""
        with self._explained():
            try:
                return {entry.path: entry for entry in self.api.list_repo_tree(self.repo, recursive=True)}
            except RepositoryNotFoundError:
                return {}

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn errors of the Hub's client into remedies for the publisher."""
        try:
            yield
        except PublishError:
            raise
        except Exception as error:
            raise PublishError(_explanation(error, self.repo, self.api.endpoint)) from error


def _explanation(error: BaseException, repo: str, endpoint: str) -> str:
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    if any(isinstance(link, LocalTokenNotFoundError) for link in chain):
        return "There is no token; run `hf auth login`, or set HF_TOKEN."
    answers = [link.response.status_code for link in chain if isinstance(link, HfHubHTTPError)]
    resume = "what has arrived will not be sent again."
    if not answers:
        return f"The Hub at {endpoint} cannot be reached ({error}). When it can, run this again; {resume}"
    reasons = {
        401: "The Hub refuses the token; run `hf auth login`, or correct HF_TOKEN.",
        403: f"The token may not write to {repo}; give it write access there.",
        404: f"The Hub knows no {repo}, or hides it from this token.",
        412: f"Somebody else has changed {repo} meanwhile; run this again.",
    }
    return reasons.get(
        answers[0], f"The Hub answered with status {answers[0]} ({error}); run this again later: {resume}"
    )


def _is_same(file: PublishedFile, entry: Any) -> bool:
    """Whether an entry of the repository's tree has the content of the file."""
    if entry is None:
        return False
    if getattr(entry, "lfs", None) is not None:
        return entry.lfs.sha256 == file.sha256
    return getattr(entry, "blob_id", None) == file.git_sha1
