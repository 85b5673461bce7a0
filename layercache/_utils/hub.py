"""Files of folders and of repositories on the Hugging Face Hub: read by name, written as one commit.

huggingface_hub, which diffusers needs, is imported on first use. Whatever it raises becomes a `HubError`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from layercache._utils.text import shown
from layercache._version import __version__
from layercache.errors import HubError, LayerCacheError

SUFFIXES = (".json", ".safetensors", ".md")
"""What is read and written: none of these runs code."""

ATTEMPTS = 3
"""Commits that are tried where somebody else commits at the same moment."""

_CONFLICT = 412  # what the Hub answers to a commit whose parent is not the newest any more
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")

Read = Callable[[str], bytes | None]


@dataclass(frozen=True)
class Source:
    """A folder, or a repository on the Hub, that files are read from.

    Attributes:
        place: the folder, or ``"org/name"``. A folder that is there is taken for one.
        revision: branch, tag or commit; ``None``: the main branch.
        token: of the Hub; ``None``: that of the login, where there is one; ``False``: none.
        cache_dir: where downloads are kept; ``None``: the cache of huggingface_hub.
        local_files_only: ask the cache alone.
    """

    place: str
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False

    @property
    def is_folder(self) -> bool:
        return Path(self.place).is_dir()

    def check(self) -> None:
        """Raises `HubError` where the place is neither a folder that is there nor a name of the Hub."""
        path = Path(self.place).expanduser()
        if self.is_folder:
            return
        if path.is_file():
            raise HubError(f"{shown(self.place)} is a file; read it with .load({str(self.place)!r})")
        if not REPOSITORY.fullmatch(self.place) or self.place.startswith("."):
            raise HubError(
                f"{shown(self.place)} is no folder that is there, and no name of a repository such as 'org/name'"
            )

    def fetch(self, name: str) -> Path:
        """Where the file lies now.

        Raises:
            HubError: it does not exist, or cannot be had.
        """
        found = self.find(name)
        if found is None:
            where = f" at revision {shown(self.revision)}" if self.revision else ""
            raise HubError(f"{shown(self.place)} has no file {shown(name)}{where}")
        return found

    def find(self, name: str) -> Path | None:
        """As `fetch`; ``None`` where there is no such file."""
        self.check()
        checked = checked_name(name)
        if self.is_folder:
            path = Path(self.place, checked)
            _check_inside(path, Path(self.place))
            return path if path.is_file() else None
        return self._download(checked)

    def _download(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        options: dict[str, Any] = {"revision": self.revision, "cache_dir": self.cache_dir}
        with failures(self.place, self.revision):
            try:
                return Path(
                    hf_hub_download(
                        self.place,
                        name,
                        token=self.token,
                        local_files_only=self.local_files_only,
                        library_name="layercache",
                        library_version=__version__,
                        **options,
                    )
                )
            except LocalEntryNotFoundError as error:
                known = try_to_load_from_cache(self.place, name, **options)
                if known is not None and not isinstance(known, str):
                    return None  # it was looked for before, and was not there
                if self.local_files_only:
                    raise HubError(
                        f"{shown(name)} of {shown(self.place)} is not in the cache of the Hub; leave out "
                        "local_files_only to download it"
                    ) from error
                raise
            except EntryNotFoundError:
                return None

    def names(self) -> list[str]:
        """Files of these `SUFFIXES`, by their names within; of a folder those at most one folder further down."""
        self.check()
        if self.is_folder:
            folder = Path(self.place)
            found = [*folder.glob("*"), *folder.glob("*/*")]
            return sorted(path.relative_to(folder).as_posix() for path in found if path.suffix in SUFFIXES)
        if self.local_files_only:
            return []
        with failures(self.place, self.revision):
            files = _api(self.token).model_info(self.place, revision=self.revision).siblings or ()
        return sorted(file.rfilename for file in files if file.rfilename.endswith(SUFFIXES))


def checked_name(name: str | os.PathLike[str]) -> str:
    """The name of a file within a folder or repository, with ``/`` between folders.

    Raises:
        HubError: it leads outside, or is of no kind that is read.
    """
    text = os.fspath(name)
    path = PurePosixPath(text)
    inside = text and "\\" not in text and "\0" not in text and not path.is_absolute() and ":" not in path.parts[0]
    if not inside or ".." in path.parts:
        raise HubError(f"{shown(text) or 'an empty name'} does not name a file inside the repository")
    if path.suffix not in SUFFIXES:
        raise HubError(f"{shown(text)} does not end in {', '.join(SUFFIXES[:-1])}; nothing else is read or written")
    return path.as_posix()


def _check_inside(path: Path, folder: Path) -> None:
    """Refuses links that lead outside; those within the cache of the Hub lead to its own blobs."""
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(one) for one in homes):
        raise HubError(f"{shown(path)} is a link that leads outside of {shown(folder)}")


def write_target(folder: Path, name: str) -> Path:
    """Where a file of this name is written in a folder.

    Raises:
        HubError: as for `checked_name`, and where a link leads outside.
    """
    path = folder / checked_name(name)
    _check_inside(path, folder)
    return path


def push(
    repo_id: str,
    merge: Callable[[Read], Mapping[str, bytes]],
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str,
) -> str:
    """Makes a repository of models where there is none, and changes files of it in one commit.

    Args:
        repo_id: ``"org/name"``.
        merge: gets a function that reads a file of the newest commit (``None`` where there is none), gives the files
            to write; called again where somebody else committed in between.
        private: of a repository that is made; ``None``: as the account's settings say.
        revision: branch; made where there is none.
        create_pr: propose the commit instead of making it.
        token: as `Source.token`.
        commit_message: first line of the commit.

    Returns:
        The address of the commit, or of the proposal.

    Raises:
        HubError: the Hub cannot be reached, or refuses it.
    """
    with failures(repo_id, revision):
        api = _api(token)
        if not REPOSITORY.fullmatch(repo_id):
            raise HubError(f"{shown(repo_id)} is no name of a repository, such as 'org/name'")
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        for attempt in range(ATTEMPTS):
            try:
                return _commit(api, repo_id, merge, revision, create_pr, commit_message)
            except Exception as error:
                if _status(error) != _CONFLICT or attempt == ATTEMPTS - 1:
                    raise
    raise AssertionError("unreachable")


def _commit(
    api: Any,
    repo_id: str,
    merge: Callable[[Read], Mapping[str, bytes]],
    revision: str | None,
    create_pr: bool,
    message: str,
) -> str:
    from huggingface_hub import CommitOperationAdd

    parent = api.model_info(repo_id, revision=revision).sha
    source = Source(repo_id, revision=parent, token=api.token)

    def read(name: str) -> bytes | None:
        found = source.find(name)
        return None if found is None else found.read_bytes()

    operations = [
        CommitOperationAdd(path_in_repo=checked_name(name), path_or_fileobj=content)
        for name, content in merge(read).items()
    ]
    done = api.create_commit(
        repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr, parent_commit=parent
    )
    return str(done.pr_url or done.commit_url)


def _api(token: str | bool | None) -> Any:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="layercache", library_version=__version__)


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


@contextmanager
def failures(place: str, revision: str | None) -> Iterator[None]:
    """Context whose failures, of whatever library, become a `HubError` that says what to do."""
    try:
        yield
    except LayerCacheError:
        raise
    except Exception as error:
        raise HubError(_sentence(error, shown(place), shown(revision or "main"))) from error


def _sentence(error: Exception, place: str, revision: str) -> str:
    from huggingface_hub import errors

    lines = str(error).strip().splitlines()
    reason = shown(lines[0]) if lines else type(error).__name__
    status = _status(error)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{place} is gated: ask for access on its page, then log in with 'hf auth login' or give token= of an "
            "account that has it"
        )
    if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
        return f"the Hub asks who you are before it lets you at {place}: log in with 'hf auth login', or give token="
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "token=True stands for that of 'hf auth login', and nobody has logged in here"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no repository {place} on the Hub, or it is private: look at the name, log in with "
            "'hf auth login', or give token="
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{place} has no branch, tag or commit {revision}; leave revision out for the main branch"
    if isinstance(error, errors.HFValidationError):
        return f"{place} is no name of a repository, such as 'org/name'"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{place} cannot be reached: the Hub is switched off by HF_HUB_OFFLINE"
    if status == 403:
        return f"the Hub refuses {place} ({reason}): the token must be allowed to write there, or give create_pr=True"
    if status == _CONFLICT:
        return f"{place} was changed by others at the same moment, {ATTEMPTS} times; try again"
    if isinstance(error, errors.LocalEntryNotFoundError) or (status is None and _is_of_network(error)):
        return (
            f"the Hub cannot be reached for {place}, and its cache does not hold the file: are you offline, or is "
            "HF_HUB_OFFLINE set?"
        )
    return f"the Hub did not do it for {place}: {reason}"


def _is_of_network(error: BaseException | None) -> bool:
    """Whether a connection failed: an error of the library that huggingface_hub speaks HTTP with, or of the system."""
    while error is not None:
        modules = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
        if modules & {"httpx", "httpx2", "httpcore", "requests"} or isinstance(error, (ConnectionError, TimeoutError)):
            return True
        error = error.__cause__
    return False
