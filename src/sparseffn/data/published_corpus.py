"""Corpora that others publish as files: found in the user's folder or the cache, downloaded on request alone.

    CACHE/corpora/NAME/text/       plain files, and `origin.json`, with what they came from
    CACHE/corpora/NAME/local-KEY/  the same, from an archive in the user's folder
    CACHE/corpora/NAME/accepted    digests that the user accepts in place of unverified ones

A `text` folder is unpacked under a hidden name, checked and renamed, so that it is whole or is not there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import final

import msgspec

from sparseffn.data.archives import MAX_MEMBER_BYTES, unpack
from sparseffn.data.download import (
    DownloadError,
    OnProgress,
    PublishedFile,
    RemoteFile,
    check_file,
    fetch,
    hashed,
    parse_digest,
    remove_downloads,
)
from sparseffn.data.registry import CorpusEntry
from sparseffn.data.splits import ANOTHER_CACHE, Piece, Place, Source, SourceFile, Split
from sparseffn.errors import UserError
from sparseffn.storage import digest_of, lock, read, remove_unfinished, write_folder, write_json, write_text

# The pieces of every split, from the plain files by name.
Cut = Callable[[Mapping[str, SourceFile]], dict[Split, list[Piece]]]
# Files that are the corpus together, each from one of its addresses.
Route = Sequence[RemoteFile]

ORIGIN = "origin.json"


@final
class _Unpacked(msgspec.Struct, frozen=True, kw_only=True):
    """`origin.json`: digests of what the plain files came from, and their own."""

    origin: dict[str, str] = msgspec.field(name="from")
    files: dict[str, str]


def _locked(folder: Path) -> AbstractContextManager[bool]:
    """Hold a corpus's folder against other processes; the second waits."""
    return lock(folder / ".lock", fix=ANOTHER_CACHE)


