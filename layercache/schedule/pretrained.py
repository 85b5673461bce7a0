"""`Pretrained`: files kept in folders and on the Hugging Face Hub, many of one model in one place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from layercache._utils import hub
from layercache._utils.files import write_atomically
from layercache._utils.formats import format_of
from layercache._utils.text import shown
from layercache.errors import FileFormatError, HubError
from layercache.schedule import card, index_file
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.index_file import Index


class Pretrained:
    """Mixin: `from_pretrained`, `save_pretrained` and `push_to_hub`, as models of diffusers have them.

    A folder, or a repository of models on the Hub, holds files of one model, an ``index.json`` that lists them, and a
    model card. Files are JSON and safetensors; none runs code.

    Attributes:
        KIND: format of the file.
    """

    KIND: ClassVar[str]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a file."""
        raise NotImplementedError

    def to_bytes(self) -> bytes:
        """What its file holds."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes its file, whole or not at all.

        Raises:
            OutputError: there is no way to.
        """
        return _write(Path(path), self.to_bytes())

    def _fingerprint(self) -> Fingerprint:
        raise NotImplementedError

    def _listed(self) -> tuple[float | None, Sequence[float | None]]:
        """For the index: share computed, and the expected PSNR in dB, its mean and its 10 % quantile."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | os.PathLike[str],
        *,
        filename: str | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
        budget: float | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Reads a file of a folder, or of a repository on the Hugging Face Hub.

        Args:
            repo_or_folder: a folder that `save_pretrained` wrote, or ``"org/name"``.
            filename: the file, by its name within. Without it the only one of this kind is taken, or the one that the
                three next arguments leave.
            num_steps, guidance: those it was made for.
            budget: of schedules: the most that may be computed, above 0 to 1; that of most compute is taken.
            revision: branch, tag or commit.
            token: of the Hub; by default that of ``hf auth login``, if there is one.
            cache_dir: where downloads are kept instead of the Hub's own cache.
            local_files_only: take what is in the cache, and ask no server.

        Raises:
            ArgumentError: a budget of a front or a profile.
            FileFormatError: the file, or the index, is damaged or of another kind.
            HubError: no such repository, revision or file; none or several that fit; or the Hub cannot be reached.
        """
        source = hub.Source(os.path.expanduser(repo_or_folder), revision, token, cache_dir, local_files_only)
        source.check()
        if filename is None:
            filename = _choose(source, cls.KIND, num_steps=num_steps, guidance=guidance, budget=budget)
        path = source.fetch(filename)
        try:
            return cls.load(path)
        except FileFormatError as error:
            if source.is_folder:
                raise
            raise FileFormatError(f"{shown(filename)} of {shown(source.place)}: {error}") from error

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        filename: str | None = None,
        base_model: str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> Path:
        """Writes its file into a folder, beside those that are there, with an index and a model card.

        Args:
            folder: made where it is missing.
            filename: within the folder; by default made of steps, guidance and share computed, such as
                ``schedules/50-steps-cfg4-b0.5.json``.
            base_model: the model it is for, as the Hub calls it, such as ``"Qwen/Qwen-Image"``.
            push_to_hub: also `push_to_hub`, to ``repo_id`` (by default the folder's name), with further ``options``.

        Returns:
            The file.

        Raises:
            ArgumentError: ``base_model`` is no name of the Hub.
            FileFormatError: the index or the card that is there is damaged.
            HubError: the name leads outside of the folder, or what `push_to_hub` raises.
            OutputError: the folder cannot be written.
        """
        place = Path(folder).expanduser()

        def read(name: str) -> bytes | None:
            path = hub.write_target(place, name)
            return path.read_bytes() if path.is_file() else None

        written = self._merged(read, filename, base_model, place.resolve().name)
        for name, content in written.items():
            _write(hub.write_target(place, name), content)
        if push_to_hub:
            self.push_to_hub(repo_id or place.resolve().name, filename=filename, base_model=base_model, **options)
        return place / next(iter(written))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        filename: str | None = None,
        base_model: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Writes its file into a repository of models on the Hugging Face Hub, which is made where there is none.

        File, index and model card are one commit. What others pushed stays in the index.

        Args:
            repo_id: ``"org/name"``.
            filename, base_model: as for `save_pretrained`.
            private: of a repository that is made.
            revision: branch, made where there is none.
            create_pr: propose it, where you may not write.
            token: of the Hub; by default that of ``hf auth login``.
            commit_message: by default it names the file.

        Returns:
            The address of the commit or of the proposal.

        Raises:
            ArgumentError: ``base_model`` is no name of the Hub.
            FileFormatError: the index or the card that is there is damaged.
            HubError: the Hub cannot be reached or refuses it, or the file name leads outside.
        """
        return hub.push(
            repo_id,
            lambda read: self._merged(read, filename, base_model, repo_id),
            private=private,
            revision=revision,
            create_pr=create_pr,
            token=token,
            commit_message=commit_message or f"Add a {self.KIND} of {self._fingerprint().num_steps} steps",
        )

    def _merged(self, read: hub.Read, filename: str | None, base_model: str | None, place: str) -> dict[str, bytes]:
        """Its file, the index with it and the card, by their names."""
        fingerprint = self._fingerprint()
        content = read(index_file.FILE)
        index = Index() if content is None else Index.from_json(content, f"{place}/{index_file.FILE}")
        used, psnr = self._listed()
        entry = index_file.named(index_file.entry_of(self.KIND, fingerprint, used, psnr), index, filename)
        index = index.with_entry(entry, base_model)
        before = read(card.FILE)
        text = card.card(None if before is None else _text(before, place), index, entry, fingerprint, place)
        return {
            entry.file: self.to_bytes(),
            index_file.FILE: index.to_json().encode(),
            card.FILE: text.encode(),
        }


def _choose(source: hub.Source, kind: str, **wanted: float | None) -> str:
    """The name of the file that is meant."""
    found = source.find(index_file.FILE)
    if found is not None:
        name = f"{index_file.FILE} of {source.place}"
        return index_file.chosen(Index.from_json(found.read_bytes(), name), kind, source.place, **wanted).file
    suffix = index_file.SUFFIX.get(kind, ".json")
    names = [name for name in source.names() if name.endswith(suffix)]
    if source.is_folder:
        names = [name for name in names if format_of(Path(source.place, name)) == kind]
    if len(names) == 1 and source.is_folder and not any(value is not None for value in wanted.values()):
        return names[0]
    listed = f"give filename=, one of {', '.join(map(shown, names))}" if names else "give filename="
    if not names and not source.local_files_only:
        raise HubError(f"{shown(source.place)} holds no {kind} file")
    raise HubError(f"{shown(source.place)} has no {index_file.FILE} that says what its files are; {listed}")


def _write(path: Path, content: bytes) -> Path:
    return write_atomically(path, lambda temporary: temporary.write_bytes(content))


def _text(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{card.FILE} in {shown(place)} is not UTF-8; mend or remove it") from error