def one_file_a_split(names: Mapping[Split, str]) -> Cut:
    return lambda files: {split: [Piece.whole(files[name])] for split, name in names.items()}


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedCorpus(CorpusEntry):
    """A corpus of a few plain files, and the ways to get them."""

    # The plain files.
    files: tuple[PublishedFile, ...]
    # Ways to get all of them, tried in order.
    routes: tuple[Route, ...]
    # Which bytes are which split.
    cut: Cut
    # The split in words, for every result.
    split_rule: str = "the corpus's own"
    # The most that one member of an archive may unpack to.
    max_bytes: int = MAX_MEMBER_BYTES

    @property
    def remotes(self) -> list[RemoteFile]:
        """The files of all routes."""
        return [remote for route in self.routes for remote in route]

    @property
    def addresses(self) -> list[str]:
        return [url for remote in self.remotes for url in remote.urls]

    @property
    def verified(self) -> bool:
        """Whether every plain file's digest was compared with a copy here."""
        return all(file.verified for file in self.files)

    @property
    def contents(self) -> str:
        """What the user may put somewhere, in words."""
        archives = [remote.file.name for remote in self.remotes if remote.members]
        kind = "file" if len(self.files) == 1 else "files"
        plain = ", ".join(file.name for file in self.files)
        return f"{' or '.join(archives)}{', or ' if archives else ''}the plain {kind} {plain}"

    def find(self, place: Place) -> Source:
        text = self._text(place)
        if place.data_dir is not None:
            text = self._find_in(place.data_dir, place)
        elif text.is_dir():
            self._check_origin(text)
        else:
            raise UserError(
                f"corpus {self.name!r} must have a `data_dir` with {self.contents}, or be prepared once; got nothing; "
                f"fix: `sparseffn data prepare --corpus {self.name}`, or pass --data-dir PATH"
            )
        files = {file.name: SourceFile.at((text / file.name).resolve(), file.name) for file in self.files}
        return Source(corpus=self.name, pieces=self.cut(files), info={"split_rule": self.split_rule})

    def state(self, place: Place) -> str:
        return "prepared" if self._text(place).is_dir() else "no"

    def prepare(
        self,
        place: Place,
        *,
        offline: bool = False,
        accept: Iterable[str] = (),
        on_progress: OnProgress | None = None,
    ) -> Source:
        """The text in the cache: from the user's folder, or downloaded.

        Args:
            place: where to look and to keep it.
            offline: download nothing.
            accept: digests that the user accepts in place of unverified ones; they are remembered.
            on_progress: called as bytes arrive.

        Raises:
            UserError: no mirror gives it, it is not what is published, the disk is full, or it may not be downloaded.
        """
        folder = place.corpus_dir(self.name)
        if digests := {parse_digest(text) for text in accept}:
            with _locked(folder):
                write_text(folder / "accepted", "".join(f"{digest}\n" for digest in sorted(self._accepted(place) | digests)))
        found = None if place.data_dir is None else self._find_in(place.data_dir, place)
        with _locked(folder):
            # Another process may have prepared it meanwhile.
            if found is not None:
                self._keep(found, place)
            elif not self._text(place).is_dir():
                self._download(place, offline=offline, on_progress=on_progress)
        return self.find(Place(cache_dir=place.cache_dir))

    def _text(self, place: Place) -> Path:
        return place.corpus_dir(self.name) / "text"

    def _accepted(self, place: Place) -> set[str]:
        path = place.corpus_dir(self.name) / "accepted"
        return set(path.read_text().split()) if path.exists() else set()

    def _keep(self, found: Path, place: Place) -> None:
        """Put the user's text where it is found without the user's folder. The lock is held."""
        text = self._text(place)
        if not text.is_dir():
            if found.parent == text.parent:
                found.rename(text)
            else:
                self._unpack([(RemoteFile(file=file, urls=()), found / file.name) for file in self.files], text, place)
        elif any(hashed(found / file.name) != hashed(text / file.name) for file in self.files):
            raise UserError(
                f"corpus {self.name!r} must be prepared from one text; got another one in {str(place.data_dir)!r} than the "
                f"cache has; fix: delete {text} to prepare this one"
            )

    def _download(self, place: Place, *, offline: bool, on_progress: OnProgress | None) -> None:
        folder, accepted = place.corpus_dir(self.name), self._accepted(place)
        failures: list[str] = []
        for route in self.routes:
            if offline and not all((folder / remote.file.name).exists() for remote in route):
                continue
            try:
                got = [(remote, fetch(remote, folder, accepted=accepted, on_progress=on_progress)) for remote in route]
            except DownloadError as error:
                failures.append(str(error))
                continue
            self._unpack(got, self._text(place), place)
            for remote in self.remotes:
                remove_downloads(remote, folder)
            return
        if offline:
            raise UserError(
                f"corpus {self.name!r} must be here already with --offline; got nothing in {str(folder)!r}; "
                f"fix: pass a folder with {self.contents} as --data-dir, or leave out --offline"
            )
        raise DownloadError(" | ".join(failures))

    def _unpack(self, route: Iterable[tuple[RemoteFile, Path]], text: Path, place: Place) -> None:
        """Plain files of a whole route, checked, as the folder `text`. The lock is held."""
        # Whoever holds the lock is alone.
        remove_unfinished(text.parent)
        accepted = self._accepted(place)
        with write_folder(text, fix=ANOTHER_CACHE) as folder:
            origin: dict[str, str] = {}
            for remote, path in route:
                origin[path.name] = hashed(path)
                if remote.members:
                    unpack(path, remote.members, folder, max_bytes=self.max_bytes)
                else:
                    shutil.copyfile(path, folder / remote.file.name)
            # What is in an accepted archive is accepted too.
            if accepted.isdisjoint(origin.values()):
                self._check(folder, accepted)
            files = {file.name: hashed(folder / file.name) for file in self.files}
            write_json(folder / ORIGIN, _Unpacked(origin=origin, files=files))

    def _check(self, folder: Path, accepted: set[str]) -> None:
        for file in self.files:
            check_file(folder / file.name, file, accepted)

    def _find_in(self, data_dir: Path, place: Place) -> Path:
        """The folder with the plain files, unpacked into the cache where the user has the archive."""
        if not data_dir.exists():
            raise UserError(
                f"corpus {self.name!r} must have a `data_dir` with {self.contents}; got {str(data_dir)!r}, which does not "
                f"exist; fix: pass the --data-dir that has it"
            )
        names = [file.name for file in self.files]
        for folder in self._folders(data_dir):
            if all((folder / name).is_file() for name in names):
                self._check(folder, self._accepted(place))
                return folder
        for remote in (route[0] for route in self.routes if len(route) == 1 and route[0].members):
            path = data_dir if data_dir.is_file() else data_dir / remote.file.name
            if path.is_file():
                return self._unpacked(remote, path, place)
        missing = [name for name in names if not (data_dir / name).is_file()]
        raise UserError(
            f"corpus {self.name!r} must have {self.contents} in `data_dir`; got {str(data_dir)!r} without "
            f"{', '.join(missing)}; fix: put them there, or pass the --data-dir that has them"
        )

    def _folders(self, data_dir: Path) -> list[Path]:
        """Where plain files may lie: the folder, those that the archives have inside, and around a single file."""
        if data_dir.is_file():
            return [data_dir.parent] if [file.name for file in self.files] == [data_dir.name] else []
        inside = sorted({Path(path).parent for remote in self.remotes for path in remote.members})
        return [data_dir, *(data_dir / folder for folder in inside), *(data_dir / folder.name for folder in inside)]

    def _unpacked(self, remote: RemoteFile, archive: Path, place: Place) -> Path:
        """The cache's folder of an archive of the user's."""
        found = SourceFile.at(archive.resolve(), archive.name)
        key = digest_of(str(found.path), str(found.size), str(found.mtime_ns), str(found.ctime_ns))
        folder = place.corpus_dir(self.name)
        text = folder / f"local-{key}"
        with _locked(folder):
            if not text.is_dir():
                check_file(archive, remote.file, self._accepted(place))
                self._unpack([(remote, archive)], text, place)
        self._check_origin(text)
        return text

    def _check_origin(self, text: Path) -> None:
        """Check that the plain files are still those that were unpacked."""
        fix = f"delete {text} and prepare it again"
        files = read(text / ORIGIN, _Unpacked, fix=fix).files if (text / ORIGIN).exists() else {ORIGIN: ""}
        changed = [name for name, digest in files.items() if not (text / name).is_file() or hashed(text / name) != digest]
        if changed:
            raise UserError(
                f"the cache must hold the text of {self.name!r} as it was unpacked in {str(text)!r}; "
                f"got another {', '.join(changed)}; fix: {fix}"
            )
